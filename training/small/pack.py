"""The small model as it is shipped: weights in float16, to be computed with in float32.

python -m sa2va_i.training.small.pack MODEL OUT
"""

import argparse
from pathlib import Path

import torch

from ...files import staged_folder
from ...loading import load
from ...publish import write_package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.model)
    with staged_folder(arguments.out) as staged:
        model.processor.tokenizer.save_pretrained(staged)
        model.half().save_pretrained(staged)
        model.config.dtype = torch.float32  # what `dtype="auto"` loads them as
        write_package(staged, model.config)


if __name__ == "__main__":
    main()
