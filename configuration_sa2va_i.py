"""Configuration of Sa2VA-i (arXiv:2509.19082)."""

import copy

from transformers import (
    AutoConfig,
    InternVLVisionConfig,
    PretrainedConfig,
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
)

DECODINGS = ("consistent", "memory")
SAMPLINGS = ("uniform", "first")


class Sa2VAiConfig(PretrainedConfig):
    r"""Sizes of the three parts of Sa2VA-i, and how it decodes unless a call says otherwise.

    Args:
        vision_config (`dict` or `InternVLVisionConfig`): InternViT, which sees the sampled frames.
        llm_config (`dict` or `PretrainedConfig`): the language model, of any type `AutoConfig` knows.
        sam2_config (`dict` or `Sam2VideoConfig`): SAM 2; its sizes are the fine-tuned decoder's too.
        downsample_ratio (`float`): side of the visual token grid over side of the ViT patch grid.
        template (`str`): name of the chat template, a key of `processing_sa2va_i.TEMPLATES`.
        min_dynamic_patch, max_dynamic_patch (`int`): fewest and most tiles an image is cut into.
        use_thumbnail (`bool`): whether an image of several tiles is also shown whole.
        seg_token_id, img_context_token_id (`int`): ids of `[SEG]` and `<IMG_CONTEXT>`, written by the conversion.
        sample_num_frames (`int`): frames of a video the language model sees; 5 in the paper, 12 for MeViS.
        sampling (`str`): `"uniform"` over the video (Sa2VA-i) or the `"first"` frames (Sa2VA).
        decoding (`str`): `"consistent"` (Sa2VA-i) or `"memory"` (Sa2VA: the fine-tuned decoder in SAM 2's memory loop).
        max_prompt_frames (`int`, *optional*): how many initial masks prompt the propagator; all of them by default.

    Raises:
        ValueError: a decoding setting is out of its range, or the config is that of an unconverted checkpoint.
    """

    model_type = "sa2va_i"
    sub_configs = {"vision_config": InternVLVisionConfig, "llm_config": AutoConfig, "sam2_config": Sam2VideoConfig}

    # An `__init__` of its own, and not the typed fields of newer transformers, so that every 5.x loads this file.
    def __init__(
        self,
        vision_config: dict | InternVLVisionConfig | None = None,
        llm_config: dict | PretrainedConfig | None = None,
        sam2_config: dict | Sam2VideoConfig | None = None,
        downsample_ratio: float = 0.5,
        template: str = "qwen_chat",
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 12,
        use_thumbnail: bool = True,
        seg_token_id: int | None = None,
        img_context_token_id: int | None = None,
        sample_num_frames: int = 5,
        sampling: str = "uniform",
        decoding: str = "consistent",
        max_prompt_frames: int | None = None,
        **kwargs,
    ):
        self.vision_config = _sub_config(vision_config, "internvl_vision")
        self.llm_config = _sub_config(llm_config, "qwen2")
        self.sam2_config = _sub_config(sam2_config, "sam2_video")
        self.downsample_ratio = downsample_ratio
        self.template = template
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.use_thumbnail = use_thumbnail
        self.seg_token_id = seg_token_id
        self.img_context_token_id = img_context_token_id
        self.sample_num_frames = sample_num_frames
        self.sampling = sampling
        self.decoding = decoding
        self.max_prompt_frames = max_prompt_frames
        check_decoding_options(sample_num_frames, sampling, decoding, max_prompt_frames)
        kwargs.setdefault("tie_word_embeddings", False)  # a matter of `llm_config` alone
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the language model; tools such as DeepSpeed's "auto" settings read it here."""
        return self.llm_config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of a tile in pixels."""
        return self.vision_config.image_size[0]

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens a tile becomes (256 for 448 px)."""
        return self.token_grid_size**2

    @property
    def token_grid_size(self) -> int:
        """Side of a tile's grid of visual tokens (16 for 448 px)."""
        return int(self.image_size // self.vision_config.patch_size[0] * self.downsample_ratio)

    def get_text_config(self, *args, **kwargs) -> PretrainedConfig:
        return self.llm_config


def _sub_config(config: dict | PretrainedConfig | None, model_type: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    fields = copy.deepcopy(config or {})  # some transformers write into the dicts they are given
    if fields.get("model_type") == "intern_vit_6b":
        raise ValueError(
            "This is the config of a published Sa2VA checkpoint, to be converted first: `sa2va-i convert SOURCE OUT`."
        )
    if isinstance(fields.get("mask_decoder_config"), dict):
        # transformers 5.17 takes this dict for a prompt encoder's; 5.23 does not
        fields["mask_decoder_config"] = Sam2VideoMaskDecoderConfig(**fields["mask_decoder_config"])
    return AutoConfig.for_model(fields.pop("model_type", model_type), **fields)


def check_decoding_options(sample_num_frames: int, sampling: str, decoding: str, max_prompt_frames: int | None) -> None:
    """Raise a ValueError that names the first option out of its range."""
    if sample_num_frames < 1:
        raise ValueError(f"`sample_num_frames` must be at least 1. Got {sample_num_frames}.")
    if sampling not in SAMPLINGS:
        raise ValueError(f"`sampling` must be one of {SAMPLINGS}. Got {sampling!r}.")
    if decoding not in DECODINGS:
        raise ValueError(f"`decoding` must be one of {DECODINGS}. Got {decoding!r}.")
    if max_prompt_frames is not None and max_prompt_frames < 1:
        raise ValueError(f"`max_prompt_frames` must be at least 1 or None for all. Got {max_prompt_frames}.")
