"""Every kind of published checkpoint, against the original's formulas written out under the original's names.

The reference checkpoint lends SAM 2, projector and `text_hidden_fcs`; language model or vision model are made here.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sa2va_i import Sa2VAiModel
from sa2va_i.checkpoint_layout import check_layout, convert_config, make_plan, rename
from sa2va_i.convert_checkpoint import convert_checkpoint
from sa2va_i.files import read_json
from sa2va_i.safetensors_io import TensorFiles, checkpoint_files

WIDTH, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 8, 2, 2, 416
HEAD_DIM = WIDTH // HEADS


def noise(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        sample = torch.randn(shape, generator=generator)
        weights[key] = 1 + 0.1 * sample if "norm" in key and len(shape) == 1 else sample * shape[-1] ** -0.5
    return weights


@pytest.fixture
def convert_with(sources, sam2_config, tmp_path):
    """Convert the reference checkpoint with parts of its weights and config replaced; returns the loaded model."""

    def convert(prefix: str, weights: dict[str, Tensor], config_part: str, config: dict) -> Sa2VAiModel:
        source = tmp_path / "source"
        source.mkdir()
        reference = TensorFiles(checkpoint_files(sources / "sa2va_i"))
        kept = {key: reference[key] for key in reference if not key.startswith(prefix)}
        save_file(kept | {prefix + key: tensor for key, tensor in weights.items()}, source / "model.safetensors")
        for file in (sources / "sa2va_i").glob("*.json"):
            if "index" not in file.name:
                shutil.copy(file, source)
        whole = read_json(source / "config.json")
        whole[config_part] = config
        (source / "config.json").write_text(json.dumps(whole))
        return Sa2VAiModel.from_pretrained(convert_checkpoint(source, tmp_path / "out", sam2_config=sam2_config))

    return convert


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotate(x: Tensor, angles: Tensor, scale: float = 1.0) -> Tensor:
    """Rotary embedding of (heads, L, d) by angles (L, d / 2), halves paired."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (heads, L, d), heads of k and v repeated; returns (L, heads * d)."""
    groups = len(q) // len(k)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def inverse_frequencies(theta: float) -> Tensor:
    return theta ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


class TestInternLM2:
    MAX_POSITIONS = 16
    CONFIG = {
        "model_type": "internlm2",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }

    @pytest.fixture
    def weights(self):
        shapes = {
            "model.tok_embeddings.weight": (VOCAB, WIDTH),
            "model.norm.weight": (WIDTH,),
            "output.weight": (VOCAB, WIDTH),
        }
        for layer in range(LAYERS):
            shapes |= {
                f"model.layers.{layer}.attention.wqkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH),
                f"model.layers.{layer}.attention.wo.weight": (WIDTH, WIDTH),
                f"model.layers.{layer}.feed_forward.w1.weight": (96, WIDTH),
                f"model.layers.{layer}.feed_forward.w2.weight": (WIDTH, 96),
                f"model.layers.{layer}.feed_forward.w3.weight": (96, WIDTH),
                f"model.layers.{layer}.attention_norm.weight": (WIDTH,),
                f"model.layers.{layer}.ffn_norm.weight": (WIDTH,),
            }
        return noise(shapes, seed=0)

    def logits(self, weights: dict[str, Tensor], token_ids: Tensor) -> Tensor:
        length = len(token_ids)
        theta = 1e6
        if length > self.MAX_POSITIONS:  # dynamic NTK: the base grows with the sequence
            theta *= (2 * length / self.MAX_POSITIONS - 1) ** (HEAD_DIM / (HEAD_DIM - 2))
        angles = torch.arange(length)[:, None] * inverse_frequencies(theta)
        x = weights["model.tok_embeddings.weight"][token_ids]
        for layer in range(LAYERS):
            w = {key.split(f"layers.{layer}.")[1]: t for key, t in weights.items() if f"layers.{layer}." in key}
            h = rms_norm(x, w["attention_norm.weight"])
            # for each key head: its queries, the key, the value
            fused = (h @ w["attention.wqkv.weight"].T).view(length, KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM)
            q = fused[:, :, :-2].flatten(1, 2).transpose(0, 1)
            k, v = fused[:, :, -2].transpose(0, 1), fused[:, :, -1].transpose(0, 1)
            x = x + attend(rotate(q, angles), rotate(k, angles), v) @ w["attention.wo.weight"].T
            h = rms_norm(x, w["ffn_norm.weight"])
            gate = F.silu(h @ w["feed_forward.w1.weight"].T) * (h @ w["feed_forward.w3.weight"].T)
            x = x + gate @ w["feed_forward.w2.weight"].T
        return rms_norm(x, weights["model.norm.weight"]) @ weights["output.weight"].T

    @pytest.mark.parametrize("length", [12, 40])
    def test_same_logits(self, convert_with, weights, length):
        """Within the context, and at two and a half times its length."""
        model = convert_with("language_model.", weights, "llm_config", self.CONFIG)
        assert model.config.llm_config.model_type == "llama"
        token_ids = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ours = model.language_model(token_ids[None]).logits[0]
        torch.testing.assert_close(ours, self.logits(weights, token_ids), rtol=0, atol=1e-4)
        weights = weights | {
            "model.layers.0.attention.wqkv.weight": weights["model.layers.0.attention.wqkv.weight"].flip(0)
        }
        assert (ours - self.logits(weights, token_ids)).abs().max() > 0.1  # twin: the fused rows in another order

    def test_bias_is_refused(self):
        with pytest.raises(ValueError, match="bias"):
            convert_config(published_config(self.CONFIG | {"bias": True}), {})


