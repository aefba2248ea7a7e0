"""Published Sa2VA and Sa2VA-i checkpoints, and Meta's SAM 2, to this package's layout.

    convert_checkpoint("ByteDance-Sa2VA-4B/", "sa2va-i-4b/", sam2="sam2_hiera_large.pt")

A plain Sa2VA checkpoint has one mask decoder, the fine-tuned one; the original decoder comes from Meta's SAM 2 file. A
published Sa2VA-i checkpoint has both. Which one a folder holds is read from its keys. The conversion is strict: every
source tensor has a place, every target tensor is filled, every shape agrees, or nothing is written.
"""

import re
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, Sam2VideoConfig

from .configuration_sa2va_i import Sa2VAiConfig
from .files import check_new_folder, read_json, staged_folder, write_json
from .modeling_sa2va_i import Sa2VAiModel
from .processing_sa2va_i import Sa2VAiProcessor

REMOTE_CODE = ("configuration_sa2va_i.py", "processing_sa2va_i.py", "sam2_propagator.py", "modeling_sa2va_i.py")
AUTO_MAP = {
    "AutoConfig": "configuration_sa2va_i.Sa2VAiConfig",
    "AutoModel": "modeling_sa2va_i.Sa2VAiModel",
    "AutoModelForCausalLM": "modeling_sa2va_i.Sa2VAiModel",
    "AutoProcessor": "processing_sa2va_i.Sa2VAiProcessor",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
MAX_SHARD_SIZE = "5GB"

LANGUAGE_MODELS = {"qwen2"}

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
SAM2_FILE = "sam2 file: "  # before the keys of Meta's file, beside those of the checkpoint
SOURCE_DECODER, SOURCE_FINE_TUNED_DECODER = "sam_mask_decoder.", "sam_mask_decoder_modified."
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

POINT_EMBEDDING = re.compile(r"^sam_prompt_encoder\.point_embeddings\.(\d)\.weight$")
POSITION_MATRIX = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
FUSED_QKV = re.compile(r"^(.*\.)attn\.qkv\.(weight|bias)$")


@dataclass(frozen=True)
class Piece:
    """A source tensor, or one of `chunks` equal parts of it along dim 0."""

    key: str
    chunk: int = 0
    chunks: int = 1

    def take(self, source: Mapping[str, Tensor]) -> Tensor:
        return source[self.key].chunk(self.chunks)[self.chunk]


Plan = dict[str, list[Piece]]  # target key -> the pieces that make it, joined along dim 0


class SafetensorsFolder(Mapping):
    """The tensors of a folder of safetensors files, each read from disk when it is asked for."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"No .safetensors file in {folder}.")
        self._file_of = {}
        for file in files:
            handle = safe_open(file, framework="pt")
            self._file_of.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, key: str) -> Tensor:
        return self._file_of[key].get_tensor(key)

    def shape_of(self, key: str) -> tuple[int, ...]:
        return tuple(self._file_of[key].get_slice(key).get_shape())

    def dtype_of(self, key: str) -> str:
        """As safetensors names it: F32, BF16, ..."""
        return self._file_of[key].get_slice(key).get_dtype()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    sam2: str | Path | None = None,
    sam2_config: dict[str, Any] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    progress: bool = False,
) -> Path:
    """Write `source` in this package's layout, with the code that loads it, as the folder `out`.

    Args:
        source: folder of a plain Sa2VA or a published Sa2VA-i checkpoint (safetensors).
        out: folder to make. It appears whole or not at all.
        sam2: Meta's SAM 2 file (`.pt`); needed for plain Sa2VA, whose original decoder it holds.
        sam2_config: fields of `Sam2VideoConfig` for other sizes than Hiera-L.
    Returns:
        `out` as a `Path`.
    Raises:
        FileNotFoundError, FileExistsError: a source is missing, or `out` is there already.
        ValueError: keys or shapes do not fit; the message names them.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"No checkpoint folder with a config.json at {source}.")
    check_new_folder(out)
    config = convert_config(read_json(source / "config.json"), sam2_config or SAM2_HIERA_LARGE)
    weights: Mapping[str, Tensor] = SafetensorsFolder(source)
    if sam2 is not None:
        weights = ChainMap({SAM2_FILE + key: tensor for key, tensor in read_sam2(Path(sam2)).items()}, weights)
    with torch.device("meta"):
        model = Sa2VAiModel(config)
    plan = make_plan(weights)
    check_plan(plan, weights, model)
    check_shared_sam2(weights)

    with staged_folder(out) as folder:
        write_configs(folder, source, config)
        write_weights(folder, plan, weights, max_shard_size, progress)
    return out


