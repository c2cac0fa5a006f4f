"""Bounded canonical CBOR (RFC 8949, section 4.2): the one encoding of everything that is signed, hashed or sent.

`decode` guarantees, before anything is allocated: size, number of items and depth are within bounds; every head is
in its shortest form; map keys are text, sorted and distinct; there are no tags, no indefinite lengths and no bytes
after the value. So a value has exactly one encoding and a peer cannot make a small message unfold into a large one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cbor2

from cloister.errors import ProtocolError

Value = None | bool | int | float | str | bytes | Sequence["Value"] | Mapping[str, "Value"]

_UINT, _NEGINT, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_FALSE_TRUE_NULL = (20, 21, 22)
_FLOAT_SIZES = {25: 2, 26: 4, 27: 8}


def encode(value: Value) -> bytes:
    """Encode canonically.

    Raises: TypeError for anything that is not null, bool, int of 64 bits, float, text, bytes, list or a map with
    text keys (a programmer's mistake, never input).
    """
    _check_type(value)
    return cbor2.dumps(value, canonical=True)


def _check_type(value: Value) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a map key must be text, not {type(key).__name__}")
            _check_type(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_type(entry)
    elif type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise TypeError("an integer must fit in 64 bits")
    elif value is not None and type(value) not in (bool, float, str, bytes):
        raise TypeError(f"cannot encode a {type(value).__name__}")


def decode(data: bytes, *, max_bytes: int, max_items: int = 1 << 16, max_depth: int = 8, what: str) -> Any:
    """Decode what a peer or a file gave us.

    Args:
        what: names the thing in errors ("hello", "bundle header").
    Returns: the value; its structure is still unchecked (use `Fields`).
    Raises: ProtocolError if it is not canonical or exceeds a bound.
    """
    if len(data) > max_bytes:
        raise ProtocolError(f"{what} has {len(data)} bytes, allowed are {max_bytes}")
    end = _Scanner(data, max_items, what).scan(0, max_depth)
    if end != len(data):
        raise ProtocolError(f"{what} has {len(data) - end} bytes after its end")
    try:
        return cbor2.loads(data)
    except (cbor2.CBORDecodeError, ValueError) as exc:  # text that is not UTF-8
        raise ProtocolError(f"{what} is malformed") from exc


class _Scanner:
    """Walks the heads of an encoding without building values."""

    def __init__(self, data: bytes, max_items: int, what: str) -> None:
        self._data = data
        self._items_left = max_items
        self._what = what

    def scan(self, at: int, depth: int) -> int:
        """Check one value at offset `at`; return the offset after it."""
        self._items_left -= 1
        if self._items_left < 0 or depth < 0:
            raise ProtocolError(f"{self._what} has too many items or is nested too deeply")
        if at >= len(self._data):
            raise ProtocolError(f"{self._what} is truncated")
        major, info = self._data[at] >> 5, self._data[at] & 31
        if major == _SIMPLE:
            return self._simple(at, info)
        argument, at = self._argument(at, info)
        if major in (_UINT, _NEGINT):
            if major == _NEGINT and argument >= 1 << 63:
                raise ProtocolError(f"{self._what} holds an integer of more than 64 bits")
            return at
        if major in (_BYTES, _TEXT):
            if argument > len(self._data) - at:
                raise ProtocolError(f"{self._what} is truncated")
            return at + argument
        if major == _TAG:
            raise ProtocolError(f"{self._what} holds a CBOR tag")
        if argument > self._items_left:
            raise ProtocolError(f"{self._what} has too many items")
        return self._array(at, argument, depth) if major == _ARRAY else self._map(at, argument, depth)

    def _argument(self, at: int, info: int) -> tuple[int, int]:
        if info < 24:
            return info, at + 1
        if info > 27:
            raise ProtocolError(f"{self._what} has an indefinite or reserved length")
        size = 1 << (info - 24)
        raw = self._data[at + 1 : at + 1 + size]
        if len(raw) < size:
            raise ProtocolError(f"{self._what} is truncated")
        argument = int.from_bytes(raw, "big")
        if argument < (24, 1 << 8, 1 << 16, 1 << 32)[info - 24]:
            raise ProtocolError(f"{self._what} is not canonical: a length is not in its shortest form")
        return argument, at + 1 + size

    def _simple(self, at: int, info: int) -> int:
        if info in _FALSE_TRUE_NULL:
            return at + 1
        size = _FLOAT_SIZES.get(info)
        raw = self._data[at : at + 1 + (size or 0)]
        if size is None or len(raw) != size + 1:
            raise ProtocolError(f"{self._what} holds an unknown or truncated simple value")
        if cbor2.dumps(cbor2.loads(raw), canonical=True) != raw:
            raise ProtocolError(f"{self._what} is not canonical: a float is not in its shortest form")
        return at + 1 + size

    def _array(self, at: int, count: int, depth: int) -> int:
        for _ in range(count):
            at = self.scan(at, depth - 1)
        return at

    def _map(self, at: int, count: int, depth: int) -> int:
        previous = b""
        for _ in range(count):
            start = at
            at = self.scan(at, depth - 1)
            key = self._data[start:at]
            # With text keys the order of RFC 8949 (bytewise) and of RFC 7049 (length first) are the same.
            if key[0] >> 5 != _TEXT or key <= previous:
                raise ProtocolError(f"{self._what} is not canonical: map keys must be text, sorted and distinct")
            previous = key
            at = self.scan(at, depth - 1)
        return at


class Fields:
    """Takes the fields of a decoded map one by one, each with its type and bounds; `end` refuses what is left."""

    def __init__(self, value: Any, what: str) -> None:
        if not isinstance(value, dict):
            raise ProtocolError(f"{what} is not a map")
        self._left: dict[str, Any] = dict(value)
        self._what = what

    @classmethod
    def decode(cls, data: bytes, *, max_bytes: int, what: str, max_items: int = 1 << 16) -> Fields:
        """Decode a map, see `decode`."""
        return cls(decode(data, max_bytes=max_bytes, max_items=max_items, what=what), what)

    def _take(self, name: str, kind: type) -> Any:
        value = self._left.pop(name, None)
        if type(value) is not kind:
            raise ProtocolError(f"{self._what}: field {name!r} is missing or not of type {kind.__name__}")
        return value

    def integer(self, name: str, *, low: int, high: int) -> int:
        """An integer in [low, high]."""
        value = self._take(name, int)
        if not low <= value <= high:
            raise ProtocolError(f"{self._what}: field {name!r} must be from {low} to {high}")
        return int(value)

    def blob(self, name: str, *, size: int | None = None, max_size: int = 1 << 16) -> bytes:
        """Bytes of exactly `size`, or of at most `max_size`."""
        value = self._take(name, bytes)
        if (size is not None and len(value) != size) or (size is None and len(value) > max_size):
            raise ProtocolError(f"{self._what}: field {name!r} has a wrong length of {len(value)} bytes")
        return bytes(value)

    def text(self, name: str, *, max_size: int = 256) -> str:
        """Text of at most `max_size` characters."""
        value = self._take(name, str)
        if len(value) > max_size:
            raise ProtocolError(f"{self._what}: field {name!r} is longer than {max_size} characters")
        return str(value)

    def table(self, name: str) -> dict[str, Any]:
        """A map; its entries are unchecked."""
        return dict(self._take(name, dict))

    def items(self, name: str, *, max_items: int) -> list[Any]:
        """A list of at most `max_items`; its entries are unchecked."""
        value = self._take(name, list)
        if len(value) > max_items:
            raise ProtocolError(f"{self._what}: field {name!r} has more than {max_items} entries")
        return list(value)

    def boolean(self, name: str) -> bool:
        """True or false."""
        return bool(self._take(name, bool))

    def end(self) -> None:
        """Refuse fields that nobody took."""
        if self._left:
            raise ProtocolError(f"{self._what}: unknown field {min(self._left)!r}")


def join(*fields: bytes) -> bytes:
    """Concatenate fields, each behind its length (8 bytes, big endian), so that no two lists give the same bytes."""
    return b"".join(len(f).to_bytes(8, "big") + f for f in fields)
