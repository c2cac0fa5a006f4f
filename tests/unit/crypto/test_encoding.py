"""Canonical CBOR: one encoding per value, and bounds that hold before anything is built."""

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.crypto.encoding import Fields, decode, encode, join
from cloister.errors import ProtocolError

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=30)
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=5) | st.dictionaries(st.text(max_size=9), v, max_size=5), max_leaves=20
)


def take(data: bytes, **limits: int) -> object:
    return decode(data, max_bytes=limits.pop("max_bytes", 1 << 16), what="thing", **limits)


@given(values)
def test_round_trip(value: object) -> None:
    assert take(encode(value), max_depth=64) == value  # type: ignore[arg-type]  # Hypothesis' type is wide


@given(values, st.data())
@settings(max_examples=300)
def test_one_encoding_per_value(value: object, data: st.DataObject) -> None:
    """Whatever decodes after a change is another value, or exactly what encodes it."""
    encoded = bytearray(encode(value))  # type: ignore[arg-type]  # Hypothesis' type is wide
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = take(bytes(encoded), max_depth=64)
    except ProtocolError:
        return
    assert encode(changed) == bytes(encoded)  # type: ignore[arg-type]  # decoded, so encodable


@given(st.binary(max_size=64))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    try:
        value = take(data)
    except ProtocolError:
        return
    assert encode(value) == data  # type: ignore[arg-type]  # decoded, so encodable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x01",  # trailing byte
        b"\x18\x01",  # a number not in its shortest form
        b"\x5f\x41a\xff",  # indefinite length
        b"\x9f\xff",
        b"\xc0\x60",  # tag
        b"\xd9\xd9\xf7\x00",
        b"\xf7",  # undefined
        b"\xf8\x20",
        b"\x1c",
        b"\xfb\x3f\xf0\x00\x00\x00\x00\x00\x00",  # 1.0 in 8 bytes
        b"\xa2\x61a\x01\x61a\x02",  # repeated key
        b"\xa2\x61b\x01\x61a\x02",  # unsorted keys
        b"\xa1\x01\x02",  # key that is not text
        b"\x61\xff",  # not UTF-8
        b"\x3b\xff\xff\xff\xff\xff\xff\xff\xff",  # below -2^63
        b"\x5b\xff\xff\xff\xff\xff\xff\xff\xff",  # a length far beyond the data
        b"\x9b\x00\x00\x00\x00\xff\xff\xff\xff",
        b"\x42a",
        b"\xf9\x00",
        b"\x19\x00",
    ],
)
def test_refuses_what_is_not_canonical(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="thing"):
        take(data)


def test_bounds() -> None:
    with pytest.raises(ProtocolError, match="allowed are 10"):
        take(encode("x" * 20), max_bytes=10)
    with pytest.raises(ProtocolError, match="too many"):
        take(encode([0] * 11), max_items=11)
    assert take(encode([0] * 11), max_items=12) == [0] * 11
    with pytest.raises(ProtocolError, match="nested"):
        take(b"\x81" * 50 + b"\x00")
    for nested in (dict.fromkeys("abcdef", 0), [[[0], [0]], [[0], [0]]]):
        items = 13 if isinstance(nested, dict) else 11
        assert take(encode(nested), max_items=items) == nested
        with pytest.raises(ProtocolError, match="too many"):
            take(encode(nested), max_items=items - 1)
    # A small message that claims a huge list must be refused by its head, not by building it.
    with pytest.raises(ProtocolError, match="too many"):
        take(b"\x9a\x00\xff\xff\xff" + b"\x00" * 100)


@pytest.mark.parametrize("value", [{1: 2}, {"a": {2}}, [object()], 2**64, -(2**63) - 1, bytearray(b"x")])
def test_encode_refuses_other_types(value: object) -> None:
    with pytest.raises(TypeError):
        encode(value)  # type: ignore[arg-type]  # the point of the test


def test_cbor2_agrees() -> None:
    value = {"b": [1, -1, 2.5, None, True], "a": b"xyz", "long name": "text"}
    assert cbor2.loads(encode(value)) == value


def test_fields() -> None:
    data = encode({"n": 5, "b": b"abc", "t": "text", "m": {}, "l": [1], "y": True})
    fields = Fields.decode(data, max_bytes=100, what="thing")
    assert fields.integer("n", low=5, high=5) == 5
    assert fields.blob("b", size=3) == b"abc"
    assert fields.text("t") == "text"
    assert fields.table("m") == {}
    assert fields.items("l", max_items=1) == [1]
    with pytest.raises(ProtocolError, match="unknown field 'y'"):
        fields.end()
    assert fields.boolean("y") is True
    fields.end()


@pytest.mark.parametrize(
    "take_field",
    [
        lambda f: f.integer("n", low=6, high=9),
        lambda f: f.integer("n", low=0, high=4),
        lambda f: f.integer("y", low=0, high=4),  # True is not 1
        lambda f: f.integer("absent", low=0, high=4),
        lambda f: f.blob("b", size=2),
        lambda f: f.blob("b", max_size=2),
        lambda f: f.blob("t"),
        lambda f: f.text("t", max_size=3),
        lambda f: f.items("l", max_items=0),
        lambda f: f.table("l"),
        lambda f: f.boolean("n"),
    ],
)
def test_fields_refuse(take_field: object) -> None:
    fields = Fields({"n": 5, "b": b"abc", "t": "text", "l": [1], "y": True}, "thing")
    with pytest.raises(ProtocolError, match="field"):
        take_field(fields)  # type: ignore[operator]  # a lambda
    with pytest.raises(ProtocolError, match="not a map"):
        Fields([1], "thing")


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_join_is_unambiguous(a: list[bytes], b: list[bytes]) -> None:
    assert (join(*a) == join(*b)) == (a == b)
