"""What verification yields: first a genuine report, then, once the policy accepts it, claims to rely on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Report:
    """A genuine report: really made by an attester of this type. Nobody has accepted it yet."""

    type: str
    report_data: bytes
    """What the attester was asked to sign: 64 bytes, or their SHA-256 where 64 do not fit (see `binding.is_bound`)."""
    registers: Mapping[str, bytes]
    """Measurements by register name."""
    hardware: bool
    """Whether a hardware root of trust signed it."""
    confidential: bool
    """Whether memory is hidden from the machine's operator."""
    issued_at: int | None = None
    """Seconds since 1970, where the evidence states it under its signature."""
    tcb: Mapping[str, str] = field(default_factory=dict)
    """Firmware and microcode versions, status, advisories, identity of the device."""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "registers", MappingProxyType(dict(self.registers)))
        object.__setattr__(self, "tcb", MappingProxyType(dict(self.tcb)))


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What is known about a peer after its evidence was verified and the policy accepted it.

    Only `attest.verify.verify` makes them.
    """

    type: str
    hardware: bool
    confidential: bool
    registers: Mapping[str, str]
    """Measurements by register name, hex."""
    measurement_label: str | None
    """The label of the policy's reference value that matched; None where the policy takes any measurement."""
    report_data: str
    """Hex; what the evidence is bound to."""
    issued_at: int | None
    verified_at: int
    """Seconds since 1970 by the verifier's clock."""
    policy_sha256: str
    tcb: Mapping[str, str]
    warnings: tuple[str, ...]
    devices: tuple[Mapping[str, str], ...] = ()
    """Type, identity, firmware and driver of each accelerator that attested together with this machine."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for reports and receipts."""
        return {
            "type": self.type,
            "hardware": self.hardware,
            "confidential": self.confidential,
            "registers": dict(self.registers),
            "measurement_label": self.measurement_label,
            "report_data": self.report_data,
            "issued_at": self.issued_at,
            "verified_at": self.verified_at,
            "policy_sha256": self.policy_sha256,
            "tcb": dict(self.tcb),
            "warnings": list(self.warnings),
            "devices": [dict(device) for device in self.devices],
        }
