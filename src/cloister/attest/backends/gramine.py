"""Collecting SGX quotes under Gramine: write the report data to one pseudo-file, read the quote from another.

Gramine shows /dev/attestation only inside the enclave, so nothing outside can answer here. Its quote comes without
collateral, which Intel's service publishes (`attest.attester.WithCollateral` adds it); a verifier refuses it without.

Source: Gramine documentation, "Attestation and Secret Provisioning", section "/dev/attestation pseudo-filesystem".
"""

from __future__ import annotations

from pathlib import Path

from cloister.attest.backends import dcap_quote
from cloister.attest.evidence import MAX_BLOB_BYTES, REPORT_DATA_BYTES, Evidence
from cloister.errors import RunError, VerificationError

TYPE = "sgx"
FOLDER = "dev/attestation"

_REPORT_DATA = slice(320, 384)
_MAX_TYPE_BYTES = 64


class GramineAttester:
    """Attests the enclave that this process runs in."""

    type = TYPE

    def __init__(self, root: Path = Path("/")) -> None:
        """Args: root: where /dev lies (tests)."""
        self._folder = root / FOLDER

    @classmethod
    def found(cls, root: Path = Path("/")) -> str | None:
        """The folder, if this process runs under Gramine with attestation; see `attest.attester.Backend`."""
        folder = root / FOLDER
        return str(folder) if (folder / "attestation_type").exists() else None

    def collect(self, report_data: bytes) -> Evidence:
        """See `attest.attester.Attester`.

        Raises: RunError if Gramine has no DCAP attestation or answers with something else than our quote.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
        kind = self._read("attestation_type", _MAX_TYPE_BYTES).strip(b"\0\n ").decode("ascii", "replace")
        if kind != "dcap":
            hint = 'set sgx.remote_attestation = "dcap" in the manifest'
            raise RunError(f"Gramine attests by {kind!r}, not by DCAP", where=str(self._folder), hint=hint)
        try:
            (self._folder / "user_report_data").write_bytes(report_data)
        except OSError as exc:
            raise self._unusable("user_report_data", exc) from exc
        quote = self._read("quote", MAX_BLOB_BYTES)
        self._check(quote, report_data)
        return Evidence(type=TYPE, blob=quote)

    def _check(self, quote: bytes, report_data: bytes) -> None:
        """The files are shared by the whole enclave: another thread may have written its own report data."""
        where = str(self._folder / "quote")
        try:
            parsed = dcap_quote.parse(quote)
        except VerificationError as exc:
            raise RunError(f"Gramine gave no SGX quote: {exc}", where=where) from exc
        if parsed.tee != TYPE or parsed.body[_REPORT_DATA] != report_data:
            raise RunError("the quote is not for our report data", where=where, hint="attest from one thread only")

    def _read(self, name: str, limit: int) -> bytes:
        try:
            with (self._folder / name).open("rb") as file:
                data = file.read(limit + 1)
        except OSError as exc:
            raise self._unusable(name, exc) from exc
        if len(data) > limit:
            raise RunError(f"longer than {limit} bytes", where=str(self._folder / name))
        return data

    def _unusable(self, name: str, exc: OSError) -> RunError:
        hint = "run inside an SGX enclave under Gramine whose manifest enables remote attestation"
        return RunError(f"cannot be used: {exc.strerror}", where=str(self._folder / name), hint=hint)