class TestPhi3:
    FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    CONFIG = {
        "model_type": "phi3",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "su", **FACTORS},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "pad_token_id": 400,
        "eos_token_id": 399,
        "bos_token_id": 1,
        "sliding_window": None,
    }

    @pytest.fixture
    def weights(self):
        shapes = {
            "model.embed_tokens.weight": (VOCAB, WIDTH),
            "model.norm.weight": (WIDTH,),
            "lm_head.weight": (VOCAB, WIDTH),
        }
        for layer in range(LAYERS):
            shapes |= {
                f"model.layers.{layer}.self_attn.qkv_proj.weight": (3 * WIDTH, WIDTH),
                f"model.layers.{layer}.self_attn.o_proj.weight": (WIDTH, WIDTH),
                f"model.layers.{layer}.mlp.gate_up_proj.weight": (2 * 96, WIDTH),
                f"model.layers.{layer}.mlp.down_proj.weight": (WIDTH, 96),
                f"model.layers.{layer}.input_layernorm.weight": (WIDTH,),
                f"model.layers.{layer}.post_attention_layernorm.weight": (WIDTH,),
            }
        return noise(shapes, seed=1)

    def logits(self, weights: dict[str, Tensor], token_ids: Tensor) -> Tensor:
        length = len(token_ids)
        # "su" scaling: frequencies divided by the short or the long factors, and both kept at the size of the original
        factors = self.FACTORS["long_factor" if length > 32 else "short_factor"]
        scale = math.sqrt(1 + math.log(128 / 32) / math.log(32))
        angles = torch.arange(length)[:, None] * inverse_frequencies(1e4) / torch.tensor(factors)
        x = weights["model.embed_tokens.weight"][token_ids]
        for layer in range(LAYERS):
            w = {key.split(f"layers.{layer}.")[1]: t for key, t in weights.items() if f"layers.{layer}." in key}
            h = rms_norm(x, w["input_layernorm.weight"])
            qkv = (h @ w["self_attn.qkv_proj.weight"].T).chunk(3, dim=-1)
            q, k, v = (part.view(length, HEADS, HEAD_DIM).transpose(0, 1) for part in qkv)
            x = x + attend(rotate(q, angles, scale), rotate(k, angles, scale), v) @ w["self_attn.o_proj.weight"].T
            gate, up = (rms_norm(x, w["post_attention_layernorm.weight"]) @ w["mlp.gate_up_proj.weight"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
        return rms_norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T

    @pytest.mark.parametrize("length", [20, 40])
    def test_same_logits(self, convert_with, weights, length):
        """With the short factors, and past the original context with the long ones."""
        model = convert_with("language_model.", weights, "llm_config", self.CONFIG)
        assert model.config.llm_config.rope_parameters["rope_type"] == "longrope"
        token_ids = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ours = model.language_model(token_ids[None]).logits[0]
        torch.testing.assert_close(ours, self.logits(weights, token_ids), rtol=0, atol=1e-4)


class TestInternViT6B:
    CONFIG = {
        "model_type": "intern_vit_6b",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 448,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
    }

    @pytest.fixture
    def weights(self):
        shapes = {
            "embeddings.class_embedding": (1, 1, 48),
            "embeddings.position_embedding": (1, 1025, 48),
            "embeddings.patch_embedding.weight": (48, 3, 14, 14),
            "embeddings.patch_embedding.bias": (48,),
        }
        for layer in range(LAYERS):
            shapes |= {
                f"encoder.layers.{layer}.norm1.weight": (48,),
                f"encoder.layers.{layer}.norm2.weight": (48,),
                f"encoder.layers.{layer}.attn.qkv.weight": (144, 48),
                f"encoder.layers.{layer}.attn.q_norm.weight": (48,),
                f"encoder.layers.{layer}.attn.k_norm.weight": (48,),
                f"encoder.layers.{layer}.attn.proj.weight": (48, 48),
                f"encoder.layers.{layer}.attn.proj.bias": (48,),
                f"encoder.layers.{layer}.mlp.fc1.weight": (96, 48),
                f"encoder.layers.{layer}.mlp.fc1.bias": (96,),
                f"encoder.layers.{layer}.mlp.fc2.weight": (48, 96),
                f"encoder.layers.{layer}.mlp.fc2.bias": (48,),
                f"encoder.layers.{layer}.ls1": (48,),
                f"encoder.layers.{layer}.ls2": (48,),
            }
        return noise(shapes, seed=2)

    def tokens(self, weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
        """All tokens, the class token first. The norm of queries and keys runs over all heads at once."""
        patches = F.conv2d(
            pixels, weights["embeddings.patch_embedding.weight"], weights["embeddings.patch_embedding.bias"], stride=14
        )
        x = torch.cat([weights["embeddings.class_embedding"], patches.flatten(2).transpose(1, 2)], dim=1)
        x = (x + weights["embeddings.position_embedding"])[0]
        for layer in range(LAYERS):
            w = {key.split(f"layers.{layer}.")[1]: t for key, t in weights.items() if f"layers.{layer}." in key}
            q, k, v = (rms_norm(x, w["norm1.weight"]) @ w["attn.qkv.weight"].T).chunk(3, dim=-1)
            q, k = rms_norm(q, w["attn.q_norm.weight"]), rms_norm(k, w["attn.k_norm.weight"])
            q, k, v = (part.view(len(x), 4, 12).transpose(0, 1) for part in (q, k, v))
            attention = ((q @ k.transpose(1, 2) / math.sqrt(12)).softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + w["ls1"] * (attention @ w["attn.proj.weight"].T + w["attn.proj.bias"])
            hidden = F.gelu(rms_norm(x, w["norm2.weight"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
            x = x + w["ls2"] * (hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])
        return x

    def test_same_tokens(self, convert_with, weights):
        model = convert_with("vision_model.", weights, "vision_config", self.CONFIG)
        pixels = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ours = model.vision_model(pixels).last_hidden_state[0]
        torch.testing.assert_close(ours, self.tokens(weights, pixels), rtol=0, atol=1e-4)


def published_config(llm_config: dict) -> dict:
    return {
        "model_type": "sa2va_chat",
        "vision_config": TestInternViT6B.CONFIG,
        "llm_config": llm_config,
        "select_layer": -1,
        "ps_version": "v2",
        "force_image_size": 448,
        "downsample_ratio": 0.5,
        "template": "internlm2_chat",
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "use_thumbnail": True,
    }


class TestConfig:
    def test_unknown_architecture_is_named(self):
        with pytest.raises(ValueError, match=r"'gemma'.*internlm2, phi3, qwen2"):
            convert_config(published_config({"model_type": "gemma"}), {})
        with pytest.raises(ValueError, match=r"'sa2va_qwen3_vl'"):
            convert_config({"model_type": "sa2va_qwen3_vl", "text_config": {}}, {})

    @pytest.mark.parametrize(("name", "value"), [("select_layer", -2), ("ps_version", "v1"), ("force_image_size", 224)])
    def test_unknown_settings_are_named(self, name, value):
        with pytest.raises(ValueError, match=f"{name}.*{value!r}"):
            convert_config(published_config(TestInternLM2.CONFIG) | {name: value}, {})


def test_lora_leftovers_are_refused():
    key = "language_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(ValueError, match=r"LoRA weights that are not merged.*lora_A.*merge_and_unload"):
        check_layout([key])


def test_computed_tables_are_dropped(sources):
    keys = [*TensorFiles(checkpoint_files(sources / "sa2va_i")), "language_model.model.rotary_emb.inv_freq"]
    config = convert_config(read_json(sources / "sa2va_i" / "config.json"), {})
    assert not any("inv_freq" in target for target in make_plan(keys, config, "qwen2"))


def test_rules_apply_in_order():
    assert rename("a.b", ((r"^a\.", "b."), (r"b", "c"))) == "c.c"
