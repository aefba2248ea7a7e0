"""Memory attention alone, of one frame: ours for K objects at once, transformers' module for one after the other.

    python benchmarks/memory_attention.py
    python benchmarks/memory_attention.py --device cuda --dtype bfloat16 --objects 1 10

Hiera-L's size (4,096 tokens a frame) with random weights; 5 prompt frames, one tracked frame, 6 pointers. The last line
is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from measure import environment, interleaved
from propagation import hiera_large

from sa2va_i.sam2_propagator import FrameFeatures, PromptMemory, Sam2Propagator
from small_model import randomize

NUM_PROMPTS, NUM_POINTERS, SIDE = 5, 6, 64


@torch.no_grad()
def compare(propagator: Sam2Propagator, num_objects: int, repeats: int) -> dict[str, float]:
    device, dtype = propagator.device, propagator.dtype
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    image = noise(1, 256, SIDE, SIDE)
    memories = [noise(num_objects, SIDE**2, 64).bfloat16() for _ in range(NUM_PROMPTS + 1)]
    pointers = [noise(num_objects, 256) for _ in range(NUM_POINTERS)]
    *of_prompts, tracked = memories
    prompts = [PromptMemory(memory, propagator.prompt_keys(memory), pointers[0]) for memory in of_prompts]
    image_position = propagator.vision_encoder.neck.position_encoding(image.shape, device, dtype)
    spatial = propagator.memory_encoder.position_encoding(torch.Size((1, 64, SIDE, SIDE)), device, dtype)
    spatial, temporal = spatial.flatten(2)[0].T, propagator.memory_temporal_positional_encoding[:, 0, 0]
    position = [spatial + temporal[6]] * NUM_PROMPTS + [spatial + temporal[0], noise(NUM_POINTERS * 4, 64) * 0]

    def native(number: int) -> Tensor:
        tokens = [memory[[number]].to(dtype) for memory in memories]
        tokens += [pointer[number].reshape(1, 4, 64) for pointer in pointers]
        recalled = propagator.memory_attention(
            current_vision_features=image.flatten(2).permute(2, 0, 1),
            current_vision_position_embeddings=image_position.flatten(2).permute(2, 0, 1),
            memory=torch.cat(tokens, dim=1).transpose(0, 1),
            memory_posision_embeddings=torch.cat(position)[:, None],
            num_object_pointer_tokens=NUM_POINTERS * 4,
        )
        return recalled.reshape(SIDE, SIDE, 256).permute(2, 0, 1)

    def one_by_one() -> Tensor:
        return torch.stack([native(number) for number in range(num_objects)])

    def ours() -> Tensor:
        return propagator.recall(FrameFeatures(image, image, image), prompts, [(0, tracked)], pointers)

    gap = (ours() - one_by_one()).abs().max().item()  # and warm-up
    seconds = interleaved({"ours": ours, "native": one_by_one}, repeats, device)
    ratio = seconds["native"] / seconds["ours"]
    times = f"ours {seconds['ours']:.3f} s, native {seconds['native']:.3f} s"
    print(f"K = {num_objects}: {times}, x{ratio:.2f}, gap {gap:.1e}")
    return {"objects": num_objects, **seconds, "ratio": ratio, "largest_gap": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    propagator = Sam2Propagator(hiera_large(1024)).eval()
    randomize(propagator, seed=0)
    propagator.to(device, dtype)
    rows = [compare(propagator, num_objects, arguments.repeats) for num_objects in arguments.objects]
    print(json.dumps({**environment(device, dtype), "rows": rows}))


if __name__ == "__main__":
    main()
