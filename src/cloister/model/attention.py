"""Packed documents see only themselves: attention masks for several documents in one row.

Legend: T = packed tokens, N = queries, K = documents, L = tokens of the longest of them, Q = queries of the one with
most, H = heads, G = key-value heads, P = prefix.

A packed row holds documents one after another, and a document may be a small tree: a root (the prompt) followed by
branches (the choices to be scored) that see the root and themselves, not each other. A token sees another one if

    it comes no later, is of the same document, and is of the root or of the same branch,

and, in a layer with a sliding window, if its *position* is less than the window behind. Trained keys and values in
front of a layer's own (a prefix of P) are seen by every token of every document and branch, whatever the window. The
rule is plugged into transformers' mask registry, so that each architecture builds its masks in its own forward pass;
while no layout is set, the registry behaves as shipped. Position ids alone would not do: with a cache they are not
taken as boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tokens of a packed row belong. All int64, on the model's device; documents are contiguous."""

    document_T: Tensor
    branch_T: Tensor
    """0 for the root of a document, 1, 2, ... for its branches."""
    position_T: Tensor
    query_N: Tensor | None = None
    """The tokens whose hidden states are wanted of a model, ascending; None: all."""

    def mask(self, window: int | None) -> Tensor:
        """Boolean (1, 1, T, T), True where row attends to column."""
        index_T = torch.arange(len(self.document_T), device=self.document_T.device)
        allowed_TT = self.document_T[:, None] == self.document_T[None, :]
        token_T = _Tokens(index_T, self.branch_T, self.position_T)
        return (allowed_TT & _within(token_T, token_T, window))[None, None]

    @cached_property
    def everywhere(self) -> Attention:
        """Every token looks."""
        return Attention.of(self, torch.arange(len(self.document_T), device=self.document_T.device))

    @cached_property
    def at_queries(self) -> Attention:
        """The tokens `query_N` look."""
        return self.everywhere if self.query_N is None else Attention.of(self, self.query_N)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """N tokens of a layout that look at their documents. All on the model's device."""

    buckets: tuple[Bucket, ...]
    """The documents that they are of, those of similar length together."""
    token_S: Tensor
    """Which tokens are looked at, all rows of all buckets one after the other."""
    query_S: Tensor
    """Which of the N look, likewise."""
    place_N: Tensor
    """Where each of the N is in `query_S`."""

    @classmethod
    def of(cls, layout: Layout, query_N: Tensor) -> Attention:
        lengths = torch.unique_consecutive(layout.document_T, return_counts=True)[1]
        owner_N = torch.searchsorted(lengths.cumsum(0), query_N, right=True)
        looking = torch.bincount(owner_N, minlength=len(lengths)).tolist()
        members: dict[int, list[_Document]] = {}
        start = first = 0
        for length, queries in zip(lengths.tolist(), looking, strict=True):
            if queries:
                members.setdefault(length.bit_length(), []).append(_Document(start, length, first, queries))
            start, first = start + length, first + queries
        rows = [_Rows.of(documents, query_N.device) for documents in members.values()]
        query_S = torch.cat([r.query_KQ.flatten() for r in rows])
        real_S = torch.cat([r.real_KQ.flatten() for r in rows]).nonzero().flatten()
        return cls(
            buckets=tuple(Bucket.of(layout, query_N, r) for r in rows),
            token_S=torch.cat([r.token_KL.flatten() for r in rows]),
            query_S=query_S,
            place_N=real_S[query_S[real_S].argsort()],
        )


class _Document(NamedTuple):
    start: int
    length: int
    first: int
    """Among all queries, the first one of this document."""
    queries: int


class _Rows(NamedTuple):
    """Documents as rows: K documents of at most L tokens, at most Q of which look. int64 and bool."""

    start_K: Tensor
    token_KL: Tensor
    """What lies behind a document's end repeats its last token: causal order keeps it from being looked at."""
    query_KQ: Tensor
    """In the same way."""
    real_KQ: Tensor
    """False behind a document's last query."""
    all_look: bool

    @classmethod
    def of(cls, documents: Sequence[_Document], device: torch.device) -> _Rows:
        start_K, length_K, first_K, queries_K = torch.tensor(documents, device=device).unbind(1)
        place_L = torch.arange(max(d.length for d in documents), device=device)
        place_Q = torch.arange(max(d.queries for d in documents), device=device)
        return cls(
            start_K=start_K,
            token_KL=start_K[:, None] + torch.minimum(place_L, length_K[:, None] - 1),
            query_KQ=first_K[:, None] + torch.minimum(place_Q, queries_K[:, None] - 1),
            real_KQ=place_Q < queries_K[:, None],
            all_look=all(d.length == d.queries for d in documents),
        )


