import copy

import pytest

from sa2va_i import Sa2VAiConfig

SAM2 = {"image_size": 192, "vision_config": {"backbone_config": {"model_type": "sam2_hiera_det_model"}}}


def test_round_trip(small_config, tmp_path):
    small_config.save_pretrained(tmp_path)
    loaded = Sa2VAiConfig.from_pretrained(tmp_path, sample_num_frames=12)
    assert loaded.sample_num_frames == 12
    assert loaded.llm_config.hidden_size == 32
    assert loaded.sam2_config.vision_config.backbone_config.hidden_size == 16
    assert loaded.image_size == small_config.image_size == 56


def test_sizes_follow_from_the_parts():
    config = Sa2VAiConfig()
    assert (config.image_size, config.token_grid_size, config.num_image_tokens) == (448, 16, 256)
    assert config.get_text_config() is config.llm_config
    assert config.hidden_size == config.llm_config.hidden_size


def test_any_language_model():
    config = Sa2VAiConfig(llm_config={"model_type": "llama", "hidden_size": 64})
    assert config.llm_config.model_type == "llama"


def test_given_dicts_are_not_modified():
    sam2, llm = copy.deepcopy(SAM2), {"model_type": "qwen2", "hidden_size": 64}
    Sa2VAiConfig(sam2_config=sam2, llm_config=llm)
    assert sam2 == SAM2
    assert llm == {"model_type": "qwen2", "hidden_size": 64}


@pytest.mark.parametrize(
    ("option", "value"),
    [("sample_num_frames", 0), ("sampling", "random"), ("decoding", "greedy"), ("max_prompt_frames", 0)],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        Sa2VAiConfig(**{option: value})
