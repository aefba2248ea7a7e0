"""The small SAM 2: video object segmentation from mask prompts on synthetic scenes, from scratch, memory included.

    python -m sa2va_i.training.small.train_sam2 OUT

Phase by phase. Pixels: the image encoder alone learns kind, colour and size of the shape at each place of its three
feature maps, by heads that are thrown away (Meta's encoder was pretrained too; from masks alone it learns slowly).
Pairs of frames, then clips of six: one to three frames of a clip are prompted with the true masks (some roughened), the
others tracked by the very loop that inference runs: each shape, and some of them as one object. Two frames are also
decoded without memory from the shape's name, as embeddings that are thrown away afterwards: the decoder learns to be
asked. All: the same, the pixels' losses beside. Names: frames alone, of scenes whose shapes share colours. From then on
the image encoder is frozen: clips of six, and long ones.

Losses as in SAM 2: of the masks, of the predicted IoU, and of whether the object is there; but of all three masks and
not of the best, for these shapes are not ambiguous, and the best of three can be right without looking at the prompt. A
name is also to give nothing where its shape is not, and to tell it from the others. A killed run goes on from its last
checkpoint.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Sam2VideoConfig

from ...mask_losses_sa2va_i import dice_losses
from ...processing_sa2va_i import SAM2_MEAN, SAM2_STD, to_pixel_values
from ...sam2_propagator import DecodedMasks, FrameFeatures, ObjectTracker, Sam2Propagator, resize
from ..synthetic import Scene
from .loop import Phase, run
from .pixels import VOCABULARIES, PixelHeads, classes_of, pixel_losses, pixel_phase

HERE = Path(__file__).parent
LOSS_SIDE = 96  # masks are compared at this size, where true ones have soft edges
PAIRS, CLIP, LONG_CLIP = 2, 6, 12  # frames of a clip, from phase to phase
SCENES_OF_PAIRS = 2  # in a step
NAMED_FRAMES = 2  # of a clip, decoded from names
FRAMES_OF_NAMES, TRIES = 6, 4  # of a step, each of another scene; and scenes to find one in whose shapes share a color
SCORES = ("chosen_iou", "right")  # logged, not learnt
NAMES = sum(VOCABULARIES, ())

Identity = tuple[str, str, str]  # kind, color, size


def build_sam2(seed: int = 0) -> Sam2Propagator:
    """The small SAM 2 with weights to start from; transformers' own are too small for a narrow network."""
    torch.manual_seed(seed)
    fields = json.loads((HERE / "sam2_config.json").read_text())
    model = Sam2Propagator(Sam2VideoConfig(**fields))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)
    for name, parameter in model.named_parameters():
        if name.startswith(("memory_temporal", "no_")) or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.2)
    # transformers keeps two copies of the position matrix
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)
    return model


class NamePrompts(nn.Module):
    """(K, C) prompts that stand for K shapes by their names."""

    def __init__(self, width: int):
        super().__init__()
        self.words = nn.Embedding(len(NAMES), width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, identities: list[Identity]) -> Tensor:
        ids = torch.tensor([[NAMES.index(word) for word in identity] for identity in identities])
        return self.mix(self.words(ids.to(self.words.weight.device)).sum(dim=1))