class _Tokens(NamedTuple):
    """Tokens by their place in their document; or in the row, where they are compared to others of it."""

    place: Tensor
    branch: Tensor
    position: Tensor


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """K documents of at most L tokens, at most Q of which look."""

    look_KQ: _Tokens
    seen_KL: _Tokens
    all_look: bool

    @classmethod
    def of(cls, layout: Layout, query_N: Tensor, rows: _Rows) -> Bucket:
        def tokens(index: Tensor) -> _Tokens:
            return _Tokens(index - rows.start_K[:, None], layout.branch_T[index], layout.position_T[index])

        place_L = torch.arange(rows.token_KL.shape[1], device=query_N.device)
        seen_KL = tokens(rows.token_KL)._replace(place=place_L)
        return cls(look_KQ=tokens(query_N[rows.query_KQ]), seen_KL=seen_KL, all_look=rows.all_look)

    @cached_property
    def is_flat(self) -> bool:
        """No document has branches."""
        return not bool(self.seen_KL.branch.any())

    def mask(self, window: int | None, prefix_tokens: int = 0) -> Tensor | None:
        """Boolean (K, 1, Q, P + L), or (1, 1, L, P + L) for all alike, or None where causal order says it all."""
        longest_L = len(self.seen_KL.place)
        if self.all_look and self.is_flat and (window is None or longest_L <= window):
            return causal_behind(longest_L, prefix_tokens, self.seen_KL.place.device) if prefix_tokens else None
        return seeing_prefix(_within(self.look_KQ, self.seen_KL, window)[:, None], prefix_tokens)


def _within(look: _Tokens, seen: _Tokens, window: int | None) -> Tensor:
    """The rule inside one document: (..., Q, L); leading dimensions are kept."""
    allowed_QL = look.place[..., :, None] >= seen.place[..., None, :]
    branch_Q1, branch_1L = look.branch[..., :, None], seen.branch[..., None, :]
    allowed_QL = allowed_QL & ((branch_1L == 0) | (branch_Q1 == branch_1L))
    if window is not None:
        allowed_QL = allowed_QL & (look.position[..., :, None] - seen.position[..., None, :] < window)
    return allowed_QL


def seeing_prefix(mask: Tensor, prefix_tokens: int) -> Tensor:
    """A mask (..., T, S), boolean or to be added, with P columns in front that every row attends to."""
    if not prefix_tokens:
        return mask
    visible = mask.new_full((*mask.shape[:-1], prefix_tokens), mask.dtype == torch.bool)
    return torch.cat([visible, mask], dim=-1)


def causal_behind(tokens: int, prefix_tokens: int, device: torch.device) -> Tensor:
    """Boolean (1, 1, T, P + T): causal order behind a prefix, which torch's own `is_causal` would get wrong."""
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return seeing_prefix(causal_TT[None, None], prefix_tokens)


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def packed(layout: Layout | None) -> Iterator[None]:
    """Within this context, models mask attention by `layout`."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current() -> Layout | None:
    """The layout of the innermost `packed`."""
    return _layout.get()


def install() -> None:
    """Teach transformers' "sdpa" and "eager" attention about the current layout. Idempotent."""
    AttentionMaskInterface.register("sdpa", _sdpa_mask)
    AttentionMaskInterface.register("eager", _eager_mask)
    AttentionInterface.register("sdpa", _sdpa_attention)


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


def _sdpa_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, G, P + T, d)
    value: Tensor,  # (1, G, P + T, d)
    attention_mask: Tensor | None,
    prefix_tokens: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, document by document: a pack of short documents costs little more than they do.

    Masked attention over the whole row gives the same, for T squared. Queries, keys and values are gathered into rows,
    one bucket of documents after the other, and the results scattered back; everything outside attention stays
    unpadded. A prefix of keys and values is put in front of each row. Queries are of all tokens, or of the layout's.
    """
    layout = _layout.get()
    attention = None if layout is None or query.shape[0] != 1 else _fitting(layout, query, key.shape[2] - prefix_tokens)
    if attention is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    looks = [bucket.look_KQ.branch.shape for bucket in attention.buckets]
    sees = [bucket.seen_KL.branch.shape for bucket in attention.buckets]
    queries = _rows(query, attention.query_S, looks)
    keys, values = (_rows(x[:, :, prefix_tokens:], attention.token_S, sees) for x in (key, value))
    parts = []
    for bucket, q, k, v in zip(attention.buckets, queries, keys, values, strict=True):
        if prefix_tokens:
            k = torch.cat([key[:, :, :prefix_tokens].expand(len(q), -1, -1, -1), k], dim=2)
            v = torch.cat([value[:, :, :prefix_tokens].expand(len(q), -1, -1, -1), v], dim=2)
        mask = bucket.mask(kwargs.get("sliding_window"), prefix_tokens)
        kwargs["is_causal"] = mask is None
        attended, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)  # (K, Q, H, d)
        parts.append(attended.flatten(0, 1))
    return torch.cat(parts).index_select(0, attention.place_N)[None], None


def _fitting(layout: Layout, query: Tensor, keys: int) -> Attention | None:
    """Who looks, if these are the queries and keys of the layout's tokens."""
    tokens, queries = len(layout.document_T), query.shape[2]
    if keys != tokens:
        return None
    if queries == tokens:
        return layout.everywhere
    return layout.at_queries if layout.query_N is not None and queries == len(layout.query_N) else None


def _rows(given: Tensor, index_S: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """(1, H, T, d) -> (K, H, L, d) for each bucket."""
    rows_SC = given[0].transpose(0, 1).flatten(1).index_select(0, index_S)
    parts = torch.split(rows_SC, [shape.numel() for shape in shapes])
    return [part.view(*shape, given.shape[1], -1).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]
