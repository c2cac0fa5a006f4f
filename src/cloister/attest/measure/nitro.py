"""PCR 0, 1 and 2 of an AWS Nitro enclave image file (EIF).

Source: AWS "Cryptographic attestation" (what each PCR covers); aws-nitro-enclaves-image-format, `defs` (the header of
548 bytes, sections each behind a header of 12 bytes, all numbers big-endian; CRC-32 over everything but itself).
A PCR is SHA-384(48 zero bytes || SHA-384(contents of its sections, in file order)).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator

from cloister.attest.measure.reference import Reference, replay
from cloister.errors import DataError

_MAGIC = b".eif"
_HEADER = struct.Struct(">4sHHQQHH32Q32QII")
_SECTION = struct.Struct(">HHQ")
_KERNEL, _COMMAND_LINE, _RAMDISK, _SIGNATURE, _METADATA = range(1, 6)
_VERSIONS = (3, 4)


def measure_nitro(eif: bytes, *, what: str) -> Reference:
    """Reference values of an enclave image.

    Raises: DataError: not an EIF, truncated, altered, or without kernel, command line and ramdisks.
    """
    sections = list(_sections(eif, what))
    kinds = [kind for kind, _ in sections]
    if kinds[:2] != [_KERNEL, _COMMAND_LINE] or kinds.count(_KERNEL) != 1 or kinds.count(_COMMAND_LINE) != 1:
        raise DataError("the EIF does not begin with one kernel and one command line", where=what)
    ramdisks = [data for kind, data in sections if kind == _RAMDISK]
    if not ramdisks:
        raise DataError("the EIF holds no ramdisk", where=what)
    boot = [data for kind, data in sections[:2]]
    signed = _SIGNATURE in kinds
    return Reference(
        type="nitro",
        registers={
            "pcr0": _pcr([*boot, *ramdisks]),
            "pcr1": _pcr([*boot, ramdisks[0]]),
            "pcr2": _pcr(ramdisks[1:]),
        },
        notes=(
            "pcr0 covers the whole image, pcr1 kernel and first ramdisk, pcr2 the other ramdisks: the application",
            "the job and its policy must be inside the image: a Nitro enclave has no register for configuration",
            *(("the image is signed: pcr8 names who signed it, and is not computed here",) if signed else ()),
        ),
    )


def _pcr(parts: list[bytes]) -> bytes:
    digest = hashlib.sha384()
    for part in parts:
        digest.update(part)
    return replay([digest.digest()], algorithm="sha384")


def _sections(eif: bytes, what: str) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of every section, the header's table and checksum checked."""
    if len(eif) < _HEADER.size or eif[:4] != _MAGIC:
        raise DataError("not an enclave image file (EIF)", where=what, hint="`nitro-cli build-enclave` writes one")
    _, version, _, _, _, _, count, *table = _HEADER.unpack_from(eif)
    offsets, sizes, checksum = table[:32], table[32:64], table[65]
    if version not in _VERSIONS or count > len(offsets):
        raise DataError(f"the EIF is of version {version}, known are 3 and 4, or has too many sections", where=what)
    if zlib.crc32(eif[_HEADER.size :], zlib.crc32(eif[: _HEADER.size - 4])) != checksum:
        raise DataError("the EIF's checksum does not hold: the file was altered or is truncated", where=what)
    at = _HEADER.size
    for offset, size in zip(offsets[:count], sizes[:count], strict=True):
        start = at + _SECTION.size
        if offset != at or start + size > len(eif):
            raise DataError("the EIF's table of sections does not fit its contents", where=what)
        kind, _, stated = _SECTION.unpack_from(eif, at)
        if stated != size or not _KERNEL <= kind <= _METADATA:
            raise DataError("a section of the EIF is of unknown kind or wrong size", where=what)
        yield kind, eif[start : start + size]
        at = start + size
    if at != len(eif):
        raise DataError("the EIF has bytes behind its last section", where=what)
