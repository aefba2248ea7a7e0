"""The small model that comes with the package: its masks are right."""

import filecmp

import numpy as np
import pytest
import torch
from transformers import AutoModel

import sa2va_i
from sa2va_i.evaluation.metrics import j_and_f
from sa2va_i.loading import SMALL
from sa2va_i.publish import CARDS, REMOTE_CODE
from sa2va_i.space.page import EXAMPLE_QUESTIONS, EXAMPLES
from sa2va_i.training.synthetic import HELD_OUT, Scene

SEED, NUM_FRAMES = HELD_OUT + 1002, 48  # of the clip, `space/examples/make_shapes.py`


@pytest.fixture(scope="module")
def model():
    return sa2va_i.load("small").eval()


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(SEED, NUM_FRAMES)


@pytest.mark.parametrize("text", [text for _, text in EXAMPLE_QUESTIONS] + ["the purple shape", "the square"])
def test_masks_are_right(model, scene, text):
    (targets,) = [expression.targets for expression in scene.expressions() if expression.text == text]
    _, truth = scene.render_all()
    masks = np.stack([masks.any(axis=0) for _, masks in model.segment(EXAMPLES / "shapes.mp4", text)])
    j, f = j_and_f(truth[list(targets)].any(axis=0), masks)
    assert (j + f) / 2 > 0.7
    others = [one for one in range(len(scene.shapes)) if one not in targets]
    assert max(sum(j_and_f(truth[one], masks)) / 2 for one in others) < 0.5  # twin: another shape's masks


def test_size():
    files = [file for file in SMALL.iterdir() if not file.is_symlink()]
    assert sum(file.stat().st_size for file in files) < 16e6


def test_it_is_a_package_of_its_own():
    """As on the Hub, with this repository's code."""
    assert all(filecmp.cmp(SMALL / name, CARDS.parent / name, shallow=False) for name in REMOTE_CODE)
    model = AutoModel.from_pretrained(SMALL, trust_remote_code=True)
    assert model.dtype == torch.float32
    assert type(model).__module__.startswith("transformers_modules")
