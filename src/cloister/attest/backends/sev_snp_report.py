"""The layout of an SEV-SNP attestation report, versions 2 to 5: 1184 bytes, numbers little endian.

Guarantees: every byte that means nothing is zero, in the signed part and behind the signature, so that no byte can be
changed without notice. Left to the caller: signature, endorsement, and whether the values are acceptable.

Source: AMD, "SEV Secure Nested Paging Firmware ABI Specification" (56860) revision 1.58: table 3 (TCB_VERSION), table
10 (guest policy), table 23 (ATTESTATION_REPORT), table 139 (signature). Version 2 has no CPUID fields, 5 adds
mitigation vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cloister.errors import VerificationError

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0
VERSIONS = (2, 3, 4, 5)
ECDSA_P384_SHA384 = 1

# Guest policy.
_RESERVED_ONE, _POLICY_KNOWN = 1 << 17, (1 << 26) - 1
SMT_ALLOWED, MIGRATION_ALLOWED, DEBUG_ALLOWED, SINGLE_SOCKET = 1 << 16, 1 << 18, 1 << 19, 1 << 20
# Platform information.
SMT_ENABLED = 1 << 0
# Flags at 0x48: AUTHOR_KEY_EN, MASK_CHIP_KEY, SIGNING_KEY (three bits).
_AUTHOR_KEY, _MASK_CHIP_KEY, _FLAGS_KNOWN = 1 << 0, 1 << 1, (1 << 5) - 1
_SIGNING_KEYS = {0: "vcek", 1: "vlek"}

_COMPONENT_BYTES = 72
"""Of the signature's r and s; the rest of its 512 bytes is neither signed nor used."""


@dataclass(frozen=True, kw_only=True)
class Tcb:
    """Security versions of the parts that a guest has to trust, 0 to 255 each."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int = 0
    """Turin and later."""

    def is_at_least(self, other: Tcb) -> bool:
        """Whether no part is older than `other`'s."""
        return all(getattr(self, name) >= getattr(other, name) for name in _TCB_PARTS)

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in _TCB_PARTS if name != "fmc" or self.fmc)


_TCB_PARTS = ("fmc", "bootloader", "tee", "snp", "microcode")
_TCB_LAYOUTS = {
    "Milan": ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    "Genoa": ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    "Turin": ("fmc", "bootloader", "tee", "snp", None, None, None, "microcode"),
}


def parse_tcb(raw: bytes, product: str) -> Tcb:
    """Read a TCB_VERSION of 8 bytes. Raises: VerificationError "evidence-format"."""
    parts: dict[str, int] = {}
    for name, value in zip(_TCB_LAYOUTS[product], raw, strict=True):
        if name is not None:
            parts[name] = value
        elif value:
            raise VerificationError("evidence-format", f"a TCB version is not laid out as {product} does it")
    return Tcb(**parts)


@dataclass(frozen=True, kw_only=True)
class SnpReport:
    """A report as its bytes say, unverified."""

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    platform_info: int
    author_key: bool
    """Whether `author_key_digest` means anything."""
    signing_key: str
    """"vcek", "vlek" or what else it says."""
    chip_key_masked: bool
    """Whether the report is not signed at all."""
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id_ma: bytes
    """Report id of the migration agent; all ones if there is none."""
    cpu: tuple[int, int] | None
    """Family and model; None in version 2."""
    chip_id: bytes
    current_tcb: bytes
    reported_tcb: bytes
    committed_tcb: bytes
    launch_tcb: bytes
    current_firmware: tuple[int, int, int]
    """Major, minor, build."""
    committed_firmware: tuple[int, int, int]
    signed: bytes
    signature: bytes
    """DER, as `cryptography` wants it."""


def parse_report(blob: bytes) -> SnpReport:
    """Read a report. Raises: VerificationError "evidence-format"."""
    if len(blob) != REPORT_BYTES:
        message = f"an SEV-SNP report has {REPORT_BYTES} bytes, this one has {len(blob)}"
        raise VerificationError("evidence-format", message)
    version, flags, policy = _number(blob, 0, 4), _number(blob, 0x48, 4), _number(blob, 0x08, 8)
    if version not in VERSIONS:
        raise VerificationError("evidence-format", f"version {version} of SEV-SNP reports is not known here")
    if _number(blob, 0x34, 4) != ECDSA_P384_SHA384:
        raise VerificationError("evidence-format", "the report is not signed with ECDSA P-384 and SHA-384")
    _check_reserved(blob, version, flags, policy)
    key = flags >> 2 & 7
    return SnpReport(
        version=version,
        guest_svn=_number(blob, 0x04, 4),
        policy=policy,
        family_id=blob[0x10:0x20],
        image_id=blob[0x20:0x30],
        vmpl=_number(blob, 0x30, 4),
        platform_info=_number(blob, 0x40, 8),
        author_key=bool(flags & _AUTHOR_KEY),
        signing_key=_SIGNING_KEYS.get(key, f"key {key}"),
        chip_key_masked=bool(flags & _MASK_CHIP_KEY),
        report_data=blob[0x50:0x90],
        measurement=blob[0x90:0xC0],
        host_data=blob[0xC0:0xE0],
        id_key_digest=blob[0xE0:0x110],
        author_key_digest=blob[0x110:0x140],
        report_id_ma=blob[0x160:0x180],
        cpu=None if version == 2 else (blob[0x188], blob[0x189]),
        chip_id=blob[0x1A0:0x1E0],
        current_tcb=blob[0x38:0x40],
        reported_tcb=blob[0x180:0x188],
        committed_tcb=blob[0x1E0:0x1E8],
        launch_tcb=blob[0x1F0:0x1F8],
        current_firmware=(blob[0x1EA], blob[0x1E9], blob[0x1E8]),
        committed_firmware=(blob[0x1EE], blob[0x1ED], blob[0x1EC]),
        signed=blob[:SIGNED_BYTES],
        signature=encode_dss_signature(
            _number(blob, SIGNED_BYTES, _COMPONENT_BYTES),
            _number(blob, SIGNED_BYTES + _COMPONENT_BYTES, _COMPONENT_BYTES),
        ),
    )


def _number(blob: bytes, at: int, size: int) -> int:
    return int.from_bytes(blob[at : at + size], "little")


def _check_reserved(blob: bytes, version: int, flags: int, policy: int) -> None:
    """Bytes and bits without a meaning are zero, so that nobody can hide or change something there."""
    reserved = (
        ("at 0x4C", 0x4C, 0x50),
        ("after the reported TCB", 0x188 if version == 2 else 0x18B, 0x1A0),
        ("after the current version", 0x1EB, 0x1EC),
        ("after the committed version", 0x1EF, 0x1F0),
        ("before the signature", 0x208 if version == 5 else 0x1F8, SIGNED_BYTES),
        ("after the signature", SIGNED_BYTES + 2 * _COMPONENT_BYTES, REPORT_BYTES),
    )
    for where, start, end in reserved:
        if any(blob[start:end]):
            raise VerificationError("evidence-format", f"the report has bytes {where} that must be zero and are not")
    if flags & ~_FLAGS_KNOWN or policy & ~_POLICY_KNOWN or not policy & _RESERVED_ONE:
        raise VerificationError("evidence-format", "the report has flags whose meaning is not known here")
