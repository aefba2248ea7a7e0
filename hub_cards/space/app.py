"""The Space: `sa2va-i demo`'s page, with the model on ZeroGPU, on a GPU of the Space's own, or on its CPU.

Settings of the Space (variables): MODEL, a folder or Hub id.
"""

import os

import spaces
import torch

from sa2va_i import load
from sa2va_i.space.page import build_page, serve
from sa2va_i.space.service import Service

MODEL = os.environ.get("MODEL", "kumuji/Sa2VA-i-1B")

if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()  # on ZeroGPU `spaces` answers yes, and moves the model when a GPU is there
    model = load(MODEL, dtype="bfloat16" if on_gpu else "auto").to("cuda" if on_gpu else "cpu").eval()
    service = Service(model)
    about = f"Model: [{MODEL}](https://huggingface.co/{MODEL}), [paper](https://arxiv.org/abs/2509.19082)."
    serve(build_page(service, about, on_gpu=spaces.GPU(duration=120)), service)
