"""One rule by which every system gets its learning rate.

Begin with the rate of the adapter's kind and the two a factor of about 3.2 beside it; while the best of the tried is
the smallest or the largest, try the next one on that side. Best is the lowest bits per byte of all parties' validation
records after a third of the budget, with the first seed. Test records play no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

_MOST = 4
"""Extensions: a factor of 100 to either side is enough for anything that trains at all."""


def find_rate(first: float, judge: Callable[[list[float]], Mapping[float, float]]) -> dict[float, float]:
    """All rates that were tried with what they gave, the best of them first.

    Args:
        judge: gives each rate's loss, infinite where training diverged.
    """
    tried = dict(judge([step(first, -1), first, step(first, 1)]))
    for _ in range(_MOST):
        best = min(tried, key=lambda rate: tried[rate])
        if best not in (min(tried), max(tried)) or math.isinf(tried[best]):
            break
        beyond = step(best, -1 if best == min(tried) else 1)
        tried |= judge([beyond])
    return dict(sorted(tried.items(), key=lambda item: item[1]))


def step(rate: float, half_decades: int) -> float:
    """The rate some half decades away, with two significant digits."""
    return float(f"{rate * 10 ** (half_decades / 2):.1e}")
