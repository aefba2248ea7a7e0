"""From a data set to predictions on disk: a run that many processes share, that stops and resumes.

A run is a folder:

    run.json                                          model, data set, options; a resumed run must have the same
    predictions/<video>/<expression>/<frame>.png      masks, 0 and 255; with them answer.json
    predictions/<video>/<expression>/soft.npz         where the data set's protocol wants probabilities

An expression's folder appears whole or not at all: what is there is done.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import read_json, staged_folder, write_json
from ..modeling_sa2va_i import Sa2VAiModel, VideoSegmentations
from .datasets import Expression, RefDAVIS17, ReferredVideo, ReferringDataset, frame_size


@dataclass(frozen=True)
class RunOptions:
    """What decides a run's result; see `Sa2VAiConfig`. prompt_style: see `expression_prompt`."""

    sample_num_frames: int = 5
    max_prompt_frames: int | None = None
    decoding: str = "consistent"
    sampling: str = "uniform"
    prompt_style: str = "sa2va-i"
    max_new_tokens: int | None = None


def expression_prompt(expression: str, style: str = "sa2va-i") -> str:
    """The request for an expression: the same for all, as in Sa2VA-i's code; "sa2va" asks a question as it stands."""
    text = expression.strip().rstrip(".")
    if style == "sa2va" and text.endswith("?"):
        return f"<image>\n{text} Please respond with segmentation mask."
    return f"<image>\nPlease segment {text}."


def prepare_run(folder: Path, model: str, dataset: ReferringDataset, options: RunOptions) -> None:
    """Make the run's folder, or check that the one there is of the same run.

    Raises:
        ValueError: it is of another run; the message names what differs.
    """
    wanted = {"model": model, "dataset": dataset.name, **asdict(options)}
    record = folder / "run.json"
    if record.exists():
        there = read_json(record)
        changed = [name for name in wanted if there.get(name) != wanted[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{folder} holds a run with {name} = {there.get(name)!r}, and this one has {wanted[name]!r}: "
                "choose another folder."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".run.json"
    write_json(partial, wanted)
    partial.replace(record)


def predict(
    dataset: ReferringDataset,
    model: Sa2VAiModel,
    folder: Path,
    options: RunOptions,
    max_objects: int | None = None,
    process: int = 0,
    num_processes: int = 1,
) -> None:
    """Predict what is not there yet, this process's share of it.

    Args:
        max_objects: how many objects are propagated as one batch.
        process, num_processes: which share; the longest videos are dealt out first.
    """
    by_work = sorted(dataset.videos, key=lambda video: -len(video.frames) * len(video.expressions))
    share = by_work[process::num_processes]
    left = [(video, expressions_left(folder, video)) for video in share]
    total = sum(len(expressions) for _, expressions in left)
    with tqdm(total=total, unit="expression", desc=dataset.name, disable=total == 0) as bar:
        for video, expressions in left:
            if expressions:
                predict_video(dataset, model, folder, video, expressions, options, max_objects)
                bar.update(len(expressions))


def predict_video(
    dataset: ReferringDataset,
    model: Sa2VAiModel,
    folder: Path,
    video: ReferredVideo,
    expressions: list[Expression],
    options: RunOptions,
    max_objects: int | None,
) -> None:
    """Predict some expressions of a video together: it is decoded and encoded once for all."""
    is_soft = isinstance(dataset, RefDAVIS17)
    segmentations = model.segment_each(
        video.files,
        [expression_prompt(expression.text, options.prompt_style) for expression in expressions],
        sample_num_frames=options.sample_num_frames,
        max_prompt_frames=options.max_prompt_frames,
        decoding=options.decoding,
        sampling=options.sampling,
        max_new_tokens=options.max_new_tokens,
        max_objects=max_objects,
        probabilities=is_soft,
    )
    with ExitStack() as stack:
        writers = [
            stack.enter_context(_ExpressionWriter(prediction_folder(folder, video, expression), video, is_soft))
            for expression in expressions
        ]
        for frame_idx, masks in with_empty_frames(segmentations, frame_size(video)):
            for writer, mask in zip(writers, masks, strict=True):
                writer.write(frame_idx, mask)
        for writer, prediction in zip(writers, segmentations.predictions, strict=True):
            writer.finish({"prediction": prediction, "sample_idx": segmentations.sample_idx})


def with_empty_frames(
    segmentations: VideoSegmentations, size: tuple[int, int]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(frame_idx, one (height, width) mask per expression): the first `[SEG]`'s, empty where there is none.

    One mask an expression, as in the original's evaluation.
    """
    empty = np.zeros(size, dtype=np.float32)
    if not any(segmentations.num_objects):
        for frame_idx in range(segmentations.num_frames):
            yield frame_idx, [empty] * len(segmentations.num_objects)
    for frame_idx, masks in segmentations:
        yield frame_idx, [of_expression[0] if len(of_expression) else empty for of_expression in masks]


def prediction_folder(folder: Path, video: ReferredVideo, expression: Expression) -> Path:
    return folder / "predictions" / video.name / expression.id


def expressions_left(folder: Path, video: ReferredVideo) -> list[Expression]:
    """The expressions of a video that the run has no result for."""
    return [expression for expression in video.expressions if not prediction_folder(folder, video, expression).exists()]


def read_masks(folder: Path, video: ReferredVideo, expression: Expression) -> np.ndarray:
    """(T, height, width) bool masks that the run predicted."""
    files = [prediction_folder(folder, video, expression) / f"{frame}.png" for frame in video.frames]
    return np.stack([np.asarray(Image.open(file)) > 0 for file in files])


def read_probabilities(folder: Path, video: ReferredVideo, expression: Expression) -> np.ndarray:
    """(T, height, width) float16 probabilities, 0 where below a half."""
    with np.load(prediction_folder(folder, video, expression) / "soft.npz") as content:
        return content["probabilities"]


class _ExpressionWriter:
    """Writes one expression's result into a staged folder."""

    def __init__(self, folder: Path, video: ReferredVideo, is_soft: bool):
        self._stage = staged_folder(folder)
        self._video = video
        self._soft: list[np.ndarray] | None = [] if is_soft else None

    def __enter__(self) -> "_ExpressionWriter":
        self._folder = self._stage.__enter__()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._stage.__exit__(*error)

    def write(self, frame_idx: int, mask: np.ndarray) -> None:
        Image.fromarray((mask > 0.5).astype(np.uint8) * 255).save(self._folder / f"{self._video.frames[frame_idx]}.png")
        if self._soft is not None:
            self._soft.append(np.where(mask > 0.5, mask, 0).astype(np.float16))

    def finish(self, answer: dict[str, Any]) -> None:
        if self._soft is not None:
            np.savez_compressed(self._folder / "soft.npz", probabilities=np.stack(self._soft))
        write_json(self._folder / "answer.json", answer)
