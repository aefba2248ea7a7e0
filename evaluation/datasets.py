"""MeViS, Ref-YouTube-VOS, Ref-DAVIS17 and ReVOS in their official layouts, read as they are asked for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import read_json
from .masks import union_of


@dataclass(frozen=True)
class Expression:
    """What is asked about a video. split: "" or, in ReVOS, "referring" or "reasoning"; targets: ids of its masks."""

    id: str
    text: str
    split: str = ""
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReferredVideo:
    """A video of a data set: its frames' names, the folder they lie in, and what is asked about it."""

    name: str
    folder: Path
    frames: tuple[str, ...]
    expressions: tuple[Expression, ...] = field(repr=False)

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"{frame}.jpg" for frame in self.frames]


class ReferringDataset(ABC):
    """A split of a data set.

    Raises:
        FileNotFoundError: a file of the layout is missing; the message shows the whole of it.
    """

    name: str
    layout: str  # what the folder must look like, for the error
    has_truth = True
    submission_folder: str | None = None  # where the server's zip has the masks; None if it takes none

    def __init__(self, root: str | Path):
        self.root = Path(root)
        missing = [path for path in self.required if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"{self.name} is not whole in {self.root}: {missing[0]} is missing. Expected:\n{self.layout}"
            )

    @property
    @abstractmethod
    def required(self) -> list[Path]:
        """Files and folders that must be there."""

    @cached_property
    @abstractmethod
    def videos(self) -> list[ReferredVideo]: ...

    def truth(
        self, video: ReferredVideo, expression: Expression, frame_indices: Sequence[int] | None = None
    ) -> np.ndarray:
        """(T, height, width) bool masks of what `expression` means, all its objects in one; of some frames, or of all.

        Raises:
            ValueError: a mask has another size than the frames, or the expression names no object.
        """
        if not self.has_truth:
            raise NotImplementedError(f"The masks of {self.name} are not public: submit to its server.")
        if not expression.targets:
            raise ValueError(f"Expression {expression.id} of {video.name} ({expression.text!r}) names no object.")
        return self._truth(video, expression, frame_indices)

    @abstractmethod
    def _truth(
        self, video: ReferredVideo, expression: Expression, frame_indices: Sequence[int] | None
    ) -> np.ndarray: ...

    def _videos(self, metadata: Path, images: Path, skip: Sequence[str] = ()) -> list[ReferredVideo]:
        return [
            ReferredVideo(
                name=name,
                folder=images / name,
                frames=tuple(video["frames"]),
                expressions=tuple(self._expressions(video["expressions"])),
            )
            for name, video in read_json(metadata)["videos"].items()
            if name not in skip
        ]

    def _expressions(self, expressions: dict[str, dict[str, Any]]) -> list[Expression]:
        return [
            Expression(key, fields["exp"], targets=tuple(map(str, fields.get("anno_id", ()))))
            for key, fields in expressions.items()
        ]


class MeViS(ReferringDataset):
    """`train` and `valid_u` have masks; those of `valid` and `test` are the server's."""

    submission_folder = ""

    def __init__(self, root: str | Path, split: str):
        self.name = f"mevis-{split}"
        self.split = split
        self.has_truth = split in ("train", "valid_u")
        self.layout = f"  {split}/JPEGImages/<video>/<frame>.jpg\n  {split}/meta_expressions.json" + (
            f"\n  {split}/mask_dict.json" if self.has_truth else ""
        )
        super().__init__(root)

    @property
    def required(self) -> list[Path]:
        folder = self.root / self.split
        masks = [folder / "mask_dict.json"] if self.has_truth else []
        return [folder / "JPEGImages", self._metadata, *masks]

    @property
    def _metadata(self) -> Path:
        released = self.root / self.split / "meta_expressions_release.json"  # of the test split
        return released if released.exists() else self.root / self.split / "meta_expressions.json"

    @cached_property
    def videos(self) -> list[ReferredVideo]:
        return self._videos(self._metadata, self.root / self.split / "JPEGImages")

    @cached_property
    def _masks(self) -> dict[str, list[dict | None]]:
        return read_json(self.root / self.split / "mask_dict.json")

    def _truth(self, video: ReferredVideo, expression: Expression, frame_indices: Sequence[int] | None) -> np.ndarray:
        return _union(self._masks, video, expression, frame_indices)


