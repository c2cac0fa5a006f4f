"""Collecting TDX quotes and SEV-SNP reports from Linux (6.7 and later): configfs-tsm, one interface for both.

Each request makes an entry of its own and removes it again, whatever happens. The kernel counts the writes to an
entry: a number that has grown by anything else than our one write means that somebody else wrote to it, and that the
report may be about their data. SEV-SNP hosts may hand out the certificate of the chip with the report; where they do
not, and for TDX always, endorsements come from elsewhere (`attest.attester.WithCollateral`).

Source: Linux, Documentation/ABI/testing/configfs-tsm-report.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloister.attest.backends import dcap_quote
from cloister.attest.backends.sev_snp_certs import pack_collateral, parse_certificate_table
from cloister.attest.backends.sev_snp_report import parse_report
from cloister.attest.evidence import MAX_BLOB_BYTES, REPORT_DATA_BYTES, Evidence
from cloister.errors import RunError, VerificationError

FOLDER = "sys/kernel/config/tsm/report"

_TYPES = {"tdx_guest": "tdx", "sev_guest": "sev-snp"}
"""By what the kernel calls its provider."""
_MAX_TEXT_BYTES = 64
_TDX_REPORT_DATA = slice(520, 584)


class TsmAttester:
    """Attests the confidential virtual machine that this process runs in."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Args: root: where /sys lies (tests)."""
        self._folder = root / FOLDER
        self._type: str | None = None

    @classmethod
    def found(cls, root: Path = Path("/")) -> str | None:
        """The folder, if this kernel has the interface; see `attest.attester.Backend`."""
        folder = root / FOLDER
        return str(folder) if folder.is_dir() else None

    @property
    def type(self) -> str:
        """ "tdx" or "sev-snp". Raises: RunError for a machine that is neither, or where an entry cannot be made."""
        if self._type is None:
            with self._entry() as entry:
                self._type = self._read_type(entry)
        return self._type

    def collect(self, report_data: bytes) -> Evidence:
        """See `attest.attester.Attester`. Raises: RunError if the kernel gives no report about our data."""
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
        with self._entry() as entry:
            before = self._read_generation(entry)
            self._write(entry / "inblob", report_data)
            report = self._read(entry / "outblob", MAX_BLOB_BYTES)
            # Only SEV-SNP has it, and there it is empty if the host hands out no certificates.
            table = self._read(entry / "auxblob", MAX_BLOB_BYTES) if (entry / "auxblob").exists() else b""
            kind, after = self._read_type(entry), self._read_generation(entry)
        if after != before + 1:
            hint = "no other program may use this entry; try again"
            raise RunError("somebody else wrote to our request for a report", where=str(entry), hint=hint)
        collateral = b""
        try:
            if kind == "sev-snp":
                found, signing_key = _snp_facts(report)
                collateral = _pick_certificate(table, signing_key)
            else:
                found = dcap_quote.parse(report).body[_TDX_REPORT_DATA]
        except VerificationError as exc:
            raise RunError(f"the kernel gave no usable {kind} report: {exc}", where=str(entry)) from exc
        if found != report_data:
            raise RunError("the kernel's report is not about our data", where=str(entry))
        return Evidence(type=kind, blob=report, collateral=collateral)

    @contextmanager
    def _entry(self) -> Iterator[Path]:
        """A request of our own; the kernel fills the folder with files as soon as it is made."""
        entry = self._folder / f"cloister-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            entry.mkdir(mode=0o700)
        except OSError as exc:
            raise _unusable(entry, exc) from exc
        try:
            yield entry
        finally:
            try:
                entry.rmdir()
            except OSError as exc:
                raise _unusable(entry, exc) from exc

    def _read_type(self, entry: Path) -> str:
        provider = self._read(entry / "provider", _MAX_TEXT_BYTES).strip().decode("ascii", "replace")
        if provider not in _TYPES:
            raise RunError(f"machines of the kind {provider!r} are not known here", where=str(entry))
        return _TYPES[provider]

    def _read_generation(self, entry: Path) -> int:
        text = self._read(entry / "generation", _MAX_TEXT_BYTES).strip()
        if not text.isdigit():
            raise RunError("the kernel's count of writes is no number", where=str(entry))
        return int(text)

    def _write(self, path: Path, data: bytes) -> None:
        """In one write: the kernel takes two as two requests."""
        try:
            file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                written = os.write(file, data)
            finally:
                os.close(file)  # this is when the kernel takes it
        except OSError as exc:
            raise _unusable(path, exc) from exc
        if written != len(data):
            raise RunError(f"the kernel took {written} of {len(data)} bytes", where=str(path))

    def _read(self, path: Path, limit: int) -> bytes:
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as exc:
            raise _unusable(path, exc) from exc
        if len(data) > limit:
            raise RunError(f"longer than {limit} bytes", where=str(path))
        return data


def _snp_facts(report: bytes) -> tuple[bytes, str]:
    """Report data, and which kind of key signed."""
    parsed = parse_report(report)
    return parsed.report_data, parsed.signing_key


def _pick_certificate(table: bytes, signing_key: str) -> bytes:
    """Collateral from the host's table: the certificate of the key that signed, and the revocation list if any."""
    found = parse_certificate_table(table)
    if signing_key not in found:
        return b""
    return pack_collateral(leaf=found[signing_key], crl=found.get("crl", b""))


def _unusable(path: Path, exc: OSError) -> RunError:
    hint = "run as root inside a TDX or SEV-SNP guest with Linux 6.7 or later, and mount configfs"
    return RunError(f"cannot be used: {exc.strerror}", where=str(path), hint=hint)
