"""Packs of random documents, and what they look like at the cut."""

from __future__ import annotations

import torch

from cloister.data.packing import LAYOUT, TENSORS, Pack
from cloister.model.attention import Layout


def random_pack(
    lengths: list[int], vocabulary: int, *, seed: int = 0, hidden: int | None = None, first_example: int = 0
) -> Pack:
    """Documents of the given lengths; the last two thirds of each are targets. With `hidden`, random activations."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids_T = torch.randint(3, vocabulary, (total,), generator=generator)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    spans = [range(s + max(n // 3, 1) - 1, s + n - 1) for s, n in zip(starts, lengths, strict=True)]
    pos_N = torch.tensor([p for span in spans for p in span])
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    given = ids_T if hidden is None else torch.randn(total, hidden, generator=generator) * 3
    return Pack(
        given=given,
        layout=Layout(
            document_T=document_T,
            branch_T=torch.zeros_like(document_T),
            position_T=torch.cat([torch.arange(n) for n in lengths]),
        ),
        target_pos_N=pos_N,
        target_id_N=ids_T[pos_N + 1],
        target_group_N=torch.cat([torch.full((len(s),), i) for i, s in enumerate(spans)]),
        group_example_G=torch.arange(len(lengths)) + first_example,
        group_role_G=torch.full((len(lengths),), -1),
    )


def equal_packs(a: Pack, b: Pack, *, but: tuple[str, ...] = ()) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in TENSORS if n not in but]
    pairs += [(getattr(a.layout, n), getattr(b.layout, n)) for n in LAYOUT]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
