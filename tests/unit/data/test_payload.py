"""A payload is read back in any order; a false index or table is a ProtocolError and nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.data.activations import Schema
from cloister.data.packing import Pack
from cloister.data.payload import Payload, max_payload_bytes, write_payload
from cloister.data.tokens import Example
from cloister.errors import ProtocolError
from tests.unit.data.tiny_packs import equal_packs, random_pack

EXAMPLES = [
    Example(id="a", task="triage", response_bytes=3, response_role=1, choice_bytes=(2, 3), answer=0),
    Example(id="é 🩺", task="answer", response_bytes=70, response_role=-1),
]
SCHEMA = Schema(activation_dtype="float32", hidden=16, vocabulary=97, max_tokens=40)
PACKS = [random_pack(lengths, 97, hidden=16, seed=i) for i, lengths in enumerate(([7, 12], [30], [5]))]


def _bytes(packs: Sequence[Pack] = PACKS, examples: Sequence[Example] = EXAMPLES, dtype: str = "float32") -> bytes:
    out = bytearray()
    write_payload(out.extend, packs, examples, dtype)
    return bytes(out)


def _open(content: bytes) -> Payload:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        assert offset + length <= len(content), "a reader must not ask for more than there is"
        return content[offset : offset + length]

    return Payload.open(read, len(content), SCHEMA, torch.float32, "party a")


def _read_all(payload: Payload) -> None:
    payload.examples()
    for index in range(len(payload)):
        payload[index]


WHOLE = _bytes()


def test_what_was_written_is_read_in_any_order() -> None:
    payload = _open(WHOLE)
    assert len(payload) == 3
    assert payload.examples() == EXAMPLES
    assert list(payload.tokens) == [19, 30, 5]
    assert list(payload.targets) == [len(p.target_pos_N) for p in PACKS]
    for index in (2, 0, 1, 2):
        assert equal_packs(payload[index], PACKS[index])


def test_a_training_payload_has_no_examples() -> None:
    assert _open(_bytes(examples=[])).examples() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("hidden", "tokens"), [(32, 16), (70, 100), (256, 512), (2048, 512)])
def test_the_size_is_bounded_before_it_is_known(hidden: int, tokens: int, dtype: str) -> None:
    packs = [random_pack([tokens // 2, tokens - tokens // 2], 97, seed=i) for i in range(3)]
    examples = [Example(id=f"r{i}", task="t", response_bytes=9, response_role=-1) for i in range(6)]
    active = [p.with_activations(torch.randn(len(p), hidden)) for p in packs]
    size = len(_bytes(active, examples, dtype))
    bound = max_payload_bytes(packs, examples, hidden, dtype)
    assert size <= bound
    if hidden >= 256:
        assert bound <= 1.15 * size


def test_writing_keeps_one_pack_at_a_time() -> None:
    """Packs are taken one by one and each is written before the next is asked for."""
    log: list[str] = []

    def packs() -> Any:
        for pack in PACKS:
            log.append("pack")
            yield pack

    write_payload(lambda _: log.append("write"), packs(), EXAMPLES, "float32")
    assert log == ["write", *["pack", "write"] * 3, "write", "write"]


def _index(**changes: Any) -> bytes:
    """The payload with entries of its index replaced."""
    (length,) = struct.unpack("<Q", WHOLE[-8:])
    body = WHOLE[: -8 - length]
    index = {**safetensors.torch.load(WHOLE[len(body) : -8]), **changes}
    blob = bytes(safetensors.torch.save({k: v for k, v in index.items() if v is not None}))
    return body + blob + struct.pack("<Q", len(blob))


def _ends(change: Callable[[list[int]], list[int]]) -> bytes:
    (length,) = struct.unpack("<Q", WHOLE[-8:])
    ends = safetensors.torch.load(WHOLE[-8 - length : -8])["end"].tolist()
    return _index(end=torch.tensor(change(ends)))


FALSE_INDEX: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no index": struct.pack("<Q", 0),
    "too long": b"abc" + struct.pack("<Q", 4),
    "huge": WHOLE[:-8] + struct.pack("<Q", 2**63),
    "cut": WHOLE[:-1],
    "grown": WHOLE + b"\0",
    "front lost": WHOLE[1:],
    "no ends": _index(end=None),
    "no tokens": _index(tokens=None),
    "float": _index(tokens=torch.tensor([19.0, 30.0, 5.0])),
    "int32": _index(tokens=torch.tensor([19, 30, 5], dtype=torch.int32)),
    "scalar": _index(end=torch.tensor(3)),
    "square": _index(tokens=torch.tensor([[19, 30, 5]])),
    "one pack less": _index(tokens=torch.tensor([19, 30])),
    "no packs": _index(
        tokens=torch.zeros(0, dtype=torch.int64), targets=torch.zeros(0, dtype=torch.int64), end=torch.tensor([9])
    ),
    "tokens 0": _index(tokens=torch.tensor([19, 0, 5])),
    "tokens too many": _index(tokens=torch.tensor([19, 41, 5])),
    "targets negative": _index(targets=torch.tensor([3, -1, 5])),
    "targets huge": _index(targets=torch.tensor([3, 2**31, 5])),
    "ends negative": _ends(lambda e: [-1, *e[1:]]),
    "ends backwards": _ends(lambda e: [e[0], e[2], e[1], e[3]]),
    "ends repeat": _ends(lambda e: [e[0], e[0], *e[2:]]),
    "ends short": _ends(lambda e: [*e[:-1], e[-1] - 1]),
    "ends beyond": _ends(lambda e: [*e[:-1], e[-1] + 1]),
}


@pytest.mark.parametrize("case", FALSE_INDEX)
def test_a_false_index_is_refused(case: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        _open(FALSE_INDEX[case])
    assert refused.value.where == "party a"


@pytest.mark.parametrize("changed", [{"tokens": [18, 30, 5]}, {"targets": [12, 20, 3]}])
def test_a_pack_with_other_counts_than_its_index_is_refused(changed: dict[str, list[int]]) -> None:
    payload = _open(_index(**{k: torch.tensor(v) for k, v in changed.items()}))
    with pytest.raises(ProtocolError, match="other counts") as refused:
        payload[0]
    assert refused.value.where == "party a, pack 0"


def test_shifted_boundaries_are_refused_when_the_pack_is_read() -> None:
    payload = _open(_ends(lambda e: [e[0], e[1] - 1, *e[2:]]))
    for index in (0, 1):
        with pytest.raises(ProtocolError):
            payload[index]


def _with_table(table: bytes) -> bytes:
    (length,) = struct.unpack("<Q", WHOLE[-8:])
    body, old = WHOLE[: -8 - length], WHOLE[-8 - length : -8]
    index = safetensors.torch.load(old)
    shift = len(table) - int(index["end"][0])
    blob = bytes(safetensors.torch.save({**index, "end": index["end"] + shift}))
    return table + body[int(index["end"][0]) :] + blob + struct.pack("<Q", len(blob))


GOOD = {"id": "a", "task": "t", "response_bytes": 3, "response_role": 1, "choice_bytes": [2, 3], "answer": 0}
FALSE_TABLE: dict[str, Any] = {
    "not a list": {"a": 1},
    "number": 3,
    "row of text": ["a"],
    "row of none": [None],
    "missing key": [{k: v for k, v in GOOD.items() if k != "task"}],
    "missing choices": [{k: v for k, v in GOOD.items() if k != "choice_bytes"}],
    "more keys": [GOOD | {"more": 1}],
    **{
        f"{key} = {value!r:.30}": [GOOD | {key: value}]
        for key, values in {
            "id": [3, None, "x" * 1025, ["a"], "\ud800"],
            "task": [3, None, "x" * 1025, "\udfff"],
            "response_bytes": [0, -1, 2**31, 1.5, "3", None, True, float("nan")],
            "response_role": [2, -2, 0.5, None, True],
            "choice_bytes": [[2, 0], [2, -1], [2, 2**31], ["a", "b"], "23", 5, None, [[1], [2]]],
            "answer": [2, -2, 0.0, None, False],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", FALSE_TABLE)
def test_a_false_table_is_refused(case: str) -> None:
    payload = _open(_with_table(json.dumps(FALSE_TABLE[case]).encode()))
    with pytest.raises(ProtocolError) as refused:
        payload.examples()
    assert refused.value.where in ("party a", "party a, example 1")
    assert str(refused.value).encode(), "the message can be printed"


def test_an_error_does_not_quote_what_the_party_wrote() -> None:
    """The enclave's operator reads its errors; the name of an example may be that of a patient."""
    payload = _open(_with_table(json.dumps([GOOD | {"id": "patient Smith", "answer": 7}]).encode()))
    with pytest.raises(ProtocolError) as refused:
        payload.examples()
    assert "Smith" not in f"{refused.value} {refused.value.hint}"


@pytest.mark.parametrize("table", [b"", b"{", b"\xff", b"[" * 5000, b"[" + b"9" * 5000 + b"]"])
def test_a_table_that_is_no_json_is_refused(table: bytes) -> None:
    with pytest.raises(ProtocolError):
        _open(_with_table(table)).examples()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bytes_changed_anywhere_end_in_a_protocol_error_at_worst(data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    (length,) = struct.unpack("<Q", WHOLE[-8:])
    index = st.integers(len(content) - 8 - length, len(content) - 1)
    table = st.integers(0, WHOLE.index(b"}]") + 1)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(index | table | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789"[]{},:')))
    try:
        _read_all(_open(bytes(content)))
    except ProtocolError as exc:
        assert exc.where.startswith("party a")  # noqa: PT017 - both outcomes are right


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=60), length=st.integers(0, 70))
def test_any_bytes_are_a_protocol_error(body: bytes, length: int) -> None:
    with pytest.raises(ProtocolError):
        _read_all(_open(body + struct.pack("<Q", length)))
