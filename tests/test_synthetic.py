"""Synthetic scenes: the same from the same seed, masks that are exact, expressions that mean what they say."""

import numpy as np
import pytest
from PIL import Image

from sa2va_i import cli
from sa2va_i.evaluation.datasets import open_dataset
from sa2va_i.training.synthetic import DIRECTIONS, HELD_OUT, STILL, Scene, choose_expressions, write_mevis

SEEDS = range(60)


def test_a_seed_gives_one_scene():
    first, second = Scene(5), Scene(5)
    for one, other in zip(first.render(7), second.render(7)):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first.render(7)[0], Scene(6).render(7)[0])
    assert first.expressions() == second.expressions()


def test_masks_are_the_visible_parts():
    """No pixel belongs to two shapes, and a shape's pixels have its colour."""
    for seed in SEEDS[:10]:
        scene = Scene(seed)
        frame, masks = scene.render(12)
        assert masks.sum(axis=0).max() <= 1
        for shape, mask in zip(scene.shapes, masks):
            if shape.texture == "plain" and mask.sum() > 50:
                assert np.abs(frame[mask].mean(axis=0) - shape.rgb).max() < 20


def test_shapes_come_and_go_as_they_say():
    for seed in SEEDS:
        scene = Scene(seed)
        _, masks = scene.render_all()
        for shape, of_shape in zip(scene.shapes, masks):
            there = of_shape.any(axis=(1, 2))
            if shape.event == "late":
                assert not there[0]
            if shape.event == "vanishes":
                assert not there[-1]
            if shape.event == "returns":
                assert there[0]
                assert not there[len(there) // 2 - 1]
                assert there[len(there) // 2 :].any()  # at the very end it may be hidden


def test_motion_is_as_it_says():
    """The way from where a shape is first to where it is last, seen in its path."""
    for seed in SEEDS:
        for shape in Scene(seed).shapes:
            first, last = shape.path[0, 1:], shape.path[-1, 1:]
            dy, dx = np.subtract(last, first)
            if shape.motion == STILL:
                assert (dy, dx) == (0, 0)
            elif shape.motion in DIRECTIONS:
                axis = {"left": -dx, "right": dx, "up": -dy, "down": dy}[shape.motion]
                assert axis > 0.2
                assert axis > 2 * min(abs(dy), abs(dx))


def test_expressions_are_unambiguous():
    """Nothing that an expression says fits another shape too."""
    for seed in SEEDS:
        scene = Scene(seed)
        seen = {}
        for expression in scene.expressions():
            assert seen.setdefault(expression.text, expression.targets) == expression.targets
            words = expression.text.replace("shapes", "shape").split()
            fits = [
                index
                for index, shape in enumerate(scene.shapes)
                if (set(words) & {"small", "large"}) <= {shape.size}
                and all(
                    word == shape.color
                    for word in words
                    if word in ("red", "green", "blue", "yellow", "purple", "orange")
                )
                and all(
                    word.rstrip("s") == shape.kind
                    for word in words
                    if word.rstrip("s") in ("circle", "square", "triangle", "star")
                )
                and ("moving" not in words or words[-1] == shape.motion)
                and ("still" not in words or shape.motion == STILL)
                and ("comes" not in words or shape.event == "returns")
                and ("disappears" not in words or shape.event == "vanishes")
                and ("appears" not in words or shape.event == "late")
            ]
            if "last" in words:
                fits = [max(fits, key=lambda index: scene.shapes[index].visible_from)]
            assert tuple(fits) == expression.targets, expression


def test_names_tell_shapes_apart():
    for seed in SEEDS:
        scene = Scene(seed)
        names = [scene.name(index) for index in range(len(scene.shapes))]
        assert len(set(names)) == len(names)
        for index, name in enumerate(names):
            assert set(scene.describe(index).split()) <= set(name.split())


def test_every_need_is_asked():
    needs = {expression.needs for seed in SEEDS for expression in choose_expressions(Scene(seed), 1)}
    assert needs == {"appearance", "motion", "time", "several"}
    assert all(len(choose_expressions(Scene(seed), 1)) <= 4 for seed in SEEDS)


def test_written_as_mevis(tmp_path):
    dataset = open_dataset("mevis-valid_u", write_mevis(tmp_path, [3, 4]))
    assert [video.name for video in dataset.videos] == ["0000003", "0000004"]
    scene = Scene(3)
    _, masks = scene.render_all()
    video = dataset.videos[0]
    for expression, expected in zip(video.expressions, choose_expressions(scene, 1), strict=True):
        assert expression.text == expected.text
        truth = masks[list(expected.targets)].any(axis=0)
        np.testing.assert_array_equal(dataset.truth(video, expression), truth)
        np.testing.assert_array_equal(dataset.truth(video, expression, [2, 5]), truth[[2, 5]])
    frame = np.asarray(Image.open(video.files[0])).astype(int)
    assert np.abs(frame - scene.render(0)[0]).mean() < 4  # JPEG
    with pytest.raises(FileExistsError):
        write_mevis(tmp_path, [3])


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sa2va-i", "synthetic", str(tmp_path / "data"), "--clips", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert open_dataset("mevis-valid_u", tmp_path / "data").videos[0].name == str(HELD_OUT)
    assert "1 videos" in capsys.readouterr().out
