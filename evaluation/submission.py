"""Zips as the servers take them."""

import zipfile
from pathlib import Path

from .datasets import ReferringDataset
from .report import check_done
from .runner import prediction_folder


def write_submission(dataset: ReferringDataset, folder: Path) -> Path:
    """Zip the masks of a whole run as the data set's server takes them; returns the zip, in the run's folder.

    MeViS has the videos at the root, Ref-YouTube-VOS under `Annotations`; in both `<video>/<expression>/<frame>.png`.

    Raises:
        ValueError: the data set has no server, the run is not done, or a frame is missing.
    """
    if dataset.submission_folder is None:
        raise ValueError(f"{dataset.name} has no server to submit to: its masks are public, score the run.")
    check_done(dataset, folder)
    path = folder / f"{dataset.name}.zip"
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for file, name in submission_files(dataset, folder):
            if not file.is_file():
                raise ValueError(f"{file} is missing: remove its folder and run again.")
            archive.write(file, name)
    partial.replace(path)
    return path


def submission_files(dataset: ReferringDataset, folder: Path) -> list[tuple[Path, str]]:
    """(file of the run, name in the zip) of everything that the server expects."""
    prefix = f"{dataset.submission_folder}/" if dataset.submission_folder else ""
    return [
        (
            prediction_folder(folder, video, expression) / f"{frame}.png",
            f"{prefix}{video.name}/{expression.id}/{frame}.png",
        )
        for video in dataset.videos
        for expression in video.expressions
        for frame in video.frames
    ]
