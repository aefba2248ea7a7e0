"""Against the original code (kumuji/Sa2VA-i at c5a809b, and Sa2VA before it), stage by stage; see tests/reference.

If one fails: a stage passes only if those before it do, so look at the first. The number of threads moves propagated
logits by 1e-3, and no mask.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sa2va_i import modeling_sa2va_i

REFERENCE = Path(__file__).parents[1] / "reference"
VIDEOS = {
    "video_t14_s5": {},
    "video_t14_s12": {"sample_num_frames": 12},
    "video_t3_s5": {},
    "video_t8_s5_two_objects": {},
    "video_t6_no_seg": {},
}
IMAGES = {"sa2va_image_f3": 3, "sa2va_image_f0_regions": 0}
MEMORY = {"decoding": "memory", "sampling": "first"}


@dataclass
class Trace:
    """What went through the stages of one call."""

    inputs: dict = field(default_factory=dict)
    output_ids: torch.Tensor | None = None
    seg_states: torch.Tensor | None = None
    initial_logits: list[torch.Tensor] = field(default_factory=list)
    propagated_logits: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def trace(reference_model, monkeypatch) -> Trace:
    trace = Trace()

    def watch(owner, name, record):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            return record(args, kwargs, result)

        monkeypatch.setattr(owner, name, watched)

    def record_generate(args, kwargs, result):
        trace.inputs, trace.output_ids = kwargs, result
        return result

    def record_seg_states(args, kwargs, result):
        trace.seg_states = result
        return result

    def record_initial(args, kwargs, result):
        trace.initial_logits.append(result.logits[:, 0])
        return result

    def record_propagated(args, kwargs, result):
        for frame_idx, logits in result:
            trace.propagated_logits.append(logits[:, 0])
            yield frame_idx, logits

    watch(reference_model, "generate", record_generate)
    watch(modeling_sa2va_i, "select_seg_states", record_seg_states)
    watch(reference_model.propagator, "decode_seg", record_initial)
    watch(modeling_sa2va_i, "track_frames", record_propagated)
    return trace


@pytest.fixture(scope="module")
def reference_frames() -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted((REFERENCE / "video").glob("*.png"))]


def load(case: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "golden" / f"{case}.npz") as golden:
        return dict(golden)


def gap(ours, golden) -> float:
    ours, golden = np.asarray(ours), np.asarray(golden)
    assert ours.shape == golden.shape
    return float(np.abs(ours - golden).max(initial=0))


def masks_of(golden: dict, object_idx: int, width: int) -> np.ndarray:
    packed = golden[f"obj{object_idx}_final_masks_packed"]
    return np.unpackbits(packed, axis=-1)[..., :width].astype(bool)


def iou(ours: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Of each frame; 1 where both are empty."""
    intersection, union = (ours & golden).sum((1, 2)), (ours | golden).sum((1, 2))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))


def check_answer(result: dict, trace: Trace, golden: dict) -> None:
    assert np.array_equal(trace.inputs["input_ids"], golden["input_ids"])
    assert gap(trace.inputs["pixel_values"][:, :, ::16, ::16], golden["pixel_values_stride16"]) <= 1e-6
    assert np.array_equal(trace.output_ids, golden["output_ids"])
    assert result["prediction"] == str(golden["prediction"])
    assert gap(trace.seg_states, golden["seg_hidden_states"]) <= 1e-4
    assert len(result["prediction_masks"]) == len(golden["seg_hidden_states"])


def check_masks(result: dict, golden: dict) -> None:
    for object_idx, masks in enumerate(result["prediction_masks"]):
        expected = masks_of(golden, object_idx, masks.shape[-1])
        assert masks.dtype == bool
        assert masks.shape == expected.shape
        assert iou(masks, expected).min() >= 0.999


def flipped_prompts(trace: Trace, golden: dict, object_idx: int, first_of_each: np.ndarray) -> np.ndarray:
    """(number of sampled frames,) bool: frames whose prompt mask differs from the original's, in undecided pixels only.

    A pixel whose logit is within 1e-4 of 0 falls on either side by rounding; no other may differ.
    """
    packed = golden[f"obj{object_idx}_prompt_masks_packed"][first_of_each]
    expected = np.unpackbits(packed, axis=-1)[..., :320].astype(bool)
    logits = torch.stack([logits[object_idx] for logits in trace.initial_logits])[:, None]
    logits = modeling_sa2va_i.resize(logits, expected.shape[1:])[:, 0].numpy()
    flipped = (logits > 0) != expected
    assert np.abs(logits[flipped]).max(initial=0) < 1e-4
    return flipped.any((1, 2))


def check_propagated_logits(trace: Trace, golden: dict, object_idx: int, left_out: np.ndarray) -> None:
    """On every frame whose object score is not so close to 0 that rounding decides whether the object is there.

    `left_out`: the prompt frames with a flipped pixel, for a prompt frame's logits are its mask's.
    """
    decided = np.abs(golden[f"obj{object_idx}_object_score_logits"][:, 0]) > 1e-2
    decided[left_out] = False
    ours = torch.stack([logits[object_idx, ::4, ::4] for logits in trace.propagated_logits])
    assert gap(ours[decided], golden[f"obj{object_idx}_low_res_masks_stride4"][decided]) <= 5e-3


