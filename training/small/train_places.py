"""Dense pretraining of the small Sa2VA-i's vision and language model: what is, moves and happens at each place.

    python -m sa2va_i.training.small.train_places MODEL OUT

MODEL: the folder that `build` made. At every visual token, heads on the language model's middle layer (thrown away
afterwards) learn the shape's kind, colour and size, where it moves, whether it was there from the start, came later or
came back, and which shape was there one frame before and is gone now. A token sees the frames before its own, so all of
this is there to be seen; words alone teach it slowly, for there are few of them to a video.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ...loading import load
from ...modeling_sa2va_i import Sa2VAiModel
from ...publish import save_package
from ..encode import IGNORED
from ..frames import uniform_frames
from ..synthetic import DIRECTIONS, STILL, Scene
from .loop import Phase, run
from .pixels import VOCABULARIES, balanced

NUM_FRAMES = 5
SCENES_OF_STEP = 8
PLACES_OF_TOKEN = 2  # a side: places are finer than tokens
MIDDLE = 3  # layer whose states the heads read
MIN_COVER = 0.3  # of a place, for it to be a shape's
MOTIONS = (*DIRECTIONS, STILL, "")
PRESENCE = ("from the start", "late", "back")
IDENTITY = ("kind", "color", "size")
QUESTIONS = {
    **{name: len(words) + 1 for name, words in zip(IDENTITY, VOCABULARIES, strict=True)},  # class 0: the background
    "motion": len(MOTIONS),
    "presence": len(PRESENCE),
    "gone_kind": len(VOCABULARIES[0]) + 1,  # class 0: nothing is gone
    "gone_color": len(VOCABULARIES[1]) + 1,
}


class PlaceHeads(nn.Module):
    """Scores for each of `QUESTIONS` at places (B, F, 2g, 2g) from visual tokens (B, F * g * g, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.scores = nn.Linear(width, PLACES_OF_TOKEN**2 * sum(QUESTIONS.values()))

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        side = round((states.shape[1] / NUM_FRAMES) ** 0.5)
        fine = (PLACES_OF_TOKEN, PLACES_OF_TOKEN)
        scores = self.scores(states).unflatten(1, (NUM_FRAMES, side, side)).unflatten(-1, (*fine, -1))
        scores = scores.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
        return self._by_question(scores)

    def read_tokens(self, states: Tensor) -> dict[str, Tensor]:
        """Scores (N, classes) for tokens that are of no place, from states (N, C): the mean over a token's places."""
        return self._by_question(self.scores(states).unflatten(-1, (PLACES_OF_TOKEN**2, -1)).mean(dim=1))

    @staticmethod
    def _by_question(scores: Tensor) -> dict[str, Tensor]:
        return dict(zip(QUESTIONS, scores.split(list(QUESTIONS.values()), dim=-1), strict=True))


def shapes_at(masks: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The shape that is at each place, and the one that was there one frame before and is gone from the picture; both
    (F, side, side), -1 for none.

    Args:
        masks: (K, F, height, width) of a scene's shapes.
    """
    num_shapes, num_frames, height, width = masks.shape
    cover = masks.reshape(num_shapes, num_frames, side, height // side, side, width // side).mean(axis=(3, 5))
    shape_at = np.where(cover.max(axis=0) > MIN_COVER, cover.argmax(axis=0), -1)
    before = np.concatenate([np.full_like(shape_at[:1], -1), shape_at[:-1]])
    is_gone = ~masks.any(axis=(2, 3))[before, np.arange(num_frames)[:, None, None]]
    return shape_at, np.where((before >= 0) & is_gone, before, -1)


def place_labels(scene: Scene, masks: np.ndarray, side: int) -> dict[str, np.ndarray]:
    """(F, side, side) classes for each of `QUESTIONS`, `IGNORED` where there is nothing to say.

    Args:
        masks: (K, F, height, width) of the scene's shapes.
    """
    num_shapes, num_frames = masks.shape[:2]
    visible = masks.any(axis=(2, 3))
    shape_at, gone_at = shapes_at(masks, side)

    def look_up(values: Sequence[int], places: np.ndarray, of_nothing: int) -> np.ndarray:
        return np.array([*values, of_nothing])[places]  # -1 is the last

    identities = [
        [words.index(shape.identity[number]) + 1 for shape in scene.shapes] for number, words in enumerate(VOCABULARIES)
    ]
    labels = {name: look_up(of_words, shape_at, 0) for name, of_words in zip(IDENTITY, identities, strict=True)}
    labels["motion"] = look_up([MOTIONS.index(shape.motion) for shape in scene.shapes], shape_at, IGNORED)
    labels["presence"] = np.full_like(shape_at, IGNORED)
    for shape in range(num_shapes):
        first = int(visible[shape].argmax())
        labels["motion"][: first + 1][shape_at[: first + 1] == shape] = IGNORED  # one frame shows no motion
        for idx in range(1, num_frames):
            came_back = not visible[shape, first:idx].all()
            presence = "back" if came_back else "late" if first else "from the start"
            labels["presence"][idx][shape_at[idx] == shape] = PRESENCE.index(presence)
    labels["gone_kind"] = look_up(identities[0], gone_at, 0)
    labels["gone_color"] = look_up(identities[1], gone_at, 0)
    return labels


def middle_states(model: Sa2VAiModel, scenes: Sequence[list[Image.Image]]) -> Tensor:
    """(B, F * tokens, C) states of the visual tokens at layer `MIDDLE`, for the frames of B scenes."""
    prompts = [model.processor(model.processor.prompt_text("<image>\n", has_media=True), frames=one) for one in scenes]
    input_ids = torch.cat([prompt["input_ids"] for prompt in prompts])
    embeddings = model.embed_prompt(input_ids, torch.cat([prompt["pixel_values"] for prompt in prompts]))
    decoded = model.get_decoder()(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
    is_visual = input_ids == model.config.img_context_token_id
    return decoded.hidden_states[MIDDLE][is_visual].unflatten(0, (len(scenes), -1))


def draw_scene(random: np.random.Generator, seed: int) -> tuple[Scene, list[Image.Image], np.ndarray]:
    """A scene of any length, some of its frames, and the masks (K, F, height, width) of its shapes there."""
    scene = Scene(seed, int(random.integers(16, 33)))
    pixels, masks = scene.render_all(uniform_frames(random, scene.num_frames, NUM_FRAMES))
    return scene, [Image.fromarray(one) for one in pixels], masks


def place_losses(heads: PlaceHeads, states: Tensor, scenes: Sequence[tuple[Scene, np.ndarray]]) -> dict[str, Tensor]:
    """Cross-entropy, the mean of all questions, and for each the share of the shapes' places that are right.

    Args:
        states: (B, F * tokens, C) of the visual tokens, at layer `MIDDLE`.
        scenes: B scenes, with the masks of their shapes in the frames.
    """
    side = PLACES_OF_TOKEN * round((states.shape[1] / NUM_FRAMES) ** 0.5)
    labels = [place_labels(scene, masks, side) for scene, masks in scenes]
    losses, right = [], {}
    for name, scores in heads(states).items():
        target = torch.from_numpy(np.stack([one[name] for one in labels])).to(scores.device)
        values = F.cross_entropy(scores.flatten(0, -2), target.flatten(), reduction="none", ignore_index=IGNORED)
        has_background = name not in ("motion", "presence")
        is_shape = target > 0 if has_background else target != IGNORED
        losses.append(balanced(values, is_shape.flatten()) if has_background else values[is_shape.flatten()].mean())
        right[name] = (scores.argmax(dim=-1) == target)[is_shape].float().mean().nan_to_num()
    return {"places": torch.stack(losses).mean(), **right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.model)
    trained = {"vision_model": model.vision_model, "mlp1": model.mlp1, "language_model": model.language_model}
    heads = PlaceHeads(model.language_model.config.hidden_size)

    def backward(seed: int) -> dict[str, Tensor]:
        drawn = [draw_scene(np.random.default_rng((one, 3)), one) for one in range(seed, seed + SCENES_OF_STEP)]
        states = middle_states(model, [frames for _, frames, _ in drawn])
        losses = place_losses(heads, states, [(scene, masks) for scene, _, masks in drawn])
        losses["places"].backward()
        return losses

    run(arguments.out, {**trained, "heads": heads}, [Phase("places", arguments.steps, 1e-3, backward, SCENES_OF_STEP)])
    save_package(model.eval(), model.processor.tokenizer, arguments.out / "places")


if __name__ == "__main__":
    main()
