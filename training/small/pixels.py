"""Dense pretraining of an image encoder: what kind, colour and size of shape is at each place of its feature maps.

Meta's and InternVL's encoders were pretrained before anyone asked them for masks or words; from those alone, a small
one learns slowly.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..synthetic import COLORS, KINDS, RADIUS, Scene
from .loop import SEEDS_OF_STEP, Phase

VOCABULARIES = (tuple(KINDS), tuple(COLORS), tuple(RADIUS))  # in the order of `Shape.identity`
FRAMES_OF_SCENE = 2


class PixelHeads(nn.Module):
    """Scores of kind, colour and size at each place of feature maps (B, C, h, w); class 0 is the background.

    Thrown away after the training.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.sizes = [len(words) + 1 for words in VOCABULARIES]
        self.levels = nn.ModuleList(nn.Conv2d(width, sum(self.sizes), 1) for width in widths)

    def forward(self, feature_maps: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return [head(level).split(self.sizes, dim=1) for head, level in zip(self.levels, feature_maps, strict=True)]


def classes_of(scene: Scene, masks: np.ndarray) -> np.ndarray:
    """(3, height, width) float32 classes of a frame's pixels, from the masks (K, height, width) of the shapes there."""
    classes = np.zeros((len(VOCABULARIES), *scene.size), dtype=np.float32)
    for shape, mask in zip(scene.shapes, masks, strict=True):
        for of_words, words, word in zip(classes, VOCABULARIES, shape.identity, strict=True):
            of_words[mask] = words.index(word) + 1
    return classes


def labelled_frames(seeds: Sequence[int]) -> tuple[list[Image.Image], Tensor]:
    """Two frames of each scene, and (B, 3, height, width) classes of their pixels."""
    images, labels = [], []
    for seed in seeds:
        scene = Scene(seed)
        for frame_idx in np.random.default_rng((seed, 2)).choice(scene.num_frames, FRAMES_OF_SCENE, replace=False):
            frame, masks = scene.render(int(frame_idx))
            images.append(Image.fromarray(frame))
            labels.append(classes_of(scene, masks))
    return images, torch.from_numpy(np.stack(labels))


def pixel_losses(heads: PixelHeads, feature_maps: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, and the share of the shapes' places that are right, means over feature maps and vocabularies.

    Args:
        labels: (B, 3, height, width) classes of the pixels.
    """
    losses, right = [], []
    for scores, level in zip(heads(feature_maps), feature_maps, strict=True):
        targets = F.interpolate(labels.to(level.device), level.shape[-2:], mode="nearest").long()
        for of_words, target in zip(scores, targets.unbind(dim=1), strict=True):
            losses.append(balanced(F.cross_entropy(of_words, target, reduction="none"), target > 0))
            right.append((of_words.argmax(dim=1) == target)[target > 0].float().mean())
    return {"pixels": torch.stack(losses).mean(), "right": torch.stack(right).mean()}


def pixel_phase(encode: Callable[[list[Image.Image]], Sequence[Tensor]], heads: PixelHeads, num_steps: int) -> Phase:
    """Training by `pixel_losses`, all seeds of a step in one batch."""

    def backward(seed: int) -> dict[str, Tensor]:
        images, labels = labelled_frames(range(seed, seed + SEEDS_OF_STEP))
        losses = pixel_losses(heads, encode(images), labels)
        losses["pixels"].backward()
        return losses

    return Phase("pixels", num_steps, 1e-3, backward)


def balanced(values: Tensor, is_shape: Tensor) -> Tensor:
    """The mean over the shapes' places and that over the background's, in equal parts; 0 for a mean over none."""
    return (_mean_where(values, is_shape) + _mean_where(values, ~is_shape)) / 2


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)
