"""Which packs each optimiser step sees, and at what learning rate: pure functions of the job."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cloister.job import TrainingSection


def plan_steps(tokens: Sequence[int], training: TrainingSection, seed: int) -> list[list[int]]:
    """For each optimiser step the indices of its packs: about `batch_tokens` tokens, shuffled anew every epoch.

    A step takes packs until the next one would exceed `batch_tokens` (at least one); a step does not span epochs.
    """
    if not tokens:
        raise ValueError("there are no packs to train on")
    wanted = training.steps
    epochs = math.inf if training.epochs is None else training.epochs
    rng = np.random.default_rng(seed)
    steps: list[list[int]] = []
    epoch = 0
    while epoch < epochs and (wanted is None or len(steps) < wanted):
        epoch_steps = _fill(rng.permutation(len(tokens)).tolist(), tokens, training.batch_tokens)
        share = min(1.0, epochs - epoch)
        steps += epoch_steps[: max(1, round(share * len(epoch_steps)))]
        epoch += 1
    return steps[:wanted]


def _fill(order: list[int], tokens: Sequence[int], batch_tokens: int) -> list[list[int]]:
    steps: list[list[int]] = []
    filled = 0
    for index in order:
        if not steps or filled + tokens[index] > batch_tokens:
            steps.append([])
            filled = 0
        steps[-1].append(index)
        filled += tokens[index]
    return steps


def pack_seed(*place: int) -> int:
    """What the dropout of one pack in one step is drawn from, by (seed, step, pack), whoever works on it."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def learning_rate(step: int, num_steps: int, training: TrainingSection) -> float:
    """The learning rate of step 0, 1, ..., num_steps - 1: linear warm-up, then the schedule.

    Cosine and linear reach 0 one step after the last; constant stays.
    """
    warmup = round(training.warmup * num_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.schedule]
    return training.learning_rate * shape
