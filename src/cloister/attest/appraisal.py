"""What a backend's verifier is given besides the evidence. It reads no clock, no file and no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cloister.attest.checks import Checks
from cloister.attest.claims import Report
from cloister.attest.evidence import Evidence
from cloister.attest.roots import TrustRoots
from cloister.attest.rules import RuleTables


@dataclass(frozen=True, kw_only=True)
class Appraisal:
    """One verification under way."""

    rules: RuleTables
    """The relying party's, by type."""
    roots: TrustRoots
    now: float
    """Seconds since 1970, from a clock that the relying party trusts."""
    any_measurement: bool = False
    """Whether the policy does not care which program runs; then it does not matter either how that one asked."""
    checks: Checks = field(default_factory=Checks)
    """Where the verifier records what it checked."""


Verifier = Callable[[Evidence, Appraisal], Report]
"""Pure: a genuine report, or VerificationError. Every step is recorded in `Appraisal.checks`."""
