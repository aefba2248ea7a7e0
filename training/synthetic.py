"""Synthetic videos of textured moving shapes, with expressions about them and exact masks, from a seed.

A `Scene` is what happens: shapes with a kind, a colour and a size, each with a motion and perhaps an event (it appears
late, disappears, or leaves the picture and comes back); they pass in front of each other. No two shapes of a scene
share kind, colour and size, and most share some of them, so that every expression has distractors. `write_mevis` makes
a data set of it in MeViS' layout.

Seeds below `HELD_OUT` are for training, those from it on for evaluation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..files import staged_folder, write_json
from ..processing_sa2va_i import to_rle

HELD_OUT = 1_000_000
SIZE = (144, 192)  # height, width
NUM_FRAMES = 24

KINDS = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (205, 35, 40),
    "green": (45, 165, 70),
    "blue": (45, 85, 215),
    "yellow": (240, 215, 50),
    "purple": (150, 60, 185),
    "orange": (240, 130, 30),
}
RADIUS = {"small": (0.11, 0.125), "large": (0.18, 0.205)}  # of the picture's height
TEXTURES = ("plain", "stripes", "checks")
DIRECTIONS = ("left", "right", "up", "down")
STILL = "still"


@dataclass(frozen=True)
class Shape:
    """One shape of a scene. Times are shares of the video, lengths shares of the picture's height.

    path: (N, 3), time, y and x of the centre; in between it moves evenly.
    motion: one of `DIRECTIONS`, `STILL`, or "" for a path that is neither.
    visible_from, visible_until: it is in the scene in between.
    event: "", "late", "vanishes" or "returns".
    """

    kind: str
    color: str
    size: str
    motion: str
    event: str
    radius: float
    path: np.ndarray
    visible_from: float
    visible_until: float
    rgb: np.ndarray
    texture: str
    angle: float
    spin: float

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.kind, self.color, self.size

    def center(self, time: float) -> np.ndarray:
        """(y, x) at `time`."""
        return np.array([np.interp(time, self.path[:, 0], self.path[:, axis]) for axis in (1, 2)])

    def is_visible(self, time: float) -> bool:
        return self.visible_from <= time < self.visible_until


@dataclass(frozen=True)
class SyntheticExpression:
    """text: a noun phrase; targets: shapes it means, by index; needs: "appearance", "motion", "time" or "several"."""

    text: str
    targets: tuple[int, ...]
    needs: str


class Scene:
    """A video that has not been drawn: ask for the frames you need.

    Args:
        seed: everything follows from it and the other arguments.
        num_frames: T.
        size: (height, width) in pixels.
    """

    def __init__(self, seed: int, num_frames: int = NUM_FRAMES, size: tuple[int, int] = SIZE):
        self.seed, self.num_frames, self.size = seed, num_frames, size
        random = np.random.default_rng(seed)
        self.shapes = _draw_shapes(random, size[1] / size[0])
        self._background = _background(random, size)

    def render(self, frame_idx: int) -> tuple[np.ndarray, np.ndarray]:
        """One frame, (height, width, 3) uint8, and the visible part of every shape, (K, height, width) bool."""
        time = frame_idx / max(self.num_frames - 1, 1)
        pixels = self._background.copy()
        masks = np.zeros((len(self.shapes), *self.size), dtype=bool)
        for index, shape in enumerate(self.shapes):
            if not shape.is_visible(time):
                continue
            coverage, shade = _draw(shape, time, self.size)
            pixels += coverage[..., None] * (np.clip(shape.rgb * shade[..., None], 0, 255) - pixels)
            masks[:index] &= coverage < 0.5  # it lies in front of those before it
            masks[index] = coverage >= 0.5
        noise = np.random.default_rng((self.seed, frame_idx)).normal(0, 4, (*self.size, 1))
        return np.clip(pixels + noise, 0, 255).astype(np.uint8), masks

    def render_all(self, frame_indices: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Frames (T, height, width, 3) and masks (K, T, height, width) of some frames, or of all."""
        frame_indices = range(self.num_frames) if frame_indices is None else frame_indices
        frames, masks = zip(*map(self.render, frame_indices), strict=True)
        return np.stack(frames), np.stack(masks, axis=1)

    def describe(self, index: int) -> str:
        """The shape in the fewest words that set it apart by its looks: "the red circle", "the small red circle"."""
        shape = self.shapes[index]
        twins = [other for other in self.shapes if (other.kind, other.color) == (shape.kind, shape.color)]
        size = f"{shape.size} " if len(twins) > 1 else ""
        return f"the {size}{shape.color} {shape.kind}"

    def name(self, index: int) -> str:
        """The shape by all of its looks, as answers name it: "the small red circle"."""
        shape = self.shapes[index]
        return f"the {shape.size} {shape.color} {shape.kind}"

    def expressions(self) -> list[SyntheticExpression]:
        """Everything that can be asked about the scene in these words."""
        return [*self._by_appearance(), *self._by_motion(), *self._by_time(), *self._several()]

    def expressions_by_need(self) -> dict[str, list[SyntheticExpression]]:
        """The same, by what they need, as far as the scene has any of it."""
        by_need: dict[str, list[SyntheticExpression]] = {}
        for expression in self.expressions():
            by_need.setdefault(expression.needs, []).append(expression)
        return by_need

    def _where(self, **fields: str) -> tuple[int, ...]:
        return tuple(
            index
            for index, shape in enumerate(self.shapes)
            if all(getattr(shape, name) == value for name, value in fields.items())
        )

    def _by_appearance(self) -> Iterator[SyntheticExpression]:
        for index, shape in enumerate(self.shapes):
            yield SyntheticExpression(self.describe(index), (index,), "appearance")
            if self._where(kind=shape.kind) == (index,):
                yield SyntheticExpression(f"the {shape.kind}", (index,), "appearance")
            if self._where(color=shape.color) == (index,):
                yield SyntheticExpression(f"the {shape.color} shape", (index,), "appearance")

    def _by_motion(self) -> Iterator[SyntheticExpression]:
        for index, shape in enumerate(self.shapes):
            if not shape.motion:
                continue
            doing = "that stays still" if shape.motion == STILL else f"moving {shape.motion}"
            if self._where(motion=shape.motion) == (index,):
                yield SyntheticExpression(f"the shape {doing}", (index,), "motion")
            if self._where(motion=shape.motion, kind=shape.kind) == (index,) and len(self._where(kind=shape.kind)) > 1:
                yield SyntheticExpression(f"the {shape.kind} {doing}", (index,), "motion")
            if (
                self._where(motion=shape.motion, color=shape.color) == (index,)
                and len(self._where(color=shape.color)) > 1
            ):
                yield SyntheticExpression(f"the {shape.color} shape {doing}", (index,), "motion")

    def _by_time(self) -> Iterator[SyntheticExpression]:
        late = self._where(event="late")
        if late:
            last = max(late, key=lambda index: self.shapes[index].visible_from)
            yield SyntheticExpression("the shape that appears last", (last,), "time")
        for event, words in (("returns", "leaves and comes back"), ("vanishes", "disappears")):
            targets = self._where(event=event)
            if len(targets) == 1:
                yield SyntheticExpression(f"the shape that {words}", targets, "time")

    def _several(self) -> Iterator[SyntheticExpression]:
        sets = [(f"all {color} shapes", self._where(color=color)) for color in COLORS]
        sets += [(f"all {kind}s", self._where(kind=kind)) for kind in KINDS]
        sets += [(f"all shapes moving {motion}", self._where(motion=motion)) for motion in DIRECTIONS]
        for text, targets in sets:
            if len(targets) > 1:
                yield SyntheticExpression(text, targets, "several")