class LabelledFrames(ReferringDataset):
    """A data set whose masks are palette images, one label an object: `<split>/Annotations/<video>/<frame>.png`."""

    split: str

    def label_maps(self, video: ReferredVideo, frame_indices: Sequence[int] | None = None) -> np.ndarray:
        """(T, height, width) uint8: 0 is background, object ids from 1."""
        folder = self.root / self.split / "Annotations" / video.name
        frames = video.frames if frame_indices is None else [video.frames[idx] for idx in frame_indices]
        labels = np.stack([np.asarray(Image.open(folder / f"{frame}.png")) for frame in frames])
        if labels.shape[1:] != frame_size(video):
            raise ValueError(f"Labels in {folder} are of size {labels.shape[1:]}, and the frames {frame_size(video)}.")
        return labels

    def _truth(self, video: ReferredVideo, expression: Expression, frame_indices: Sequence[int] | None) -> np.ndarray:
        return np.isin(self.label_maps(video, frame_indices), list(map(int, expression.targets)))


class RefYouTubeVOS(LabelledFrames):
    """`valid` are 202 videos: those that stand in the test expressions too are not part of it. `train` has masks."""

    def __init__(self, root: str | Path, split: str = "valid"):
        self.split = split
        self.has_truth = split == "train"
        self.name = "ref-youtube-vos" + ("-train" if self.has_truth else "")
        self.submission_folder = None if self.has_truth else "Annotations"
        self.layout = (
            f"  {split}/JPEGImages/<video>/<frame>.jpg\n  meta_expressions/{split}/meta_expressions.json\n"
            + (
                "  train/Annotations/<video>/<frame>.png"
                if self.has_truth
                else "  meta_expressions/test/meta_expressions.json"
            )
        )
        super().__init__(root)

    @property
    def required(self) -> list[Path]:
        folder = self.root / self.split
        last = folder / "Annotations" if self.has_truth else self._metadata("test")
        return [folder / "JPEGImages", self._metadata(self.split), last]

    def _metadata(self, split: str) -> Path:
        return self.root / "meta_expressions" / split / "meta_expressions.json"

    @cached_property
    def videos(self) -> list[ReferredVideo]:
        not_ours = [] if self.has_truth else list(read_json(self._metadata("test"))["videos"])
        return self._videos(self._metadata(self.split), self.root / self.split / "JPEGImages", skip=not_ours)

    def _expressions(self, expressions: dict[str, dict[str, Any]]) -> list[Expression]:
        return [
            Expression(key, fields["exp"], targets=(str(fields["obj_id"]),) if "obj_id" in fields else ())
            for key, fields in expressions.items()
        ]


