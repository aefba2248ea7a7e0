"""Any Sa2VA checkpoint as a model: converted ones as they are, published originals converted once into a cache."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants, hf_hub_download

from .convert_checkpoint import Hub, convert_checkpoint, is_hub_id, resolve_source
from .files import read_json
from .modeling_sa2va_i import Sa2VAiModel
from .safetensors_io import checkpoint_files

SMALL = Path(__file__).parent / "training" / "small" / "model"  # trained on synthetic shapes, comes with the package
BYTES_PER_SECOND = 200e6  # of a conversion on a laptop's disk, to say how long it will take


def load(
    name: str | Path,
    sam2: str | Path | None = None,
    sam2_config: dict[str, Any] | None = None,
    hub: Hub | None = None,
    **kwargs,
) -> Sa2VAiModel:
    """The model of a checkpoint, whether it is converted or a published original.

        model = sa2va_i.load("kumuji/Sa2VA-i-4B", dtype="bfloat16")
        model = sa2va_i.load("ByteDance/Sa2VA-4B", sam2="facebook/sam2-hiera-large")
        model = sa2va_i.load("small")

    An original is converted into a cache the first time; size and time are said before. See `cached_conversion`.

    Args:
        name: folder or Hub id; "small" is the model that comes with the package, which knows synthetic shapes alone.
        sam2, sam2_config, hub: as `convert_checkpoint` takes them; for originals.
        kwargs: for `Sa2VAiModel.from_pretrained`.
    """
    return Sa2VAiModel.from_pretrained(loadable(name, sam2, sam2_config, hub), **kwargs)


def loadable(
    name: str | Path, sam2: str | Path | None = None, sam2_config: dict[str, Any] | None = None, hub: Hub | None = None
) -> str:
    """`name` itself if it is a converted checkpoint, else the folder of its cached conversion."""
    if name == "small":
        return str(SMALL)
    hub = hub or Hub()
    if _model_type(name, hub) == "sa2va_i":
        return str(name)
    return str(cached_conversion(name, sam2, sam2_config, hub))


def cached_conversion(name: str | Path, sam2: str | Path | None, sam2_config: dict[str, Any] | None, hub: Hub) -> Path:
    """The conversion of a published original, made now or before, by this process or another.

    It lies under `SA2VA_I_CACHE`, by default `sa2va_i` in the Hub's own cache folder, one folder for each source and
    SAM 2; removing it is safe.
    """
    source = resolve_source(name, hub)
    root = Path(os.environ.get("SA2VA_I_CACHE", Path(constants.HF_HOME) / "sa2va_i"))
    out = root / f"{Path(str(name)).name}-{_fingerprint(source, sam2, sam2_config)}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            size = sum(file.stat().st_size for file in checkpoint_files(source))
            print(
                f"Converting {name} once: {size / 1e9:.1f} GB, about {size / BYTES_PER_SECOND:.0f} s, into {out}",
                file=sys.stderr,
            )
            convert_checkpoint(name, out, sam2, sam2_config, hub=hub, progress=True)
    return out


def _model_type(name: str | Path, hub: Hub) -> str | None:
    if is_hub_id(name):
        config = hf_hub_download(
            str(name), "config.json", revision=hub.revision, token=hub.token, cache_dir=hub.cache_dir
        )
        return read_json(Path(config)).get("model_type")
    return read_json(resolve_source(name, hub) / "config.json").get("model_type")


def _fingerprint(source: Path, sam2: str | Path | None, sam2_config: dict[str, Any] | None) -> str:
    """Changes with the source's files, the SAM 2 that is named, and its sizes."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint_files(source)]
    return hashlib.sha256(json.dumps([files, str(sam2), sam2_config]).encode()).hexdigest()[:12]
