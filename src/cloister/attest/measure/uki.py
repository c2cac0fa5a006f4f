"""Unified kernel images: one EFI program that holds stub, kernel, initrd and kernel command line.

Source: UAPI Group specification "Unified Kernel Image"; systemd-stub(7); systemd `src/fundamental/uki.h`, whose
enumeration is the order in which the stub measures sections.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cloister.attest.measure.pe import PeImage, parse_pe
from cloister.errors import DataError

_ORDER = (
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrsig", ".pcrpkey",
    ".profile", ".dtbauto", ".hwids", ".efifw",
)  # fmt: skip
_NOT_MEASURED = ".pcrsig"
"""Holds signatures over the expected value, so it cannot be part of it."""
_NOT_IN_252 = frozenset((".ucode", ".uname", ".sbat", ".profile", ".dtbauto", ".hwids", ".efifw"))
_STUB = re.compile(rb"#### LoaderInfo: systemd-stub (\d+)")

CALLS_KERNEL_DIRECTLY = 258
"""From this version on systemd-stub starts the kernel without the firmware's LoadImage (systemd pull request 37372), so
that the firmware does not measure it a second time."""


@dataclass(frozen=True, kw_only=True)
class Uki:
    """A parsed unified kernel image."""

    pe: PeImage
    sections: dict[str, bytes]
    """By name, as they lie in memory."""
    stub_version: int | None
    """systemd-stub's; None for another stub."""

    def measured(self) -> list[tuple[str, bytes]]:
        """The sections that the stub measures, in its order.

        Raises: DataError for versions whose list of sections is not known.
        """
        if self.stub_version is not None and (self.stub_version < 252 or self.stub_version == 253):
            hint = "build it with systemd-stub 254 or later"
            raise DataError(f"what systemd-stub {self.stub_version} measures is not known here", hint=hint)
        skipped = {_NOT_MEASURED} | (_NOT_IN_252 if self.stub_version == 252 else set())
        return [(name, self.sections[name]) for name in _ORDER if name in self.sections and name not in skipped]

    @property
    def kernel(self) -> bytes:
        """The kernel, itself a PE file."""
        return self.sections[".linux"]

    @property
    def initrd(self) -> bytes:
        """The initrd; empty where there is none."""
        return self.sections.get(".initrd", b"")

    def command_line(self) -> str:
        """The kernel's command line.

        Raises: DataError if there is none, or the stub would change it before passing it on.
        """
        raw = self.sections.get(".cmdline", b"")
        text = raw.decode("ascii", errors="replace")
        if not text or text != text.strip() or not text.isprintable() or not text.isascii():
            hint = "write it on one line of printable ASCII, without blanks, newline or NUL at its ends"
            raise DataError("the image's kernel command line is missing or not plain", where=".cmdline", hint=hint)
        return text


def parse_uki(data: bytes, *, what: str) -> Uki:
    """Parse a unified kernel image.

    Raises: DataError: it is not a PE file, or holds no kernel, or holds several profiles.
    """
    pe = parse_pe(data, what=what)
    sections: dict[str, bytes] = {}
    for section in pe.sections:
        if section.name in sections and section.name in _ORDER:
            hint = "an image with several profiles has several measurements; build one image for each"
            raise DataError(f"the image holds several sections {section.name}", where=what, hint=hint)
        sections[section.name] = pe.content(section)
    if ".linux" not in sections:
        hint = "deploy/image says how to build one"
        raise DataError("not a unified kernel image: there is no section .linux", where=what, hint=hint)
    found = _STUB.search(sections.get(".sdmagic", b""))
    return Uki(pe=pe, sections=sections, stub_version=int(found[1]) if found else None)
