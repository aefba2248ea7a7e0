"""The paper's ablations (arXiv:2509.19082, Tables 3 to 6) in miniature: the small model on held-out synthetic scenes.

    python benchmarks/ablations.py
    python benchmarks/ablations.py --scenes 200 --groups 5

Every row sees the same scenes, with one expression each of appearance, motion, time and several targets. The scenes are
dealt into groups of other seeds: a cell is the mean of the groups' J&F in percent, and their standard deviation. The
last line is JSON.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from sa2va_i import Sa2VAiModel, load
from sa2va_i.evaluation.metrics import j_and_f
from sa2va_i.evaluation.runner import expression_prompt, with_empty_frames
from sa2va_i.training.synthetic import HELD_OUT, Scene, choose_expressions

BASE = {"decoding": "consistent", "sampling": "uniform", "sample_num_frames": 5, "max_prompt_frames": None}
TABLES = {
    "Tables 3 and 4: decoding x sampling": [
        {"decoding": decoding, "sampling": sampling}
        for decoding in ("memory", "consistent")
        for sampling in ("first", "uniform")
    ],
    "Table 5: sampled frames": [{"sample_num_frames": number} for number in (5, 8, 12, 16)],
    "Table 6: prompt frames": [{"max_prompt_frames": number} for number in (None, 1)],
}


ROWS = list({json.dumps({**BASE, **row}): None for rows in TABLES.values() for row in rows})  # each once


def score_scene(model: Sa2VAiModel, scene: Scene) -> dict[str, dict[str, float]]:
    """For each of `ROWS`, J&F of the scene's expressions by what they need. The scene is encoded once for all rows."""
    frames, masks = scene.render_all()
    video = model.encode_video([Image.fromarray(frame) for frame in frames])
    expressions = choose_expressions(scene, per_need=1)
    prompts = [expression_prompt(expression.text) for expression in expressions]
    scores: dict[str, dict[str, float]] = {}
    for row in ROWS:
        segmentations = model.segment_each(video, prompts, max_new_tokens=64, **json.loads(row))
        by_frame = [of_frame for _, of_frame in with_empty_frames(segmentations, scene.size)]
        predicted = [np.stack(of_expression) > 0 for of_expression in zip(*by_frame, strict=True)]
        scores[row] = {
            expression.needs: 100 * statistics.fmean(j_and_f(masks[list(expression.targets)].any(axis=0), prediction))
            for expression, prediction in zip(expressions, predicted, strict=True)
        }
    return scores


def summarise(by_scene: list[dict[str, float]], num_groups: int) -> dict[str, float]:
    """Mean and spread over groups of seeds, and the mean of each need."""
    groups = [
        [value for scene in by_scene[first::num_groups] for value in scene.values()] for first in range(num_groups)
    ]
    means = [statistics.fmean(group) for group in groups]
    needs = sorted({need for scene in by_scene for need in scene})
    by_need = {need: statistics.fmean(scene[need] for scene in by_scene if need in scene) for need in needs}
    return {"J&F": statistics.fmean(means), "spread": statistics.stdev(means) if num_groups > 1 else 0.0, **by_need}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the record, beside the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.model).eval()
    seeds = range(HELD_OUT, HELD_OUT + arguments.scenes)
    by_scene = [score_scene(model, Scene(seed)) for seed in tqdm(seeds, unit="scene")]
    results = {row: summarise([scene[row] for scene in by_scene], arguments.groups) for row in ROWS}
    for table, rows in TABLES.items():
        print(f"\n{table}")
        for row in rows:
            result = results[json.dumps({**BASE, **row})]
            label = ", ".join("all" if value is None else str(value) for value in row.values())
            needs = "  ".join(f"{name} {value:5.1f}" for name, value in result.items() if name not in ("J&F", "spread"))
            print(f"  {label:22} {result['J&F']:5.1f} +- {result['spread']:4.1f}   {needs}")
    record = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "scenes": arguments.scenes,
        "groups": arguments.groups,
        "rows": [{**json.loads(key), **result} for key, result in results.items()],
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
