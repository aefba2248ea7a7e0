"""The small Sa2VA-i with the trained small SAM 2: what the recipe starts from.

    python -m sa2va_i.training.small.join WORDS SAM2 OUT

WORDS: the model that has learnt to answer. SAM2: the folder that `train_sam2` made.
"""

import argparse
import copy
from pathlib import Path

from ...loading import load
from ...modeling_sa2va_i import Sa2VAiModel
from ...publish import save_package
from ...sam2_propagator import Sam2Propagator


def join(words: Sa2VAiModel, sam2: Sam2Propagator) -> Sa2VAiModel:
    """`words` with `sam2` in the place of its own, and a copy of its decoder to be fine-tuned, as in Sa2VA."""
    config = copy.deepcopy(words.config)
    config.sam2_config = sam2.config
    config.sam2_config.name_or_path = ""  # a folder of the training's
    model = Sa2VAiModel(config).eval()
    for name, part in words.named_children():
        if name not in ("propagator", "grounding_encoder"):
            getattr(model, name).load_state_dict(part.state_dict())
    model.propagator.load_state_dict(sam2.state_dict())
    model.grounding_encoder.load_state_dict(sam2.mask_decoder.state_dict())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", type=Path)
    parser.add_argument("sam2", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    words = load(arguments.words)
    model = join(words, Sam2Propagator.from_pretrained(arguments.sam2))
    model.generation_config = words.generation_config
    save_package(model, words.processor.tokenizer, arguments.out)


if __name__ == "__main__":
    main()
