"""From predictions to scores, tables and pictures of the worst."""

import csv
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import read_json, write_json
from ..overlay import draw_overlay
from ..publish import read_paper
from .datasets import Expression, RefDAVIS17, ReferredVideo, ReferringDataset, ReVOS
from .metrics import j_and_f, robustness
from .runner import expressions_left, read_masks, read_probabilities

BACKGROUND = 0.1  # what a probability must beat to be an object in Ref-DAVIS17's label maps


@dataclass(frozen=True)
class Score:
    """J and F of one expression (mean over frames) or of one object; R in ReVOS alone."""

    video: str
    expression: str
    split: str
    j: float
    f: float
    r: float | None = None

    @property
    def jf(self) -> float:
        return (self.j + self.f) / 2


def score_run(dataset: ReferringDataset, folder: Path, num_workers: int = 1) -> dict[str, Any]:
    """Score a whole run; writes `scores.json`, `scores.csv` and `report.md` into its folder and returns the first.

    Ref-DAVIS17 is scored by both protocols found in the literature: `expressions`, each expression alone, plain mean;
    `davis-annotators`, the objects of each annotator in one label map, the mean of four annotators.

    Raises:
        ValueError: the run is not done.
    """
    check_done(dataset, folder)
    scores = _map(partial(_score_expressions, dataset, folder), dataset.videos, num_workers)
    result = {"expressions": summary(scores)}
    if isinstance(dataset, RefDAVIS17):
        annotators = _map(partial(_score_annotators, dataset, folder), dataset.videos, num_workers)
        result["davis-annotators"] = summary(annotators)
    run = read_json(folder / "run.json")
    content = {**run, "num_expressions": len(scores), "scores": result}
    write_json(folder / "scores.json", content)
    write_csv(folder / "scores.csv", scores)
    (folder / "report.md").write_text(report(content), encoding="utf-8")
    return content


def check_done(dataset: ReferringDataset, folder: Path) -> None:
    """Raise a ValueError that counts what is left of a run."""
    left = sum(len(expressions_left(folder, video)) for video in dataset.videos)
    total = sum(len(video.expressions) for video in dataset.videos)
    if left:
        raise ValueError(f"{left} of {total} expressions of {dataset.name} are left in {folder}: run it again first.")


def summary(scores: list[Score]) -> dict[str, float]:
    """Means in percent. With splits (ReVOS) also of each, and `overall` is the mean of theirs."""
    splits = sorted({score.split for score in scores})
    if splits == [""]:
        return _means(scores)
    by_split = {split: _means([score for score in scores if score.split == split]) for split in splits}
    overall = {name: fmean(means[name] for means in by_split.values()) for name in by_split[splits[0]]}
    flat = {f"{split} {name}": value for split, means in by_split.items() for name, value in means.items()}
    return {**flat, **{f"overall {name}": value for name, value in overall.items()}}


def report(content: dict[str, Any]) -> str:
    """A Markdown table of the run beside the number that the paper's authors give for this model and data set."""
    options = {name: value for name, value in content.items() if name not in ("scores", "num_expressions")}
    lines = [f"# {content['dataset']}", "", *(f"- {name}: {value}" for name, value in options.items()), ""]
    published = paper_score(content["model"], content["dataset"])
    for protocol, means in content["scores"].items():
        lines += [f"## {protocol}", "", "| | this run |", "|---|---|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in means.items()]
        lines.append("")
    if published is not None:
        name, source = Path(content["model"]).name, read_paper()["source"]
        lines += [f"The authors give J&F {published} for {name} ({source}, beside arXiv:2509.19082).", ""]
    return "\n".join(lines)


def paper_score(model: str, dataset: str) -> float | None:
    """J&F that the authors give, if they do, by the model's name."""
    wanted = Path(model).name.lower()
    for name, scores in read_paper()["J&F"].items():
        if name.lower() == wanted:
            return scores.get(dataset)
    return None


def write_csv(path: Path, scores: list[Score]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "expression", "split", "J", "F", "J&F"])
        for score in scores:
            values = (f"{value:.6f}" for value in (score.j, score.f, score.jf))
            writer.writerow([score.video, score.expression, score.split, *values])


