import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa2va_i import Sa2VAiConfig, Sam2Propagator
from sa2va_i.checkpoint_layout import FINE_TUNED_DECODER, ORIGINAL_DECODER, SAM2_HIERA_LARGE, convert_config, make_plan
from sa2va_i.convert_checkpoint import REMOTE_CODE, convert_checkpoint
from sa2va_i.files import read_json
from sa2va_i.safetensors_io import TensorFiles, checkpoint_files

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
    ours, theirs = tensors(converted), tensors(other)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
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


def test_no_such_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_two_tensors_for_one_place():
    with pytest.raises(ValueError, match="Two source tensors"):
        make_plan([SAM2 + "sam_mask_decoder_modified.x", "grounding_encoder.x"], Sa2VAiConfig(), "qwen2")