def convert_config(source: Mapping[str, Any], sam2_config: Mapping[str, Any]) -> Sa2VAiConfig:
    """Our config from the source's, every value read from it; token ids are filled in later.

    Raises:
        ValueError: a setting this package does not implement.
    """
    expected = {"select_layer": -1, "ps_version": "v2", "force_image_size": source["vision_config"]["image_size"]}
    for name, value in expected.items():
        if source[name] != value:
            raise ValueError(f"`{name}` = {source[name]!r} in the source's config; only {value!r} is supported.")
    return Sa2VAiConfig(
        vision_config=_vision_config(source["vision_config"]),
        llm_config=_llm_config(source["llm_config"]),
        sam2_config=Sam2VideoConfig(**sam2_config),
        downsample_ratio=source["downsample_ratio"],
        template=source["template"],
        min_dynamic_patch=source["min_dynamic_patch"],
        max_dynamic_patch=source["max_dynamic_patch"],
        use_thumbnail=source["use_thumbnail"],
        architectures=["Sa2VAiModel"],
        auto_map=AUTO_MAP,
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
    if source["model_type"] not in LANGUAGE_MODELS:
        raise ValueError(f"Language model {source['model_type']!r} is not supported; {sorted(LANGUAGE_MODELS)} are.")
    known = AutoConfig.for_model(source["model_type"]).to_dict().keys() | {"rope_theta", "rope_scaling"}
    dropped = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id"}
    fields = {name: value for name, value in source.items() if name in known - dropped}
    return AutoConfig.for_model(**fields)


def make_plan(weights: Mapping[str, Tensor]) -> Plan:
    """Where every tensor goes. The layout, plain Sa2VA or Sa2VA-i, is read from the keys."""
    has_both_decoders = any(key.startswith(SAM2_PREFIX + SOURCE_FINE_TUNED_DECODER) for key in weights)
    has_sam2_file = any(key.startswith(SAM2_FILE) for key in weights)
    if has_both_decoders and has_sam2_file:
        raise ValueError("The checkpoint is a Sa2VA-i one and holds the original decoder: leave out the SAM 2 file.")
    if not has_both_decoders and not has_sam2_file:
        raise ValueError(
            "The checkpoint is a plain Sa2VA one, which lacks the original SAM 2 decoder: give Meta's SAM 2 file "
            "(--sam2 sam2_hiera_large.pt)."
        )
    plan: Plan = {}
    points = {}
    for key in weights:
        part, _, rest = key.partition(".")
        if key.startswith(SAM2_FILE):
            rest = key.removeprefix(SAM2_FILE)
            if rest.startswith(SOURCE_DECODER):  # the rest of the file stands in the checkpoint too
                _add(plan, ORIGINAL_DECODER + _decoder_key(rest), Piece(key))
        elif key.startswith(SAM2_PREFIX):
            rest = key.removeprefix(SAM2_PREFIX)
            if rest.startswith(SOURCE_FINE_TUNED_DECODER):
                _add(plan, FINE_TUNED_DECODER + _decoder_key(rest), Piece(key))
            elif rest.startswith(SOURCE_DECODER):
                decoder = ORIGINAL_DECODER if has_both_decoders else FINE_TUNED_DECODER
                _add(plan, decoder + _decoder_key(rest), Piece(key))
            elif rest == POSITION_MATRIX:  # transformers keeps two copies, and re-randomises a missing one in silence
                _add(plan, "propagator.prompt_encoder.shared_embedding.positional_embedding", Piece(key))
                _add(plan, "propagator.shared_image_embedding.positional_embedding", Piece(key))
            elif match := POINT_EMBEDDING.match(rest):
                points[int(match[1])] = Piece(key)
            else:
                _add(plan, "propagator." + rename(rest, SAM2_RENAMES), Piece(key))
        elif part == "vision_model":
            if match := FUSED_QKV.match(rest):
                for chunk, name in enumerate("qkv"):
                    target = f"vision_model.{rename(match[1], VISION_RENAMES)}attention.{name}_proj.{match[2]}"
                    _add(plan, target, Piece(key, chunk, 3))
            else:
                _add(plan, "vision_model." + rename(rest, VISION_RENAMES), Piece(key))
        elif part == "mlp1":
            _add(plan, "mlp1." + rename(rest, PROJECTOR_RENAMES), Piece(key))
        else:
            _add(plan, key, Piece(key))
    if points:
        plan["propagator.prompt_encoder.point_embed.weight"] = [points[number] for number in sorted(points)]
    return plan


def _add(plan: Plan, target: str, piece: Piece) -> None:
    if target in plan:
        raise ValueError(f"Two source tensors become {target}: {plan[target][0].key} and {piece.key}.")
    plan[target] = [piece]


def _decoder_key(key: str) -> str:
    return rename(key.partition(".")[2], MASK_DECODER_RENAMES)


def rename(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    """`key` after every rule, in order."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def check_plan(plan: Plan, weights: Mapping[str, Tensor], model: Sa2VAiModel) -> None:
    """Raise a ValueError unless the plan fills the model (on the meta device) exactly."""
    target = model.state_dict()
    unknown = sorted(plan.keys() - target.keys())
    unfilled = sorted(target.keys() - plan.keys() - model.all_tied_weights_keys.keys())
    if unknown or unfilled:
        raise ValueError(
            f"The checkpoint does not fit: {len(unknown)} source tensors have no place {_some(unknown)}, "
            f"{len(unfilled)} of ours are not filled {_some(unfilled)}."
        )
    for key, pieces in plan.items():
        shapes = [piece.take(weights).shape for piece in pieces]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else tuple(shapes[0])
        if shape != tuple(target[key].shape):
            raise ValueError(
                f"{pieces[0].key} is {shape} in the source and {tuple(target[key].shape)} in the model ({key}). "
                "Sizes of SAM 2 other than Hiera-L are given with --sam2-config."
            )


def check_shared_sam2(weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if the checkpoint's frozen SAM 2 is not that of the SAM 2 file, beyond bfloat16 rounding."""
    for key in weights:
        name = key.removeprefix(SAM2_FILE)
        if name == key or name.startswith(SOURCE_DECODER):
            continue
        twins = [SAM2_PREFIX + name, SAM2_PREFIX + name.replace(".gamma", ".g_weight")]
        twin = next((twin for twin in twins if twin in weights), None)
        if twin is None:
            raise ValueError(f"{name} of the SAM 2 file is not in the checkpoint: it is another SAM 2.")
        original, shared = weights[key].float(), weights[twin].float()
        if original.shape != shared.shape or not torch.allclose(original, shared, rtol=2**-7, atol=1e-6):
            raise ValueError(
                f"{name} differs between the checkpoint and the SAM 2 file. It is frozen in training: this is not the "
                "SAM 2 the checkpoint was made from."
            )


def write_weights(folder: Path, plan: Plan, weights: Mapping[str, Tensor], max_shard_size: str, progress: bool) -> None:
    """Write the plan's tensors as sharded safetensors with an index, one shard in memory at a time."""
    shapes = {key: torch.cat([piece.take(weights).to("meta") for piece in pieces]) for key, pieces in plan.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    with tqdm(total=len(plan), unit="tensor", desc="convert", disable=not progress) as bar:
        for filename, keys in split.filename_to_tensors.items():
            shard = {}
            for key in keys:
                shard[key] = torch.cat([piece.take(weights) for piece in plan[key]])
                bar.update()
            save_file(shard, folder / filename, metadata={"format": "pt"})
            (folder / filename).chmod(0o644)  # safetensors makes its files private
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_configs(folder: Path, source: Path, config: Sa2VAiConfig) -> None:
    """Everything beside the weights that a Hub repository of a remote-code model holds: code, configs, tokenizer."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    # read from the copy: beside the source's config.json, AutoTokenizer would offer to run the source's code
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Sa2VAiProcessor.from_config(config, tokenizer)
    processor.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    processor.to_json_file(folder / "processor_config.json")
    config.seg_token_id = processor.seg_token_id
    config.img_context_token_id = processor.img_context_token_id
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=2048,  # as the original
        eos_token_id=processor.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def read_sam2(file: Path) -> dict[str, Tensor]:
    """Tensors of Meta's SAM 2 file (`{"model": {...}}`), mapped from disk."""
    if not file.is_file():
        raise FileNotFoundError(f"No SAM 2 file at {file}.")
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if "model" not in content:
        raise ValueError(f'{file} is not one of Meta\'s SAM 2 files: it has {_some(sorted(content))} and no "model".')
    return content["model"]


def _some(names: list[str]) -> str:
    return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
