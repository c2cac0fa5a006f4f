"""The last decoder layer, computed only for the tokens whose hidden states are wanted.

Of the other tokens nobody sees more than the keys and values that they have in this layer. So the layer's own forward
pass runs twice: once for all tokens, until its attention module hands keys and values to a cache, and once for the
wanted tokens alone, where the cache gives back those of all. Attention output, MLP, norms and their backward passes
are computed for the wanted tokens; a model computes the same hidden states of them, up to the order of sums.

It holds where a layer takes its keys and values through a cache and does everything else token by token. A layer that
asks no cache computes all tokens, as if this were not here.

Legend: T = tokens of the row, N = wanted ones, D = model dimension, G = key-value heads, d = width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from cloister.model import attention

CACHES = ("past_key_values", "layer_past")
"""What architectures call the cache that they hand to their layers and attention modules."""

_WORTH = 7 / 8
"""With a larger share of wanted tokens, running twice costs more than it saves: all queries are computed in vain."""


class _Known(Exception):  # noqa: N818  # no error: keys and values are known, the rest of the pass is not needed
    pass


class _KeysAndValues:
    """A cache that takes those of all tokens (1, G, T, d), and then stands in for those of the wanted ones."""

    def __init__(self) -> None:
        self._all: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self._all is None:
            self._all = key, value
            raise _Known
        return self._all


class LastLayer:
    """Takes the place of a layer's `forward`: the same for all, where the current layout wants all tokens.

    Otherwise rows of the output (1, T, D) are right for wanted tokens, and zero for the others.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        parameters = inspect.signature(forward).parameters
        self._names = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._cache = next((name for name in CACHES if name in parameters), None)

    @classmethod
    def install(cls, layer: nn.Module) -> None:
        """Idempotent."""
        if not isinstance(layer.forward, cls):
            layer.forward = cls(layer.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layout = attention.current()
        query_N = None if layout is None else layout.query_N
        given = dict(zip(self._names, args, strict=False)) | kwargs
        hidden_1TD = given[self._names[0]]
        tokens = hidden_1TD.shape[1]
        if (
            query_N is None
            or len(query_N) > _WORTH * tokens
            or self._cache is None
            or given.get(self._cache) is not None
        ):
            return self._forward(*args, **kwargs)
        given[self._cache] = _KeysAndValues()
        with suppress(_Known):
            return self._forward(**given)
        out_1ND = self._forward(**{name: _at(value, query_N, tokens) for name, value in given.items()})
        return hidden_1TD.new_zeros(hidden_1TD.shape).index_copy(1, query_N, out_1ND)


def _at(value: Any, query_N: Tensor, tokens: int) -> Any:
    """What an argument of a layer is for some tokens: positions (1, T), rotations (1, T, d), masks (1, 1, T, S)."""
    if isinstance(value, tuple):
        return tuple(_at(part, query_N, tokens) for part in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    dim = {1: 0, 4: 2}.get(value.dim(), 1)
    return value.index_select(dim, query_N) if value.shape[dim] == tokens else value
