"""The propagator beside what a user would take instead, with the same weights, frames and mask prompts, in one process.

    python benchmarks/propagation.py      # on the CPU: 8 frames, 5 prompt frames, 1, 3 and 5 objects
    python benchmarks/propagation.py --device cuda --dtype bfloat16 \\
        --frames 50 200 1000 --objects 1 3 10 --prompts 1 5 12
    python benchmarks/propagation.py --device cuda --dtype bfloat16 --frames 200 --objects 1 10 --compiled

SAM 2 is Hiera-L at 1024 px with random weights: the cost is the same. Contenders, taking turns:
    ours           `Sam2Propagator.propagate`
    transformers   `Sam2VideoModel` with a `Sam2VideoInferenceSession`
    sam2           `SAM2VideoPredictor` of the package sam2 (left out where it is not installed); with --compiled, its
                   `vos_optimized=True`
    original       the schedule of the original Sa2VA-i in our modules: every object runs alone, and n + T + U frames
                   are encoded for it: n sampled ones for initial masks, the U different ones as prompts, and all T
All end with masks of the video's size on the CPU. Prints for each setting: frames through the image encoder, arithmetic
(matrix products, convolutions, attention), seconds, the ratio to ours, what share of the machine's matrix rate is
reached, and how far masks are from ours; last, one line of JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Sam2VideoConfig, Sam2VideoInferenceSession, Sam2VideoModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from measure import count_flops, environment, interleaved, matrix_rate, peak_mb, reset_peak

from sa2va_i.checkpoint_layout import SAM2_HIERA_LARGE
from sa2va_i.processing_sa2va_i import uniform_frame_indices
from sa2va_i.sam2_propagator import FrameFeatures, ObjectTracker, Sam2Propagator, resize, track_frames
from small_model import at_side, randomize

SIZE = (480, 854)  # of the video and of its masks: (height, width)

Prompts = Mapping[int, Tensor]  # (K, height, width) bool masks of some frames


class Frames(list):
    """T frames of moving noise as SAM 2 takes them, made as they are asked for."""

    def __init__(self, num_frames: int, side: int, device: torch.device, dtype: torch.dtype):
        noise = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        super().__init__(range(num_frames))
        self._noise = noise

    def __getitem__(self, frame_idx: int) -> Tensor:
        return self._noise.roll(8 * frame_idx, dims=2)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[frame_idx] for frame_idx in range(len(self)))


def make_prompts(num_objects: int, indices: list[int]) -> dict[int, Tensor]:
    """Boxes that wander."""
    prompts = {}
    for frame_idx in indices:
        masks = torch.zeros(num_objects, *SIZE, dtype=torch.bool)
        for number, mask in enumerate(masks):
            y, x = 37 * number % 300, (61 * number + 9 * frame_idx) % 600
            mask[y : y + 120, x : x + 160] = True
        prompts[frame_idx] = masks
    return prompts


class EncoderCounter:
    """Frames through image encoders."""

    def __init__(self, *encoders: nn.Module):
        self.frames = 0
        for encoder in encoders:
            encoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs) -> None:
        self.frames += len(args[0] if args else kwargs["pixel_values"])


def ours(propagator: Sam2Propagator, frames: Frames, prompts: Prompts) -> list[Tensor]:
    return [masks_of(logits) for _, logits in propagator.propagate(frames, prompts)]


def masks_of(logits: Tensor) -> Tensor:
    """Straight from stride 4, as the peers do it; Sa2VA-i goes by way of SAM 2's size."""
    return (resize(logits, SIZE)[:, 0] > 0).cpu()


@torch.no_grad()
def original_schedule(propagator: Sam2Propagator, frames: Frames, prompts: Prompts) -> list[Tensor]:
    def encode(frame_idx: int) -> FrameFeatures:
        return propagator.features_for(propagator.mask_decoder, propagator.encode_images(frames[frame_idx][None]))

    num_objects = len(next(iter(prompts.values())))
    of_objects = []
    for number in range(num_objects):
        for frame_idx in prompts:  # for the initial masks, whose decoding is of no weight beside it
            encode(frame_idx)
        tracker = ObjectTracker(propagator, propagator.mask_decoder)
        for frame_idx, masks in prompts.items():
            tracker.add_mask_prompt(frame_idx, encode(frame_idx), masks[[number]])

        of_frames = map(encode, range(len(frames)))  # prompt frames too
        to_track = (features for idx, features in enumerate(of_frames) if idx not in prompts)
        of_objects.append([masks_of(logits) for _, logits in track_frames([tracker], len(frames), to_track)])
        list(to_track)  # prompt frames at the end
    return [torch.cat(of_frame) for of_frame in zip(*of_objects, strict=True)]


def transformers_session(model: Sam2VideoModel, frames: Frames, prompts: Prompts) -> list[Tensor]:
    session = Sam2VideoInferenceSession(
        video=torch.stack([frame.cpu() for frame in frames]),
        video_height=SIZE[0],
        video_width=SIZE[1],
        inference_device=model.device,
        inference_state_device=model.device,
        dtype=model.dtype,
    )
    side = model.config.image_size
    for frame_idx, masks in prompts.items():
        resized = F.interpolate(masks[:, None].float(), (side, side), mode="bilinear", antialias=True) >= 0.5
        numbers = [session.obj_id_to_idx(number) for number in range(len(masks))]
        for number in numbers:
            session.add_mask_inputs(number, frame_idx, resized[[number]])
        session.obj_with_new_inputs = numbers
        model(inference_session=session, frame_idx=frame_idx)
    return [masks_of(output.pred_masks) for output in model.propagate_in_video_iterator(session, start_frame_idx=0)]


