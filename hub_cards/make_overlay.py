"""Draws overlay.jpg: what the small model sees in four frames of the demo's clip, for two sentences.

python hub_cards/make_overlay.py
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import sa2va_i
from sa2va_i.overlay import draw_overlay, object_color
from sa2va_i.processing_sa2va_i import open_video
from sa2va_i.space.page import EXAMPLES

SENTENCES = ("the circle moving right", "all red shapes")
FRAMES = (0, 16, 30, 47)
SIDE = 3  # of a pixel of the clip in the picture


def main() -> None:
    model = sa2va_i.load("small").eval()
    video = open_video(EXAMPLES / "shapes.mp4")
    masks = [model.predict_forward(video=video, text=f"Please segment {one}.")["prediction_masks"] for one in SENTENCES]
    height, width = (SIDE * one for one in video.original_size)
    picture = Image.new("RGB", (width * len(FRAMES), height + 40), "white")
    for column, (frame_idx, frame) in enumerate(zip(FRAMES, video.frames_at(FRAMES), strict=True)):
        large = [
            np.asarray(Image.fromarray(of_sentence[0][frame_idx]).resize((width, height))) for of_sentence in masks
        ]
        picture.paste(draw_overlay(frame.resize((width, height), Image.Resampling.BICUBIC), large), (column * width, 0))
    draw = ImageDraw.Draw(picture)
    for number, sentence in enumerate(SENTENCES):
        left = 20 + number * picture.width // 2
        draw.rectangle((left, height + 10, left + 20, height + 30), fill=object_color(number))
        draw.text((left + 32, height + 6), f"\u201c{sentence}\u201d", fill="black", font_size=22)
    picture.save(Path(__file__).with_name("overlay.jpg"), quality=88)


if __name__ == "__main__":
    main()
