"""Draws `shapes.mp4`, the clip of the demo: a synthetic scene that no training sees.

python space/examples/make_shapes.py
"""

from pathlib import Path

from PIL import Image

from sa2va_i.overlay import VideoWriter
from sa2va_i.training.synthetic import HELD_OUT, Scene

SEED = HELD_OUT + 1002
NUM_FRAMES, FPS = 48, 12

if __name__ == "__main__":
    frames, _ = Scene(SEED, NUM_FRAMES).render_all()
    with VideoWriter(Path(__file__).with_name("shapes.mp4"), FPS) as writer:
        for frame in frames:
            writer.write(Image.fromarray(frame))
