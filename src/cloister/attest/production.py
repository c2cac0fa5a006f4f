"""What a job across machines refuses although the policy would let it pass.

A policy says what its owner accepts; two kinds of it protect nobody and are for one machine only: one that does not
check which program runs, and evidence of an attester that does not hide memory from its operator.
"""

from __future__ import annotations

import ipaddress

from cloister.attest.claims import Claims
from cloister.attest.policy import SIMULATED, AppraisalPolicy
from cloister.errors import JobError, VerificationError


def require_listed_measurements(policy: AppraisalPolicy, *, address: str, insecure_simulated: bool) -> None:
    """Refuse a policy that accepts any measurement, save for a simulation on this very machine.

    Args:
        address: HOST:PORT of the enclave.
    Raises: JobError.
    """
    simulated = insecure_simulated and set(policy.accept) == {SIMULATED}
    if policy.any_measurement and not (simulated and is_loopback(address)):
        raise JobError(
            'measurements = "any" does not check which program runs in the enclave',
            where="policy.measurements",
            hint="list the program in [[measurement]]; `cloister attest measure` computes its values,"
            " `cloister attest show` those of evidence at hand",
        )


def require_confidential(claims: Claims, *, allowed: bool) -> Claims:
    """Refuse an attester that hides nothing from its operator, unless the user has `allowed` it.

    Simulated evidence has a permission of its own, which `attest.verify.verify` has checked.

    Raises: VerificationError("confidential").
    """
    if not (claims.confidential or claims.type == SIMULATED or allowed):
        raise VerificationError(
            "confidential",
            f"evidence of type {claims.type} says what runs, but its operator can read all data",
            hint="use an enclave with encrypted memory; for a test, pass --insecure-not-confidential",
        )
    return claims


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