# What happens


def _draw_shapes(random: np.random.Generator, width: float) -> tuple[Shape, ...]:
    """Shapes that do not hide each other for most of the video; `width` is in picture heights."""
    while True:
        number = int(random.integers(3, 6))
        kinds = random.choice(KINDS, int(random.integers(2, 4)), replace=False)
        colors = random.choice(list(COLORS), int(random.integers(2, 5)), replace=False)
        identities = {
            (str(random.choice(kinds)), str(random.choice(colors)), str(random.choice(list(RADIUS))))
            for _ in range(number)
        }
        if len(identities) < 3:
            continue
        ordered = sorted(identities)
        random.shuffle(ordered)
        events = _draw_events(random, len(ordered))
        shapes = tuple(
            _draw_shape(random, identity, event, width) for identity, event in zip(ordered, events, strict=True)
        )
        if not _is_crowded(shapes):
            return shapes


def _draw_events(random: np.random.Generator, number: int) -> list[str]:
    events = [
        name for name, chance in (("late", 0.6), ("returns", 0.5), ("vanishes", 0.35)) if random.random() < chance
    ]
    if "late" in events and random.random() < 0.3:
        events.append("late")
    events = events[: number - 1] + [""] * number  # one shape at least has no event
    events = events[:number]
    random.shuffle(events)
    return events