def sample_frames(random: np.random.Generator, num_frames: int) -> tuple[int, list[int], list[int]]:
    """Length of a scene, some frames of it at an even step, and which of those are prompted."""
    length, step = int(random.integers(16, 33)), int(random.integers(1, 4))
    step = min(step, (length - 1) // (num_frames - 1))
    first = int(random.integers(0, length - step * (num_frames - 1)))
    frames = [first + step * number for number in range(num_frames)]
    if random.random() < 0.35:
        return length, frames, [0]
    num_prompts = int(random.integers(1, min(4, num_frames)))
    return length, frames, sorted(random.choice(num_frames, num_prompts, replace=False).tolist())


def roughen(random: np.random.Generator, masks: Tensor) -> Tensor:
    """Masks (K, 1, h, w) of 0 and 1 as a decoder that is not perfect gives them: thicker, thinner or shifted."""
    radius = int(random.integers(0, 3))
    if random.random() < 0.5:
        masks = F.max_pool2d(masks, 2 * radius + 1, 1, radius)
    else:
        masks = -F.max_pool2d(-masks, 2 * radius + 1, 1, radius)
    return torch.roll(masks, random.integers(-2, 3, 2).tolist(), (2, 3))


def with_group(random: np.random.Generator, masks: np.ndarray) -> np.ndarray:
    """Masks (K + 1, F, height, width): those of K shapes, and some of them as one, as in "all blue shapes"."""
    group = random.choice(len(masks), int(random.integers(2, len(masks))), replace=False)
    return np.concatenate([masks, masks[group].any(axis=0, keepdims=True)])


def scene_losses(
    sam2: Sam2Propagator,
    names: NamePrompts,
    seed: int,
    num_frames: int,
    heads: PixelHeads | None = None,
    trains_encoder: bool = True,
) -> dict[str, Tensor]:
    """The losses of one scene, means over its frames; with `heads`, those of the pixels too."""
    random = np.random.default_rng((seed, 1))
    length, frame_indices, prompts = sample_frames(random, num_frames)
    scene = Scene(seed, length)
    frames, masks = scene.render_all(frame_indices)
    pixel_values = to_pixel_values([Image.fromarray(frame) for frame in frames], sam2.image_side, SAM2_MEAN, SAM2_STD)
    objects = torch.from_numpy(with_group(random, masks)).to(sam2.device)
    targets = F.interpolate(objects.float(), (LOSS_SIDE, LOSS_SIDE), mode="area")  # (K + 1, F, side, side)
    with torch.set_grad_enabled(trains_encoder):
        pyramid = sam2.encode_images(pixel_values)
    features = features_of_frames(sam2, pyramid)
    losses = [
        naming_losses(sam2, names, random, scene, features[idx], targets[:-1, idx])
        for idx in random.choice(num_frames, NAMED_FRAMES, replace=False)
    ]
    shown = objects[:, prompts].flatten(1).any(dim=1)  # a prompt that shows nothing can be followed nowhere
    if shown.any():
        losses += tracking_losses(sam2, random, features, objects[shown], targets[shown], prompts)
    if heads is None:
        return means_of(losses)
    labels = np.stack([classes_of(scene, of_frame) for of_frame in masks.swapaxes(0, 1)])
    return {**means_of(losses), **pixel_losses(heads, pyramid, torch.from_numpy(labels))}


def names_losses(sam2: Sam2Propagator, names: NamePrompts, heads: PixelHeads, seeds: range) -> dict[str, Tensor]:
    """Of one frame of each of some scenes, `TRIES` seeds for each, decoded from names; with those of the pixels."""
    drawn = []
    for first in seeds[::TRIES]:
        random, scene = np.random.default_rng((first, 3)), scene_with_twins(range(first, first + TRIES))
        drawn.append((random, scene, *scene.render(int(random.integers(scene.num_frames)))))
    images = [Image.fromarray(frame) for _, _, frame, _ in drawn]
    pyramid = sam2.encode_images(to_pixel_values(images, sam2.image_side, SAM2_MEAN, SAM2_STD))
    losses = []
    for (random, scene, _, masks), features in zip(drawn, features_of_frames(sam2, pyramid), strict=True):
        targets = F.interpolate(torch.from_numpy(masks)[None].float(), (LOSS_SIDE, LOSS_SIDE), mode="area")[0]
        losses.append(naming_losses(sam2, names, random, scene, features, targets.to(sam2.device)))
    labels = np.stack([classes_of(scene, masks) for _, scene, _, masks in drawn])
    return {**means_of(losses), **pixel_losses(heads, pyramid, torch.from_numpy(labels))}


def features_of_frames(sam2: Sam2Propagator, pyramid: Sequence[Tensor]) -> list[FrameFeatures]:
    """Of each frame of a pyramid by itself, for SAM 2's own decoder."""
    return [sam2.features_for(sam2.mask_decoder, [level[[idx]] for level in pyramid]) for idx in range(len(pyramid[0]))]


def scene_with_twins(seeds: range) -> Scene:
    """The first of the scenes in which two shapes are of one colour, else the last."""
    for seed in seeds:
        scene = Scene(seed)
        if len({shape.color for shape in scene.shapes}) < len(scene.shapes):
            break
    return scene


def means_of(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each loss over the frames that have it."""
    names = dict.fromkeys(name for one in losses for name in one)
    return {name: torch.stack([one[name] for one in losses if name in one]).mean() for name in names}


def total_of(losses: dict[str, Tensor]) -> Tensor:
    """What is learnt of them."""
    return sum(loss for name, loss in losses.items() if name not in SCORES)


def naming_losses(
    sam2: Sam2Propagator,
    names: NamePrompts,
    random: np.random.Generator,
    scene: Scene,
    features: FrameFeatures,
    targets: Tensor,
) -> dict[str, Tensor]:
    """Of one frame, decoded without memory from the names of its shapes, and of one that is not in the scene."""
    identities = [shape.identity for shape in scene.shapes]
    stranger = identities[0]
    while stranger in identities:
        stranger = tuple(str(random.choice(words)) for words in VOCABULARIES)
    identities.append(stranger)
    targets = torch.cat([targets, torch.zeros_like(targets[:1])])
    decoded = sam2.decode_seg(sam2.mask_decoder, features, names(identities))
    logits = candidates_at(decoded, targets.shape[-1])
    is_absent = ~present(targets)
    return {
        **frame_losses(decoded, targets, learns_absence=True),
        "absent": 0.3 * dice_losses(logits[is_absent].flatten(2), logits.new_zeros(1)).mean(),
        "apart": apart_loss(logits, targets, identities),
    }


def apart_loss(logits: Tensor, targets: Tensor, identities: list[Identity]) -> Tensor:
    """Cross-entropy of masks' mean logits over each shape: above 0 over their own, below over the others.

    Others of the same colour count twice. Without it, kinds and sizes are not looked at: a mask of two shapes that
    share one costs dice no more than a third.

    Args:
        logits: (K, M, side, side), of M masks for each of K names.
        targets: (K, side, side).
    """
    is_there = targets.flatten(1).sum(dim=1) > 20
    shapes = targets[is_there] / targets[is_there].sum(dim=(1, 2), keepdim=True)
    over_shapes = torch.einsum("kmhw,shw->kms", logits, shapes)
    is_own = torch.eye(len(targets), device=targets.device)[:, None, is_there].expand_as(over_shapes)
    of_one_color = torch.tensor([[one[1] == other[1] for other in identities] for one in identities])
    weight = (1.0 + of_one_color.to(targets.device)[:, None, is_there]) * (1 - is_own)
    loss = F.binary_cross_entropy_with_logits(over_shapes, is_own, reduction="none")
    return (loss * is_own).sum() / is_own.sum().clamp(min=1) + (loss * weight).sum() / weight.sum().clamp(min=1)


def tracking_losses(
    sam2: Sam2Propagator,
    random: np.random.Generator,
    features: list[FrameFeatures],
    masks: Tensor,
    targets: Tensor,
    prompts: list[int],
) -> list[dict[str, Tensor]]:
    """Of each frame that is not prompted."""
    tracker = ObjectTracker(sam2, sam2.mask_decoder)
    for idx in prompts:
        prompt = masks[:, idx, None].float()
        if random.random() < 0.5:
            prompt = roughen(random, prompt)
        tracker.add_mask_prompt(idx, features[idx], prompt[:, 0] > 0.5)
    losses = []
    for idx, of_frame in enumerate(features):
        if idx not in prompts:
            decoded = tracker.decode(idx, of_frame)
            losses.append(frame_losses(decoded, targets[:, idx]))
            tracker.remember(idx, of_frame, decoded)
    return losses


def frame_losses(decoded: DecodedMasks, targets: Tensor, learns_absence: bool = False) -> dict[str, Tensor]:
    """Losses on one frame; targets (K, side, side) in 0..1.

    Masks of objects that are not there are not learnt, as in SAM 2, unless `learns_absence`: then they are to be empty.
    """
    is_present = present(targets)
    logits = candidates_at(decoded, targets.shape[-1])
    targets = targets[:, None].expand_as(logits)
    probabilities = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    focal = (cross_entropy * (probabilities - targets).square()).mean(dim=(2, 3))
    dice = dice_losses(logits.flatten(2), targets.flatten(2))
    with torch.no_grad():
        predicted, true = logits > 0, targets > 0.5
        iou = (predicted & true).sum(dim=(2, 3)) / (predicted | true).sum(dim=(2, 3)).clamp(min=1)
    weight = is_present.float() / is_present.sum().clamp(min=1)
    return {
        "focal": 20 * (focal.mean() if learns_absence else (focal.mean(dim=1) * weight).sum()),
        "dice": (dice.mean(dim=1) * weight).sum(),
        "iou": ((decoded.iou_scores - iou).square().mean(dim=1) * weight).sum(),
        "presence": F.binary_cross_entropy_with_logits(decoded.object_score_logits[:, 0], is_present.float()),
        "chosen_iou": (iou.gather(1, decoded.iou_scores.argmax(dim=1, keepdim=True))[:, 0] * weight).sum(),
    }


def candidates_at(decoded: DecodedMasks, side: int) -> Tensor:
    """(K, M, side, side) logits of all masks."""
    return resize(decoded.candidates.flatten(0, 1)[:, None], side)[:, 0].unflatten(0, (len(decoded.candidates), -1))


def present(targets: Tensor) -> Tensor:
    """(K,) bool: of which objects there is at least half a pixel in (K, side, side)."""
    return targets.flatten(1).amax(dim=1) > 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pixels", type=int, default=6500, help="steps of the image encoder alone")
    parser.add_argument("--pairs", type=int, default=3000, help="steps on pairs of frames")
    parser.add_argument("--clips", type=int, default=3000, help="steps on clips of six frames")
    parser.add_argument("--all", type=int, default=1300, help="steps on clips of six, the pixels' losses beside")
    parser.add_argument("--names", type=int, default=3000, help="steps on frames, from names alone")
    parser.add_argument("--frozen", type=int, default=1500, help="steps on clips of six, the image encoder frozen")
    parser.add_argument("--memory", type=int, default=1000, help="the same on clips of twelve")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sam2 = build_sam2()
    width = sam2.config.mask_decoder_config.hidden_size
    names, heads = NamePrompts(width), PixelHeads([width] * 3)

    def encode(images: list[Image.Image]) -> tuple[Tensor, ...]:
        return sam2.encode_images(to_pixel_values(images, sam2.image_side, SAM2_MEAN, SAM2_STD))

    def names_only(seed: int) -> dict[str, Tensor]:
        losses = names_losses(sam2, names, heads, range(seed, seed + FRAMES_OF_NAMES * TRIES))
        total_of(losses).backward()
        return losses

    def scenes(seed: int, num_scenes: int, num_frames: int, **options) -> dict[str, Tensor]:
        for one in range(seed, seed + num_scenes):
            losses = scene_losses(sam2, names, one, num_frames, **options)
            (total_of(losses) / num_scenes).backward()
        return losses

    phases = [
        pixel_phase(encode, heads, arguments.pixels),
        Phase("pairs", arguments.pairs, 2e-4, lambda seed: scenes(seed, SCENES_OF_PAIRS, PAIRS)),
        Phase("clips", arguments.clips, 2e-4, lambda seed: scenes(seed, 1, CLIP)),
        Phase("all", arguments.all, 4e-4, lambda seed: scenes(seed, 1, CLIP, heads=heads)),
        Phase("names", arguments.names, 3e-4, names_only, FRAMES_OF_NAMES * TRIES),
        Phase("frozen", arguments.frozen, 3e-4, lambda seed: scenes(seed, 1, CLIP, trains_encoder=False)),
        Phase("memory", arguments.memory, 2.5e-4, lambda seed: scenes(seed, 1, LONG_CLIP, trains_encoder=False)),
    ]
    run(arguments.out, {"sam2": sam2, "names": names, "heads": heads}, phases)
    sam2.eval().save_pretrained(arguments.out / "sam2")


if __name__ == "__main__":
    main()
