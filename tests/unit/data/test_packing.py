"""Each document lies in one pack, whole; no padding; the seed decides which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.data.packing import Pack, pack_documents
from cloister.data.tokens import Document


def _documents(lengths: list[int], seed: int = 0) -> list[Document]:
    """Documents of distinct tokens, one or two branches, so that each can be told from the others."""
    rng = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        root = int(rng.integers(1, length))
        branch_T = np.array([0] * root + [1] * (length - root), dtype=np.int64)
        if length - root > 2:
            branch_T[-1:] = 2
        target_pos_N = np.arange(root - 1, length - 1, dtype=np.int64)
        groups = tuple((number, role) for role in range(int(branch_T.max())))
        documents.append(
            Document(
                id_T=number * 1000 + np.arange(length, dtype=np.int64),
                position_T=np.arange(length, dtype=np.int64),
                branch_T=branch_T,
                target_pos_N=target_pos_N,
                target_id_N=number * 1000 + target_pos_N + 1,
                target_group_N=np.maximum(branch_T[target_pos_N + 1] - 1, 0),
                groups=groups,
            )
        )
    return documents


def _unpack(pack: Pack) -> list[Document]:
    """The documents of a pack, by its layout alone."""
    documents = []
    for number in range(int(pack.layout.document_T.max()) + 1):
        here = (pack.layout.document_T == number).numpy()
        first = int(np.flatnonzero(here)[0])
        mine = here[pack.target_pos_N.numpy()]
        used = np.unique(pack.target_group_N.numpy()[mine])
        examples, roles = pack.group_example_G.numpy()[used], pack.group_role_G.numpy()[used]
        documents.append(
            Document(
                id_T=pack.given.numpy()[here],
                position_T=pack.layout.position_T.numpy()[here],
                branch_T=pack.layout.branch_T.numpy()[here],
                target_pos_N=pack.target_pos_N.numpy()[mine] - first,
                target_id_N=pack.target_id_N.numpy()[mine],
                target_group_N=pack.target_group_N.numpy()[mine] - used[0],
                groups=tuple(zip(examples.tolist(), roles.tolist(), strict=True)),
            )
        )
    return documents


def _same(a: Document, b: Document) -> bool:
    names = ("id_T", "position_T", "branch_T", "target_pos_N", "target_id_N", "target_group_N")
    return a.groups == b.groups and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), seed=st.integers(0, 2**31 - 1))
def test_each_document_comes_out_once_and_whole(lengths: list[int], seed: int) -> None:
    documents = _documents(lengths)
    packs = pack_documents(documents, 40, seed)
    out = sorted((d for p in packs for d in _unpack(p)), key=lambda d: int(d.id_T[0]))
    assert len(out) == len(documents)
    assert all(_same(a, b) for a, b in zip(out, documents, strict=True))
    assert all(len(p) <= 40 for p in packs)
    assert sum(map(len, packs)) == sum(lengths)


def test_the_seed_decides() -> None:
    documents = _documents([5, 9, 30, 12, 22, 7, 8, 31] * 5)
    contents = [[p.given.tolist() for p in pack_documents(documents, 40, seed)] for seed in (3, 3, 4)]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(("mean", "fill"), [(60, 0.97), (150, 0.9), (300, 0.75)])
def test_packs_are_well_filled(mean: int, fill: float) -> None:
    lengths = np.clip(np.random.default_rng(0).gamma(2.0, mean / 2, 500).astype(int), 4, 512).tolist()
    packs = pack_documents(_documents(lengths), 512, 0)
    assert sum(lengths) / (512 * len(packs)) > fill


def test_short_and_long_documents_meet_in_one_pack() -> None:
    packs = pack_documents(_documents([4] * 100 + [30] * 100), 40, 0)
    both = sum(len({4, 30} & set(np.bincount(p.layout.document_T.numpy()).tolist())) == 2 for p in packs)
    assert both > len(packs) / 3


def test_a_document_longer_than_a_pack_is_a_programmers_mistake() -> None:
    with pytest.raises(ValueError, match="41 tokens does not fit a pack of 40"):
        pack_documents(_documents([5, 41]), 40, 0)


def test_a_pack_moves_whole() -> None:
    (pack,) = pack_documents(_documents([5, 9]), 40, 0)
    moved = pack.to("meta")
    tensors = [v for v in (*vars(moved).values(), *vars(moved.layout).values()) if hasattr(v, "device")]
    assert len(tensors) == 9
    assert {str(t.device) for t in tensors} == {"meta"}
