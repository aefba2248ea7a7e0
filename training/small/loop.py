"""The training loop of the small model's SAM 2 and vision model: phases, a log, and checkpoints to go on from."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

WARM_UP = 100
SEEDS_OF_STEP = 4  # seeds that one step may use, unless its phase says more


@dataclass(frozen=True)
class Phase:
    """A part of the training, with a warm-up and a cosine of its own.

    backward: adds the gradients of a step, given its first seed, and returns losses to log.
    num_seeds: that a step may use, from that one on.
    """

    name: str
    num_steps: int
    peak: float
    backward: Callable[[int], dict[str, Tensor]]
    num_seeds: int = SEEDS_OF_STEP

    def learning_rate(self, step: int) -> float:
        if step < WARM_UP:
            return self.peak * (step + 1) / WARM_UP
        share = (step - WARM_UP) / max(self.num_steps - WARM_UP, 1)
        return self.peak * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)


def run(out: Path, modules: Mapping[str, nn.Module], phases: Sequence[Phase], save_every: int = 250) -> None:
    """Train `modules` through all phases; go on from `out/checkpoint.pt` if it is there."""
    out.mkdir(parents=True, exist_ok=True)
    trained = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=phases[0].peak, betas=(0.9, 0.98), weight_decay=0.05)
    kept = {**modules, "optimizer": optimizer}
    checkpoint, start = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, one in kept.items():
            one.load_state_dict(state[name])
        start = state["step"]
    schedule = [(phase, step) for phase in phases for step in range(phase.num_steps)]
    began, seen = time.time(), []
    for number in range(start, len(schedule)):
        phase, step = schedule[number]
        if step == 0:
            seen.clear()  # another phase may have other losses
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate(step)
        losses = phase.backward(phase.num_seeds * number)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append([*(loss.item() for loss in losses.values()), norm.item()])
        if (step + 1) % 50 == 0:
            means = zip((*losses, "norm"), np.mean(seen, axis=0).tolist(), strict=True)
            record = {"phase": phase.name, "step": step + 1, **{name: round(mean, 4) for name, mean in means}}
            line = json.dumps({**record, "seconds": round(time.time() - began)})
            print(line, flush=True)
            with (out / "log.jsonl").open("a") as log:
                log.write(line + "\n")
            seen.clear()
        if (number + 1) % save_every == 0 or number + 1 == len(schedule):
            partial = checkpoint.with_suffix(".partial")
            torch.save({name: one.state_dict() for name, one in kept.items()} | {"step": number + 1}, partial)
            partial.replace(checkpoint)
