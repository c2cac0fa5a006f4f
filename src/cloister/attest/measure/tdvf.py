"""MRTD: what the TDX module measures of a trust domain's firmware before it runs.

Source: Intel TDX Module specification, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND (a 128-byte record with the name of the
operation and the guest-physical address; for MR.EXTEND followed by the 256 bytes at that address); Intel TDX Virtual
Firmware Design Guide, 11 (TDVF metadata); edk2 OvmfPkg, the table of GUIDs 32 bytes before the end of the firmware.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass

from cloister.errors import DataError

_TABLE_FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_METADATA_OFFSET = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
_BYTES_BEHIND_TABLE = 32
_ENTRY_BYTES = 18
"""Length (2 bytes, of the whole entry) and GUID at an entry's end."""
_DESCRIPTOR = struct.Struct("<4sIII")
_SECTION = struct.Struct("<IIQQII")
_PAGE = 4096
_CHUNK = 256
_MR_EXTEND, _PAGE_AUG = 1, 2
_MAX_SECTIONS = 64
_MAX_PAGES = 1 << 16
"""256 MiB of firmware memory; real metadata name under 20 MiB."""


@dataclass(frozen=True, kw_only=True)
class TdvfSection:
    """One range of memory that the host sets up before the firmware runs."""

    data_offset: int
    data_bytes: int
    address: int
    memory_bytes: int
    attributes: int


def mrtd(firmware: bytes, *, what: str, pages_first: bool = False) -> bytes:
    """The 48 bytes of MRTD.

    Args:
        pages_first: the host adds all pages of a section before it extends their contents, as hosts with Intel's early
            patches to QEMU 8 do; Linux 6.16 and later adds and extends page by page.
    Raises: DataError: the firmware holds no valid TDVF metadata.
    """
    digest = hashlib.sha384()
    for section in tdvf_sections(firmware, what=what):
        pages = range(0, section.memory_bytes, _PAGE)
        if pages_first:
            for page in pages:
                digest.update(_page_add(section, page))
            for page in pages:
                digest.update(_extend(firmware, section, page))
        else:
            for page in pages:
                digest.update(_page_add(section, page) + _extend(firmware, section, page))
    return digest.digest()


def _page_add(section: TdvfSection, page: int) -> bytes:
    if section.attributes & _PAGE_AUG:  # added after the build, so never measured
        return b""
    return _record(b"MEM.PAGE.ADD", section.address + page)


def _extend(firmware: bytes, section: TdvfSection, page: int) -> bytes:
    if not section.attributes & _MR_EXTEND:
        return b""
    start = section.data_offset + page
    content = firmware[start : start + _PAGE]
    return b"".join(
        _record(b"MR.EXTEND", section.address + page + at) + content[at : at + _CHUNK] for at in range(0, _PAGE, _CHUNK)
    )


def _record(name: bytes, address: int) -> bytes:
    return (name.ljust(16, b"\0") + address.to_bytes(8, "little")).ljust(128, b"\0")


def tdvf_sections(firmware: bytes, *, what: str) -> list[TdvfSection]:
    """The sections of the firmware's TDVF metadata, in order.

    Raises: DataError.
    """
    at = len(firmware) - _metadata_distance(firmware, what)
    try:
        signature, _, version, count = _DESCRIPTOR.unpack_from(firmware, at)
        if signature != b"TDVF" or version != 1 or count > _MAX_SECTIONS:
            raise DataError("the firmware's TDVF metadata are of an unknown form", where=what)
        entries = [_SECTION.unpack_from(firmware, at + _DESCRIPTOR.size + _SECTION.size * i) for i in range(count)]
    except struct.error as exc:
        raise DataError("the firmware's TDVF metadata lie outside of it", where=what) from exc
    sections = [
        TdvfSection(data_offset=offset, data_bytes=size, address=address, memory_bytes=memory, attributes=attributes)
        for offset, size, address, memory, _, attributes in entries
    ]
    for section in sections:
        _check(section, len(firmware), what)
    if sum(section.memory_bytes for section in sections) > _MAX_PAGES * _PAGE:
        raise DataError("the firmware's TDVF metadata name too much memory", where=what)
    return sections


def _check(section: TdvfSection, firmware_bytes: int, what: str) -> None:
    if section.address % _PAGE or section.memory_bytes % _PAGE or section.address + section.memory_bytes > 1 << 52:
        raise DataError("a TDVF section is not made of whole pages", where=what)
    if section.data_bytes > section.memory_bytes or section.data_offset + section.data_bytes > firmware_bytes:
        raise DataError("a TDVF section's contents do not fit", where=what)
    if section.attributes & _MR_EXTEND and section.data_bytes != section.memory_bytes:
        raise DataError("a measured TDVF section is not stored as a whole", where=what)
    if section.attributes & ~(_MR_EXTEND | _PAGE_AUG):
        raise DataError("a TDVF section has attributes that are not known here", where=what)


def _metadata_distance(firmware: bytes, what: str) -> int:
    """How many bytes before the firmware's end its TDVF metadata begin."""
    end = len(firmware) - _BYTES_BEHIND_TABLE
    hint = "give the OVMF or TDVF file that the machine boots, variables included (OVMF.fd, not OVMF_CODE.fd alone)"
    if end < _ENTRY_BYTES or firmware[end - 16 : end] != _TABLE_FOOTER:
        raise DataError("not an OVMF firmware: its table of GUIDs is missing", where=what, hint=hint)
    start = end - int.from_bytes(firmware[end - 18 : end - 16], "little")
    at = end - _ENTRY_BYTES
    while at - _ENTRY_BYTES >= max(start, 0):
        size = int.from_bytes(firmware[at - 18 : at - 16], "little")
        if size < _ENTRY_BYTES or at - size < 0:
            break
        if firmware[at - 16 : at] == _METADATA_OFFSET and size == _ENTRY_BYTES + 4:
            distance = int.from_bytes(firmware[at - size : at - _ENTRY_BYTES], "little")
            if distance > len(firmware):
                raise DataError("the firmware's TDVF metadata lie outside of it", where=what)
            return distance
        at -= size
    raise DataError("the firmware holds no TDVF metadata: it was not built for TDX", where=what, hint=hint)
