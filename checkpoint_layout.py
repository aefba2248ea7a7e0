"""Where every tensor of a published checkpoint goes, and what its config says in this package's terms.

The sources: plain Sa2VA (one mask decoder, the fine-tuned one), published Sa2VA-i (both decoders), Meta's SAM 2 file or
transformers' (the original decoder). Tables first, one rule a line; then the plan they make: of which source tensors
every target tensor is made. Nothing here reads a weight.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from .configuration_sa2va_i import Sa2VAiConfig

# language models by the source's name, and what they are in transformers
LANGUAGE_MODELS = {"qwen2": "qwen2", "internlm2": "llama", "phi3": "phi3"}

# SAM 2.0 Hiera-L, the only size the original code has
SAM2_HIERA_LARGE = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 144,
            "num_attention_heads": 2,
            "embed_dim_per_stage": [144, 288, 576, 1152],
            "num_attention_heads_per_stage": [2, 4, 8, 16],
            "blocks_per_stage": [2, 6, 36, 4],
            "global_attention_blocks": [23, 33, 43],
            "window_positional_embedding_background_size": [7, 7],
            "window_size_per_stage": [8, 4, 16, 8],
        },
        "backbone_channel_list": [1152, 576, 288, 144],
    },
    "enable_temporal_pos_encoding_for_object_pointers": False,
    "enable_occlusion_spatial_embedding": False,
}

SAM2_PREFIX = "grounding_encoder.sam2_model."
SAM2_FILE = "sam2 file: "  # before the keys of a SAM 2 file, beside those of the checkpoint
SOURCE_DECODER, SOURCE_FINE_TUNED_DECODER = "sam_mask_decoder.", "sam_mask_decoder_modified."
NATIVE_DECODER = "mask_decoder."  # in transformers' own SAM 2 checkpoints
ORIGINAL_DECODER, FINE_TUNED_DECODER = "propagator.mask_decoder.", "grounding_encoder."

# (pattern, replacement), applied in order to a key without its part's prefix
MASK_DECODER_RENAMES = (
    (r"^output_upscaling\.0\.", "upscale_conv1."),
    (r"^output_upscaling\.1\.", "upscale_layer_norm."),
    (r"^output_upscaling\.3\.", "upscale_conv2."),
    (r"^(transformer\.layers\.\d+\.)norm([1-4])\.", r"\1layer_norm\2."),
    (r"^(transformer\.layers\.\d+\.mlp\.)layers\.0\.", r"\1proj_in."),
    (r"^(transformer\.layers\.\d+\.mlp\.)layers\.1\.", r"\1proj_out."),
    (r"^transformer\.norm_final_attn\.", "transformer.layer_norm_final_attn."),
    (r"^(transformer\..*)out_proj\.", r"\1o_proj."),
    # three-layer perceptrons: the middle layer is `layers.0` in transformers; move the ends first
    (r"^(output_hypernetworks_mlps\.\d+\.|iou_prediction_head\.|pred_obj_score_head\.)layers\.0\.", r"\1proj_in."),
    (r"^(output_hypernetworks_mlps\.\d+\.|iou_prediction_head\.|pred_obj_score_head\.)layers\.1\.", r"\1layers.0."),
    (r"^(output_hypernetworks_mlps\.\d+\.|iou_prediction_head\.|pred_obj_score_head\.)layers\.2\.", r"\1proj_out."),
)
SAM2_RENAMES = (
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
    (r"^image_encoder\.trunk\.(blocks\.\d+\.)norm([12])\.", r"vision_encoder.backbone.\1layer_norm\2."),
    (r"^image_encoder\.trunk\.(blocks\.\d+\.mlp\.)layers\.0\.", r"vision_encoder.backbone.\1proj_in."),
    (r"^image_encoder\.trunk\.(blocks\.\d+\.mlp\.)layers\.1\.", r"vision_encoder.backbone.\1proj_out."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^(memory_attention\.layers\.\d+\.)norm([123])\.", r"\1layer_norm\2."),
    (r"^(memory_attention\.layers\.\d+\.(?:self_attn|cross_attn_image)\.)out_proj\.", r"\1o_proj."),
    (r"^memory_attention\.norm\.", "memory_attention.layer_norm."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.12\.", "memory_encoder.mask_downsampler.final_conv."),
    *(
        (
            rf"^memory_encoder\.mask_downsampler\.encoder\.{3 * layer + part}\.",
            f"memory_encoder.mask_downsampler.layers.{layer}.{name}.",
        )
        for layer in range(4)
        for part, name in enumerate(("conv", "layer_norm"))
    ),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.fuser\.(layers\.\d+\.)dwconv\.", r"memory_encoder.memory_fuser.\1depthwise_conv."),
    (r"^memory_encoder\.fuser\.(layers\.\d+\.)norm\.", r"memory_encoder.memory_fuser.\1layer_norm."),
    (r"^memory_encoder\.fuser\.(layers\.\d+\.)pwconv([12])\.", r"memory_encoder.memory_fuser.\1pointwise_conv\2."),
    # layer scale: `gamma` in Meta's files, `g_weight` or `weight` in Sa2VA's
    (r"^memory_encoder\.fuser\.(layers\.\d+\.)(?:gamma|g_weight|weight)$", r"memory_encoder.memory_fuser.\1scale"),
    (r"^sam_prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^obj_ptr_proj\.layers\.0\.", "object_pointer_proj.proj_in."),
    (r"^obj_ptr_proj\.layers\.1\.", "object_pointer_proj.layers.0."),
    (r"^obj_ptr_proj\.layers\.2\.", "object_pointer_proj.proj_out."),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
)
VISION_RENAMES = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.([qk])_norm\.", r".attention.\1_norm."),
)
PROJECTOR_RENAMES = ((r"^0\.", "layer_norm."), (r"^1\.", "linear_1."), (r"^3\.", "linear_2."))

# InternLM2 is Llama under other names; `attention.wqkv` is split apart, see `_wqkv`
INTERNLM2_RENAMES = (
    (r"^model\.tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
)
# Source keys with no place on purpose: tables that transformers computes
DROPPED = (re.compile(r"\.rotary_emb\.inv_freq$"),)

POINT_EMBEDDING = re.compile(r"^sam_prompt_encoder\.point_embeddings\.(\d)\.weight$")
POSITION_MATRIX = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
FUSED_QKV = re.compile(r"^(.*\.)attn\.qkv\.(weight|bias)$")
INTERNLM2_WQKV = re.compile(r"^(.*\.)attention\.wqkv\.weight$")
LORA = re.compile(r"base_model\.model\.|\.lora_[AB]\.|\.base_layer\.")


@dataclass(frozen=True)
class Recipe:
    """How a target tensor is made: `make` of the source tensors `keys`, on real tensors or on the meta device."""

    keys: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


Plan = dict[str, Recipe]  # by target key


# Configs


def convert_config(source: Mapping[str, Any], sam2_config: Mapping[str, Any]) -> Sa2VAiConfig:
    """Our config from the source's, every value read from it; token ids are filled in later.

    Raises:
        ValueError: a setting or an architecture this package does not implement.
    """
    architecture = source.get("model_type")
    if "llm_config" not in source or "vision_config" not in source:
        raise ValueError(f"A checkpoint of type {architecture!r} is not supported: no Sa2VA of the InternVL family.")
    expected = {"select_layer": -1, "ps_version": "v2", "force_image_size": source["vision_config"]["image_size"]}
    for name, value in expected.items():
        if source[name] != value:
            raise ValueError(f"`{name}` = {source[name]!r} in the source's config; only {value!r} is supported.")
    return Sa2VAiConfig(
        vision_config=_vision_config(source["vision_config"]),
        llm_config=_llm_config(source["llm_config"]),
        sam2_config=dict(sam2_config),
        downsample_ratio=source["downsample_ratio"],
        template=source["template"],
        min_dynamic_patch=source["min_dynamic_patch"],
        max_dynamic_patch=source["max_dynamic_patch"],
        use_thumbnail=source["use_thumbnail"],
        architectures=["Sa2VAiModel"],
        dtype=source.get("torch_dtype"),
    )


def _vision_config(source: Mapping[str, Any]) -> dict[str, Any]:
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "patch_size",
        "image_size",
        "layer_norm_eps",
        "hidden_act",
        "norm_type",
    )
    return {
        **{name: source[name] for name in same},
        "attention_bias": source["qkv_bias"],
        "use_qk_norm": source.get("qk_normalization", False),
        "use_mean_pooling": True,  # else transformers adds a final norm that InternViT has not
    }


def _llm_config(source: Mapping[str, Any]) -> PretrainedConfig:
    """The language model's own settings, out of a full dump that old transformers wrote."""
    source = dict(source)
    model_type = LANGUAGE_MODELS.get(source.get("model_type"))
    if model_type is None:
        raise ValueError(
            f"Language model {source.get('model_type')!r} is not supported; {', '.join(sorted(LANGUAGE_MODELS))} are."
        )
    if model_type == "llama":
        source["attention_bias"] = source.pop("bias", False)
        source["mlp_bias"] = False
        if source["attention_bias"]:
            raise ValueError("An InternLM2 with `bias` = True is not supported.")
    if isinstance(source.get("rope_scaling"), dict):
        source["rope_scaling"] = _rope_scaling(source["rope_scaling"])
    known = AutoConfig.for_model(model_type).to_dict().keys() | {"rope_theta", "rope_scaling"}
    dropped = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id"}
    fields = {name: value for name, value in source.items() if name in known - dropped}
    return AutoConfig.for_model(**{**fields, "model_type": model_type})


