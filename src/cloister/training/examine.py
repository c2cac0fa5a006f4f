"""How a trained adapter fits each party's own training packs: their loss, and how hard they pull at the adapter.

Of the packs a sample is taken that costs at most a hundredth of what the training cost. Nothing is changed by it, and
nothing but the sample and the adapter decides it: an enclave that was restarted finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cloister.errors import ProtocolError
from cloister.training.loop import Fit, PackSource, Stepper

SHARE = 0.01
"""Of the tokens of the training, for all parties together; a party has at least one pack."""
MAX_TOKENS = 1 << 14
"""Of a party: more would not say more."""


def sample_packs(tokens: Sequence[int], places: Sequence[range], trained_tokens: int, seed: int) -> list[list[int]]:
    """Packs to look at, by party: a random choice of about equally many tokens of each.

    Args:
        tokens: of every pack. places: which packs are whose. trained_tokens: what the training went through.
    """
    room = min(MAX_TOKENS, int(SHARE * trained_tokens / max(1, len(places))))
    rng = np.random.default_rng(seed)
    return [_fill(rng.permutation(np.array(own)).tolist(), tokens, room) for own in places]


def examine(
    stepper: Stepper, source: PackSource, chosen: Sequence[Sequence[int]], owner: Callable[[int], str]
) -> list[Fit]:
    """The fit of each party's chosen packs; `owner` names the bundle of a pack.

    Raises:
        ProtocolError: loss or gradient are not finite; names the bundle.
    """
    fits = []
    for members in chosen:
        loss, norm = stepper.examine(source, members)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ProtocolError("its packs give a loss or gradient that is not finite", where=owner(members[0]))
        fits.append(Fit(tokens=sum(source.tokens[i] for i in members), loss=loss, gradient_norm=norm))
    return fits


def _fill(order: Sequence[int], tokens: Sequence[int], room: int) -> list[int]:
    """The first of `order`, and those after it that there is room for."""
    upto = np.cumsum([tokens[index] for index in order])
    return list(order[: max(1, int(np.searchsorted(upto, room, side="right")))])
