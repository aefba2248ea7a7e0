"""The Sa2VA-i-FT recipe (arXiv:2509.19082): from a YAML file to a trained checkpoint in this package's layout."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraModel
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..checkpoint_layout import some
from ..evaluation.datasets import DATASETS, open_dataset
from ..files import check_new_folder
from ..loading import load
from ..modeling_sa2va_i import Sa2VAiModel
from ..publish import save_package
from ..safetensors_io import TensorFiles, checkpoint_files
from .data import Conversations, Draw, Mixture, ReferringImages, ReferringVideos, SampleError, Source, SyntheticScenes
from .encode import Collator
from .frames import FRAME_RULES
from .parts import PARTS, Lora, merge, set_trained

logger = logging.get_logger(__name__)

PAPER = {  # TrainingArguments of the paper
    "learning_rate": 4e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.05,
    "warmup_steps": 0.05,  # a share, below 1
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "bf16": torch.accelerator.is_available(),  # on a CPU float32 is faster
    "logging_steps": 10,
    "save_steps": 500,
    "report_to": "none",
}
ON_ERROR = ("stop", "skip")
LAST = "last"  # folder, in that of the run, of what the Trainer saves at the end


@dataclass
class TrainConfig:
    """What `sa2va-i train` reads.

    Args:
        model: folder or Hub id of the checkpoint to start from, converted or published.
        out: folder to make for the result; `<out>.run` beside it holds checkpoints and logs.
        data: one entry a source, `{source: NAME, repeats: 1, ...}`, see `make_source`.
        num_frames, sampling: frames of a video in a sample, by `frames.FRAME_RULES`.
        num_objects: objects, each with its question, in a sample.
        max_length: longest sequence in tokens; a longer sample is an error.
        masks: whether masks are learnt beside the text.
        trained: the parts that train, of `parts.PARTS`.
        lora: for the language model, or None to train it whole.
        dtype: of the frozen weights; the trained ones are float32.
        on_error: "stop" at a bad sample, naming it, or "skip" and count it.
        trainer: fields of transformers' `TrainingArguments`, over the paper's.

    Raises:
        ValueError: a field is unknown or out of its range.
    """

    model: str
    out: str
    data: list[dict[str, Any]]
    num_frames: int = 8
    sampling: str = "uniform"
    num_objects: int = 5
    max_length: int = 8192
    masks: bool = True
    trained: list[str] = field(default_factory=lambda: list(PARTS[1:]))
    lora: dict[str, Any] | None = field(default_factory=dict)
    dtype: str = "auto"
    on_error: str = "stop"
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, known in (("sampling", tuple(FRAME_RULES)), ("on_error", ON_ERROR)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}. Got {getattr(self, name)!r}.")
        for name in ("num_frames", "num_objects", "max_length"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1. Got {getattr(self, name)!r}.")
        if not self.data:
            raise ValueError("`data` names no source.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path} must be a YAML mapping of settings. Got {type(content).__name__}.")
        known = {one.name for one in fields(cls)}
        unknown = sorted(content.keys() - known)
        missing = sorted({"model", "out", "data"} - content.keys())
        if unknown or missing:
            raise ValueError(f"{path}: unknown settings {unknown}, missing ones {missing}. Known: {sorted(known)}.")
        return cls(**content)


def train(config: TrainConfig) -> Path:
    """Train, go on where a killed run stopped, and write the merged result as the folder `config.out`.

    Raises:
        FileExistsError: the result is there already.
        SampleError: a sample is bad, or its loss is no number, and `on_error` is "stop".
    """
    out, run = Path(config.out), Path(f"{config.out}.run")
    check_new_folder(out)
    draw = Draw(config.num_frames, config.sampling, config.num_objects)
    sources = [(make_source(entry, draw), entry.get("repeats", 1)) for entry in config.data]
    arguments = TrainingArguments(output_dir=str(run), remove_unused_columns=False, **{**PAPER, **config.trainer})
    set_seed(arguments.seed)  # the Trainer's own call comes after LoRA's weights are drawn
    model, _ = _model_to_train(config)
    trainer = Sa2VAiTrainer(
        model,
        arguments,
        data_collator=Collator(model.processor, config.max_length, config.masks),
        train_dataset=Mixture(sources, arguments.seed, config.on_error),
        on_error=config.on_error,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run) if run.is_dir() else None)
    trainer.save_model(str(run / LAST))  # gathers what FSDP or DeepSpeed share out
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        save_merged(config, run / LAST, out)
    trainer.accelerator.wait_for_everyone()
    return out


def save_merged(config: TrainConfig, trained: Path, out: Path) -> None:
    """Write weights that the Trainer saved, LoRA merged, with tokenizer and code as the folder `out`."""
    model, adapter = _model_to_train(config)
    state = dict(TensorFiles(checkpoint_files(trained)))
    lacking, unknown = model.load_state_dict(state, strict=False)
    lacking = set(lacking) - model.all_tied_weights_keys.keys()
    if lacking or unknown:
        raise ValueError(f"{trained} does not fit {config.model}: {some(sorted(lacking))} {some(sorted(unknown))}.")
    merge(model, adapter)
    save_package(model.to(model.config.dtype), model.processor.tokenizer, out)


def _model_to_train(config: TrainConfig) -> tuple[Sa2VAiModel, LoraModel | None]:
    """The model with the parts that train in float32, and what `merge` takes."""
    model = load(config.model, dtype=config.dtype)
    adapter = set_trained(model, config.trained, None if config.lora is None else Lora(**config.lora))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, adapter


def make_source(entry: dict[str, Any], draw: Draw) -> Source:
    """A source of samples.

    Args:
        entry: `source` names it, and the others are where it lies:
            `mevis-train`, `ref-youtube-vos-train`, `revos-train`, ... (any of `evaluation.datasets.DATASETS` with
            masks): `root`; `refcoco`: `root`, `images`, `split_by`; `conversations`: `file`, `images`; `synthetic`:
            `num_scenes`, `first_seed`, `descriptions`. `repeats`, everywhere: how many times over.
    """
    settings = {name: value for name, value in entry.items() if name not in ("source", "repeats")}
    name = entry.get("source")
    makers: dict[str, Callable[..., Source]] = {
        "refcoco": lambda **places: ReferringImages(**places, draw=draw),
        "conversations": Conversations,
        "synthetic": lambda **numbers: SyntheticScenes(**numbers, draw=draw),
    }
    if name in DATASETS:
        makers[name] = lambda root: ReferringVideos(open_dataset(name, root), draw)
    if name not in makers:
        raise ValueError(f"`source` must be one of {', '.join([*DATASETS, *makers])}. Got {name!r}.")
    try:
        return makers[name](**settings)
    except TypeError as error:
        raise ValueError(f"The settings {sorted(settings)} do not fit the source {name}: {error}") from error


class Sa2VAiTrainer(Trainer):
    """transformers' Trainer; knows which samples a loss is of, and logs the losses one by one."""

    def __init__(self, *args, on_error: str = "stop", **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # each batch's loss is a mean
        self._on_error = on_error
        self._parts: dict[str, list[Tensor]] = {}

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs
    ) -> Tensor | tuple[Tensor, Any]:
        sample_ids = inputs.pop("sample_ids")
        output = model(**inputs)
        loss = output.loss
        if not loss.isfinite():
            loss = self._no_number(model, loss, sample_ids)
        else:
            for name in ("text_loss", "mask_loss", "dice_loss"):
                if output.get(name) is not None:
                    self._parts.setdefault(name, []).append(output[name].detach())
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._parts.items()})
            self._parts.clear()
        if self.train_dataset.num_skipped:
            logs["num_skipped"] = self.train_dataset.num_skipped.item()
        super().log(logs, *args, **kwargs)

    def _no_number(self, model: torch.nn.Module, loss: Tensor, sample_ids: list[str]) -> Tensor:
        """A loss of 0 in its place, whose gradients are 0 too."""
        if self._on_error == "stop":
            raise SampleError(f"The loss is {loss.item()} on the samples {', '.join(sample_ids)}.")
        self.train_dataset.num_skipped += 1
        logger.warning(f"Skipped: the loss is {loss.item()} on the samples {', '.join(sample_ids)}.")
        return sum(0.0 * parameter.sum() for parameter in model.parameters() if parameter.requires_grad)
