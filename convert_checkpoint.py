"""Published Sa2VA and Sa2VA-i checkpoints, and the original SAM 2, to this package's layout.

    convert_checkpoint("ByteDance/Sa2VA-4B", "sa2va-i-4b/", sam2="facebook/sam2-hiera-large")
    convert_checkpoint("Sa2VA-i-1B/", "sa2va-i-1b/")

Which layout a source has is read from its keys. The conversion is strict: every source tensor has a place or stands on
the list of those dropped, every target tensor is filled, every shape agrees, or nothing is written. Tensors pass one by
one from file to file. No code of the source is run.
"""

import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModel

from .checkpoint_layout import SAM2_FILE, SAM2_HIERA_LARGE, Plan, convert_config, make_plan, shared_sam2, some
from .configuration_sa2va_i import Sa2VAiConfig
from .files import check_disk_space, check_new_folder, read_json, staged_folder, write_json
from .internlm2_tokenizer import convert_internlm2_tokenizer
from .modeling_sa2va_i import Sa2VAiModel
from .publish import write_card, write_package
from .safetensors_io import DTYPES, INDEX_FILE, TensorFiles, checkpoint_files, file_sha256, num_bytes, write_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
SOURCE_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt")  # no code, no pickles
MAX_SHARD_SIZE = "5GB"
DISK_MARGIN = 100_000_000  # tokenizer, code, configs
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass
class Hub:
    """How to reach the Hub: a branch, tag or commit; a token; where downloads are kept."""

    revision: str | None = None
    token: str | None = None
    cache_dir: str | Path | None = None

    def download(self, repo_id: str, patterns: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                allow_patterns=list(patterns),
            )
        )


class Weights(Mapping[str, Tensor]):
    """Tensors of several sources, each under its prefix; read when they are asked for."""

    def __init__(self, sources: Mapping[str, Mapping[str, Tensor]]):
        self._places = {prefix + name: (source, name) for prefix, source in sources.items() for name in source}

    def meta(self, key: str) -> Tensor:
        """An empty tensor of this shape and dtype on the meta device."""
        source, name = self._places[key]
        return source.meta(name) if isinstance(source, TensorFiles) else source[name].to("meta")

    def __getitem__(self, key: str) -> Tensor:
        source, name = self._places[key]
        return source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    sam2: str | Path | None = None,
    sam2_config: dict[str, Any] | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    verify: bool = False,
    hub: Hub | None = None,
    progress: bool = False,
) -> Path:
    """Write `source` in this package's layout, with the code that loads it, as the folder `out`.

    Args:
        source: folder or Hub id of a plain Sa2VA or a published Sa2VA-i checkpoint (safetensors).
        out: folder to make. It appears whole or not at all.
        sam2: the original SAM 2, needed for plain Sa2VA: Meta's file (`.pt`), or a folder or Hub id with Meta's file or
            transformers' safetensors.
        sam2_config: fields of `Sam2VideoConfig` for other sizes than Hiera-L.
        dtype: of the written weights: `float32`, `bfloat16`, `float16`; each tensor's own by default.
        max_shard_size: of a weights file, as "5GB".
        verify: load the result and run each part once, where memory allows.
        hub: revision, token and cache for a Hub id.
    Returns:
        `out` as a `Path`.
    Raises:
        FileNotFoundError, FileExistsError: a source is missing, or `out` is there already.
        OSError: the disk is too small.
        ValueError: keys, shapes or settings do not fit; the message names them.
    """
    hub = hub or Hub()
    out = Path(out)
    check_new_folder(out)
    target_dtype = None if dtype is None else _dtype(dtype)
    folder = resolve_source(source, hub)
    source_config = read_json(folder / "config.json")
    config = convert_config(source_config, sam2_config or SAM2_HIERA_LARGE)
    sources: dict[str, Mapping[str, Tensor]] = {"": TensorFiles(checkpoint_files(folder))}
    sam2_file = None
    if sam2 is not None:
        sam2_file = resolve_sam2(sam2, hub)
        sources[SAM2_FILE] = read_sam2(sam2_file)
    weights = Weights(sources)
    plan = make_plan(weights, config, source_config["llm_config"]["model_type"])
    with torch.device("meta"):
        model = Sa2VAiModel(config)
    layout = check_plan(plan, weights, model, target_dtype)
    check_disk_space(out, num_bytes(layout.values()) + DISK_MARGIN)
    check_shared_sam2(plan, weights)
    if target_dtype is not None:
        config.dtype = target_dtype

    with staged_folder(out) as staged:
        write_configs(staged, folder, config)
        hashes = write_weights(staged, plan, layout, weights, max_shard_size, progress)
        write_json(staged / "conversion.json", provenance(source, folder, sam2_file, hashes))
        write_card(staged, repo_id=out.name)
        check_written(staged, layout)
        if verify:
            verify_parts(staged, num_bytes(layout.values()))
    return out