def _draw_shape(random: np.random.Generator, identity: tuple[str, str, str], event: str, width: float) -> Shape:
    kind, color, size = identity
    radius = random.uniform(*RADIUS[size])
    motion = "" if event == "returns" else str(random.choice((*DIRECTIONS, STILL)))
    visible_from = random.uniform(0.25, 0.6) if event == "late" else 0.0
    visible_until = random.uniform(0.45, 0.75) if event == "vanishes" else math.inf
    begin, end = visible_from, min(visible_until, 1.0)
    path = _exit_path(random, radius, width) if event == "returns" else _path(random, motion, radius, width, begin, end)
    return Shape(
        kind,
        color,
        size,
        motion,
        event,
        radius,
        path,
        visible_from,
        visible_until,
        rgb=np.clip(np.array(COLORS[color]) + random.uniform(-15, 15, 3), 0, 255),
        texture=str(random.choice(TEXTURES)),
        angle=random.uniform(-0.3, 0.3),
        spin=random.uniform(-0.4, 0.4),
    )


def _path(
    random: np.random.Generator, motion: str, radius: float, width: float, begin: float, end: float
) -> np.ndarray:
    """Straight from one part of the picture to the other between the times `begin` and `end`, or in one place."""
    extent = np.array([1.0, width])
    start = random.uniform(radius, extent - radius)
    stop = start.copy()
    if motion != STILL:
        axis = 0 if motion in ("up", "down") else 1
        room = extent[axis] - 2 * radius
        ends = radius + room * np.array([random.uniform(0, 0.3), random.uniform(0.7, 1)])
        start[axis], stop[axis] = ends if motion in ("down", "right") else ends[::-1]
        stop[1 - axis] += random.uniform(-0.06, 0.06)
    return np.array([[begin, *start], [end, *stop]])


def _exit_path(random: np.random.Generator, radius: float, width: float) -> np.ndarray:
    """Out over a border, gone for a while around the middle of the video, and back in."""
    extent = np.array([1.0, width])
    axis, far_side = int(random.integers(2)), bool(random.integers(2))
    inside = random.uniform(radius, extent - radius, (2, 2))
    depth = random.uniform(1.2, 2.5, 2) * radius
    inside[:, axis] = extent[axis] - depth if far_side else depth
    outside = inside.copy()
    outside[:, axis] = extent[axis] + 1.3 * radius if far_side else -1.3 * radius
    times = [0, random.uniform(0.25, 0.38), random.uniform(0.6, 0.7), random.uniform(0.85, 1)]
    return np.column_stack([times, [inside[0], outside[0], outside[1], inside[1]]])


def _is_crowded(shapes: Sequence[Shape], num_times: int = 12) -> bool:
    """Whether some shape has another one right over it in more than a third of the video."""
    times = np.linspace(0, 1, num_times)
    centers = np.array([[shape.center(time) for time in times] for shape in shapes])
    for one in range(len(shapes)):
        for other in range(one):
            reach = 0.8 * max(shapes[one].radius, shapes[other].radius)
            distance = np.linalg.norm(centers[one] - centers[other], axis=1)
            if (distance < reach).mean() > 1 / 3:
                return True
    return False


# What it looks like


