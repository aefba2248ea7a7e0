import av
import numpy as np
import pytest
from PIL import Image

from sa2va_i.overlay import FILL_OPACITY, PALETTE, VideoWriter, draw_overlay, object_color


def square(x: int) -> np.ndarray:
    mask = np.zeros((100, 120), bool)
    mask[30:70, x : x + 40] = True
    return mask


@pytest.mark.parametrize("ground", [0, 255])
def test_fill_and_outline(ground):
    frame = Image.new("RGB", (120, 100), (ground,) * 3)
    drawn = np.asarray(draw_overlay(frame, [square(10), square(70)]))
    for object_idx, x in enumerate((10, 70)):
        color = np.array(object_color(object_idx))
        assert np.array_equal(drawn[30, x + 20], color)
        np.testing.assert_allclose(drawn[50, x + 20], ground + FILL_OPACITY * (color - ground), atol=1)
    assert (drawn[5, 5] == ground).all()
    assert (drawn[29, 30] == 0).all()  # the dark line around


def test_the_frame_is_not_modified():
    frame = Image.new("RGB", (120, 100), "white")
    draw_overlay(frame, [square(10)])
    assert (np.asarray(frame) == 255).all()


@pytest.mark.parametrize("mask", [np.zeros((100, 120), bool), np.ones((100, 120), bool)])
def test_empty_and_full_masks(mask):
    draw_overlay(Image.new("RGB", (120, 100)), [mask])


def test_no_objects():
    frame = Image.new("RGB", (120, 100), "white")
    assert np.array_equal(draw_overlay(frame, []), frame)


def test_colors_repeat():
    assert object_color(len(PALETTE)) == object_color(0)


@pytest.mark.parametrize(("size", "written"), [((80, 60), (80, 60)), ((81, 61), (82, 62))])
def test_video(tmp_path, size, written):
    with VideoWriter(tmp_path / "out.mp4", fps=29.97) as writer:
        for level in range(0, 250, 50):
            writer.write(Image.new("RGB", size, (level,) * 3))
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == pytest.approx(29.97, abs=0.01)
    assert [frame.shape for frame in frames] == [(written[1], written[0], 3)] * 5
    np.testing.assert_allclose([frame.mean() for frame in frames], range(0, 250, 50), atol=3)


def test_the_index_stands_in_front(tmp_path):
    """Or browsers load the whole file before the first frame."""
    with VideoWriter(tmp_path / "out.mp4", fps=10) as writer:
        writer.write(Image.new("RGB", (80, 60)))
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
