"""Reading AWS Nitro's attestation documents and the answers of its security module (NSM), within bounds.

The envelope (COSE_Sign1, RFC 9052, section 4.2) is not signed itself, so only the one form that the NSM writes is
read: no tag, the protected header {1: -35} (ES384), no unprotected header, nothing behind the signature. The payload
is signed; it is CBOR, but not in our canonical form (maps of indefinite length, keys in another order), so it has a
reader of its own: it knows integers, bytes, text, arrays, maps, true, false and null, and nothing else.

Source: AWS, "Verifying the root of trust" (aws-nitro-enclaves-nsm-api, docs/attestation_process.md), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cloister.crypto.encoding import Fields
from cloister.errors import ProtocolError, VerificationError

PCR_BYTES = 48
MAX_DOCUMENT_BYTES = 0x3000
"""Length of the NSM's longest answer (Linux, include/uapi/linux/nsm.h: NSM_RESPONSE_MAX_SIZE)."""

_HEAD = bytes.fromhex("8444a1013822a059")
"""Array of 4; protected header as 4 bytes; empty unprotected header; payload with a length of 2 bytes."""
_SIGNATURE_HEAD = bytes.fromhex("5860")
_SIGNATURE_BYTES = 96
_PROTECTED = bytes.fromhex("44a1013822")
_MAX_ITEMS = 256
_MAX_DEPTH = 4
_MAX_USER_BYTES = 1024
_MAX_TIME_MS = 253_402_300_799_999  # the last of the year 9999, where calendars end
_CONSTANTS = {20: False, 21: True, 22: None}
_INDEFINITE = 31
_BREAK = b"\xff"


@dataclass(frozen=True, kw_only=True)
class Document:
    """An attestation document as its bytes say: unverified."""

    module_id: str
    timestamp_ms: int
    """Milliseconds since 1970."""
    pcrs: dict[int, bytes]
    """48 bytes each."""
    certificates: tuple[bytes, ...]
    """DER, leaf first, root last."""
    user_data: bytes
    signature: bytes
    signed: bytes
    """What the signature is over (RFC 9052, section 4.4)."""


def parse(blob: bytes) -> Document:
    """Read a document. Raises: VerificationError "evidence-format"."""
    try:
        payload, signature = _open(blob)
        return _document(payload, signature)
    except ProtocolError as exc:
        raise VerificationError("evidence-format", f"the Nitro document is malformed: {exc}") from exc


def _open(blob: bytes) -> tuple[bytes, bytes]:
    """Payload and signature."""
    start = len(_HEAD) + 2
    size = int.from_bytes(blob[len(_HEAD) : start], "big")
    end = start + size
    if len(blob) > MAX_DOCUMENT_BYTES or size < 256 or not blob.startswith(_HEAD):
        raise ProtocolError("it is not a COSE_Sign1 message with ES384 as the NSM writes it")
    if blob[end : end + 2] != _SIGNATURE_HEAD or len(blob) != end + 2 + _SIGNATURE_BYTES:
        raise ProtocolError("it is truncated, or has something behind its end")
    return blob[start:end], blob[end + 2 :]


def _document(payload: bytes, signature: bytes) -> Document:
    table = decode(payload)
    if not isinstance(table, dict):
        raise ProtocolError("the payload is not a map")
    # Bytes that whoever asked for the document chose; those that it did not choose are null, or no such field.
    chosen = {name: table.pop(name, None) or b"" for name in ("user_data", "nonce", "public_key")}
    for name, value in chosen.items():
        if type(value) is not bytes or len(value) > _MAX_USER_BYTES:
            raise ProtocolError(f"{name} is not bytes, or is too long")
    fields = Fields(table, "the payload")
    if fields.text("digest") != "SHA384":
        raise ProtocolError("the digest is not SHA384")
    document = Document(
        module_id=fields.text("module_id"),
        timestamp_ms=fields.integer("timestamp", low=1, high=_MAX_TIME_MS),
        pcrs=_pcrs(fields.table("pcrs")),
        certificates=_certificates(fields),
        user_data=chosen["user_data"],
        signature=signature,
        signed=b"\x84\x6aSignature1" + _PROTECTED + b"\x40\x59" + len(payload).to_bytes(2, "big") + payload,
    )
    fields.end()
    return document


def _pcrs(table: dict[Any, Any]) -> dict[int, bytes]:
    for index, value in table.items():
        if type(index) is not int or index > 31 or type(value) is not bytes or len(value) != PCR_BYTES:
            raise ProtocolError(f"a PCR is not one of 0 to 31, or not of {PCR_BYTES} bytes")
    if not {0, 1, 2} <= set(table):
        raise ProtocolError("PCR 0, 1 or 2 is missing")
    return {index: table[index] for index in sorted(table)}


def _certificates(fields: Fields) -> tuple[bytes, ...]:
    leaf, bundle = fields.blob("certificate"), fields.items("cabundle", max_items=8)
    if any(type(der) is not bytes for der in bundle):
        raise ProtocolError("a certificate is not bytes")
    return (leaf, *reversed(bundle))


def decode(data: bytes) -> Any:
    """Decode CBOR as the NSM writes it. Raises: ProtocolError."""
    reader = _Reader(data)
    value = reader.value(_MAX_DEPTH)
    if reader.at != len(data):
        raise ProtocolError("something is behind the end")
    return value


class _Reader:
    """Reads values one after the other; nothing is allocated that the bytes at hand do not hold."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._items_left = _MAX_ITEMS
        self.at = 0

    def value(self, depth: int) -> Any:
        """The value at `at`, which then points behind it."""
        self._items_left -= 1
        if self._items_left < 0 or depth < 0:
            raise ProtocolError("it has too many items or is nested too deeply")
        major, info = divmod(self._take(1)[0], 32)
        if major == 0:
            return self._argument(info)
        if major in (2, 3):
            raw = self._take(self._argument(info))
            return raw if major == 2 else _text(raw)
        if major == 4:
            return [self.value(depth - 1) for _ in self._entries(info)]
        if major == 5:
            return self._map(info, depth)
        if major == 7 and info in _CONSTANTS:
            return _CONSTANTS[info]
        raise ProtocolError("it holds a kind of value that a Nitro document does not have")

    def _map(self, info: int, depth: int) -> dict[Any, Any]:
        table: dict[Any, Any] = {}
        for _ in self._entries(info):
            key = self.value(depth - 1)
            # Keys of one type only: so that they can be compared.
            if type(key) not in (int, str) or key in table or any(type(key) is not type(k) for k in table):
                raise ProtocolError("a key of a map is repeated, or neither a number nor text")
            table[key] = self.value(depth - 1)
        return table

    def _entries(self, info: int) -> Iterator[None]:
        """Once for each entry, of as many as the head says or up to the break. `value` bounds their number."""
        left = -1 if info == _INDEFINITE else self._argument(info)
        while left != 0:
            if left < 0 and self._data[self.at : self.at + 1] == _BREAK:
                self.at += 1
                return
            yield None
            left -= 1

    def _argument(self, info: int) -> int:
        if info < 24:
            return info
        if info > 27:
            raise ProtocolError("a length is indefinite or reserved")
        return int.from_bytes(self._take(1 << (info - 24)), "big")

    def _take(self, size: int) -> bytes:
        raw = self._data[self.at : self.at + size]
        if len(raw) < size:
            raise ProtocolError("it is truncated")
        self.at += size
        return raw


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise ProtocolError("a text is not UTF-8") from exc