@cache
def _outline(kind: str) -> np.ndarray:
    """(N, 2) corners in units of the radius."""
    if kind == "square":
        return np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) * 0.85
    corners = {"circle": 48, "triangle": 3, "star": 10}[kind]
    angles = np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, 0.45, 1.1) if kind == "star" else np.full(corners, 1.0)
    if kind == "triangle":
        radii = radii * 1.15
    return radii[:, None] * np.stack([-np.cos(angles), np.sin(angles)], axis=1)  # the first corner is on top


def _draw(shape: Shape, time: float, size: tuple[int, int], oversample: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel the shape covers, 0..1, and its texture's brightness; both (height, width)."""
    height, width = size
    angle = shape.angle + shape.spin * time
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    center, radius = shape.center(time) * height, shape.radius * height
    corners = center + radius * _outline(shape.kind) @ turn.T
    canvas = Image.new("L", (oversample * width, oversample * height))
    ImageDraw.Draw(canvas).polygon([(x * oversample, y * oversample) for y, x in corners], fill=255)
    coverage = np.asarray(canvas.reduce(oversample), dtype=np.float32) / 255
    y, x = np.mgrid[:height, :width].astype(np.float32)
    v, u = (y - center[0]) / radius, (x - center[1]) / radius
    return coverage, _SHADES[shape.texture](turn[0, 0] * v + turn[1, 0] * u, turn[0, 1] * v + turn[1, 1] * u)


_SHADES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda v, u: np.ones_like(u),
    "stripes": lambda v, u: 1 + 0.22 * np.sign(np.sin(7 * u)),
    "checks": lambda v, u: 1 + 0.18 * np.sign(np.sin(6 * u) * np.sin(6 * v)),
}


def _background(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) float32: soft blotches of a dull colour, with some grain."""
    height, width = size
    base = random.uniform(50, 190) + random.uniform(-18, 18, 3)
    blotches = random.uniform(-35, 35, (6, 8, 1)) + random.uniform(-8, 8, (6, 8, 3))
    coarse = np.clip(base + blotches, 0, 255).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) + random.normal(0, 6, (height, width, 1)).astype(np.float32)


# As a data set


def write_mevis(folder: str | Path, seeds: Sequence[int], split: str = "valid_u", per_need: int = 1) -> Path:
    """Draw scenes into `folder` as a split of MeViS: `open_dataset("mevis-<split>", folder)` reads it.

    Args:
        per_need: expressions of each scene for each of appearance, motion, time and several, where it has them.

    Raises:
        FileExistsError: the split is there already.
    """
    videos, masks = {}, {}
    with staged_folder(Path(folder) / split) as staged:
        for seed in seeds:
            scene = Scene(seed)
            name = f"{seed:07d}"
            images = staged / "JPEGImages" / name
            images.mkdir(parents=True)
            frames, shape_masks = scene.render_all()
            for frame_idx, frame in enumerate(frames):
                Image.fromarray(frame).save(images / f"{frame_idx:05d}.jpg", quality=95)
            first_id = len(masks)
            for number, of_shape in enumerate(shape_masks):
                masks[str(first_id + number)] = [to_rle(mask) if mask.any() else None for mask in of_shape]
            videos[name] = {
                "frames": [f"{frame_idx:05d}" for frame_idx in range(scene.num_frames)],
                "expressions": {
                    str(key): {
                        "exp": expression.text,
                        "obj_id": list(expression.targets),
                        "anno_id": [first_id + target for target in expression.targets],
                        "needs": expression.needs,
                    }
                    for key, expression in enumerate(choose_expressions(scene, per_need))
                },
            }
        write_json(staged / "meta_expressions.json", {"videos": videos})
        write_json(staged / "mask_dict.json", masks)
    return Path(folder)


def choose_expressions(scene: Scene, per_need: int) -> list[SyntheticExpression]:
    """Up to `per_need` expressions of each kind of need, by the scene's seed."""
    random = np.random.default_rng((scene.seed, scene.num_frames))
    chosen = []
    for expressions in scene.expressions_by_need().values():
        order = random.permutation(len(expressions))[:per_need]
        chosen += [expressions[index] for index in sorted(order)]
    return chosen
