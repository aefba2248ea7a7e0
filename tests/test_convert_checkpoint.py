import errno
import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa2va_i import Sa2VAiConfig, Sa2VAiModel, Sam2Propagator
from sa2va_i.checkpoint_layout import FINE_TUNED_DECODER, ORIGINAL_DECODER, SAM2_HIERA_LARGE, convert_config, make_plan
from sa2va_i.convert_checkpoint import Hub, convert_checkpoint
from sa2va_i.files import read_json
from sa2va_i.publish import REMOTE_CODE
from sa2va_i.safetensors_io import TensorFiles, checkpoint_files, file_sha256

SAM2 = "grounding_encoder.sam2_model."


def tensors(folder) -> TensorFiles:
    return TensorFiles(checkpoint_files(folder))


@pytest.fixture
def source(sources, tmp_path):
    """A copy of the plain Sa2VA checkpoint in one file, to be damaged."""
    folder = shutil.copytree(sources / "sa2va", tmp_path / "source")
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(weights, folder / "model.safetensors")
    return folder


def change(folder, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def convert(source, tmp_path, sources, sam2_config):
    return convert_checkpoint(source, tmp_path / "out", sam2=sources / "sam2.pt", sam2_config=sam2_config)


def test_both_layouts_become_the_same(converted, sources, sam2_config, tmp_path):
    """Plain Sa2VA and Meta's file, or published Sa2VA-i: one model."""
    other = convert_checkpoint(sources / "sa2va_i", tmp_path / "out", sam2_config=sam2_config)
    assert (converted / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert read_json(converted / "config.json") == read_json(other / "config.json")


def test_the_two_decoders_keep_their_roles(converted, sources):
    weights, source = tensors(converted), tensors(sources / "sa2va_i")
    key = "iou_token.weight"
    assert torch.equal(weights[ORIGINAL_DECODER + key], source[SAM2 + "sam_mask_decoder." + key])
    assert torch.equal(weights[FINE_TUNED_DECODER + key], source[SAM2 + "sam_mask_decoder_modified." + key])
    assert not torch.equal(weights[ORIGINAL_DECODER + key], weights[FINE_TUNED_DECODER + key])


def test_the_second_decoder_is_16_mb(converted):
    weights = tensors(converted)
    num_bytes = sum(weights[key].nbytes for key in weights if key.startswith(FINE_TUNED_DECODER))
    assert round(num_bytes / 2**20) == 16


def test_what_is_written(converted):
    names = {file.name for file in converted.iterdir()}
    assert names >= {*REMOTE_CODE, "config.json", "processor_config.json", "generation_config.json", "tokenizer.json"}
    config = read_json(converted / "config.json")
    assert config["auto_map"]["AutoModel"] == "modeling_sa2va_i.Sa2VAiModel"
    assert (config["seg_token_id"], config["img_context_token_id"]) == (411, 404)
    assert config["vision_config"]["attention_bias"] is True
    assert config["llm_config"]["rope_parameters"]["rope_theta"] == 1e6
    assert read_json(converted / "processor_config.json")["auto_map"]


def test_shards(sources, sam2_config, tmp_path, converted):
    out = convert_checkpoint(sources / "sa2va_i", tmp_path / "out", sam2_config=sam2_config, max_shard_size="20MB")
    assert len(list(out.glob("*.safetensors"))) == 4
    index = read_json(out / "model.safetensors.index.json")
    assert index["weight_map"].keys() == set(tensors(converted))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(converted).values())


def test_default_sizes_are_those_of_hiera_l(sources):
    """898 tensors: Meta's file of 1031, its fused and its doubled ones counted as transformers has them."""
    config = convert_config(read_json(sources / "sa2va" / "config.json"), SAM2_HIERA_LARGE)
    with torch.device("meta"):
        propagator = Sam2Propagator(config.sam2_config)
    assert len(propagator.state_dict()) == 898
    assert sum(tensor.numel() for tensor in propagator.parameters()) == pytest.approx(224.4e6, rel=1e-3)


def test_layout_is_read_from_the_keys(sources, tmp_path, sam2_config):
    with pytest.raises(ValueError, match=r"lacks the original SAM 2 decoder.*--sam2"):
        convert_checkpoint(sources / "sa2va", tmp_path / "out", sam2_config=sam2_config)
    with pytest.raises(ValueError, match="leave out the SAM 2 file"):
        convert_checkpoint(sources / "sa2va_i", tmp_path / "out", sources / "sam2.pt", sam2_config)


def test_hiera_l_does_not_fit_the_small_one(sources, tmp_path):
    with pytest.raises(ValueError, match="not filled"):
        convert_checkpoint(sources / "sa2va_i", tmp_path / "out")


class TestStrict:
    """Every source tensor is used, every target tensor filled, every shape agrees; else nothing is written."""

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        yield
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    def test_extra(self, source, tmp_path, sources, sam2_config):
        change(source, lambda weights: weights.update({"language_model.extra": torch.zeros(1)}))
        with pytest.raises(ValueError, match=r"1 source tensors have no place \(language_model\.extra\)"):
            convert(source, tmp_path, sources, sam2_config)

    def test_lacking(self, source, tmp_path, sources, sam2_config):
        change(source, lambda weights: weights.pop("mlp1.0.bias"))
        with pytest.raises(ValueError, match=r"1 of ours are not filled \(mlp1\.layer_norm\.bias\)"):
            convert(source, tmp_path, sources, sam2_config)

    def test_shape(self, source, tmp_path, sources, sam2_config):
        change(source, lambda weights: weights.update({"mlp1.0.bias": torch.zeros(3)}))
        with pytest.raises(ValueError, match=r"mlp1\.0\.bias gives \(3,\).*\(192,\)"):
            convert(source, tmp_path, sources, sam2_config)

    def test_another_sam2(self, source, tmp_path, sources, sam2_config):
        key = SAM2 + "no_mem_embed"
        change(source, lambda weights: weights.update({key: weights[key] + 0.1}))
        with pytest.raises(ValueError, match="no_mem_embed differs"):
            convert(source, tmp_path, sources, sam2_config)

    def test_no_sam2_file(self, source, tmp_path, sam2_config):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
            convert_checkpoint(source, tmp_path / "out", tmp_path / "nowhere.pt", sam2_config)
        torch.save({"other": 1}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other\.pt.*\"model\""):
            convert_checkpoint(source, tmp_path / "out", tmp_path / "other.pt", sam2_config)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda config: config.update(ps_version="v1"), "ps_version.*'v1'"),
            (lambda config: config["llm_config"].update(model_type="gpt2"), "gpt2"),
        ],
    )
    def test_unsupported_config(self, source, tmp_path, sources, sam2_config, edit, message):
        config = read_json(source / "config.json")
        edit(config)
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path, sources, sam2_config)

    def test_interrupted(self, source, tmp_path, sources, sam2_config, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("sa2va_i.convert_checkpoint.write_tensors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path, sources, sam2_config)


def test_rounding_of_the_frozen_sam2_is_no_difference(source, tmp_path, sources, sam2_config):
    """Published checkpoints are in bfloat16, Meta's file in float32."""
    change(source, lambda weights: weights.update({key: tensor.bfloat16() for key, tensor in weights.items()}))
    out = convert(source, tmp_path, sources, sam2_config)
    assert tensors(out)["mlp1.linear_1.weight"].dtype == torch.bfloat16


def test_existing_folder_is_left_alone(sources, tmp_path, sam2_config):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists already"):
        convert_checkpoint(sources / "sa2va_i", tmp_path / "out", sam2_config=sam2_config)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_source_code_is_not_run(source, tmp_path, sources, sam2_config):
    """The source's config names code beside it; converting must neither run it nor ask."""
    for name in ("configuration_sa2va_chat.py", "modeling_sa2va_chat.py"):
        (source / name).write_text("raise RuntimeError('the source code was run')")
    convert(source, tmp_path, sources, sam2_config)


class TestBrokenSources:
    """A clear error, and nothing that looks finished."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path):
        yield
        assert not list(tmp_path.glob("*out*"))

    def test_truncated_shard(self, sources, tmp_path, sam2_config):
        folder = shutil.copytree(sources / "sa2va_i", tmp_path / "source")
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=rf"{shard.name} is truncated"):
            convert_checkpoint(folder, tmp_path / "out", sam2_config=sam2_config)

    def test_index_naming_a_missing_file(self, sources, tmp_path, sam2_config):
        folder = shutil.copytree(sources / "sa2va_i", tmp_path / "source")
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=shard.name):
            convert_checkpoint(folder, tmp_path / "out", sam2_config=sam2_config)

    def test_pickle_with_code(self, sources, tmp_path, sam2_config):
        """Loading it must not run it."""
        torch.save({"model": Malice(tmp_path / "malice-was-here")}, tmp_path / "sam2.pt")
        with pytest.raises(ValueError, match=r"sam2\.pt cannot be read as a file of weights alone"):
            convert_checkpoint(sources / "sa2va", tmp_path / "out", tmp_path / "sam2.pt", sam2_config)
        assert not (tmp_path / "malice-was-here").exists()

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
    def test_sam2_file_of_something_else(self, sources, tmp_path, sam2_config, content):
        (tmp_path / "sam2.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"sam2\.pt cannot be read"):
            convert_checkpoint(sources / "sa2va", tmp_path / "out", tmp_path / "sam2.pt", sam2_config)

    def test_disk_that_is_too_small(self, sources, tmp_path, sam2_config, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=10**7))
        with pytest.raises(OSError, match=r"needs 0\.2 GB and 0\.0 GB are free"):
            convert_checkpoint(sources / "sa2va_i", tmp_path / "out", sam2_config=sam2_config)

    def test_disk_that_fills_up(self, sources, tmp_path, sam2_config, monkeypatch):
        def fill(path, layout, tensors):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("sa2va_i.convert_checkpoint.write_tensors", fill)
        with pytest.raises(OSError, match="No space left"):
            convert_checkpoint(sources / "sa2va_i", tmp_path / "out", sam2_config=sam2_config)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_killed_run_is_started_over(sources, tmp_path, sam2_config, converted):
    """What it left stands under no final name, and is cleared away."""
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    out = convert_checkpoint(sources / "sa2va_i", tmp_path / "out", sam2_config=sam2_config)
    assert (out / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(sources, tmp_path, sam2_config, dtype, converted):
    out = convert_checkpoint(sources / "sa2va_i", tmp_path / "out", sam2_config=sam2_config, dtype=dtype)
    weights, original = tensors(out), tensors(converted)
    assert all(torch.equal(weights[key], original[key].to(getattr(torch, dtype))) for key in original)
    assert read_json(out / "config.json")["dtype"] == dtype
    assert Sa2VAiModel.from_pretrained(out).dtype == getattr(torch, dtype)


def test_unknown_dtype(sources, tmp_path):
    with pytest.raises(ValueError, match="int4"):
        convert_checkpoint(sources / "sa2va_i", tmp_path / "out", dtype="int4")


def test_provenance(converted, sources):
    record = read_json(converted / "conversion.json")
    assert record["source"] == str(sources / "sa2va")
    assert record["sam2"] == {"file": "sam2.pt", "sha256": file_sha256(sources / "sam2.pt")}
    assert record["sha256"] == {"model.safetensors": file_sha256(converted / "model.safetensors")}
    assert record["versions"].keys() == {"sa2va-i", "torch", "transformers"}


def test_verify(sources, tmp_path, sam2_config):
    folder = shutil.copytree(sources / "sa2va_i", tmp_path / "source")
    convert_checkpoint(folder, tmp_path / "good", sam2_config=sam2_config, verify=True)
    shard = next(file for file in folder.glob("*.safetensors") if "mlp1.0.weight" in load_file(file))
    weights = load_file(shard)
    weights["mlp1.0.weight"][0] = float("nan")
    save_file(weights, shard)
    with pytest.raises(ValueError, match=r"mlp1 gives numbers that are not finite"):
        convert_checkpoint(folder, tmp_path / "bad", sam2_config=sam2_config, verify=True)
    assert not (tmp_path / "bad").exists()


class TestHub:
    """No network here: `snapshot_download` is a stand-in that knows two repositories."""

    @pytest.fixture
    def downloads(self, sources, tmp_path, monkeypatch):
        repositories = {"someone/Sa2VA-1B": sources / "sa2va", "facebook/sam2-hiera-large": tmp_path / "sam2"}
        (tmp_path / "sam2").mkdir()
        shutil.copy(sources / "sam2.pt", tmp_path / "sam2" / "sam2_hiera_large.pt")
        asked = []

        def download(repo_id, **options):
            asked.append((repo_id, options))
            snapshot = tmp_path / "cache" / repo_id / "snapshots" / "0123abcd"
            patterns = options["allow_patterns"]
            shutil.copytree(repositories[repo_id], snapshot, dirs_exist_ok=True)
            for file in snapshot.iterdir():
                if not any(file.match(pattern) for pattern in patterns):
                    file.unlink()
            return str(snapshot)

        monkeypatch.setattr("sa2va_i.convert_checkpoint.snapshot_download", download)
        return asked

    def test_ids_for_both(self, downloads, tmp_path, sam2_config, converted):
        out = convert_checkpoint(
            "someone/Sa2VA-1B",
            tmp_path / "out",
            sam2="facebook/sam2-hiera-large",
            sam2_config=sam2_config,
            hub=Hub(revision="v1", token="secret", cache_dir=tmp_path / "cache"),
        )
        assert (out / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
        record = read_json(out / "conversion.json")
        assert (record["source"], record["source_revision"]) == ("someone/Sa2VA-1B", "0123abcd")
        (_, source), (_, sam2) = downloads
        assert (source["revision"], source["token"]) == ("v1", "secret")
        assert sam2["revision"] is None  # the revision is the checkpoint's
        assert not any(pattern.endswith((".py", ".bin")) for pattern in source["allow_patterns"])
        assert "secret" not in (out / "conversion.json").read_text()

    def test_a_folder_goes_before_an_id(self, downloads, sources, tmp_path, monkeypatch, sam2_config):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(sources / "sa2va_i", tmp_path / "someone" / "Sa2VA-1B")
        convert_checkpoint("someone/Sa2VA-1B", tmp_path / "out", sam2_config=sam2_config)
        assert downloads == []


def test_sam2_in_transformers_layout(sources, tmp_path, sam2_config, converted):
    """As `facebook/sam2-hiera-large` has it beside Meta's file."""
    weights = tensors(converted)
    prefix = "propagator."
    native = {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}
    (tmp_path / "sam2").mkdir()
    save_file(native, tmp_path / "sam2" / "model.safetensors")
    out = convert_checkpoint(sources / "sa2va", tmp_path / "out", tmp_path / "sam2", sam2_config)
    assert (out / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    native["memory_encoder.projection.bias"] = native["memory_encoder.projection.bias"] + 1
    save_file(native, tmp_path / "sam2" / "model.safetensors")
    with pytest.raises(ValueError, match=r"memory_encoder\.projection\.bias differs"):
        convert_checkpoint(sources / "sa2va", tmp_path / "other", tmp_path / "sam2", sam2_config)


def test_no_such_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_two_tensors_for_one_place():
    with pytest.raises(ValueError, match="Two source tensors"):
        make_plan([SAM2 + "sam_mask_decoder_modified.x", "grounding_encoder.x"], Sa2VAiConfig(), "qwen2")
