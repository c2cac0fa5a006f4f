"""Verified claims as reports show them."""

from __future__ import annotations

from cloister.attest.claims import Claims
from cloister.report.model import Attestation


def attestation_of(claims: Claims) -> Attestation:
    """The claims as reports show them."""
    return Attestation(
        type=claims.type,
        hardware=claims.hardware,
        confidential=claims.confidential,
        measurement=" ".join(f"{name}={value}" for name, value in sorted(claims.registers.items())),
        policy_sha256=claims.policy_sha256,
        devices=[dict(device) for device in claims.devices],
        warnings=list(claims.warnings),
    )
