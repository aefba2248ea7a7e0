"""The propagator against Meta's own predictor, with the same weights, frames and mask prompts.

pip install hydra-core iopath && pip install --no-deps --no-build-isolation sam2
"""

from itertools import pairwise

import pytest
import torch
from transformers import Sam2VideoConfig

from sa2va_i import Sam2Propagator
from sa2va_i.sam2_propagator import resize
from small_model import at_side

pytest.importorskip("sam2", reason="the extra `peers` is not installed")
import sam2_peer

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
    trunk = [f"++model.image_encoder.trunk.{name}={value}" for name, value in TRUNK.items()]
    neck = "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]"
    predictor = sam2_peer.build_predictor([*trunk, neck, f"++model.image_size={SIDE}"], device="cpu")
    predictor.load_state_dict(sam2_weights)
    return predictor


@pytest.fixture(scope="module")
def propagator(sam2_weights, sam2_config) -> Sam2Propagator:
    propagator = Sam2Propagator(at_side(Sam2VideoConfig(**sam2_config), SIDE)).eval()
    propagator.load_state_dict(sam2_peer.native_weights(sam2_weights, propagator))
    return propagator


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


def track_with_ours(propagator, video, prompts) -> torch.Tensor:
    """As the predictor gives them: from stride 4 straight to the prompts' size (Sa2VA-i goes by way of SAM 2's)."""
    return torch.stack([resize(logits, (120, 160))[:, 0] for _, logits in propagator.propagate(video, prompts)])


@pytest.fixture(scope="module")
def expected(predictor, video) -> torch.Tensor:
    """(T, K, height, width) logits at the prompts' size."""
    return torch.stack([logits for _, logits in sam2_peer.propagate(predictor, video, PROMPTS)])


def test_same_masks(propagator, video, expected):
    ours = track_with_ours(propagator, video, PROMPTS)
    gap = (ours - expected).abs().amax((1, 2, 3))
    print(f"largest gap of a logit on each frame: {[f'{value:.1e}' for value in gap.tolist()]}")
    assert gap.max() <= 1e-2  # roundings of the bfloat16 memories add up over frames of noise
    # so masks can differ only where a logit is as near to 0 as that
    differing = (ours > 0) != (expected > 0)
    assert not (differing & (expected.abs() > gap.max())).any()
    assert differing.float().mean() < 1e-4


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