def draw_worst(dataset: ReferringDataset, folder: Path, number: int) -> list[Path]:
    """Overlays of the expressions of lowest J&F, truth on the left and prediction on the right, in `worst/`.

    Three frames each: the first, the middle and the last.
    """
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["J&F"]))[:number]
    videos = {video.name: video for video in dataset.videos}
    out = folder / "worst"
    out.mkdir(exist_ok=True)
    pictures = []
    for rank, row in enumerate(rows, start=1):
        video = videos[row["video"]]
        expression = next(one for one in video.expressions if one.id == row["expression"])
        truth, prediction = dataset.truth(video, expression), read_masks(folder, video, expression)
        picture = _side_by_side(video, truth, prediction)
        path = out / f"{rank:03d}_{row['J&F'][:4]}_{video.name}_{expression.id}.png".replace("/", "-")
        picture.save(path)
        path.with_suffix(".txt").write_text(expression.text + "\n", encoding="utf-8")
        pictures.append(path)
    return pictures


def _means(scores: list[Score]) -> dict[str, float]:
    means = {name: 100 * fmean(getattr(score, field) for score in scores) for name, field in _FIELDS.items()}
    if scores[0].r is not None:
        means["R"] = 100 * fmean(score.r for score in scores)
    return means


_FIELDS = {"J": "j", "F": "f", "J&F": "jf"}


def _map(score: Callable[[ReferredVideo], list[Score]], videos: list[ReferredVideo], num_workers: int) -> list[Score]:
    """`score` of every video, in order, on several processes; each chunk of videos carries the data set once."""
    with tqdm(total=len(videos), unit="video", desc="score") as bar:
        if num_workers <= 1:
            return list(_flat(map(score, videos), bar))
        chunk = math.ceil(len(videos) / (8 * num_workers))
        with ProcessPoolExecutor(num_workers) as pool:
            return list(_flat(pool.map(score, videos, chunksize=chunk), bar))


def _flat(results: Iterator[list[Score]], bar: tqdm) -> Iterator[Score]:
    for scores in results:
        bar.update()
        yield from scores


def _score_expressions(dataset: ReferringDataset, folder: Path, video: ReferredVideo) -> list[Score]:
    foreground = dataset.foreground(video) if isinstance(dataset, ReVOS) else None
    return [_score_expression(dataset, folder, video, one, foreground) for one in video.expressions]


def _score_expression(
    dataset: ReferringDataset, folder: Path, video: ReferredVideo, expression: Expression, foreground: np.ndarray | None
) -> Score:
    truth, prediction = dataset.truth(video, expression), read_masks(folder, video, expression)
    return Score(
        video.name,
        expression.id,
        expression.split,
        *j_and_f(truth, prediction),
        None if foreground is None else float(robustness(truth, prediction, foreground).mean()),
    )


def _score_annotators(dataset: RefDAVIS17, folder: Path, video: ReferredVideo) -> list[Score]:
    """Of every object, by each annotator's label map."""
    truth = dataset.label_maps(video)
    scores = []
    for annotator in range(dataset.num_annotators):
        expressions = video.expressions[annotator :: dataset.num_annotators]
        labels = label_maps(np.stack([read_probabilities(folder, video, one) for one in expressions]))
        for label, expression in enumerate(expressions, start=1):
            of_object = truth == int(expression.targets[0])
            scores.append(Score(video.name, expression.id, "", *j_and_f(of_object, labels == label)))
    return scores


def label_maps(probabilities: np.ndarray) -> np.ndarray:
    """(T, height, width) labels of the most probable object, from 1, or 0 where none reaches a half.

    Args:
        probabilities: (K, T, height, width) of the objects of one annotator.
    """
    kept = np.where(probabilities < 0.5, 0, probabilities).astype(np.float32)
    background = np.full((1, *kept.shape[1:]), BACKGROUND, dtype=np.float32)
    return np.concatenate([background, kept]).argmax(axis=0)


def _side_by_side(video: ReferredVideo, truth: np.ndarray, prediction: np.ndarray) -> Image.Image:
    last = len(video.frames) - 1
    rows = []
    for frame_idx in sorted({0, last // 2, last}):
        with Image.open(video.files[frame_idx]) as image:
            frame = image.convert("RGB")
        rows.append(np.hstack([draw_overlay(frame, [masks[frame_idx]]) for masks in (truth, prediction)]))
    return Image.fromarray(np.vstack(rows))
