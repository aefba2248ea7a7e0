"""Which parts of the model train, by how much, and how they become plain weights again."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, LoraModel

from ..modeling_sa2va_i import Sa2VAiModel

PARTS = ("vision_model", "mlp1", "language_model", "text_hidden_fcs", "grounding_encoder")
# Heads of the fine-tuned decoder that no loss reaches: masks are chosen by the one and not gated by the other
UNREACHED = ("iou_prediction_head", "pred_obj_score_head")
ADAPTER = "default"


@dataclass(frozen=True)
class Lora:
    """Rank, scale and dropout of the language model's low-rank updates (the paper's)."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05


def set_trained(model: Sa2VAiModel, parts: Sequence[str], lora: Lora | None) -> LoraModel | None:
    """Freeze everything but `parts`; the language model among them trains whole, or through LoRA.

    With LoRA, its embeddings and head train whole. `propagator` never trains: it is the original SAM 2.

    Returns:
        What `merge` takes.
    Raises:
        ValueError: a part is not one of `PARTS`.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"`trained` must be of {PARTS}. Got {unknown}.")
    model.requires_grad_(False)
    for part in parts:
        getattr(model, part).requires_grad_(True)
    for name in UNREACHED:
        getattr(model.grounding_encoder, name).requires_grad_(False)
    if lora is None or "language_model" not in parts:
        return None
    model.language_model.requires_grad_(False)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapter = LoraModel(model.language_model, {ADAPTER: config}, ADAPTER)
    model.get_input_embeddings().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    return adapter


def merge(model: Sa2VAiModel, adapter: LoraModel | None) -> None:
    """Add the low-rank updates to the language model's weights, and take their layers out."""
    if adapter is not None:
        model.language_model = adapter.merge_and_unload()