class RefDAVIS17(LabelledFrames):
    """Validation. Every object has four expressions in a row, one of each annotator; masks are palette images."""

    name = "ref-davis17"
    split = "valid"
    layout = (
        "  valid/JPEGImages/<video>/<frame>.jpg\n"
        "  valid/Annotations/<video>/<frame>.png\n"
        "  meta_expressions/valid/meta_expressions.json"
    )
    num_annotators = 4

    @property
    def required(self) -> list[Path]:
        valid = self.root / "valid"
        return [valid / "JPEGImages", valid / "Annotations", self._metadata]

    @property
    def _metadata(self) -> Path:
        return self.root / "meta_expressions" / "valid" / "meta_expressions.json"

    @cached_property
    def videos(self) -> list[ReferredVideo]:
        return self._videos(self._metadata, self.root / "valid" / "JPEGImages")

    def _expressions(self, expressions: dict[str, dict[str, Any]]) -> list[Expression]:
        in_order = sorted(expressions, key=int)
        return [
            Expression(key, expressions[key]["exp"], targets=(str(number // self.num_annotators + 1),))
            for number, key in enumerate(in_order)
        ]


class ReVOS(ReferringDataset):
    """Referring (type 0) and reasoning (type 1) expressions; type 2 asks for what is not there."""

    splits = {0: "referring", 1: "reasoning"}

    def __init__(self, root: str | Path, split: str = "valid"):
        self.name = "revos" + ("-train" if split == "train" else "")
        self._metadata = f"meta_expressions_{split}_.json"
        names = [self._metadata, "mask_dict.json"] + (["mask_dict_foreground.json"] if split == "valid" else [])
        self._names = names
        self.layout = "\n".join(f"  {name}" for name in ("JPEGImages/<video>/<frame>.jpg", *names))
        super().__init__(root)

    @property
    def required(self) -> list[Path]:
        return [self.root / "JPEGImages", *(self.root / name for name in self._names)]

    @cached_property
    def videos(self) -> list[ReferredVideo]:
        videos = self._videos(self.root / self._metadata, self.root / "JPEGImages")
        return [video for video in videos if video.expressions]

    def _expressions(self, expressions: dict[str, dict[str, Any]]) -> list[Expression]:
        return [
            Expression(key, fields["exp"], self.splits[fields["type_id"]], tuple(map(str, fields["anno_id"])))
            for key, fields in expressions.items()
            if fields["type_id"] in self.splits
        ]

    @cached_property
    def _masks(self) -> dict[str, list[dict | None]]:
        return read_json(self.root / "mask_dict.json")

    @cached_property
    def _foreground(self) -> dict[str, dict[str, list]]:
        return read_json(self.root / "mask_dict_foreground.json")

    def _truth(self, video: ReferredVideo, expression: Expression, frame_indices: Sequence[int] | None) -> np.ndarray:
        return _union(self._masks, video, expression, frame_indices)

    def foreground(self, video: ReferredVideo) -> np.ndarray:
        """(T, height, width) bool masks of all objects of the video."""
        return union_of([self._foreground[video.name]["masks_rle"]], frame_size(video))


DATASETS = {
    "mevis-train": lambda root: MeViS(root, "train"),
    "mevis-valid_u": lambda root: MeViS(root, "valid_u"),
    "mevis-valid": lambda root: MeViS(root, "valid"),
    "mevis-test": lambda root: MeViS(root, "test"),
    "ref-youtube-vos-train": lambda root: RefYouTubeVOS(root, "train"),
    "ref-youtube-vos": RefYouTubeVOS,
    "ref-davis17": RefDAVIS17,
    "revos-train": lambda root: ReVOS(root, "train"),
    "revos": ReVOS,
}


def open_dataset(name: str, root: str | Path) -> ReferringDataset:
    """The data set `name`, a key of `DATASETS`, in the folder `root`."""
    if name not in DATASETS:
        raise ValueError(f"`dataset` must be one of {', '.join(DATASETS)}. Got {name!r}.")
    return DATASETS[name](root)


def frame_size(video: ReferredVideo) -> tuple[int, int]:
    """(height, width) of the first frame; its pixels are not read."""
    with Image.open(video.files[0]) as image:
        return image.size[::-1]


def _union(
    masks: dict[str, list[Any]], video: ReferredVideo, expression: Expression, frame_indices: Sequence[int] | None
) -> np.ndarray:
    """The masks of an expression's objects as one, from run-length codes by object."""
    objects = [masks[target] for target in expression.targets]
    if frame_indices is not None:
        objects = [[codes[idx] for idx in frame_indices] for codes in objects]
    try:
        return union_of(objects, frame_size(video))
    except ValueError as error:
        raise ValueError(f"The masks of {video.name}, expression {expression.id}, do not fit: {error}") from error
