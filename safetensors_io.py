"""Safetensors files read and written tensor by tensor, so that a 52 GB checkpoint passes through little memory.

The safetensors library maps whole files and writes from tensors that are all in memory. The format itself is small
(https://huggingface.co/docs/safetensors): eight bytes of header length, a JSON header, the tensors' bytes.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_FILE = "model.safetensors.index.json"
HASH_CHUNK = 1 << 24


class _Entry(NamedTuple):
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name, each read from disk when it is asked for, none kept.

    Raises:
        ValueError: a file is no safetensors file or is truncated, or two files hold the same name.
    """

    def __init__(self, files: Iterable[Path]):
        self._entries: dict[str, _Entry] = {}
        for file in files:
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    raise ValueError(f"{name} stands in two files: {self._entries[name].file} and {file}.")
                self._entries[name] = entry

    def meta(self, name: str) -> Tensor:
        """An empty tensor of this shape and dtype on the meta device; nothing is read."""
        entry = self._entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry.num_bytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        buffer = bytearray(entry.num_bytes)
        with entry.file.open("rb") as file:
            file.seek(entry.offset)
            if file.readinto(buffer) != entry.num_bytes:
                raise ValueError(f"{entry.file} was cut while it was read, at {name}.")
        return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those its index names, or the one there is.

    Raises:
        FileNotFoundError: there is none, or the index names one that is not there.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"No .safetensors file in {folder}.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}.")
    return files


def write_tensors(path: Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Write one safetensors file from tensors that come one at a time; returns its SHA-256.

    Args:
        path: the file to make.
        layout: name -> a tensor of its shape and dtype, on the meta device; in the order in which `tensors` come.
        tensors: (name, tensor), contiguous.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = header_bytes(layout)
        file.write(header)
        digest.update(header)
        for (expected, like), (name, tensor) in zip(layout.items(), tensors, strict=True):
            if name != expected or tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} comes where {expected} should.")
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is no safetensors file, or its header is cut off.")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no safetensors file: its header is no JSON.") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, fields in header.items():
        if fields["dtype"] not in DTYPES:
            raise ValueError(f"{name} in {path} is of type {fields['dtype']}; supported are {sorted(DTYPES)}.")
        begin, end = fields["data_offsets"]
        if 8 + length + end > size:
            raise ValueError(f"{path} is truncated: {name} should end at byte {8 + length + end}, the file at {size}.")
        entries[name] = _Entry(path, DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + length + begin, end - begin)
    return entries


def header_bytes(layout: Mapping[str, Tensor]) -> bytes:
    """What a safetensors file of these tensors begins with; their bytes follow in this order."""
    fields: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, like in layout.items():
        end = begin + num_bytes([like])
        fields[name] = {"dtype": DTYPE_NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return struct.pack("<Q", len(text)) + text
