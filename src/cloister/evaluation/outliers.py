"""Values that stand out among a few: robust z-scores, which one wild value cannot hide in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from cloister.report.model import PartyFit

LOSS_FLOOR, GRADIENT_FLOOR = 0.1, 0.5
"""Least spread between honest parties, in natural logarithms: texts differ in how hard they are, gradients more."""
MIN_VALUES = 3
"""Of two, neither is the odd one."""
_NORMAL = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""


def fits_of(rows: Mapping[str, tuple[int, float, float]]) -> list[PartyFit]:
    """Scores of all parties beside each other, from {party: (tokens, loss, gradient norm)}."""
    losses = robust_z([loss for _, loss, _ in rows.values()], LOSS_FLOOR)
    gradients = robust_z([norm for _, _, norm in rows.values()], GRADIENT_FLOOR)
    return [
        PartyFit(party=party, tokens=tokens, train_loss=loss, loss_z=loss_z, gradient_norm=norm, gradient_z=gradient_z)
        for (party, (tokens, loss, norm)), loss_z, gradient_z in zip(rows.items(), losses, gradients, strict=True)
    ]


def robust_z(values: Sequence[float], floor: float) -> list[float | None]:
    """(ln value - median) / spread for positive values, the spread from the median absolute deviation.

    Args:
        floor: least spread, in natural logarithms. With few values that happen to be alike the deviation is next to
            nothing, and everything else would stand out.

    Returns: None for all where there are fewer than MIN_VALUES.
    """
    if len(values) < MIN_VALUES:
        return [None] * len(values)
    logs = [math.log(max(value, 1e-12)) for value in values]
    middle = median(logs)
    spread = max(floor, _NORMAL * median(abs(x - middle) for x in logs))
    return [(x - middle) / spread for x in logs]
