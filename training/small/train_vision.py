"""The small vision model: dense pretraining on synthetic scenes, from scratch, before it learns to be put into words.

python -m sa2va_i.training.small.train_vision OUT
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from ...processing_sa2va_i import IMAGENET_MEAN, IMAGENET_STD, to_pixel_values
from .loop import run
from .pixels import PixelHeads, pixel_phase

VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 8,
    "attention_bias": True,
    "use_mean_pooling": True,
    "layer_scale_init_value": 1.0,
}


def build_vision(seed: int = 0) -> InternVLVisionModel:
    """The vision model with weights to start from."""
    torch.manual_seed(seed)
    model = InternVLVisionModel(InternVLVisionConfig(**VISION))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.embeddings.position_embeddings, std=0.1)
    nn.init.normal_(model.embeddings.cls_token, std=0.1)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, heads = build_vision(), PixelHeads([VISION["hidden_size"]])
    side = VISION["image_size"] // VISION["patch_size"]

    def encode(images: list[Image.Image]) -> list[Tensor]:
        pixel_values = to_pixel_values(images, VISION["image_size"], IMAGENET_MEAN, IMAGENET_STD)
        patches = model(pixel_values).last_hidden_state[:, 1:]
        return [patches.transpose(1, 2).unflatten(2, (side, side))]

    run(arguments.out, {"vision": model, "heads": heads}, [pixel_phase(encode, heads, arguments.steps)])
    model.eval().save_pretrained(arguments.out / "vision")


if __name__ == "__main__":
    main()
