"""Requests about one video, from frames and sentences to masks: where time goes, and what the hardware would allow.

    python benchmarks/end_to_end.py      # on the CPU: a small random model, 8 prompts, 40 frames
    python benchmarks/end_to_end.py --device cuda --dtype bfloat16 --size 4b --frames 60 --prompts 1 8

A 4B-size model is InternViT-300M, a language model of Qwen2.5-3B's size and Hiera-L at 1024 px, with random weights;
the language model is made to answer `[SEG]` to everything. Contenders, taking turns: all prompts together
(`segment_each`), and one after the other (`predict_forward`).

For the first, seconds of each stage beside its roofline: its arithmetic at the machine's matrix rate, and for the
answers no less than what it takes to read the language model's weights once a token. Prints the frames seen by SAM 2's
image encoder and by the vision model, the tokens read by the language model, prompts per second, and, last, one line of
JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from measure import (
    copy_rate,
    count_flops,
    environment,
    interleaved,
    matrix_rate,
    peak_mb,
    reset_peak,
    timed,
)

import small_model
from sa2va_i import Sa2VAiConfig, Sa2VAiModel
from sa2va_i.checkpoint_layout import SAM2_HIERA_LARGE
from sa2va_i.evaluation.runner import expression_prompt

SIZE = (854, 480)  # of the video: width, height
VISION_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "attention_bias": True,
    "use_mean_pooling": True,
}
LANGUAGE_3B = {
    "model_type": "qwen2",
    "vocab_size": 151680,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}


def build(size: str, device: torch.device, dtype: torch.dtype) -> Sa2VAiModel:
    if size == "small":
        model = small_model.build().to(device, dtype)
    else:
        tokenizer = small_model.load_tokenizer()
        config = Sa2VAiConfig(
            vision_config=VISION_300M,
            llm_config=LANGUAGE_3B,
            sam2_config=SAM2_HIERA_LARGE,
            seg_token_id=tokenizer.convert_tokens_to_ids("[SEG]"),
            img_context_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        )
        with torch.device(device):
            model = Sa2VAiModel._from_config(config, dtype=dtype).eval()
        model.preparing_for_generation(tokenizer, max_new_tokens=12)
    small_model.always_answer_seg(model)
    return model


class Counter:
    """What passes through SAM 2, the vision model and the language model."""

    def __init__(self, model: Sa2VAiModel):
        self.seen = {}
        self.start()
        model.propagator.vision_encoder.register_forward_pre_hook(self._count("SAM 2 frames"), with_kwargs=True)
        model.vision_model.register_forward_pre_hook(self._count("vision frames"), with_kwargs=True)
        model.get_decoder().register_forward_pre_hook(self._count_tokens, with_kwargs=True)

    def start(self) -> None:
        self.seen = {"SAM 2 frames": 0, "vision frames": 0, "prompt tokens": 0, "answer tokens": 0}

    def _count(self, what: str) -> Callable:
        def count(module, args, kwargs) -> None:
            self.seen[what] += len(args[0] if args else kwargs["pixel_values"])

        return count

    def _count_tokens(self, module, args, kwargs) -> None:
        if kwargs.get("inputs_embeds") is not None:
            self.seen["prompt tokens"] += kwargs["inputs_embeds"].shape[1]
        else:  # generated tokens come as ids
            self.seen["answer tokens"] += kwargs["input_ids"].shape[1]


def together(model: Sa2VAiModel, video: list[Image.Image], texts: list[str]) -> list[np.ndarray]:
    masks = [masks for _, masks in model.segment_each(video, texts)]
    return [np.concatenate(of_text) for of_text in zip(*masks, strict=True)]


def one_by_one(model: Sa2VAiModel, video: list[Image.Image], texts: list[str]) -> list[np.ndarray]:
    return [model.predict_forward(video=video, text=text)["prediction_masks"][0] for text in texts]


def stages(model: Sa2VAiModel, video: list[Image.Image], texts: list[str], counter: Counter) -> dict[str, Any]:
    """Seconds and roofline of the answers and of the masks, of which SAM 2's image encoder has a part."""
    device, dtype = model.device, model.dtype
    rate, bandwidth = matrix_rate(device, dtype), copy_rate(device)
    counter.start()
    segmentations, flops_of_answers = count_flops(lambda: model.segment_each(video, texts))
    weights = sum(parameter.nbytes for parameter in model.language_model.parameters())
    reading = counter.seen["answer tokens"] * weights / bandwidth
    _, flops_of_masks = count_flops(lambda: list(segmentations))
    pixels = model.processor.sam2_pixel_values(video[:1])
    with torch.no_grad():
        _, flops_of_frame = count_flops(lambda: model.propagator.encode_images(pixels))
    segmentations, seconds_of_answers = timed(lambda: model.segment_each(video, texts), device)
    _, seconds_of_masks = timed(lambda: list(segmentations), device)
    roofs = {
        "answers": flops_of_answers / rate + reading,
        "encoding": len(video) * flops_of_frame / rate,
        "tracking": (flops_of_masks - len(video) * flops_of_frame) / rate,
    }
    return {
        "seconds": {"answers": round(seconds_of_answers, 3), "masks": round(seconds_of_masks, 3)},
        "roofline_seconds": {name: round(roof, 3) for name, roof in roofs.items()},
        "times_roofline": round((seconds_of_answers + seconds_of_masks) / sum(roofs.values()), 2),
        "matrix_gflops_per_second": round(rate / 1e9),
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
    }


