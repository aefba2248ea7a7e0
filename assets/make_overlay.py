"""Draw assets/overlay.png: four frames of the test video with masks as `sa2va-i segment` draws them.

No trained weights ship with the package, so the masks are not a model's: the shapes are found by their colour.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from sa2va_i.overlay import draw_overlay

FRAMES = Path(__file__).parents[1] / "tests" / "reference" / "video"


def shapes(frame: Image.Image) -> list[np.ndarray]:
    """The green square, the red circle and the blue triangle, (height, width) bool each."""
    smooth = frame.filter(ImageFilter.MedianFilter(5))
    red, green, blue = np.moveaxis(np.asarray(smooth).astype(int), -1, 0)
    circle = (red > 200) & (blue < 60)
    triangle = (blue > 225) & (red < 100)
    square = (green > 120) & (red < 45) & (blue < 90)
    square[:135] = square[:, :60] = False  # the ground is as green there
    return [square, circle, triangle]


def main() -> None:
    frames = [Image.open(FRAMES / f"{frame_idx:05d}.png").convert("RGB") for frame_idx in (0, 4, 9, 13)]
    strip = Image.new("RGB", (frames[0].width * len(frames), frames[0].height))
    for position, frame in enumerate(frames):
        strip.paste(draw_overlay(frame, shapes(frame)), (position * frame.width, 0))
    strip.save(Path(__file__).with_name("overlay.png"))


if __name__ == "__main__":
    main()
