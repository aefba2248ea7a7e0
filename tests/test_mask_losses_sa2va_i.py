"""The losses against the formulas written out in NumPy."""

import numpy as np
import pytest
import torch

from sa2va_i.mask_losses_sa2va_i import NUM_POINTS, dice_losses, mask_losses, read_points, uncertain_points


def plain_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    probabilities = 1 / (1 + np.exp(-logits))
    return float(-(targets * np.log(probabilities) + (1 - targets) * np.log(1 - probabilities)).mean())


def plain_dice(logits: np.ndarray, targets: np.ndarray) -> float:
    losses = []
    for values, truth in zip(logits, targets):
        probabilities = 1 / (1 + np.exp(-values))
        losses.append(1 - (2 * (probabilities * truth).sum() + 1) / (probabilities.sum() + truth.sum() + 1))
    return float(np.mean(losses))


def plain_read(image: np.ndarray, x: float, y: float) -> float:
    """Bilinear value at x and y in 0..1 over the whole image; 0 beyond the border."""
    height, width = image.shape
    padded = np.pad(image, 1)
    column, row = x * width + 0.5, y * height + 0.5  # in the padded image, pixel centres at whole numbers
    left, top = int(np.floor(column)), int(np.floor(row))
    a, b = column - left, row - top
    patch = padded[top : top + 2, left : left + 2]
    return float((1 - b) * ((1 - a) * patch[0, 0] + a * patch[0, 1]) + b * ((1 - a) * patch[1, 0] + a * patch[1, 1]))


def test_points_are_read_bilinearly():
    random = np.random.default_rng(0)
    image, points = random.normal(size=(5, 7)), random.random((200, 2))
    ours = read_points(torch.tensor(image)[None], torch.tensor(points)[None])[0].numpy()
    np.testing.assert_allclose(ours, [plain_read(image, *point) for point in points], atol=1e-12)


def test_dice():
    random = np.random.default_rng(1)
    logits, targets = random.normal(size=(3, 50)), (random.random((3, 50)) < 0.3).astype(float)
    targets[2] = 0  # an object that is not there
    ours = dice_losses(torch.tensor(logits), torch.tensor(targets)).mean()
    assert ours.item() == pytest.approx(plain_dice(logits, targets))


def test_both_losses_at_the_points_that_are_drawn():
    """The same points, drawn again from the same seed, go through the plain formulas."""
    random = np.random.default_rng(2)
    logits, masks = random.normal(size=(2, 6, 6)), random.random((2, 12, 18)) < 0.4
    torch.manual_seed(0)
    cross_entropy, dice = mask_losses(torch.tensor(logits), torch.tensor(masks))
    torch.manual_seed(0)
    points = uncertain_points(torch.tensor(logits)).numpy()
    assert points.shape == (2, NUM_POINTS, 2)
    values, truth = (
        np.array([[plain_read(image, *point) for point in of_mask] for image, of_mask in zip(images, points)])
        for images in (logits, masks.astype(float))
    )
    assert cross_entropy.item() == pytest.approx(plain_cross_entropy(values, truth))
    assert dice.item() == pytest.approx(plain_dice(values, truth))
    assert cross_entropy.item() != pytest.approx(plain_cross_entropy(values, 1 - truth), rel=1e-2)  # it can fail


def test_most_points_lie_where_the_mask_is_uncertain():
    """Logits that fall from left to right are uncertain around one column: of three quarters of the points, those in
    the nearest third or so of all that are drawn."""
    logits = torch.linspace(4, -4, 64).expand(1, 64, 64)
    torch.manual_seed(0)
    x = uncertain_points(logits)[0, :, 0]
    assert ((x - 0.5).abs() < 0.13).float().mean() > 0.75
    assert ((x - 0.5).abs() > 0.3).float().mean() > 0.05  # the rest may lie anywhere


def test_a_perfect_mask_costs_nothing():
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[:, 8:24, 8:24] = True
    logits = masks.float() * 60 - 30
    torch.manual_seed(0)
    cross_entropy, dice = mask_losses(logits, masks)
    torch.manual_seed(0)
    wrong_cross_entropy, wrong_dice = mask_losses(-logits, masks)
    assert dice < 0.15  # most points lie on the border, where the coarse masks are neither
    assert cross_entropy < 0.1 * wrong_cross_entropy
    assert wrong_dice > 0.9