# Sources


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` is written like `owner/name` and nothing on this disk is called so."""
    return not Path(name).exists() and HUB_ID.match(str(name)) is not None


def resolve_source(source: str | Path, hub: Hub) -> Path:
    """The local folder of a checkpoint: itself, or the download of a Hub id."""
    folder = Path(source)
    if is_hub_id(source):
        folder = hub.download(str(source), SOURCE_PATTERNS)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No checkpoint folder with a config.json at {source}, and no Hub id by this name.")
    return folder


def resolve_sam2(sam2: str | Path, hub: Hub) -> Path:
    """The local file of the original SAM 2: transformers' safetensors before Meta's file where a folder holds both."""
    path = Path(sam2)
    if is_hub_id(sam2):
        path = Hub(token=hub.token, cache_dir=hub.cache_dir).download(str(sam2), ("model.safetensors", "*.pt"))
    if path.is_dir():
        files = [*sorted(path.glob("*.safetensors")), *sorted(path.glob("*.pt"))]
        if not files:
            raise FileNotFoundError(f"No .pt and no .safetensors file in {path}.")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"No SAM 2 file at {sam2}, and no Hub id by this name.")
    return path


def read_sam2(file: Path) -> Mapping[str, Tensor]:
    """Tensors of a SAM 2 file: safetensors, or Meta's `{"model": {...}}` without running what a pickle may hold."""
    if file.suffix == ".safetensors":
        return TensorFiles([file])
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} cannot be read as a file of weights alone: {reason}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f'{file} is not one of Meta\'s SAM 2 files: it has no "model".')
    return content["model"]


# Checks before


def check_plan(plan: Plan, weights: Weights, model: Sa2VAiModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Raise a ValueError unless the plan fills the model exactly; returns the tensors to be written, on meta."""
    target = model.state_dict()
    unknown = sorted(plan.keys() - target.keys())
    unfilled = sorted(target.keys() - plan.keys() - model.all_tied_weights_keys.keys())
    if unknown or unfilled:
        raise ValueError(
            f"The checkpoint does not fit: {len(unknown)} source tensors have no place {some(unknown)}, "
            f"{len(unfilled)} of ours are not filled {some(unfilled)}."
        )
    layout = {}
    for key in filter(plan.__contains__, target):  # the model's order, whatever the source's
        recipe = plan[key]
        made = recipe.make(*map(weights.meta, recipe.keys))
        if made.shape != target[key].shape:
            raise ValueError(
                f"{recipe.keys[0]} gives {tuple(made.shape)} and the model has {tuple(target[key].shape)} ({key}). "
                "Sizes of SAM 2 other than Hiera-L are given with --sam2-config."
            )
        layout[key] = torch.empty(made.shape, dtype=dtype or made.dtype, device="meta")
    return layout


def check_shared_sam2(plan: Plan, weights: Weights) -> None:
    """Raise a ValueError if the checkpoint's frozen SAM 2 is not that of the SAM 2 file, beyond bfloat16 rounding."""
    for key, recipe in shared_sam2(weights, plan).items():
        original = weights[key].float()
        shared = recipe.make(*map(weights.__getitem__, recipe.keys)).float()
        if original.shape != shared.shape or not torch.allclose(original, shared, rtol=2**-7, atol=1e-6):
            raise ValueError(
                f"{key.removeprefix(SAM2_FILE)} differs between the checkpoint and the SAM 2 file. It is frozen in "
                "training: this is not the SAM 2 the checkpoint was made from."
            )


# Writing


def write_weights(
    folder: Path, plan: Plan, layout: dict[str, Tensor], weights: Weights, max_shard_size: str, progress: bool
) -> dict[str, str]:
    """Write the plan's tensors as sharded safetensors with an index, one tensor in memory at a time.

    Returns:
        SHA-256 by file name.
    """
    split = split_torch_state_dict_into_shards(layout, max_shard_size=max_shard_size)
    hashes = {}
    total = num_bytes(layout.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar:

        def made(keys: list[str]) -> Iterator[tuple[str, Tensor]]:
            for key in keys:
                recipe = plan[key]
                tensor = recipe.make(*map(weights.__getitem__, recipe.keys)).to(layout[key].dtype).contiguous()
                yield key, tensor
                bar.update(tensor.nbytes)

        for filename, keys in split.filename_to_tensors.items():
            shard = {key: layout[key] for key in keys}
            hashes[filename] = write_tensors(folder / filename, shard, made(keys))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX_FILE, index)
    return hashes


def write_configs(folder: Path, source: Path, config: Sa2VAiConfig) -> None:
    """Everything beside the weights that a Hub repository of a remote-code model holds: code, configs, tokenizer."""
    # the tokenizer's files are copied first: beside the source's config.json, AutoTokenizer would offer to run its code
    if (source / "tokenizer.model").is_file() and not (source / "tokenizer.json").is_file():
        convert_internlm2_tokenizer(source, folder)
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    write_package(folder, config)


def provenance(source: str | Path, folder: Path, sam2_file: Path | None, hashes: dict[str, str]) -> dict[str, Any]:
    """What `conversion.json` says: from what, by what, and the hashes of what was written."""
    files = [folder / "config.json", *checkpoint_files(folder)]
    commit = folder.name if folder.parent.name == "snapshots" else None  # the Hub cache names folders by commit
    return {
        "source": str(source),
        "source_revision": commit,
        "source_files": {file.name: file.stat().st_size for file in files},
        "sam2": None if sam2_file is None else {"file": sam2_file.name, "sha256": file_sha256(sam2_file)},
        "versions": {name: version(name) for name in ("sa2va-i", "torch", "transformers")},
        "sha256": hashes,
    }


# Proof on the way out


def check_written(folder: Path, layout: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless the folder, read as users read it, has just the model's tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    expected = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    written = TensorFiles(checkpoint_files(folder))
    if not expected <= set(written) or set(written) != layout.keys():
        raise ValueError(f"The written checkpoint is not whole: {some(sorted(expected ^ set(written)))} differ.")


@torch.no_grad()
def verify_parts(folder: Path, size: int) -> None:
    """Load the folder and run each part once on noise; raise a ValueError where a number is not finite."""
    available = psutil.virtual_memory().available
    if available < 1.3 * size:
        print(f"Not verified: the weights take {size / 1e9:.1f} GB and {available / 1e9:.1f} GB are free.")
        return
    model = Sa2VAiModel.from_pretrained(folder)
    config, propagator = model.config, model.propagator
    tile = torch.randn(1, 3, config.image_size, config.image_size)
    side = config.sam2_config.image_size
    pyramid = propagator.encode_images(torch.randn(1, 3, side, side))
    tokens = model.get_image_features(tile)
    features = propagator.features_for(model.grounding_encoder, pyramid)
    seg = model.text_hidden_fcs(tokens[:, 0])
    frame = torch.zeros(3, side, side)
    *_, (_, propagated) = propagator.propagate([frame, frame], {0: torch.ones(1, 8, 8, dtype=torch.bool)})
    parts = {
        "vision_model and mlp1": tokens,
        "language_model": model.language_model(inputs_embeds=tokens).logits,
        "text_hidden_fcs": seg,
        "grounding_encoder": propagator.decode_seg(model.grounding_encoder, features, seg).logits,
        "propagator": propagated,
    }
    for name, output in parts.items():
        if not output.isfinite().all():
            raise ValueError(f"{name} gives numbers that are not finite: the weights are broken.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in DTYPES.values() or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16. Got {name!r}.")
    return dtype
