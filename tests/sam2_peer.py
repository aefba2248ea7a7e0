"""Meta's own predictor (the package sam2), set as the original Sa2VA-i sets it: a peer to compare with.

pip install hydra-core iopath && pip install --no-deps --no-build-isolation sam2
"""

from collections.abc import Iterator, Mapping, Sequence
from unittest import mock

import torch
from sam2.build_sam import build_sam2_video_predictor
from torch import Tensor

from sa2va_i import Sa2VAiConfig, Sam2Propagator
from sa2va_i.checkpoint_layout import SAM2_FILE, make_plan

OVERRIDES = [
    "++model.binarize_mask_from_pts_for_mem_enc=false",
    # part of `apply_postprocessing`, without the hole filling
    "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
    "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
    "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
]


def build_predictor(overrides: Sequence[str] = (), **options):
    """SAM2VideoPredictor of Hiera-L; prompt masks are not made binary for the memory."""
    return build_sam2_video_predictor(
        "configs/sam2/sam2_hiera_l.yaml",
        ckpt_path=None,
        apply_postprocessing=False,
        hydra_overrides_extra=[*OVERRIDES, *overrides],
        **options,
    )


def native_weights(weights: Mapping[str, Tensor], propagator: Sam2Propagator) -> dict[str, Tensor]:
    """Meta's tensors under transformers' names, by the tables of the conversion."""
    keyed = {"grounding_encoder.sam2_model." + key: tensor for key, tensor in weights.items()}
    keyed |= {SAM2_FILE + key: tensor for key, tensor in weights.items() if key.startswith("sam_mask_decoder.")}
    plan = make_plan(keyed, Sa2VAiConfig(), "qwen2")
    recipes = {key: plan["propagator." + key] for key in propagator.state_dict()}
    return {key: recipe.make(*(keyed[name] for name in recipe.keys)) for key, recipe in recipes.items()}


def propagate(predictor, video: Tensor, prompts: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(frame_idx, logits (K, height, width) at the prompts' size) of frames (T, 3, H, W)."""
    height, width = next(iter(prompts.values())).shape[-2:]
    with torch.inference_mode():
        # `init_state` reads frames from a folder of JPEGs; these are tensors
        with mock.patch("sam2.sam2_video_predictor.load_video_frames", return_value=(video, height, width)):
            state = predictor.init_state("frames given as a tensor")
        for frame_idx, masks in prompts.items():
            for object_idx, mask in enumerate(masks):
                predictor.add_new_mask(state, frame_idx, object_idx, mask)
        for frame_idx, _, logits in predictor.propagate_in_video(state, start_frame_idx=0):
            yield frame_idx, logits[:, 0]
