"""Peak memory of converting the 26B checkpoint: every key and shape of it, in files of zeros that take no disk.

    python benchmarks/convert_memory.py /path/with/60GB/free      # the whole 26B: 52 GB are written, then removed
    python benchmarks/convert_memory.py /tmp --layers 2           # two layers of each tower; the same largest tensor

The bound is twice the largest tensor and 500 MB. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAM2 = "grounding_encoder.sam2_model."
SHARD_BYTES = 5_000_000_000
# InternLM2.5-20B and InternViT-6B
LLM = {
    "model_type": "internlm2",
    "bias": False,
    "vocab_size": 92553,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
VISION = {
    "model_type": "intern_vit_6b",
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 448,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
}


def published_config(layers: int | None) -> dict:
    llm, vision = dict(LLM), dict(VISION)
    if layers is not None:
        llm["num_hidden_layers"] = vision["num_hidden_layers"] = layers
    return {
        "model_type": "sa2va_chat",
        "vision_config": vision,
        "llm_config": llm,
        "select_layer": -1,
        "ps_version": "v2",
        "force_image_size": 448,
        "downsample_ratio": 0.5,
        "template": "qwen_chat",  # of the small tokenizer that stands in for InternLM2's
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "use_thumbnail": True,
        "torch_dtype": "bfloat16",
    }


def published_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every key of the published checkpoint with its shape."""
    llm, vision = config["llm_config"], config["vision_config"]
    width, inner, vocab = llm["hidden_size"], llm["intermediate_size"], llm["vocab_size"]
    head = width // llm["num_attention_heads"]
    shapes = {
        "language_model.model.tok_embeddings.weight": (vocab, width),
        "language_model.model.norm.weight": (width,),
        "language_model.output.weight": (vocab, width),
    }
    for layer in range(llm["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}."
        shapes |= {
            prefix + "attention.wqkv.weight": (
                (llm["num_attention_heads"] + 2 * llm["num_key_value_heads"]) * head,
                width,
            ),
            prefix + "attention.wo.weight": (width, width),
            prefix + "feed_forward.w1.weight": (inner, width),
            prefix + "feed_forward.w2.weight": (width, inner),
            prefix + "feed_forward.w3.weight": (inner, width),
            prefix + "attention_norm.weight": (width,),
            prefix + "ffn_norm.weight": (width,),
        }
    side, inner = vision["hidden_size"], vision["intermediate_size"]
    shapes |= {
        "vision_model.embeddings.class_embedding": (1, 1, side),
        "vision_model.embeddings.position_embedding": (1, 1025, side),
        "vision_model.embeddings.patch_embedding.weight": (side, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (side,),
    }
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"vision_model.encoder.layers.{layer}."
        shapes |= {prefix + name: (side,) for name in ("norm1.weight", "norm2.weight", "ls1", "ls2", "attn.proj.bias")}
        shapes |= {prefix + name: (side,) for name in ("attn.q_norm.weight", "attn.k_norm.weight", "mlp.fc2.bias")}
        shapes |= {
            prefix + "attn.qkv.weight": (3 * side, side),
            prefix + "attn.proj.weight": (side, side),
            prefix + "mlp.fc1.weight": (inner, side),
            prefix + "mlp.fc1.bias": (inner,),
            prefix + "mlp.fc2.weight": (side, inner),
        }
    return shapes | rest_of_the_shapes(config)


def rest_of_the_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Projector, `text_hidden_fcs` and SAM 2 at Hiera-L: the reference checkpoint's keys, the model's shapes."""
    import torch

    from sa2va_i import Sa2VAiModel
    from sa2va_i.checkpoint_layout import SAM2_HIERA_LARGE, convert_config, make_plan

    ours = convert_config(config, SAM2_HIERA_LARGE)
    with torch.device("meta"):
        model = Sa2VAiModel(ours).state_dict()
    recipe = json.loads((ROOT / "tests/reference/recipe.json").read_text())
    keys = [key for key in recipe["order"] if not key.startswith(("vision_model.", "language_model."))]
    block = re.compile(r"(.*\.trunk\.blocks\.)\d+(\..*)")
    names = {match.groups() for key in keys if (match := block.match(key))}
    keys = [key for key in keys if not block.match(key)]
    keys += [f"{before}{number}{after}" for number in range(48) for before, after in sorted(names)]
    shapes = {}
    for target, made in make_plan(keys, ours, "internlm2").items():
        if target in model:  # only the first block of a stage has a projection
            shape = tuple(model[target].shape)
            parts = len(made.keys)
            shapes |= dict.fromkeys(made.keys, (shape[0] // parts, *shape[1:]))
    return shapes


def write_fake(folder: Path, layers: int | None) -> int:
    """The checkpoint as sparse files; returns the bytes of its largest tensor."""
    import torch

    from sa2va_i.safetensors_io import header_bytes, num_bytes

    config = published_config(layers)
    shutil.copytree(ROOT / "tests/reference/checkpoint_files", folder)
    (folder / "config.json").write_text(json.dumps(config))
    shards, size = [{}], 0
    for key, shape in published_shapes(config).items():
        like = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        if size + num_bytes([like]) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = like
        size += num_bytes([like])
    for number, shard in enumerate(shards, start=1):
        with (folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors").open("wb") as file:
            file.write(header_bytes(shard))
            file.truncate(file.tell() + num_bytes(shard.values()))
    return max(num_bytes([like]) for shard in shards for like in shard.values())


def measure(source: Path, out: Path) -> dict:
    from sa2va_i.convert_checkpoint import convert_checkpoint

    start = time.monotonic()
    convert_checkpoint(source, out, progress=True)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mb": round(peak_mb), "seconds": round(time.monotonic() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the result fits")
    parser.add_argument("--layers", type=int, help="layers of each tower, in the place of 48 and 45")
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        largest = write_fake(source, arguments.layers)
        command = [sys.executable, __file__, str(arguments.folder), "--measure", str(source), str(out)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        run = json.loads(output.splitlines()[-1])
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    bound_mb = 2 * largest / 2**20 + 500
    print(f"{'written':>12} {'largest':>10} {'peak':>10} {'bound':>10} {'time':>8}")
    memory = f"{largest / 2**20:7.0f} MB {run['peak_mb']:7} MB {bound_mb:7.0f} MB"
    print(f"{written / 1e9:9.1f} GB {memory} {run['seconds']:6} s")
    record = {
        "device": f"cpu ({platform.machine()})",
        "layers": arguments.layers,
        "written_gb": round(written / 1e9, 1),
    }
    print(json.dumps({**record, "largest_mb": round(largest / 2**20), "bound_mb": round(bound_mb), **run}))
    if run["peak_mb"] > bound_mb:
        sys.exit("The peak is over the bound.")


if __name__ == "__main__":
    main()