def run_setting(
    model: Sa2VAiModel, counter: Counter, num_frames: int, num_prompts: int, repeats: int
) -> dict[str, Any]:
    device = model.device
    noise = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    video = [Image.fromarray(np.roll(noise, 3 * frame_idx, axis=1)) for frame_idx in range(num_frames)]
    texts = [expression_prompt(f"object {number}") for number in range(num_prompts)]
    contenders = {"together": together, "one by one": one_by_one}
    masks, seen = {}, {}
    for name, run in contenders.items():  # warm-up, and what each sees
        counter.start()
        masks[name] = run(model, video, texts)
        seen[name] = dict(counter.seen)
    reset_peak(device)
    runs = {name: lambda run=run: run(model, video, texts) for name, run in contenders.items()}
    seconds = interleaved(runs, repeats, device)
    differing = np.mean([(a != b).mean() for a, b in zip(*masks.values(), strict=True)])
    ratio = seconds["one by one"] / seconds["together"]

    print(f"\nT = {num_frames}, {num_prompts} prompts")
    print(f"{'':12}" + "".join(f"{what:>15}" for what in (*counter.seen, "prompts/s")))
    for name, counts in seen.items():
        print(
            f"{name:12}" + "".join(f"{count:15}" for count in counts.values()) + f"{num_prompts / seconds[name]:15.2f}"
        )
    print(f"together is x{ratio:.2f}; differing pixels {differing:.1e}")
    of_stages = stages(model, video, texts, counter)
    print(f"stages: {of_stages}", flush=True)
    return {
        "frames": num_frames,
        "prompts": num_prompts,
        "seen": seen,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratio": round(ratio, 2),
        "differing_pixels": float(differing),
        "peak_mb": round(peak_mb(device)),
        "stages": of_stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", default="small", choices=["small", "4b"])
    parser.add_argument("--frames", type=int, nargs="+", default=[40])
    parser.add_argument("--prompts", type=int, nargs="+", default=[8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="compile SAM 2 first")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    model = build(arguments.size, device, dtype)
    counter = Counter(model)
    if arguments.compiled:
        model.compile_for_video()
    settings = [
        run_setting(model, counter, num_frames, num_prompts, arguments.repeats)
        for num_frames in arguments.frames
        for num_prompts in arguments.prompts
    ]
    print(json.dumps({**environment(device, dtype), "size": arguments.size, "settings": settings}))


if __name__ == "__main__":
    main()
