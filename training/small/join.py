"""The small Sa2VA-i with the trained small SAM 2: what the recipe starts from.

    python -m sa2va_i.training.small.join WORDS SAM2 OUT

WORDS: the model that has learnt to answer. SAM2: the folder that `train_sam2` made.
"""

import argparse
from pathlib import Path

from ...loading import load
from ...modeling_sa2va_i import Sa2VAiModel
from ...publish import save_package
from ...sam2_propagator import Sam2Propagator


def join(model: Sa2VAiModel, sam2: Sam2Propagator) -> None:
    """Put `sam2` into the model. The fine-tuned decoder starts as a copy of its decoder, as in Sa2VA."""
    model.propagator.load_state_dict(sam2.state_dict())
    model.grounding_encoder.load_state_dict(sam2.mask_decoder.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", type=Path)
    parser.add_argument("sam2", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.words)
    join(model, Sam2Propagator.from_pretrained(arguments.sam2))
    save_package(model, model.processor.tokenizer, arguments.out)


if __name__ == "__main__":
    main()
