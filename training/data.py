"""Training samples from referring videos and images, conversations and synthetic scenes.

A sample is a conversation about a few frames of a video, or about an image, with a mask for every `[SEG]` in its
answers. Everything drawn at random follows from the seed and the sample's index, so a resumed run sees what an
uninterrupted one would.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from torch.utils.data import Dataset
from transformers.utils import logging

from ..evaluation.datasets import ReferringDataset, frame_size
from ..evaluation.masks import decode
from ..files import read_json
from ..processing_sa2va_i import IMAGE_TOKEN, SEG, load_image
from .frames import FRAME_RULES
from .synthetic import HELD_OUT, STILL, Scene, SyntheticExpression
from .wording import DESCRIPTION_QUESTIONS, answer, named_answer, question, turns_with_image

logger = logging.get_logger(__name__)

MAX_SKIPS = 100  # bad samples in a row after which something else is wrong


class SampleError(ValueError):
    """A sample that cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class Sample:
    """id: what it is made of, for messages; turns: (question, answer) pairs, `<image>` in the first question.

    frames: RGB, of one size, in order; a single one, `is_image`, is an image.
    masks: (K, F, height, width) bool, one for each `[SEG]` in the answers, in order.
    """

    id: str
    frames: list[Image.Image]
    turns: list[tuple[str, str]]
    masks: np.ndarray
    is_image: bool = False


