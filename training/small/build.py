"""The small Sa2VA-i before its training: the small vision model, and a language model and SAM 2 from scratch.

    python -m sa2va_i.training.small.build VISION OUT

VISION: the folder that `train_vision` made. The answer is learnt without SAM 2; `join` puts the trained one in. The
tokenizer is a byte-level BPE of the words of
`training/wording.py` and `training/synthetic.py`; other words are spelled out in pieces.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import InternVLVisionModel, PreTrainedTokenizerFast

from ...configuration_sa2va_i import Sa2VAiConfig
from ...modeling_sa2va_i import Sa2VAiModel
from ...processing_sa2va_i import IMG_CONTEXT, IMG_END, IMG_START, REGION_END, REGION_START, SEG
from ...publish import save_package
from ..data import describe_scene
from ..synthetic import Scene
from ..wording import ANSWERS, DESCRIPTION_QUESTIONS, IMAGE_QUESTIONS, VIDEO_QUESTIONS, named_answer
from .train_sam2 import build_sam2

VOCAB_SIZE = 512
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(IMG_START, IMG_END, IMG_CONTEXT, REGION_START, REGION_END, SEG, "<p>", "</p>"),
)
LANGUAGE = {
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 160,
    "intermediate_size": 416,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 4096,
}


def sentences(num_scenes: int = 400) -> Iterator[str]:
    """Text as it stands in training."""
    random = np.random.default_rng(0)
    yield from ("user\n", "assistant\n", *ANSWERS, *DESCRIPTION_QUESTIONS)
    for seed in range(num_scenes):
        scene = Scene(seed)
        yield describe_scene(scene)
        for expression in scene.expressions():
            yield str(random.choice([*VIDEO_QUESTIONS, *IMAGE_QUESTIONS])).format(expression.text)
            yield named_answer([scene.name(target) for target in expression.targets])


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=4096,
    )


def build(vision: InternVLVisionModel, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Sa2VAiModel:
    """The model with weights to start from."""
    config = Sa2VAiConfig(
        vision_config=vision.config.to_dict(),
        llm_config={**LANGUAGE, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        sam2_config=build_sam2().config.to_dict(),
        seg_token_id=tokenizer.convert_tokens_to_ids(SEG),
        img_context_token_id=tokenizer.convert_tokens_to_ids(IMG_CONTEXT),
        max_dynamic_patch=1,  # images as single tiles, like the frames it is trained on
        architectures=["Sa2VAiModel"],
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Sa2VAiModel(config)
    for part in (model.mlp1, model.language_model, model.text_hidden_fcs):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    model.vision_model.load_state_dict(vision.state_dict())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vision", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    tokenizer = build_tokenizer()
    model = build(InternVLVisionModel.from_pretrained(arguments.vision), tokenizer)
    save_package(model, tokenizer, arguments.out)
    sizes = {name: sum(one.numel() for one in part.parameters()) for name, part in model.named_children()}
    print(f"{sum(sizes.values()) / 1e6:.2f} M parameters: {sizes}")


if __name__ == "__main__":
    main()
