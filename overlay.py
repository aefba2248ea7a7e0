"""Masks drawn on frames, for people to look at; and the video files they go into."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from PIL import Image, ImageFilter

# Okabe and Ito's colours without black: apart for every kind of colour vision, on dark and on light frames.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
FILL_OPACITY = 0.45
SHADOW = np.array((0, 0, 0))  # around the outline, so that it stands out from a background of its own colour


def object_color(object_idx: int) -> tuple[int, int, int]:
    """RGB colour of an object, 0..255; the palette repeats after seven."""
    return PALETTE[object_idx % len(PALETTE)]


def draw_overlay(frame: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """`frame` with every object filled and outlined in its colour, later objects on top.

    Args:
        frame: RGB.
        masks: (K, height, width) bool, of the frame's size.
    """
    pixels = np.array(frame, dtype=np.float32)
    width = max(2, round(min(frame.size) / 250))
    for object_idx, mask in enumerate(masks):
        color = np.array(object_color(object_idx), dtype=np.float32)
        pixels[mask] += FILL_OPACITY * (color - pixels[mask])
        grown, core = _grow(mask, width), ~_grow(~mask, width)
        pixels[grown & ~mask] = SHADOW
        pixels[mask & ~core] = color
    return Image.fromarray(pixels.round().astype(np.uint8))


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


class VideoWriter:
    """An H.264 file that every player and browser opens, written frame by frame.

        with VideoWriter("overlay.mp4", fps=25) as writer:
            writer.write(image)

    H.264 has even sides only; an odd one is grown by a copy of the last row or column.
    """

    def __init__(self, path: str | Path, fps: float):
        # the index in front, so that browsers play it before all of it has come
        self._container = av.open(str(path), mode="w", options={"movflags": "+faststart"})
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "18"}
        self._size: tuple[int, int] | None = None

    def write(self, image: Image.Image) -> None:
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._size is None:
            self._size = pixels.shape[:2]
            self._stream.height, self._stream.width = self._size
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._size is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
