"""The small model as it is shipped: weights in float16, to be computed with in float32.

python -m sa2va_i.training.small.pack MODEL OUT
"""

import argparse
from pathlib import Path

import torch

from ...loading import load
from ...publish import save_package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.model)
    save_package(model.half(), model.processor.tokenizer, arguments.out, loaded_as=torch.float32)


if __name__ == "__main__":
    main()
