"""Losses between mask logits and true masks, on sampled points (arXiv:2509.19082, with Mask2Former's sampling).

Letters in shapes: N masks (a mask is of one object in one frame), P points.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_POINTS = 12_544
OVERSAMPLE_RATIO = 3
IMPORTANCE_RATIO = 0.75
DICE_EPS = 1.0


def mask_losses(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of N masks, each a mean over masks, at `NUM_POINTS` points a mask.

    Args:
        logits: (N, h, w), of any size.
        masks: (N, height, width) bool or 0..1, of any size; points are read from both by bilinear interpolation.
    """
    with torch.no_grad():
        points = uncertain_points(logits)
        targets = read_points(masks.to(logits.dtype), points)
    values = read_points(logits, points)
    return F.binary_cross_entropy_with_logits(values, targets), dice_losses(values, targets).mean()


def dice_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(...), 1 less the dice of probabilities (..., P), with sums that are not squared ("naive")."""
    probabilities = logits.sigmoid()
    overlap = (probabilities * targets).sum(dim=-1)
    total = probabilities.sum(dim=-1) + targets.sum(dim=-1)
    return 1 - (2 * overlap + DICE_EPS) / (total + DICE_EPS)


def uncertain_points(logits: Tensor) -> Tensor:
    """(N, P, 2) points, x and y in 0..1: most where the logits are nearest to 0, the rest anywhere.

    Of `OVERSAMPLE_RATIO` times as many points as wanted, drawn evenly, those nearest to the border make up
    `IMPORTANCE_RATIO` of the result.
    """
    num_masks, num_important = len(logits), int(IMPORTANCE_RATIO * NUM_POINTS)
    drawn = torch.rand(num_masks, OVERSAMPLE_RATIO * NUM_POINTS, 2, device=logits.device, dtype=logits.dtype)
    nearest = read_points(logits, drawn).abs().topk(num_important, dim=1, largest=False).indices
    important = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(num_masks, NUM_POINTS - num_important, 2, device=logits.device, dtype=logits.dtype)
    return torch.cat([important, anywhere], dim=1)


def read_points(images: Tensor, points: Tensor) -> Tensor:
    """(N, P) values of `images` (N, h, w) at `points` (N, P, 2), bilinear; 0 lies beyond the border."""
    return F.grid_sample(images[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]
