"""J&F of the small SAM 2 alone on held-out scenes: each shape prompted with its true mask where it first appears.

    python -m sa2va_i.training.small.evaluate_sam2 MODEL --scenes 200

MODEL: a folder of Sa2VA-i, whose `propagator` is taken, or of `train_sam2`. Frames before a shape's first and that
first one, which is given, are not scored. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ...evaluation.metrics import j_and_f
from ...files import read_json
from ...modeling_sa2va_i import Sa2VAiModel
from ...processing_sa2va_i import SAM2_MEAN, SAM2_STD, to_pixel_values
from ...sam2_propagator import Sam2Propagator
from ..synthetic import HELD_OUT, Scene


def load_propagator(folder: Path) -> Sam2Propagator:
    if read_json(folder / "config.json")["model_type"] == "sa2va_i":
        return Sa2VAiModel.from_pretrained(folder).propagator
    return Sam2Propagator.from_pretrained(folder).eval()


def score_scene(sam2: Sam2Propagator, scene: Scene) -> list[tuple[float, float]]:
    """(J, F) of each shape."""
    frames, masks = scene.render_all()
    pixels = to_pixel_values([Image.fromarray(frame) for frame in frames], sam2.image_side, SAM2_MEAN, SAM2_STD)
    first_seen = masks.any(axis=(2, 3)).argmax(axis=1)
    scores = []
    for first in np.unique(first_seen[first_seen < scene.num_frames - 1]):
        shapes = np.flatnonzero((first_seen == first) & masks[:, first].any(axis=(1, 2)))
        prompt = torch.from_numpy(masks[shapes, first])
        predicted = [
            sam2.masks_at(logits, scene.size).cpu().numpy() for _, logits in sam2.propagate(pixels[first:], {0: prompt})
        ]
        for number, shape in enumerate(shapes):
            truth, prediction = masks[shape, first + 1 :], np.stack([one[number] for one in predicted[1:]])
            scores.append(j_and_f(truth, prediction))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sam2 = load_propagator(arguments.model)
    scores = []
    for seed in tqdm(range(HELD_OUT, HELD_OUT + arguments.scenes), unit="scene"):
        scores += score_scene(sam2, Scene(seed))
    j, f = np.mean(scores, axis=0).tolist()
    print(json.dumps({"J": round(j, 4), "F": round(f, 4), "J&F": round((j + f) / 2, 4), "objects": len(scores)}))


if __name__ == "__main__":
    main()
