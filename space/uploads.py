"""What a visitor may upload, checked before anything expensive is done with it."""

from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

from ..processing_sa2va_i import Video, is_image_file, load_image, open_video


@dataclass(frozen=True)
class Limits:
    """Of one upload. num_bytes: of the file; seconds, num_frames: of a video; num_pixels: of a frame or a photo."""

    num_bytes: int = 100_000_000
    seconds: float = 60
    num_frames: int = 600
    num_pixels: int = 4096 * 2304

    def __str__(self) -> str:
        return f"videos up to {self.seconds:.0f} s and {self.num_frames} frames, {self.num_bytes // 1_000_000} MB"


def open_upload(path: str | Path, limits: Limits) -> Video | Image.Image:
    """The photo or video at `path`.

    Raises:
        ValueError: it is neither, broken, or beyond `limits`; the message is for the visitor and names no path.
    """
    path = Path(path)
    num_bytes = path.stat().st_size
    if num_bytes > limits.num_bytes:
        raise ValueError(
            f"This file has {num_bytes / 1e6:.0f} MB; the limit here is {limits.num_bytes / 1e6:.0f} MB. "
            "Please cut or shrink it."
        )
    is_image = is_image_file(path)
    try:
        _check_image(path, limits) if is_image else _check_video(path, limits)
        return load_image(path) if is_image else open_video(path)
    except LimitError:
        raise
    except (ValueError, OSError, Image.DecompressionBombError, av.FFmpegError) as error:
        kind = "photo" if is_image else "video"
        raise ValueError(f"This file cannot be read as a {kind}; it may be broken, or be something else.") from error


class LimitError(ValueError):
    """An upload beyond the limits."""


def _check_image(path: Path, limits: Limits) -> None:
    with Image.open(path) as image:
        _check_size(*image.size, limits)


def _check_video(path: Path, limits: Limits) -> None:
    """From what the container says, without decoding it."""
    with av.open(str(path)) as container:
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:  # FFmpeg takes some texts for pictures of a terminal
            raise ValueError("no video stream that can be decoded")
        _check_size(stream.width, stream.height, limits)
        seconds = (container.duration or 0) / av.time_base
        num_frames = stream.frames or seconds * float(stream.average_rate or 25)
    if seconds > limits.seconds:
        raise LimitError(f"This video lasts {seconds:.0f} s; the limit here is {limits.seconds:.0f} s. Please cut it.")
    if num_frames > limits.num_frames:
        raise LimitError(
            f"This video has {num_frames:.0f} frames; the limit here is {limits.num_frames}. "
            "Please cut it, or lower its frame rate."
        )


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.num_pixels:
        raise LimitError(
            f"This is {width} x {height} pixels; the limit here is {limits.num_pixels / 1e6:.0f} megapixels. "
            "Please shrink it."
        )