def _rope_scaling(source: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(source)
    rope_type = scaling.pop("type", None) or scaling.pop("rope_type", None)
    return {**scaling, "rope_type": "longrope" if rope_type == "su" else rope_type}  # "su": Phi3's name before


# Plans


def make_plan(keys: Iterable[str], config: Sa2VAiConfig, source_llm: str) -> Plan:
    """Where every tensor goes. Plain Sa2VA or Sa2VA-i is read from the keys.

    Args:
        keys: of the checkpoint, and of a SAM 2 file with `SAM2_FILE` in front.
        config: of the target.
        source_llm: the source's name of its language model: `internlm2`, `qwen2`, `phi3`.
    """
    keys = list(keys)
    check_layout(keys)
    sam2_keys = {key: key.removeprefix(SAM2_PREFIX) for key in keys if key.startswith(SAM2_PREFIX)}
    decoder_of_checkpoint = ORIGINAL_DECODER if has_both_decoders(keys) else FINE_TUNED_DECODER
    plan = _Plan()
    for key in keys:
        part, _, rest = key.partition(".")
        if any(pattern.search(key) for pattern in DROPPED):
            continue
        if key.startswith(SAM2_FILE):
            rest = key.removeprefix(SAM2_FILE)
            if rest.startswith(SOURCE_DECODER):  # the rest of the file stands in the checkpoint too
                plan.add(ORIGINAL_DECODER + _decoder_key(rest), Recipe((key,)))
            elif rest.startswith(NATIVE_DECODER):
                plan.add(ORIGINAL_DECODER + rest.removeprefix(NATIVE_DECODER), Recipe((key,)))
        elif key in sam2_keys:
            _plan_sam2(plan, key, sam2_keys[key], decoder_of_checkpoint)
        elif part == "vision_model":
            _plan_vision(plan, key, rest)
        elif part == "mlp1":
            plan.add("mlp1." + rename(rest, PROJECTOR_RENAMES), Recipe((key,)))
        elif part == "language_model" and source_llm == "internlm2":
            _plan_internlm2(plan, key, rest, config.llm_config)
        else:
            plan.add(key, Recipe((key,)))
    points = sorted(key for key, rest in sam2_keys.items() if POINT_EMBEDDING.match(rest))
    if points:
        plan.add("propagator.prompt_encoder.point_embed.weight", Recipe(tuple(points), _concatenate))
    return dict(plan)


class _Plan(dict[str, Recipe]):
    def add(self, target: str, recipe: Recipe) -> None:
        if target in self:
            raise ValueError(f"Two source tensors become {target}: {self[target].keys[0]} and {recipe.keys[0]}.")
        self[target] = recipe


def has_both_decoders(keys: Iterable[str]) -> bool:
    """Whether a checkpoint is a published Sa2VA-i one."""
    return any(key.startswith(SAM2_PREFIX + SOURCE_FINE_TUNED_DECODER) for key in keys)


def check_layout(keys: Iterable[str]) -> None:
    """Raise a ValueError if the sources together do not hold each decoder once, or hold unmerged LoRA weights."""
    keys = list(keys)
    lora = sorted(key for key in keys if LORA.search(key))
    if lora:
        raise ValueError(
            f"The checkpoint holds LoRA weights that are not merged, {some(lora)}. Merge them first (peft: "
            "`merge_and_unload()`), then convert."
        )
    has_sam2_file = any(key.startswith(SAM2_FILE) for key in keys)
    if has_both_decoders(keys) and has_sam2_file:
        raise ValueError("The checkpoint is a Sa2VA-i one and holds the original decoder: leave out the SAM 2 file.")
    if not has_both_decoders(keys) and not has_sam2_file:
        raise ValueError(
            "The checkpoint is a plain Sa2VA one, which lacks the original SAM 2 decoder: give Meta's SAM 2 file "
            "(--sam2 sam2_hiera_large.pt) or its Hub id (--sam2 facebook/sam2-hiera-large)."
        )


def shared_sam2(keys: Iterable[str], plan: Plan) -> dict[str, Recipe]:
    """For every tensor of the SAM 2 file that the checkpoint holds too, how the checkpoint's is made.

    Raises:
        ValueError: the file holds a tensor outside its decoder that the checkpoint lacks: it is another SAM 2.
    """
    keys = set(keys)
    shared = {}
    for key in sorted(keys):
        name = key.removeprefix(SAM2_FILE)
        if name == key or name.startswith((SOURCE_DECODER, NATIVE_DECODER)):
            continue
        # Meta's names, with the layer scale's three; or transformers' names
        twins = [SAM2_PREFIX + re.sub(r"gamma$", scale, name) for scale in ("gamma", "g_weight", "weight")]
        recipes = [Recipe((twin,)) for twin in twins if twin in keys]
        if "propagator." + name in plan:
            recipes.append(plan["propagator." + name])
        if not recipes:
            raise ValueError(f"{name} of the SAM 2 file is not in the checkpoint: it is another SAM 2.")
        shared[key] = recipes[0]
    return shared


def rename(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    """`key` after every rule, in order."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def some(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def _plan_sam2(plan: _Plan, key: str, rest: str, decoder_of_checkpoint: str) -> None:
    if rest.startswith(SOURCE_FINE_TUNED_DECODER):
        plan.add(FINE_TUNED_DECODER + _decoder_key(rest), Recipe((key,)))
    elif rest.startswith(SOURCE_DECODER):
        plan.add(decoder_of_checkpoint + _decoder_key(rest), Recipe((key,)))
    elif rest == POSITION_MATRIX:  # transformers keeps two copies, and re-randomises a missing one in silence
        plan.add("propagator.prompt_encoder.shared_embedding.positional_embedding", Recipe((key,)))
        plan.add("propagator.shared_image_embedding.positional_embedding", Recipe((key,)))
    elif not POINT_EMBEDDING.match(rest):
        plan.add("propagator." + rename(rest, SAM2_RENAMES), Recipe((key,)))


def _plan_vision(plan: _Plan, key: str, rest: str) -> None:
    match = FUSED_QKV.match(rest)
    if match is None:
        plan.add("vision_model." + rename(rest, VISION_RENAMES), Recipe((key,)))
        return
    for chunk, name in enumerate("qkv"):
        target = f"vision_model.{rename(match[1], VISION_RENAMES)}attention.{name}_proj.{match[2]}"
        plan.add(target, Recipe((key,), _third(chunk)))


def _plan_internlm2(plan: _Plan, key: str, rest: str, config: PretrainedConfig) -> None:
    match = INTERNLM2_WQKV.match(rest)
    if match is None:
        plan.add("language_model." + rename(rest, INTERNLM2_RENAMES), Recipe((key,)))
        return
    for name in "qkv":
        target = f"language_model.{match[1]}self_attn.{name}_proj.weight"
        plan.add(target, Recipe((key,), _wqkv(name, config.num_attention_heads, config.num_key_value_heads)))


def _decoder_key(key: str) -> str:
    return rename(key.partition(".")[2], MASK_DECODER_RENAMES)


def _concatenate(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def _third(chunk: int) -> Callable[[Tensor], Tensor]:
    """Query, key or value of a fused projection, one after the other along dim 0."""
    return lambda fused: fused.chunk(3)[chunk]


def _wqkv(name: str, num_heads: int, num_kv_heads: int) -> Callable[[Tensor], Tensor]:
    """Query, key or value of InternLM2's fused projection: for every key head, its queries, the key, the value."""
    groups = num_heads // num_kv_heads
    rows = {"q": slice(0, groups), "k": slice(groups, groups + 1), "v": slice(groups + 1, groups + 2)}[name]

    def take(fused: Tensor) -> Tensor:
        by_head = fused.unflatten(0, (num_kv_heads, groups + 2, -1))
        return by_head[:, rows].flatten(0, 2)

    return take
