"""The small Sa2VA-i learns to answer: which shape is meant, in words, and where to look for it.

    python -m sa2va_i.training.small.train_words PLACES OUT

PLACES: the folder that `train_places` made. Text cross-entropy as in the recipe, and beside it three losses that are
not. Those of the places go on. At each name and at `[SEG]`, the heads that read places must read what was asked for
(its kind, colour, motion, ...), and the attention of two heads of the next layer must fall on the tokens where the
shape is, or was just before it was gone. From the words alone the language model finds out slowly where to look.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...loading import load
from ...modeling_sa2va_i import Sa2VAiModel
from ...publish import save_package
from ..data import Sample, draw_expressions, in_order, turn_about
from ..encode import IGNORED, Collator
from ..synthetic import Scene
from ..wording import turns_with_image
from .loop import Phase, run
from .pixels import VOCABULARIES
from .train_places import (
    IDENTITY,
    MIDDLE,
    MOTIONS,
    PLACES_OF_TOKEN,
    PRESENCE,
    QUESTIONS,
    SCENES_OF_STEP,
    PlaceHeads,
    draw_scene,
    place_losses,
    shapes_at,
)

NUM_TURNS = 6
LAYER, NUM_HEADS = 4, 2  # whose attention is taught
BESIDE_TEXT = {"asked": 0.25, "attention": 0.25, "places": 0.5}  # weights of the other losses


@dataclass(frozen=True)
class Look:
    """What a token looks for: the shapes, and what was said of them (as classes of `QUESTIONS`, or `IGNORED`)."""

    shapes: list[int]
    asked: dict[str, int]


def conversation(random: np.random.Generator, scene: Scene) -> tuple[list[tuple[str, str]], list[Look]]:
    """Questions and answers about a scene; a look for each name in them, and after them for `[SEG]`."""
    turns, looks = [], []
    for expression in draw_expressions(random, scene, NUM_TURNS):
        turns.append(turn_about(random, scene, expression))
        targets, asked = in_order(scene, expression), asked_for(expression.text)
        looks += [Look(shapes, asked) for shapes in (*([target] for target in targets), targets)]
    return turns_with_image(random, turns), looks


def asked_for(text: str) -> dict[str, int]:
    """What an expression says of its shapes, as classes of `QUESTIONS`; `IGNORED` where it says nothing."""
    words = text.split()
    asked = dict.fromkeys(QUESTIONS, IGNORED)
    for name, vocabulary in zip(IDENTITY, VOCABULARIES, strict=True):
        for number, word in enumerate(vocabulary):
            if word in words or f"{word}s" in words:
                asked[name] = number + 1
    for number, motion in enumerate(MOTIONS[:-1]):
        if motion in words:
            asked["motion"] = number
    for phrase, presence in (("appears last", "late"), ("comes back", "back")):
        if phrase in text:
            asked["presence"] = PRESENCE.index(presence)
    return asked


def tokens_of(masks: np.ndarray, grid_size: int) -> np.ndarray:
    """(K, F * grid_size ** 2) bool: the visual tokens where each shape is, or was before it was gone."""
    at = np.stack(shapes_at(masks, PLACES_OF_TOKEN * grid_size))  # (2, F, side, side)
    is_at = at[None] == np.arange(len(masks))[:, None, None, None, None]
    blocks = is_at.reshape(*is_at.shape[:3], grid_size, PLACES_OF_TOKEN, grid_size, PLACES_OF_TOKEN)
    return blocks.any(axis=(1, 4, 6)).reshape(len(masks), -1)


def word_losses(model: Sa2VAiModel, heads: PlaceHeads, seeds: Sequence[int]) -> dict[str, Tensor]:
    """text, asked, attention and places: the losses; share: of the attention, that falls where it should; tokens: share
    of the answers' tokens that are right."""
    drawn, samples, looks = [], [], []
    for seed in seeds:
        random = np.random.default_rng((seed, 4))
        scene, frames, masks = draw_scene(random, seed)
        turns, of_scene = conversation(random, scene)
        drawn.append((scene, masks))
        samples.append(Sample(f"synthetic/{seed}", frames, turns, masks))
        looks.append(of_scene)
    batch = Collator(model.processor, with_masks=False)(samples)
    input_ids, labels = batch["input_ids"], batch["labels"]
    decoded = model.get_decoder()(
        inputs_embeds=model.embed_prompt(input_ids, batch["pixel_values"]),
        attention_mask=batch["attention_mask"],
        use_cache=False,
        output_hidden_states=True,
        output_attentions=True,
    )
    logits = model.get_output_embeddings()(decoded.last_hidden_state[:, :-1])
    text = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    is_visual = input_ids == model.config.img_context_token_id
    states = decoded.hidden_states[MIDDLE][is_visual].unflatten(0, (len(samples), -1))
    name_id = model.processor.tokenizer(" the", add_special_tokens=False).input_ids[0]
    does_look = (labels == name_id) | (labels == model.config.seg_token_id)
    asked = [look.asked for of_scene in looks for look in of_scene]
    read = heads.read_tokens(decoded.hidden_states[LAYER][does_look])
    targets = {name: torch.tensor([one[name] for one in asked]) for name in QUESTIONS}
    of_questions = [
        F.cross_entropy(read[name], target, ignore_index=IGNORED)
        for name, target in targets.items()
        if (target != IGNORED).any()
    ]
    wanted = []
    for (_, masks), of_scene, is_token in zip(drawn, looks, is_visual, strict=True):
        tokens = torch.from_numpy(tokens_of(masks, model.config.token_grid_size))
        of_looks = torch.zeros(len(of_scene), len(is_token), dtype=torch.bool)
        of_looks[:, is_token] = torch.stack([tokens[look.shapes].any(dim=0) for look in of_scene])
        wanted.append(of_looks)
    attention = decoded.attentions[LAYER].transpose(1, 2)[does_look][:, :NUM_HEADS]
    share = (attention * torch.cat(wanted)[:, None]).sum(dim=-1)
    losses = place_losses(heads, states, drawn)
    right = (logits.argmax(dim=-1) == labels[:, 1:])[labels[:, 1:] != IGNORED].float().mean()
    return {
        "text": text,
        "asked": torch.stack(of_questions).mean(),
        "attention": -(share + 1e-4).log().mean(),
        **losses,
        "share": share.mean(),
        "tokens": right,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.places / "places", attn_implementation="eager")  # which tells its attention
    heads = PlaceHeads(model.language_model.config.hidden_size)
    heads.load_state_dict(torch.load(arguments.places / "checkpoint.pt", weights_only=True)["heads"])

    def backward(seed: int) -> dict[str, Tensor]:
        losses = word_losses(model, heads, range(seed, seed + SCENES_OF_STEP))
        beside = sum(weight * losses[name] for name, weight in BESIDE_TEXT.items())
        (losses["text"] + beside).backward()
        return losses

    parts = {"vision_model": model.vision_model, "mlp1": model.mlp1, "language_model": model.language_model}
    run(arguments.out, {**parts, "heads": heads}, [Phase("words", arguments.steps, 5e-4, backward, SCENES_OF_STEP)])
    save_package(model.eval(), model.processor.tokenizer, arguments.out / "words")


if __name__ == "__main__":
    main()
