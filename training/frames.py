"""Which frames of a video a training sample shows. Each rule gives increasing indices, and all frames of a video that
has no more than are wanted."""

from collections.abc import Callable

import numpy as np

from ..processing_sa2va_i import first_frame_indices

FrameRule = Callable[[np.random.Generator, int, int], list[int]]


def random_frames(random: np.random.Generator, num_frames: int, num_samples: int) -> list[int]:
    """`num_samples` different frames, any of them."""
    if num_frames <= num_samples:
        return list(range(num_frames))
    return sorted(random.choice(num_frames, num_samples, replace=False).tolist())


def first_frames(random: np.random.Generator, num_frames: int, num_samples: int) -> list[int]:
    """The first `num_samples` frames."""
    return first_frame_indices(num_frames, num_samples)


def uniform_frames(random: np.random.Generator, num_frames: int, num_samples: int) -> list[int]:
    """The middles of `num_samples` equal parts, all moved by one offset of up to half a part (arXiv:2509.19082)."""
    if num_frames <= num_samples:
        return list(range(num_frames))
    part = num_frames / num_samples
    middles = np.linspace(part / 2 - 0.5, num_frames - 1 - (part / 2 - 0.5), num_samples)
    moved = np.rint(middles + random.uniform(-part / 2, part / 2)).astype(int)
    return moved.clip(0, num_frames - 1).tolist()


FRAME_RULES: dict[str, FrameRule] = {"uniform": uniform_frames, "random": random_frames, "first": first_frames}