class Source(ABC):
    """Where samples come from."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def id_of(self, index: int) -> str:
        """What a message calls sample `index`."""

    @abstractmethod
    def sample(self, index: int, random: np.random.Generator) -> Sample:
        """Raises a ValueError or an OSError where the data are bad."""


@dataclass(frozen=True)
class Draw:
    """How a sample is drawn: frames of a video by a key of `FRAME_RULES`, and objects, each with a turn of its own."""

    num_frames: int = 8
    sampling: str = "uniform"
    num_objects: int = 5

    def frame_indices(self, random: np.random.Generator, num_frames: int) -> list[int]:
        return FRAME_RULES[self.sampling](random, num_frames, self.num_frames)

    def objects(self, random: np.random.Generator, number: int) -> list[int]:
        """Indices of objects out of `number`; drawn with replacement where there are fewer than wanted."""
        return random.choice(number, self.num_objects, replace=number < self.num_objects).tolist()


class ReferringVideos(Source):
    """MeViS, Ref-YouTube-VOS, ReVOS, or synthetic videos on disk: a sample is a video and some of its expressions."""

    def __init__(self, dataset: ReferringDataset, draw: Draw):
        if not dataset.has_truth:
            raise ValueError(f"The masks of {dataset.name} are not public; train on another split.")
        self._dataset, self._draw = dataset, draw
        self._videos = [video for video in dataset.videos if video.expressions]

    def __len__(self) -> int:
        return len(self._videos)

    def id_of(self, index: int) -> str:
        return f"{self._dataset.name}/{self._videos[index].name}"

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        video = self._videos[index]
        frame_indices = self._draw.frame_indices(random, len(video.frames))
        expressions = [video.expressions[number] for number in self._draw.objects(random, len(video.expressions))]
        turns = [(question(random, expression.text), answer(random)) for expression in expressions]
        frames = [load_image(video.files[idx]) for idx in frame_indices]
        height, width = frame_size(video)
        if any(frame.size != (width, height) for frame in frames):
            raise ValueError(f"its frames differ in size: {sorted({frame.size for frame in frames})} (width, height).")
        masks = np.stack([self._dataset.truth(video, expression, frame_indices) for expression in expressions])
        return Sample(self.id_of(index), frames, turns_with_image(random, turns), masks)


class ReferringImages(Source):
    """RefCOCO, RefCOCO+ and RefCOCOg: a sample is an image and some of its referred objects.

    Args:
        root: folder with `instances.json` and `refs(<split_by>).json`: the official files, the pickled `.p` written
            again as JSON, for a pickle may run code.
        images: folder of COCO's `train2014` images.
        split: of the references, `train`.
    """

    def __init__(self, root: str | Path, images: str | Path, split_by: str, draw: Draw, split: str = "train"):
        self._images, self._draw = Path(images), draw
        root = Path(root)
        refs = root / f"refs({split_by}).json"
        if not refs.is_file():
            raise FileNotFoundError(
                f'{refs} is missing. If you trust the official {refs.stem}.p, make it once: python -c "import json, '
                f"pickle; json.dump(pickle.load(open('{refs.stem}.p', 'rb')), open('{refs.name}', 'w'))\""
            )
        instances = read_json(root / "instances.json")
        self._annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
        self._files = {image["id"]: image["file_name"] for image in instances["images"]}
        by_image: dict[int, list[dict[str, Any]]] = {}
        for reference in read_json(refs):
            if reference["split"] == split:
                by_image.setdefault(reference["image_id"], []).append(reference)
        self._name, self._by_image = root.name, list(by_image.items())

    def __len__(self) -> int:
        return len(self._by_image)

    def id_of(self, index: int) -> str:
        return f"{self._name}/{self._files[self._by_image[index][0]]}"

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        image_id, references = self._by_image[index]
        image = load_image(self._images / self._files[image_id])
        turns, masks = [], []
        for number in self._draw.objects(random, len(references)):
            reference = references[number]
            sentence = reference["sentences"][int(random.integers(len(reference["sentences"])))]["sent"]
            turns.append((question(random, sentence, is_image=True), answer(random)))
            masks.append(_polygon_mask(self._annotations[reference["ann_id"]]["segmentation"], image.size[::-1]))
        return Sample(
            self.id_of(index), [image], turns_with_image(random, turns), np.stack(masks)[:, None], is_image=True
        )


class Conversations(Source):
    """LLaVA's layout: a JSON list of `{"id", "image", "conversations": [{"from", "value"}, ...]}`; no masks."""

    def __init__(self, file: str | Path, images: str | Path):
        self._images = Path(images)
        self._name = Path(file).stem
        self._items = [item for item in read_json(Path(file)) if "image" in item]

    def __len__(self) -> int:
        return len(self._items)

    def id_of(self, index: int) -> str:
        return f"{self._name}/{self._items[index].get('id', index)}"

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        item = self._items[index]
        image = load_image(self._images / item["image"])
        texts = [turn["value"] for turn in item["conversations"]]
        speakers = [turn["from"] for turn in item["conversations"]]
        if speakers != ["human", "gpt"] * (len(speakers) // 2) or not speakers:
            raise ValueError(f"human and gpt must take turns, the human first. Got {speakers}.")
        turns = [
            (question.replace(IMAGE_TOKEN, "").strip(), said)
            for question, said in zip(texts[::2], texts[1::2], strict=True)
        ]
        masks = np.zeros((0, 1, *image.size[::-1]), dtype=bool)
        return Sample(self.id_of(index), [image], turns_with_image(random, turns), masks, is_image=True)


class SyntheticScenes(Source):
    """Scenes drawn when they are asked for; the answers name the shapes, so that motion and time are put into words.

    Args:
        num_scenes, first_seed: the seeds; all below `HELD_OUT`.
        descriptions: share of samples that begin with a description of everything that happens.
    """

    def __init__(self, num_scenes: int, draw: Draw, first_seed: int = 0, descriptions: float = 0.0):
        if first_seed + num_scenes > HELD_OUT:
            raise ValueError(f"Seeds from {HELD_OUT} on are held out; got {first_seed}..{first_seed + num_scenes - 1}.")
        self._num_scenes, self._first_seed = num_scenes, first_seed
        self._draw, self._descriptions = draw, descriptions

    def __len__(self) -> int:
        return self._num_scenes

    def id_of(self, index: int) -> str:
        return f"synthetic/{self._first_seed + index}"

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        scene = Scene(self._first_seed + index, num_frames=int(random.integers(16, 33)))
        frame_indices = self._draw.frame_indices(random, scene.num_frames)
        frames, shape_masks = scene.render_all(frame_indices)
        turns = []
        if random.random() < self._descriptions:
            turns.append((str(random.choice(DESCRIPTION_QUESTIONS)), describe_scene(scene)))
        chosen = draw_expressions(random, scene, self._draw.num_objects)
        masks = np.zeros((len(chosen), *shape_masks.shape[1:]), dtype=bool)
        for number, expression in enumerate(chosen):
            turns.append(turn_about(random, scene, expression))
            masks[number] = shape_masks[list(expression.targets)].any(axis=0)
        return Sample(
            self.id_of(index), [Image.fromarray(frame) for frame in frames], turns_with_image(random, turns), masks
        )


def draw_expressions(random: np.random.Generator, scene: Scene, number: int) -> list[SyntheticExpression]:
    """`number` expressions, each kind of need as often as the others, as far as the scene has expressions of it."""
    by_need = scene.expressions_by_need()
    needs = random.permutation(sorted(by_need)).tolist()
    wanted = [needs[index % len(needs)] for index in range(number)]
    return [by_need[need][int(random.integers(len(by_need[need])))] for need in wanted]


def in_order(scene: Scene, expression: SyntheticExpression) -> list[int]:
    """The targets of an expression in the order in which answers name them."""
    return sorted(expression.targets, key=lambda target: scene.shapes[target].identity)


def turn_about(random: np.random.Generator, scene: Scene, expression: SyntheticExpression) -> tuple[str, str]:
    """A question for an expression, and the answer that names its targets."""
    names = [scene.name(target) for target in in_order(scene, expression)]
    return question(random, expression.text), named_answer(names)


def describe_scene(scene: Scene) -> str:
    """Every shape and what it does, in one order: "The blue star moves left, appears late. The red circle ...\""""
    sentences = []
    for shape in sorted(range(len(scene.shapes)), key=lambda index: scene.shapes[index].identity):
        motion, event = scene.shapes[shape].motion, scene.shapes[shape].event
        doing = {"": "leaves and comes back", STILL: "stays still"}.get(motion, f"moves {motion}")
        when = {"late": ", appears late", "vanishes": ", disappears"}.get(event, "")
        sentences.append(f"{scene.describe(shape).capitalize()} {doing}{when}.")
    return " ".join(sentences)


class Mixture(Dataset):
    """Sources one after the other, each several times over; the Trainer shuffles.

    Args:
        sources: (source, repeats).
        seed: of what is drawn in a sample.
        on_error: "stop" raises a `SampleError`; "skip" takes the next sample instead, with a warning, and counts it in
            `num_skipped`, a tensor that the workers of a data loader share.
    """

    def __init__(self, sources: Sequence[tuple[Source, int]], seed: int, on_error: str = "stop"):
        self._places = [
            (source, index) for source, repeats in sources for _ in range(repeats) for index in range(len(source))
        ]
        self._seed, self._on_error = seed, on_error
        self.num_skipped = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        for skipped in range(MAX_SKIPS):
            place = (index + skipped) % len(self)
            try:
                return self._sample(place)
            except SampleError as error:
                if self._on_error == "stop":
                    raise
                self.num_skipped += 1
                logger.warning(f"Skipped: {error}")
        raise SampleError(f"{MAX_SKIPS} samples in a row are bad, the last of them {self.id_of(place)}.")

    def id_of(self, index: int) -> str:
        source, place = self._places[index]
        return source.id_of(place)

    def _sample(self, index: int) -> Sample:
        source, place = self._places[index]
        try:
            sample = source.sample(place, np.random.default_rng((self._seed, index)))
        except (OSError, ValueError, KeyError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise SampleError(f"sample {source.id_of(place)}: {reason}") from error
        num_seg = sum(said.count(SEG) for _, said in sample.turns)
        if num_seg != len(sample.masks):
            raise SampleError(f"sample {sample.id}: {num_seg} {SEG} in the answers and {len(sample.masks)} masks.")
        return sample


def _polygon_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool from COCO's polygons or run-length code."""
    mask = decode(coco.frPyObjects(segmentation, *size))
    if mask.shape != size:
        raise ValueError(f"its mask is of size {mask.shape}, and the image of {size}.")
    return mask
