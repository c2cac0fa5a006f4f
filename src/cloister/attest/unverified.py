"""What evidence says about itself, read without verifying anything: for `cloister attest show`, never for a decision.

Whoever hands over evidence can make it say anything. `attest.verify` is what believes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from cloister.attest.backends import azure_vtpm, dcap_quote, nitro_document, nvidia_report, simulated, tpm
from cloister.attest.backends.sev_snp_report import DEBUG_ALLOWED, parse_report
from cloister.attest.backends.tpm_quote import Cursor, parse_public
from cloister.attest.evidence import Evidence
from cloister.errors import VerificationError


@dataclass(frozen=True, kw_only=True)
class Said:
    """The evidence's own words. UNVERIFIED."""

    report_data: bytes
    registers: Mapping[str, bytes]
    """By the names that a policy uses."""
    details: Mapping[str, str] = field(default_factory=dict)


def describe(evidence: Evidence) -> Said:
    """Read evidence of any known type.

    Raises: VerificationError: "evidence-format" if it is malformed, "type" if its type is not known here.
    """
    if evidence.type not in _READERS:
        hint = f"known are {', '.join(_READERS)}"
        raise VerificationError("type", f"evidence of type {evidence.type!r} is not known here", hint=hint)
    return _READERS[evidence.type](evidence)


# (offset, size) in the report body; Intel TDX Module ABI, TDREPORT, and Intel SDM vol. 3D, REPORT.
_TDX = {
    "mr_seam": (16, 48), "td_attributes": (120, 8), "mr_td": (136, 48), "mr_config_id": (184, 48),
    "mr_owner": (232, 48), "mr_owner_config": (280, 48),
    "rtmr0": (328, 48), "rtmr1": (376, 48), "rtmr2": (424, 48), "rtmr3": (472, 48),
}  # fmt: skip
_TDX_REPORT_DATA, _SGX_REPORT_DATA = slice(520, 584), slice(320, 384)
_SGX = {"mr_enclave": (64, 32), "mr_signer": (128, 32), "config_id": (192, 64), "isv_prod_id": (256, 2)}
_TDX_DEBUG, _SGX_DEBUG = 0x01, 0x02
"""In the first byte of the attributes."""


def _tdx(evidence: Evidence) -> Said:
    quote = dcap_quote.parse(evidence.blob)
    _expect(quote.tee, "tdx")
    return Said(
        report_data=quote.body[_TDX_REPORT_DATA],
        registers={name: quote.body[at : at + size] for name, (at, size) in _TDX.items()},
        details={"quote version": str(quote.version), "debug": _on(quote.body[120] & _TDX_DEBUG)},
    )


def _sgx(evidence: Evidence) -> Said:
    quote = dcap_quote.parse(evidence.blob)
    _expect(quote.tee, "sgx")
    svn = int.from_bytes(quote.body[258:260], "little")
    return Said(
        report_data=quote.body[_SGX_REPORT_DATA],
        registers={name: quote.body[at : at + size] for name, (at, size) in _SGX.items()},
        details={"security version": str(svn), "debug": _on(quote.body[48] & _SGX_DEBUG)},
    )


def _snp(evidence: Evidence) -> Said:
    report = parse_report(evidence.blob)
    names = ("measurement", "host_data", "id_key_digest", "author_key_digest", "family_id", "image_id")
    return Said(
        report_data=report.report_data,
        registers={name: getattr(report, name) for name in names},
        details={
            "report version": str(report.version),
            "signed with": report.signing_key.upper(),
            "chip": report.chip_id.hex(),
            "privilege level": f"VMPL {report.vmpl}",
            "debug": _on(report.policy & DEBUG_ALLOWED),
        },
    )


def _nitro(evidence: Evidence) -> Said:
    document = nitro_document.parse(evidence.blob)
    made = datetime.fromtimestamp(document.timestamp_ms / 1000, UTC)
    debug = any(document.pcrs[index] == bytes(nitro_document.PCR_BYTES) for index in range(3))
    return Said(
        report_data=document.user_data,
        registers={f"pcr{index}": value for index, value in document.pcrs.items()},
        details={"module": document.module_id, "made": f"{made:%F %T} UTC", "debug": _on(debug)},
    )


def _tpm(evidence: Evidence) -> Said:
    parts = tpm.unpack(evidence.blob)
    return Said(
        report_data=_extra_data(parts.attest),
        registers={f"pcr{index}": value for index, value in parts.pcrs.items()},
        details={"attestation key": parse_public(parts.public).name.hex()},
    )


def _azure_vtpm(evidence: Evidence) -> Said:
    parts = azure_vtpm.parse(evidence)
    names = ("measurement", "host_data", "id_key_digest", "author_key_digest", "family_id", "image_id")
    registers = {f"pcr{index}": value for index, value in parts.pcrs.items()}
    return Said(
        report_data=_extra_data(parts.attest),
        registers=registers | {f"snp_{name}": getattr(parts.snp, name) for name in names},
        details={"chip": parts.snp.chip_id.hex(), "debug": _on(parts.snp.policy & DEBUG_ALLOWED)},
    )


def _gpu(evidence: Evidence) -> Said:
    report = nvidia_report.parse(evidence.blob)
    return Said(
        report_data=report.nonce,
        registers={f"measurement_{index}": value for index, value in sorted(report.measurements.items())},
        details={"driver": report.driver, "VBIOS": report.vbios, "mode": report.mode, **report.stated},
    )


def _extra_data(attest: bytes) -> bytes:
    """Of a TPMS_ATTEST: behind its magic number, its type and the qualified signer (TPM 2.0 Library, Part 2)."""
    cursor = Cursor(attest, "the quote")
    cursor.take(6)
    cursor.sized(68)
    return cursor.sized(66)


def _simulated(evidence: Evidence) -> Said:
    report = simulated.read(evidence)
    return Said(report_data=report.report_data, registers=report.registers, details={"note": simulated.WARNING})


def _expect(found: str, expected: str) -> None:
    if found != expected:
        raise VerificationError("evidence-format", f"the quote is of {found}, its envelope says {expected}")


def _on(value: int) -> str:
    return "ON" if value else "off"


_READERS: Mapping[str, Callable[[Evidence], Said]] = MappingProxyType(
    {
        "tdx": _tdx,
        "sgx": _sgx,
        "sev-snp": _snp,
        "nitro": _nitro,
        "tpm": _tpm,
        "azure-vtpm": _azure_vtpm,
        "nvidia-gpu": _gpu,
        "simulated": _simulated,
    }
)
