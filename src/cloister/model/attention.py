"""Packed documents see only themselves: attention masks for several documents in one row.

Legend: T = packed tokens.

A packed row holds documents one after another, and a document may be a small tree: a root (the prompt) followed by
branches (the choices to be scored) that see the root and themselves, not each other. A token sees another one if

    it comes no later, is of the same document, and is of the root or of the same branch,

and, in a layer with a sliding window, if its *position* is less than the window behind. The rule is plugged into
transformers' mask registry, so that each architecture builds its masks in its own forward pass; while no layout is
set, the registry behaves as shipped. Position ids alone would not do: with a cache they are not taken as boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tokens of a packed row belong. All int64, on the model's device."""

    document_T: Tensor
    branch_T: Tensor
    """0 for the root of a document, 1, 2, ... for its branches."""
    position_T: Tensor

    def mask(self, window: int | None) -> Tensor:
        """Boolean (1, 1, T, T), True where row attends to column."""
        index_T = torch.arange(len(self.document_T), device=self.document_T.device)
        allowed_TT = index_T[:, None] >= index_T[None, :]
        allowed_TT &= self.document_T[:, None] == self.document_T[None, :]
        allowed_TT &= (self.branch_T[None, :] == 0) | (self.branch_T[:, None] == self.branch_T[None, :])
        if window is not None:
            allowed_TT &= self.position_T[:, None] - self.position_T[None, :] < window
        return allowed_TT[None, None]


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def packed(layout: Layout | None) -> Iterator[None]:
    """Within this context, models mask attention by `layout`."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def install() -> None:
    """Teach transformers' "sdpa" and "eager" masks about the current layout. Idempotent."""
    AttentionMaskInterface.register("sdpa", _sdpa_mask)
    AttentionMaskInterface.register("eager", _eager_mask)


def _sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return _mask(sdpa_mask, *args, **kwargs)


def _eager_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    mask = _mask(eager_mask, *args, **kwargs)
    if mask is None or mask.dtype != torch.bool:
        return mask
    dtype = kwargs.get("dtype", torch.float32)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def _mask(stock: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    layout = _layout.get()
    if layout is None:
        return stock(*args, **kwargs)
    return layout.mask(kwargs.get("local_size"))
