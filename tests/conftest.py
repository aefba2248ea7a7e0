"""A small Sa2VA-i with random weights, the converted reference checkpoints, and videos made on the spot."""

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# before transformers is imported: no network, and remote code copied to a place of its own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="sa2va-i-modules-")

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import small_model as small_model_builder
from sa2va_i import Sa2VAiConfig, Sa2VAiModel, Sa2VAiProcessor
from sa2va_i.convert_checkpoint import convert_checkpoint
from sa2va_i.overlay import VideoWriter

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def tokenizer():
    return small_model_builder.load_tokenizer()


@pytest.fixture(scope="session")
def small_config(tokenizer) -> Sa2VAiConfig:
    return small_model_builder.config_for(tokenizer)


@pytest.fixture(scope="session")
def small_model() -> Sa2VAiModel:
    """Random weights with which objects come and go and masks move."""
    return small_model_builder.build()


@pytest.fixture(scope="session")
def seg_model() -> Sa2VAiModel:
    """A small model that answers every prompt with one `[SEG]`."""
    model = small_model_builder.build()
    small_model_builder.always_answer_seg(model)
    return model


@pytest.fixture(scope="session")
def small_processor(small_model) -> Sa2VAiProcessor:
    return small_model.processor


@pytest.fixture(scope="session")
def small_checkpoint(small_model, tokenizer, tmp_path_factory) -> Path:
    """The small model as a folder for `from_pretrained`."""
    folder = tmp_path_factory.mktemp("small")
    small_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def answering() -> Callable[[Sa2VAiModel, str], AbstractContextManager]:
    """`with answering(model, "It is [SEG]."):` makes the model give this answer, whatever it is asked."""

    @contextmanager
    def force(model: Sa2VAiModel, answer: str | list[int]) -> Iterator[None]:
        token_ids = model.processor.tokenizer(answer).input_ids if isinstance(answer, str) else answer
        remaining = iter(token_ids)

        def favour_next(module, args, logits):
            logits = logits.clone()
            logits[..., next(remaining)] = 1e4
            return logits

        handle = model.language_model.lm_head.register_forward_hook(favour_next)
        try:
            yield
        finally:
            handle.remove()

    return force


@pytest.fixture(scope="session")
def frames() -> list[Image.Image]:
    """12 frames of a disk that crosses a textured ground, 80 x 60."""
    noise = np.random.default_rng(0).integers(60, 120, (60, 80, 3), dtype=np.uint8)
    frames = []
    for frame_idx in range(12):
        frame = Image.fromarray(noise.copy())
        x = 5 + 5 * frame_idx
        ImageDraw.Draw(frame).ellipse((x, 20, x + 18, 38), fill=(230, 40, 40))
        frames.append(frame)
    return frames


@pytest.fixture(scope="session")
def video_file(frames, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "disk.mp4"
    with VideoWriter(path, fps=10) as writer:
        for frame in frames:
            writer.write(frame)
    return path


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """Folder of the reference weights as published: `sa2va/`, `sa2va_i/`, `sam2.pt`."""
    spec = importlib.util.spec_from_file_location("build_checkpoints", REFERENCE / "build_checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("sources")
    module.build(folder)
    return folder


@pytest.fixture(scope="session")
def sam2_config() -> dict:
    return json.loads((REFERENCE / "sam2_config.json").read_text())


@pytest.fixture(scope="session")
def converted(sources, sam2_config, tmp_path_factory) -> Path:
    """The plain Sa2VA reference checkpoint, converted with the original decoder of the SAM 2 file."""
    out = tmp_path_factory.mktemp("converted") / "sa2va_i"
    return convert_checkpoint(sources / "sa2va", out, sam2=sources / "sam2.pt", sam2_config=sam2_config)


@pytest.fixture(scope="session")
def reference_model(converted) -> Sa2VAiModel:
    return Sa2VAiModel.from_pretrained(converted)
