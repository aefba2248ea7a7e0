"""Eight expressions about one video: together, as `sa2va-i evaluate` predicts them, against one after the other.

    python benchmarks/expressions.py
    python benchmarks/expressions.py --frames 100 --expressions 16

Both run in this process, taking turns, with a small random SAM 2 (192 px) on the CPU. Prints the frames seen by SAM 2's
image encoder and by the vision model, the tokens read by the language model, expressions per second, the ratio, and,
last, one line of JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import small_model
from sa2va_i import Sa2VAiModel
from sa2va_i.evaluation.runner import expression_prompt


class Counter:
    """What passes through SAM 2, the vision model and the language model."""

    def __init__(self, model: Sa2VAiModel):
        self.seen = {}
        self.start()
        model.propagator.vision_encoder.register_forward_pre_hook(self._count("SAM 2 frames"), with_kwargs=True)
        model.vision_model.register_forward_pre_hook(self._count("vision frames"), with_kwargs=True)
        model.get_decoder().register_forward_pre_hook(self._count_tokens, with_kwargs=True)

    def start(self) -> None:
        self.seen = {"SAM 2 frames": 0, "vision frames": 0, "prompt tokens": 0}

    def _count(self, what: str):
        def count(module, args, kwargs) -> None:
            self.seen[what] += len(args[0] if args else kwargs["pixel_values"])

        return count

    def _count_tokens(self, module, args, kwargs) -> None:
        if kwargs.get("inputs_embeds") is not None:  # generated tokens come as ids
            self.seen["prompt tokens"] += kwargs["inputs_embeds"].shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--expressions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = small_model.build()
    small_model.always_answer_seg(model)
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    video = [Image.fromarray(np.roll(noise, 3 * frame_idx, axis=1)) for frame_idx in range(arguments.frames)]
    texts = [expression_prompt(f"object {number}") for number in range(arguments.expressions)]
    counter = Counter(model)

    def together() -> list[np.ndarray]:
        masks = [masks for _, masks in model.segment_each(video, texts)]
        return [np.concatenate(of_text) for of_text in zip(*masks, strict=True)]

    def one_by_one() -> list[np.ndarray]:
        return [model.predict_forward(video=video, text=text)["prediction_masks"][0] for text in texts]

    contenders = {"together": together, "one by one": one_by_one}
    results, seconds, seen = {}, {name: [] for name in contenders}, {}
    for name, run in contenders.items():  # warm-up, and what each sees
        counter.start()
        results[name] = run()
        seen[name] = dict(counter.seen)
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    differing = np.mean([(a != b).mean() for a, b in zip(*results.values(), strict=True)])

    speed = {name: arguments.expressions / statistics.median(times) for name, times in seconds.items()}
    print(f"{'':12}" + "".join(f"{what:>15}" for what in (*counter.seen, "expressions/s")))
    for name in contenders:
        print(f"{name:12}" + "".join(f"{count:15}" for count in seen[name].values()) + f"{speed[name]:15.2f}")
    ratio = speed["together"] / speed["one by one"]
    print(f"together is x{ratio:.2f}; differing pixels {differing:.1e}")
    record = {
        "device": f"cpu ({platform.machine()})",
        "dtype": "float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "frames": arguments.frames,
        "expressions": arguments.expressions,
        "seen": seen,
        "expressions_per_second": {name: round(value, 2) for name, value in speed.items()},
        "ratio": round(ratio, 2),
        "differing_pixels": float(differing),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
