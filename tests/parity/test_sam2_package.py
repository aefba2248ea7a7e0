"""The propagator against Meta's own predictor, with the same weights, frames and mask prompts.

pip install hydra-core iopath && pip install --no-deps --no-build-isolation sam2
"""

from itertools import pairwise

import pytest
import torch
from transformers import Sam2VideoConfig

from sa2va_i import Sa2VAiConfig, Sam2Propagator
from sa2va_i.checkpoint_layout import SAM2_FILE, make_plan
from sa2va_i.sam2_propagator import resize

pytest.importorskip("sam2", reason="the extra `peers` is not installed")
pytestmark = pytest.mark.peers

SIDE = 256
NUM_FRAMES = 10
TRUNK = {
    "embed_dim": 16,
    "num_heads": 1,
    "stages": [1, 2, 3, 1],
    "global_att_blocks": [4],
    "window_spec": [8, 4, 16, 8],
    "window_pos_embed_bkg_spatial_size": [7, 7],
}


@pytest.fixture(scope="module")
def sam2_weights(sources) -> dict[str, torch.Tensor]:
    return torch.load(sources / "sam2.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def predictor(sam2_weights):
    """SAM2VideoPredictor as the original Sa2VA-i configures it: prompt masks are not made binary for the memory."""
    from sam2.build_sam import build_sam2_video_predictor

    overrides = [f"++model.image_encoder.trunk.{name}={value}" for name, value in TRUNK.items()]
    predictor = build_sam2_video_predictor(
        "configs/sam2/sam2_hiera_l.yaml",
        ckpt_path=None,
        device="cpu",
        apply_postprocessing=False,
        hydra_overrides_extra=[
            *overrides,
            "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]",
            f"++model.image_size={SIDE}",
            "++model.binarize_mask_from_pts_for_mem_enc=false",
            # part of `apply_postprocessing`, without the hole filling
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
            "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
        ],
    )
    predictor.load_state_dict(sam2_weights)
    return predictor


@pytest.fixture(scope="module")
def propagator(sam2_weights, sam2_config) -> Sam2Propagator:
    config = Sam2VideoConfig(**sam2_config)
    config.image_size = config.prompt_encoder_config.image_size = SIDE
    config.vision_config.backbone_config.image_size = [SIDE, SIDE]
    config.vision_config.backbone_feature_sizes = [[SIDE // 4] * 2, [SIDE // 8] * 2, [SIDE // 16] * 2]
    config.memory_attention_rope_feat_sizes = [SIDE // 16] * 2
    propagator = Sam2Propagator(config).eval()
    propagator.load_state_dict(native_weights(sam2_weights, propagator))
    return propagator


def native_weights(weights, propagator) -> dict[str, torch.Tensor]:
    """Meta's tensors under transformers' names, by the tables of the conversion."""
    keyed = {"grounding_encoder.sam2_model." + key: tensor for key, tensor in weights.items()}
    keyed |= {SAM2_FILE + key: tensor for key, tensor in weights.items() if key.startswith("sam_mask_decoder.")}
    plan = make_plan(keyed, Sa2VAiConfig(), "qwen2")
    recipes = {key: plan["propagator." + key] for key in propagator.state_dict()}
    return {key: recipe.make(*(keyed[name] for name in recipe.keys)) for key, recipe in recipes.items()}


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.randn(NUM_FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def box(x: int, y: int) -> torch.Tensor:
    mask = torch.zeros(120, 160, dtype=torch.bool)
    mask[y : y + 40, x : x + 50] = True
    return mask


PROMPTS = {
    0: torch.stack([box(10, 20), box(90, 60)]),
    4: torch.stack([box(30, 40), box(60, 60)]),
    9: torch.stack([box(80, 50), torch.zeros(120, 160, dtype=torch.bool)]),
}


def track_with_sam2(predictor, video, prompts) -> torch.Tensor:
    """(T, K, height, width) logits at the prompts' size."""
    height, width = 120, 160
    with torch.inference_mode():
        state = _empty_state(predictor, video, height, width)
        for frame_idx, masks in prompts.items():
            for object_idx, mask in enumerate(masks):
                predictor.add_new_mask(state, frame_idx, object_idx, mask)
        frames = {idx: logits for idx, _, logits in predictor.propagate_in_video(state, start_frame_idx=0)}
    return torch.stack([frames[idx][:, 0] for idx in range(len(video))])


def _empty_state(predictor, video, height, width):
    """`init_state` reads frames from a folder of JPEGs; these are tensors."""
    from unittest import mock

    loaded = (video, height, width)
    with mock.patch("sam2.sam2_video_predictor.load_video_frames", return_value=loaded):
        return predictor.init_state("frames given as a tensor")


def track_with_ours(propagator, video, prompts) -> torch.Tensor:
    """As the predictor gives them: from stride 4 straight to the prompts' size (Sa2VA-i goes by way of SAM 2's)."""
    return torch.stack([resize(logits, (120, 160))[:, 0] for _, logits in propagator.propagate(video, prompts)])


@pytest.fixture(scope="module")
def expected(predictor, video) -> torch.Tensor:
    return track_with_sam2(predictor, video, PROMPTS)


def test_same_masks(propagator, video, expected):
    ours = track_with_ours(propagator, video, PROMPTS)
    gap = (ours - expected).abs().amax((1, 2, 3))
    print(f"largest gap of a logit on each frame: {[f'{value:.1e}' for value in gap.tolist()]}")
    assert gap.max() <= 1e-2  # roundings of the bfloat16 memories add up over frames of noise
    # so masks can differ only where a logit is as near to 0 as that
    assert ((ours > 0) != (expected > 0)).float().mean() < 1e-5


def test_the_masks_are_worth_comparing(expected):
    """Neither constant nor all absent."""
    tracked = [idx for idx in range(NUM_FRAMES) if idx not in PROMPTS]
    assert (expected[tracked] > 0).any((-1, -2)).float().mean() > 0.5
    assert all(not torch.equal(expected[a] > 0, expected[b] > 0) for a, b in pairwise(tracked))


@pytest.mark.parametrize("twin", ["fewer prompts", "pointers dropped"])
def test_twins_differ(propagator, video, expected, twin, monkeypatch):
    prompts = PROMPTS
    if twin == "fewer prompts":
        prompts = {0: PROMPTS[0]}
    else:
        monkeypatch.setattr("sa2va_i.sam2_propagator.MemoryBank.pointers_for", lambda self, frame_idx: [])
    ours = track_with_ours(propagator, video, prompts)
    assert (ours - expected).abs().max() > 0.1
