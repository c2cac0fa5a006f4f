"""Inputs for Hypothesis: seeds with a few changes, or anything."""

from __future__ import annotations

from hypothesis import strategies as st


def inputs(seeds: list[bytes], max_bytes: int) -> st.SearchStrategy[bytes]:
    """Up to four changes to one of the seeds; now and then bytes of any kind."""
    anything = st.binary(max_size=min(max_bytes, 256))
    if not seeds:
        return anything
    changes = st.lists(st.tuples(st.integers(0, 1 << 20), _CHANGES), max_size=4)
    return st.tuples(st.sampled_from(seeds), changes).map(lambda pair: _apply(*pair)) | anything


_CHANGES = st.one_of(
    st.integers(0, 255).map(lambda byte: ("set", bytes([byte]))),
    st.sampled_from([b"\x00", b"\x7f", b"\xff" * 4, b"\xff" * 8, b"\x80\x00"]).map(lambda b: ("set", b)),
    st.binary(min_size=1, max_size=8).map(lambda b: ("insert", b)),
    st.integers(1, 64).map(lambda n: ("cut", bytes(n))),
    st.just(("end", b"")),
)


def _apply(seed: bytes, changes: list[tuple[int, tuple[str, bytes]]]) -> bytes:
    for at, (what, value) in changes:
        at %= len(seed) + 1
        if what == "set":
            seed = seed[:at] + value + seed[at + len(value) :]
        elif what == "insert":
            seed = seed[:at] + value + seed[at:]
        elif what == "cut":
            seed = seed[:at] + seed[at + len(value) :]
        else:
            seed = seed[:at]
    return seed
