"""Region similarity J, boundary accuracy F (DAVIS 2017) and ReVOS' robustness R, of bool masks (T, height, width)."""

import math

import numpy as np
from scipy import ndimage

BOUNDARY_BOUND = 0.008  # of the image's diagonal: how far a boundary may be off


def region_similarity(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """J, (T,): intersection over union of each frame; 1 where both are empty."""
    intersection = (truth & prediction).sum(axis=(1, 2))
    union = (truth | prediction).sum(axis=(1, 2))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def boundary_accuracy(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """F, (T,): F1 of the boundary pixels within `BOUNDARY_BOUND` of each other; 1 where both are empty."""
    height, width = truth.shape[1:]
    disk = _disk(math.ceil(BOUNDARY_BOUND * math.hypot(height, width)))
    return np.array([_boundary_f1(*frames, disk) for frames in zip(truth, prediction, strict=True)])


def j_and_f(truth: np.ndarray, prediction: np.ndarray) -> tuple[float, float]:
    """J and F, means over frames."""
    return float(region_similarity(truth, prediction).mean()), float(boundary_accuracy(truth, prediction).mean())


def robustness(truth: np.ndarray, prediction: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """R, (T,): 1 less the wrongly predicted area over the area of all objects of the video, at least 0 (ReVOS).

    A frame without any object gives 1 if nothing is predicted there, else 0.
    """
    wrong = (prediction & ~truth).sum(axis=(1, 2)).astype(float)
    objects = foreground.sum(axis=(1, 2)).astype(float)
    share = np.divide(wrong, objects, out=np.where(wrong > 0, 1.0, 0.0), where=objects > 0)
    return np.maximum(1 - share, 0.0)


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a (height, width) mask's outline: those that differ from a neighbour to the right, below or both.

    The last row and column have no such neighbours beyond the image, as in DAVIS' own map of boundaries.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ both)


def _boundary_f1(truth: np.ndarray, prediction: np.ndarray, disk: np.ndarray) -> float:
    truth_boundary, predicted_boundary = boundary(truth), boundary(prediction)
    num_truth, num_predicted = truth_boundary.sum(), predicted_boundary.sum()
    if num_truth == 0 or num_predicted == 0:
        return float(num_truth == num_predicted)
    hits = (predicted_boundary & ndimage.binary_dilation(truth_boundary, disk)).sum()
    found = (truth_boundary & ndimage.binary_dilation(predicted_boundary, disk)).sum()
    precision, recall = hits / num_predicted, found / num_truth
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _disk(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2
