"""Documents to packs: several documents in one row of at most `max_tokens`, without padding.

Legend: T = tokens of a pack, N = its targets, G = its groups, D = model dimension.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cloister.data.tokens import Document
from cloister.model.attention import Layout


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One row for a model. Integers are int64; everything is on one device."""

    given: Tensor
    """Token ids (T), or activations at the cut (T, D)."""
    layout: Layout
    target_pos_N: Tensor
    target_id_N: Tensor
    target_group_N: Tensor
    group_example_G: Tensor
    group_role_G: Tensor

    def __len__(self) -> int:
        return len(self.given)

    def with_activations(self, activation_TD: Tensor) -> Pack:
        return replace(self, given=activation_TD)

    @cached_property
    def wanted(self) -> Layout:
        """The layout, with the tokens before targets as its queries."""
        return replace(self.layout, query_N=self._predicting[0])

    @cached_property
    def wanted_N(self) -> Tensor:
        """Which of these queries stands before each target: branches share the last token of their root."""
        return self._predicting[1]

    @cached_property
    def _predicting(self) -> tuple[Tensor, Tensor]:
        query_N, which_N = torch.unique(self.target_pos_N, return_inverse=True)
        return query_N, which_N

    def to(self, device: torch.device | str) -> Pack:
        if self.given.device == torch.device(device):
            return self
        tensors = {name: getattr(self, name).to(device) for name in TENSORS}
        layout = Layout(**{name: getattr(self.layout, name).to(device) for name in LAYOUT})
        return Pack(layout=layout, **tensors)


LAYOUT = ("document_T", "branch_T", "position_T")
TENSORS = ("given", "target_pos_N", "target_id_N", "target_group_N", "group_example_G", "group_role_G")


def pack_documents(documents: Sequence[Document], max_tokens: int, seed: int) -> list[Pack]:
    """Best-fit packing of the documents in a seeded random order. Each document lies in one pack, whole.

    A pack never mixes documents by length: order is random, so that no pack is all long or all short documents.
    """
    longest = max(map(len, documents), default=0)
    if longest > max_tokens:
        raise ValueError(f"a document of {longest} tokens does not fit a pack of {max_tokens}")
    order = np.random.default_rng(seed).permutation(len(documents))
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    packs: list[list[Document]] = []
    for index in order:
        document = documents[index]
        slot = bisect.bisect_left(rooms, (len(document), 0))
        if slot < len(rooms):
            room, pack = rooms.pop(slot)
        else:
            room, pack = max_tokens, len(packs)
            packs.append([])
        packs[pack].append(document)
        bisect.insort(rooms, (room - len(document), pack))
    return [_join(members) for members in packs]


def _join(documents: Sequence[Document]) -> Pack:
    starts = np.cumsum([0, *(len(d) for d in documents)])
    firsts = np.cumsum([0, *(len(d.groups) for d in documents)])
    groups = np.array([g for d in documents for g in d.groups], dtype=np.int64).reshape(-1, 2)

    def join(columns: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Tensor:
        return torch.from_numpy(np.concatenate(columns))

    return Pack(
        given=join([d.id_T for d in documents]),
        layout=Layout(
            document_T=join([np.full(len(d), i, dtype=np.int64) for i, d in enumerate(documents)]),
            branch_T=join([d.branch_T for d in documents]),
            position_T=join([d.position_T for d in documents]),
        ),
        target_pos_N=join([d.target_pos_N + s for d, s in zip(documents, starts, strict=False)]),
        target_id_N=join([d.target_id_N for d in documents]),
        target_group_N=join([d.target_group_N + f for d, f in zip(documents, firsts, strict=False)]),
        group_example_G=torch.from_numpy(groups[:, 0].copy()),
        group_role_G=torch.from_numpy(groups[:, 1].copy()),
    )
