"""The layout of Intel's quotes: SGX (version 3) and TDX (versions 4 and 5), to the last byte. Proves nothing.

`dcap-qvl` reads what it needs and ignores the rest, so bytes behind a quote, in its outer certification type, between
its certificates and in its root certificate could be changed. Here every byte is accounted for: it is signed, or it
has one value that it may have.

Source: Intel, SGX ECDSA Quote Library Reference (quote 3) and TDX DCAP Quoting Library API (quotes 4 and 5), appendix
"Quote Format"; report bodies: Intel SDM vol. 3D "REPORT", Intel TDX Module ABI "TDREPORT".
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Literal

from cloister.errors import VerificationError

Tee = Literal["tdx", "sgx"]

TEE_TYPES: dict[int, Tee] = {0x00000000: "sgx", 0x00000081: "tdx"}
VERSIONS: dict[Tee, tuple[int, ...]] = {"sgx": (3,), "tdx": (4, 5)}
HEADER_BYTES = 48
SGX_BODY_BYTES = 384
TDX_BODY_BYTES = {2: 584, 3: 648, 4: 885}
"""By body type of quote version 5: TD report 1.0, 1.5, 1.5 extended. Each begins with the one before it."""

V4_PADDING_BYTES = 70
"""Intel's TD quoting enclave sizes its buffer for version 5 with a TD report 1.5 and leaves this many zero bytes
behind a version 4 quote (seen in real ones). Accepted: exactly none, or exactly these."""

_ECDSA_P256 = 2
_QE_REPORT_CERTIFICATION, _PCK_CHAIN = 6, 5
_SIGNATURE_AND_KEY_BYTES = 128
_QE_REPORT_AND_SIGNATURE_BYTES = 384 + 64
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\n([A-Za-z0-9+/=\n]+?)\n-----END CERTIFICATE-----\n?")


@dataclass(frozen=True, kw_only=True)
class Quote:
    """A quote's parts. Nobody has checked a signature yet."""

    tee: Tee
    version: int
    body: bytes
    """The enclave's or the trust domain's report."""
    chain: tuple[bytes, ...]
    """PCK certificate, its issuer, the root: DER."""


def parse(blob: bytes) -> Quote:
    """Take a quote apart.

    Raises: VerificationError("evidence-format") if a byte is missing, left over, or not what it must be.
    """
    reader = _Reader(blob)
    header = reader.take(HEADER_BYTES, "header")
    version, tee = _parse_header(header)
    body_bytes = SGX_BODY_BYTES if tee == "sgx" else TDX_BODY_BYTES[2]
    if version == 5:
        body_type, size = reader.integer(2, "body type"), reader.integer(4, "body size")
        body_bytes = TDX_BODY_BYTES.get(body_type, 0)
        if size != body_bytes:
            raise _malformed(f"a body of type {body_type} and {size} bytes is unknown")
    body = reader.take(body_bytes, "body")
    signed = _Reader(reader.take(reader.integer(4, "signature size"), "signature"))
    padding = reader.rest()
    if padding and not (version == 4 and padding == bytes(V4_PADDING_BYTES)):
        raise _malformed(f"{len(padding)} bytes behind the quote's end")
    return Quote(tee=tee, version=version, body=body, chain=_parse_signature(signed, version))


def _parse_header(header: bytes) -> tuple[int, Tee]:
    version, key_type = int.from_bytes(header[0:2], "little"), int.from_bytes(header[2:4], "little")
    tee = TEE_TYPES.get(int.from_bytes(header[4:8], "little"))
    if tee is None or version not in VERSIONS[tee] or key_type != _ECDSA_P256:
        raise _malformed(f"version {version}, TEE type {header[7::-1][:4].hex()}, key type {key_type} is unknown")
    if tee == "tdx" and any(header[8:12]):  # version 3 has the versions of QE and PCE here
        raise _malformed("reserved bytes of its header are not zero")
    return version, tee


def _parse_signature(reader: _Reader, version: int) -> tuple[bytes, ...]:
    """Walk the signature's part up to the certificates; `dcap-qvl` verifies it."""
    reader.take(_SIGNATURE_AND_KEY_BYTES, "signature")
    if version != 3:
        if reader.integer(2, "certification type") != _QE_REPORT_CERTIFICATION:
            raise _malformed("its certification data are of an unknown type")
        inner = _Reader(reader.take(reader.integer(4, "certification size"), "certification data"))
        reader.end()
        reader = inner
    reader.take(_QE_REPORT_AND_SIGNATURE_BYTES, "report of the quoting enclave")
    reader.take(reader.integer(2, "authentication size"), "authentication data")
    if reader.integer(2, "certificate type") != _PCK_CHAIN:
        raise _malformed("it does not hold the certificates of its platform (PCK chain, type 5)")
    chain = _parse_chain(reader.take(reader.integer(4, "certificates' size"), "certificates"))
    reader.end()
    return chain


def _parse_chain(pem: bytes) -> tuple[bytes, ...]:
    """PEM as Intel writes it, with or without a zero byte behind it: no other text, in one encoding only."""
    chain, text = [], pem.removesuffix(b"\0")
    for block in _PEM.finditer(text):
        try:
            chain.append(base64.b64decode(block[1].replace(b"\n", b""), validate=True))
        except binascii.Error as exc:
            raise _malformed("its certificates are not base64") from exc
    if len(chain) != 3 or b"".join(_to_pem(der) for der in chain) != text.removesuffix(b"\n") + b"\n":
        raise _malformed("its certificates are not three, or other text is among them")
    return tuple(chain)


def _to_pem(der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----", b""])


class _Reader:
    """Takes bytes from the front; refuses to go beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int, what: str) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise _malformed(f"it ends inside its {what}")
        self._at += count
        return taken

    def integer(self, count: int, what: str) -> int:
        return int.from_bytes(self.take(count, what), "little")

    def rest(self) -> bytes:
        return self._data[self._at :]

    def end(self) -> None:
        if self.rest():
            raise _malformed("there are bytes behind its certificates")


def _malformed(what: str) -> VerificationError:
    return VerificationError("evidence-format", f"the quote is malformed: {what}")
