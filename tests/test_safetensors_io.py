import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa2va_i.safetensors_io import DTYPES, INDEX_FILE, TensorFiles, checkpoint_files, file_sha256, write_tensors

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0]).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
}


def write(path, tensors=TENSORS) -> str:
    return write_tensors(path, {name: tensor.to("meta") for name, tensor in tensors.items()}, tensors.items())


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_the_library_reads_what_is_written(tmp_path):
    digest = write(tmp_path / "a.safetensors")
    assert same(load_file(tmp_path / "a.safetensors"), TENSORS)
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert digest == file_sha256(tmp_path / "a.safetensors")


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert same(dict(TensorFiles([tmp_path / "a.safetensors"])), TENSORS)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype(tmp_path, dtype):
    tensors = {"a": torch.tensor([0, 1]).to(dtype)}
    write(tmp_path / "a.safetensors", tensors)
    assert same(load_file(tmp_path / "a.safetensors"), tensors)


def test_meta_reads_nothing(tmp_path):
    write(tmp_path / "a.safetensors")
    files = TensorFiles([tmp_path / "a.safetensors"])
    like = files.meta("matrix")
    assert (like.shape, like.dtype, like.device.type) == ((2, 3), torch.float32, "meta")


@pytest.mark.parametrize(
    "tensors",
    [
        [("matrix", torch.zeros(2, 3)), ("scalar", torch.tensor(1.0))],
        [("matrix", torch.zeros(3, 2)), ("scalar", torch.tensor(1))],
        [("scalar", torch.tensor(1)), ("matrix", torch.zeros(2, 3))],
    ],
    ids=["dtype", "shape", "order"],
)
def test_tensors_must_come_as_announced(tmp_path, tensors):
    layout = {name: TENSORS[name].to("meta") for name in ("matrix", "scalar")}
    with pytest.raises(ValueError, match="comes where"):
        write_tensors(tmp_path / "a.safetensors", layout, tensors)


class TestBrokenFiles:
    @pytest.fixture
    def file(self, tmp_path):
        write(tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    def test_truncated(self, file):
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"a\.safetensors is truncated: flags"):
            TensorFiles([file])

    @pytest.mark.parametrize("kept", [0, 4, 20])
    def test_header_cut_off(self, file, kept):
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"a\.safetensors is no safetensors file"):
            TensorFiles([file])

    def test_something_else(self, file):
        file.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc")
        with pytest.raises(ValueError, match="no JSON"):
            TensorFiles([file])

    def test_unknown_dtype(self, file):
        header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
        with pytest.raises(ValueError, match="F8_E4M3"):
            TensorFiles([file])

    def test_one_name_in_two_files(self, file, tmp_path):
        write(tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match="two files"):
            TensorFiles([file, tmp_path / "b.safetensors"])


class TestCheckpointFiles:
    def test_those_of_the_index(self, tmp_path):
        for name in ("a", "b", "leftover"):
            write(tmp_path / f"{name}.safetensors")
        index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
        (tmp_path / INDEX_FILE).write_text(json.dumps(index))
        assert [file.name for file in checkpoint_files(tmp_path)] == ["a.safetensors", "b.safetensors"]

    def test_index_naming_a_missing_file(self, tmp_path):
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
        with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
            checkpoint_files(tmp_path)

    def test_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No .safetensors"):
            checkpoint_files(tmp_path)
