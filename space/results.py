"""The files of one answer that a visitor can take away."""

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..overlay import VideoWriter, draw_overlay
from ..processing_sa2va_i import to_rle

MASKS, CODES = "masks.zip", "masks.json"


@dataclass(frozen=True)
class Files:
    """overlay: mp4 or, of a photo, png; masks: zip of `<object>/<frame>.png`, objects from 1; codes: COCO run-length
    codes as JSON, `{"objects": [[code of frame 0, ...], ...]}`."""

    overlay: Path
    masks: Path
    codes: Path


class ResultWriter:
    """Writes the files frame by frame; none of them is held. Use `writing`."""

    def __init__(self, folder: Path, num_objects: int, fps: float | None, stack: ExitStack):
        self._folder = folder
        self._codes: list[list[dict]] = [[] for _ in range(num_objects)]
        self._zip = stack.enter_context(zipfile.ZipFile(folder / MASKS, "w"))
        self._video = None if fps is None else stack.enter_context(VideoWriter(folder / overlay_name(fps), fps))

    def write(self, frame_idx: int, frame: Image.Image, masks: np.ndarray) -> None:
        overlay = draw_overlay(frame, masks)
        if self._video is None:
            overlay.save(self._folder / overlay_name(None))
        else:
            self._video.write(overlay)
        for number, mask in enumerate(masks):
            buffer = io.BytesIO()
            Image.fromarray(mask).save(buffer, "png")
            self._zip.writestr(f"{number + 1}/{frame_idx:05d}.png", buffer.getvalue())
            self._codes[number].append(to_rle(mask))

    def write_codes(self) -> None:
        (self._folder / CODES).write_text(json.dumps({"objects": self._codes}))


@contextmanager
def writing(folder: Path, num_objects: int, fps: float | None) -> Iterator[ResultWriter]:
    """A writer into `folder`; `fps` None for a photo."""
    with ExitStack() as stack:
        writer = ResultWriter(folder, num_objects, fps, stack)
        yield writer
        writer.write_codes()


def files_in(folder: Path, fps: float | None) -> Files:
    return Files(folder / overlay_name(fps), folder / MASKS, folder / CODES)


def overlay_name(fps: float | None) -> str:
    return "overlay.png" if fps is None else "overlay.mp4"