def sam2_predictor(predictor, dtype: torch.dtype, frames: Frames, prompts: Prompts) -> list[Tensor]:
    import sam2_peer

    device = next(predictor.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return [(logits > 0).cpu() for _, logits in sam2_peer.propagate(predictor, frames, prompts)]


def hiera_large(side: int) -> Sam2VideoConfig:
    return at_side(Sam2VideoConfig(**SAM2_HIERA_LARGE), side)


def build(
    side: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> tuple[dict[str, Callable], EncoderCounter]:
    """The contenders, all with one set of weights, and a counter of the frames that they encode."""
    propagator, session_model = Sam2Propagator(hiera_large(side)).eval(), Sam2VideoModel(hiera_large(side)).eval()
    encoders = [propagator.vision_encoder, session_model.vision_encoder]
    contenders = {}
    if find_spec("sam2"):
        import sam2_peer

        predictor = sam2_peer.build_predictor([f"++model.image_size={side}"], device=device, vos_optimized=compiled)
        randomize(predictor, seed=0)
        propagator.load_state_dict(sam2_peer.native_weights(predictor.state_dict(), propagator))
        encoders.append(predictor.image_encoder)
        contenders["sam2"] = partial(sam2_predictor, predictor, dtype)
    else:
        print("sam2 is not installed: left out", file=sys.stderr)
        randomize(propagator, seed=0)
    session_model.load_state_dict(propagator.state_dict())
    propagator.to(device, dtype), session_model.to(device, dtype)
    counter = EncoderCounter(*encoders)
    if compiled:
        propagator.compile_parts()
    return {
        "ours": partial(ours, propagator),
        "transformers": partial(transformers_session, session_model),
        **contenders,
        "original": partial(original_schedule, propagator),
    }, counter


def iou(masks: list[Tensor], reference: list[Tensor]) -> float:
    """Mean over objects and frames; 1 where both are empty."""
    one, two = torch.stack(masks), torch.stack(reference)
    union = (one | two).sum((2, 3))
    return float(torch.where(union > 0, (one & two).sum((2, 3)) / union.clamp(min=1), 1.0).mean())


def run_setting(
    contenders: dict[str, Callable],
    counter: EncoderCounter,
    frames: Frames,
    prompts: Prompts,
    repeats: int,
    counted: bool,
) -> list[dict[str, Any]]:
    device = frames[0].device
    rows, masks = {name: {"contender": name} for name in contenders}, {}

    def run(name: str) -> None:
        counter.frames = 0
        reset_peak(device)
        masks[name] = contenders[name](frames, prompts)
        rows[name] |= {"encoded": counter.frames, "peak_mb": round(peak_mb(device))}

    runs = {name: partial(run, name) for name in contenders}
    if counted:  # which is slower than a run that counts nothing
        for name, one in runs.items():
            rows[name]["gflops"] = round(count_flops(one)[1] / 1e9)
    for name, seconds in interleaved(runs, repeats, device).items():
        rows[name]["seconds"] = round(seconds, 3)
    for name, row in rows.items():
        row["ratio"] = round(row["seconds"] / rows["ours"]["seconds"], 2)
        row["iou_to_ours"] = round(iou(masks[name], masks["ours"]), 5)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--frames", type=int, nargs="+", default=[8])
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--prompts", type=int, nargs="+", default=[5], help="prompt frames, spread uniformly")
    parser.add_argument("--side", type=int, default=1024, help="of the frames that SAM 2 takes; small ones to try this")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument(
        "--counted",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a round before them, that counts arithmetic and warms up; without it the first one is cold",
    )
    parser.add_argument("--contenders", nargs="+", help="these alone, beside ours")
    parser.add_argument("--compiled", action="store_true", help="ours and sam2, each by its own means")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    contenders, counter = build(arguments.side, device, dtype, arguments.compiled)
    if arguments.contenders:
        contenders = {name: run for name, run in contenders.items() if name in ("ours", *arguments.contenders)}
    rate = matrix_rate(device, dtype)
    record = {**environment(device, dtype), "matrix_gflops_per_second": round(rate / 1e9), "settings": []}
    print(json.dumps({key: value for key, value in record.items() if key != "settings"}))
    columns = ("encoded", "gflops", "seconds", "ratio", "share_of_matrix_rate", "iou_to_ours", "peak_mb")
    for num_frames, num_objects, num_prompts in product(arguments.frames, arguments.objects, arguments.prompts):
        frames = Frames(num_frames, arguments.side, device, dtype)
        prompts = make_prompts(num_objects, uniform_frame_indices(num_frames, num_prompts))
        rows = run_setting(contenders, counter, frames, prompts, arguments.repeats, arguments.counted)
        print(f"\nT = {num_frames}, K = {num_objects}, n = {num_prompts}")
        setting = {"frames": num_frames, "objects": num_objects, "prompts": num_prompts}
        if arguments.counted:
            for row in rows:
                row["share_of_matrix_rate"] = round(row["gflops"] * 1e9 / row["seconds"] / rate, 2)
            setting["roofline_seconds"] = round(rows[0]["gflops"] * 1e9 / rate, 4)
        print(f"{'':14}" + "".join(f"{column:>{len(column) + 3}}" for column in columns))
        for row in rows:
            print(
                f"{row['contender']:14}"
                + "".join(f"{row.get(column, '-')!s:>{len(column) + 3}}" for column in columns),
                flush=True,
            )
        if arguments.counted:
            print(f"roofline of ours (its arithmetic at the matrix rate): {setting['roofline_seconds']:.3f} s")
        record["settings"].append({**setting, "rows": rows})
    print(json.dumps(record))


if __name__ == "__main__":
    main()