@pytest.mark.parametrize("case", VIDEOS)
def test_video(case, reference_model, reference_frames, trace, answering):
    golden = load(case)
    num_frames = int(case.split("_")[1].removeprefix("t"))
    with answering(reference_model, golden["output_ids"][0].tolist()):
        result = reference_model.predict_forward(
            video=reference_frames[:num_frames], text=str(golden["text"]), **VIDEOS[case]
        )
    check_answer(result, trace, golden)
    # the original repeats the indices of a video shorter than the number of samples, to the same effect
    sample_idx, first_of_each = np.unique(golden["sample_idx"], return_index=True)
    assert result["sample_idx"] == sample_idx.tolist()
    for object_idx in range(len(result["prediction_masks"])):
        initial = torch.stack([logits[object_idx, ::4, ::4] for logits in trace.initial_logits])
        assert gap(initial, golden[f"obj{object_idx}_init_low_res_masks_stride4"][first_of_each]) <= 1e-3
        flipped = flipped_prompts(trace, golden, object_idx, first_of_each)
        check_propagated_logits(trace, golden, object_idx, left_out=sample_idx[flipped])
    check_masks(result, golden)


def test_the_model_answers_by_itself(reference_model, reference_frames, trace):
    """Not forced: its own greedy answer is the original's."""
    golden = load("video_t14_s5")
    result = reference_model.predict_forward(
        video=reference_frames, text=str(golden["text"]), return_drafts_only=True, max_new_tokens=20
    )
    assert result["prediction"] == str(golden["prediction"])
    drafts = np.unpackbits(golden["obj0_prompt_masks_packed"], axis=-1)[..., :320].astype(bool)
    assert iou(result["prediction_masks"][0], drafts).min() >= 0.999


@pytest.mark.parametrize("case", IMAGES)
def test_image(case, reference_model, reference_frames, trace, answering):
    golden = load(case)
    with answering(reference_model, golden["output_ids"][0].tolist()):
        result = reference_model.predict_forward(
            image=reference_frames[IMAGES[case]], text=str(golden["text"]), mask_prompts=golden.get("mask_prompts")
        )
    check_answer(result, trace, golden)
    check_masks(result, golden)
    for object_idx in range(len(result["prediction_masks"])):
        logits = trace.initial_logits[0][None, object_idx : object_idx + 1]
        full = modeling_sa2va_i.resize(logits, 1024)[0]
        assert gap(full[:, ::4, ::4], golden[f"obj{object_idx}_logits_stride4"]) <= 1e-3


def test_memory_decoding(reference_model, reference_frames, trace):
    """The original Sa2VA: first frames, the fine-tuned decoder inside SAM 2's memory loop, no gating of masks."""
    golden = load("sa2va_video_t10_memory")
    result = reference_model.predict_forward(video=reference_frames[:10], text=str(golden["text"]), **MEMORY)
    check_answer(result, trace, golden)
    check_masks(result, golden)
    full = torch.stack([modeling_sa2va_i.resize(logits[None], 1024)[0, 0] for logits in trace.propagated_logits])
    assert gap(full[:, ::8, ::8], golden["obj0_logits_stride8"]) <= 5e-3


# Twins that must differ: each proves that the checks above can fail.


def test_twin_other_decoding(reference_model, reference_frames, trace):
    """Memory decoding on the consistent case."""
    golden = load("video_t14_s12")
    result = reference_model.predict_forward(
        video=reference_frames, text=str(golden["text"]), sample_num_frames=12, decoding="memory"
    )
    check_answer(result, trace, golden)
    assert iou(result["prediction_masks"][0], masks_of(golden, 0, 320)).min() < 0.9
    with pytest.raises(AssertionError):
        check_propagated_logits(trace, golden, 0, left_out=golden["sample_idx"])


def test_twin_unrounded_normalisation(reference_model, reference_frames, trace, monkeypatch):
    """ImageNet's constants unrounded, as one would write them."""
    monkeypatch.setattr("sa2va_i.processing_sa2va_i.SAM2_STD", (0.229, 0.224, 0.225))
    golden = load("sa2va_image_f3")
    reference_model.predict_forward(image=reference_frames[3], text=str(golden["text"]))
    full = modeling_sa2va_i.resize(trace.initial_logits[0][None], 1024)[0]
    assert gap(full[:, ::4, ::4], golden["obj0_logits_stride4"]) > 1e-3


def test_twin_swapped_decoders(reference_model, reference_frames, trace, monkeypatch):
    """The two decoders hold different weights: with the original one in its place, [SEG] gives other masks."""
    monkeypatch.setitem(reference_model._modules, "grounding_encoder", reference_model.propagator.mask_decoder)
    golden = load("sa2va_image_f3")
    reference_model.predict_forward(image=reference_frames[3], text=str(golden["text"]))
    full = modeling_sa2va_i.resize(trace.initial_logits[0][None], 1024)[0]
    assert gap(full[:, ::4, ::4], golden["obj0_logits_stride4"]) > 1e-3
