"""The outputs of `cloister attest`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cloister.report.model import (
    Count,
    Part,
    Versioned,
)


class AttestCheck(Part):
    """One numbered step of a verification of evidence."""

    n: Annotated[int, Field(ge=1)]
    name: str
    passed: bool
    reason: str
    """What holds, or why it does not."""


class AttestVerifyReport(Versioned):
    """`cloister attest verify`: every step up to the end, or to the one that refused."""

    accepted: bool
    type: str
    """Of the evidence; empty where not even that could be read."""
    hardware: bool
    """It was accepted, and a hardware root of trust signed it."""
    checks: list[AttestCheck]
    claims: dict[str, Any]  # Any: JSON
    """What may be relied on, see `attest.claims.Claims`; empty if it was refused."""
    error_code: str | None
    """The code of the check that refused; null if it was accepted."""


class RegisterDiff(Part):
    """A register of a reference value beside that of the evidence, hex."""

    name: str
    expected: str
    found: str | None
    """null: the evidence has no such register."""
    equal: bool


class MeasurementDiff(Part):
    """A reference value of the policy, compared with evidence."""

    label: str
    type: str
    matches: bool
    registers: list[RegisterDiff]


class AttestShowReport(Versioned):
    """`cloister attest show`: what evidence says about itself. NOTHING in it was verified."""

    verified: Literal[False] = False
    path: str
    type: str
    report_data: str
    """Hex; what it is bound to."""
    registers: dict[str, str]
    """Measurements, hex."""
    details: dict[str, str]
    """What else it says, in words."""
    sizes: dict[str, Count]
    """Bytes of its parts."""
    devices: list[str] = Field(default_factory=list)
    """Types of the evidence of accelerators inside."""
    measurements: list[MeasurementDiff] = Field(default_factory=list)
    """The policy's, where one was given."""


class AttestCollectReport(Versioned):
    """`cloister attest collect`: evidence of this machine, written to a file."""

    path: str
    type: str
    attester: str
    """What was found here."""
    report_data: str
    """Hex; what the evidence is bound to."""
    bytes: Count


class AttestFetchReport(Versioned):
    """`cloister attest fetch`: a vendor's endorsements, written to a file."""

    path: str
    type: str
    """Of the evidence that they are for."""
    embedded: bool
    """The file is the evidence with the endorsements inside, not the endorsements alone."""
    sources: list[str]
    """Addresses that were asked, or the cache that had the answer."""
    bytes: Count


class AttestEnrolReport(Versioned):
    """`cloister attest enrol`: a TPM's attestation key that has completed credential activation."""

    attestation_key: str
    """Its TPM name, hex, for `attestation_keys` in [tpm] of a policy."""
    endorsement_key: str
    """SHA-256 of the endorsement key's public half, hex: compare it with what the machine's maker or owner says."""
    endorsed: bool
    """A manufacturer that was named vouches for the TPM."""
    tpm: str | None
    """Its address; none where its answer came in a file."""
    policy: str
    """The table for a policy file, TOML."""


class AttestEnrolStepReport(Versioned):
    """`cloister attest enrol request`, `challenge` and `answer`: a step of an enrolment across machines."""

    step: Literal["request", "challenge", "answer"]
    path: str
    """The file for the other machine."""
    next: str
    """What to do with it."""


class MeasureReport(Versioned):
    """`cloister attest measure`: reference values of an image."""

    image: str
    type: str
    """Of evidence."""
    label: str
    registers: dict[str, str]
    """What was computed: register name to hex."""
    missing: dict[str, str]
    """Registers that the image does not determine, with the reason. Without them the others prove nothing."""
    notes: list[str]
    """What the values assume."""
    table: str
    """The [[measurement]] table of a policy; it does not load while registers are missing."""
    policy: str
    """A whole policy with that table."""
