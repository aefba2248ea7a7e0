"""The reference weights, in the layouts that users have: `python build_checkpoints.py OUT`.

OUT/sa2va/    plain Sa2VA: one mask decoder, the fine-tuned one
OUT/sam2.pt   Meta's SAM 2 file: the original decoder
OUT/sa2va_i/  published Sa2VA-i: both
"""

import json
import shutil
import sys
import zlib
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

HERE = Path(__file__).parent
SAM2 = "grounding_encoder.sam2_model."
ORIGINAL, FINE_TUNED = SAM2 + "sam_mask_decoder.", SAM2 + "sam_mask_decoder_modified."

Weights = dict[str, torch.Tensor]


def reference_weights() -> Weights:
    """Every tensor, under the keys of a published Sa2VA-i checkpoint."""
    recipe = json.loads((HERE / "recipe.json").read_text())
    weights = load_file(HERE / "overrides.safetensors")
    for key, noise in recipe["tensors"].items():
        seed = (zlib.crc32(key.encode()) + recipe["seed"]) % 2**31
        sample = torch.randn(noise["shape"], generator=torch.Generator().manual_seed(seed))
        weights[key] = sample * noise["std"] + noise["mean"]
    return weights


def as_sa2va(weights: Weights) -> Weights:
    rest = {key: tensor for key, tensor in weights.items() if not key.startswith((ORIGINAL, FINE_TUNED))}
    fine_tuned = {key.replace(FINE_TUNED, ORIGINAL): t for key, t in weights.items() if key.startswith(FINE_TUNED)}
    return rest | fine_tuned


def as_sam2(weights: Weights) -> Weights:
    """Meta's names; the layer scale is `gamma` there and `g_weight` in Sa2VA checkpoints."""
    sam2 = {key: t for key, t in weights.items() if key.startswith(SAM2) and not key.startswith(FINE_TUNED)}
    return {key.removeprefix(SAM2).replace("g_weight", "gamma"): tensor for key, tensor in sam2.items()}


def save_checkpoint(folder: Path, weights: Weights) -> None:
    shutil.copytree(HERE / "checkpoint_files", folder)
    save_torch_state_dict(weights, folder, max_shard_size="20MB")


def build(out: Path) -> None:
    weights = reference_weights()
    save_checkpoint(out / "sa2va_i", weights)
    save_checkpoint(out / "sa2va", as_sa2va(weights))
    torch.save({"model": as_sam2(weights)}, out / "sam2.pt")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
