"""A small Sa2VA-i with random weights, for tests and benchmarks: SAM 2 at 192 px, tiles of 56 px."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Sam2VideoConfig

from sa2va_i import Sa2VAiConfig, Sa2VAiModel

HERE = Path(__file__).parent


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(HERE / "reference" / "checkpoint_files", config=Sa2VAiConfig())


def config_for(tokenizer: PreTrainedTokenizerBase) -> Sa2VAiConfig:
    return Sa2VAiConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "attention_bias": True,
        },
        llm_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        sam2_config=json.loads((HERE / "small_sam2.json").read_text()),
        seg_token_id=tokenizer.convert_tokens_to_ids("[SEG]"),
        img_context_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )


def at_side(config: Sam2VideoConfig, side: int) -> Sam2VideoConfig:
    """`config`, set to take frames of `side` x `side` pixels."""
    config.image_size = config.prompt_encoder_config.image_size = side
    config.vision_config.backbone_config.image_size = [side, side]
    config.vision_config.backbone_feature_sizes = [[side // stride] * 2 for stride in (4, 8, 16)]
    config.memory_attention_rope_feat_sizes = [side // 16] * 2
    return config


def build() -> Sa2VAiModel:
    """Weights with which objects come and go and masks move: with transformers' own init, all are one constant."""
    tokenizer = load_tokenizer()
    torch.manual_seed(0)  # of the position matrices, which are buffers
    model = Sa2VAiModel(config_for(tokenizer)).eval()
    parts = ("propagator", "grounding_encoder", "vision_model", "mlp1", "language_model", "text_hidden_fcs")
    for seed, part in enumerate(parts):
        randomize(getattr(model, part), seed)
    model.preparing_for_generation(tokenizer, max_new_tokens=12)
    return model


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.named_parameters():
        if tensor.ndim == 1:
            is_scale = "norm" in name and name.endswith("weight")
            noise = torch.randn(tensor.shape, generator=generator) * 0.1 + (1.0 if is_scale else 0.0)
        else:
            noise = torch.randn(tensor.shape, generator=generator) * 1.5 * tensor[0].numel() ** -0.5
        tensor.data.copy_(noise)


@torch.no_grad()
def always_answer_seg(model: Sa2VAiModel) -> None:
    """Make the language model answer every prompt with "[SEG]", so that no answer needs to be forced.

    Without the layers' contributions a state is the last token's embedding, and each token has one successor.
    """
    language_model, tokenizer = model.language_model, model.processor.tokenizer
    for layer in language_model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding, head = language_model.get_input_embeddings().weight, language_model.lm_head.weight
    (newline,) = tokenizer("\n").input_ids  # the last token of every prompt
    seg, end = tokenizer.convert_tokens_to_ids(["[SEG]", "<|im_end|>"])
    norm = language_model.model.norm.weight
    head.zero_()
    head[seg], head[end] = embedding[newline] * norm, embedding[seg] * norm
