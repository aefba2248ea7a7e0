"""COCO run-length codes of masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco


def decode(code: Any) -> np.ndarray:
    """(height, width) bool of a code, or of a list of codes as one."""
    decoded = coco.decode(code)
    return decoded.any(axis=2) if decoded.ndim == 3 else decoded.astype(bool)


def union_of(objects: Sequence[Sequence[Any]], size: tuple[int, int]) -> np.ndarray:
    """(T, height, width) bool masks of several objects as one.

    Args:
        objects: for each, a COCO run-length code, a list of several, or None for every frame.

    Raises:
        ValueError: a code is of another size.
    """
    num_frames = len(objects[0]) if objects else 0
    masks = np.zeros((num_frames, *size), dtype=bool)
    for codes in objects:
        for frame_idx, code in enumerate(codes):
            if code:
                decoded = decode(code)
                if decoded.shape != tuple(size):
                    raise ValueError(f"the mask of frame {frame_idx} is of size {decoded.shape}, not {size}.")
                masks[frame_idx] |= decoded
    return masks
