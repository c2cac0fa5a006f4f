"""What a job across machines refuses although a policy would let it pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloister.attest.backends.simulated import InsecureSimulatedAttester
from cloister.attest.claims import Claims
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.production import is_loopback, require_confidential, require_listed_measurements
from cloister.attest.verify import verify
from cloister.errors import JobError, VerificationError

MIXED = AppraisalPolicy(accept=("tdx", "simulated"), insecure_simulated=True, any_measurement=True)
ANY_SIMULATED = AppraisalPolicy.insecure_simulated_only()
LOCAL, REMOTE = "127.0.0.1:7443", "0.0.0.0:7443"


def claims(**changes: object) -> Claims:
    source = InsecureSimulatedAttester(measurement=bytes(32), clock=lambda: 1.0)
    found = verify(source.collect(bytes(64)), ANY_SIMULATED, bytes(64), 1.0, allow_simulated=True)
    return replace(found, **changes)  # type: ignore[arg-type]  # names of fields


@pytest.mark.parametrize(
    ("policy", "address", "insecure_simulated", "passes"),
    [
        (ANY_SIMULATED, LOCAL, True, True),
        (ANY_SIMULATED, LOCAL, False, False),
        (ANY_SIMULATED, REMOTE, True, False),
        (AppraisalPolicy(accept=("tdx",), any_measurement=True), LOCAL, True, False),
        (MIXED, LOCAL, True, False),
        (AppraisalPolicy(accept=("tdx",)), REMOTE, False, True),
        (AppraisalPolicy.insecure_simulated_only(bytes(32)), REMOTE, False, True),
    ],
)
def test_any_measurement_is_for_simulations_on_this_machine(
    policy: AppraisalPolicy, address: str, insecure_simulated: bool, passes: bool
) -> None:
    if passes:
        require_listed_measurements(policy, address=address, insecure_simulated=insecure_simulated)
        return
    with pytest.raises(JobError, match="which program runs") as refused:
        require_listed_measurements(policy, address=address, insecure_simulated=insecure_simulated)
    assert (refused.value.exit_code, "[[measurement]]" in refused.value.hint) == (2, True)


def test_an_operator_who_can_read_all_data_needs_permission() -> None:
    tpm = claims(type="tpm", hardware=True, confidential=False)
    with pytest.raises(VerificationError) as refused:
        require_confidential(tpm, allowed=False)
    assert refused.value.code == "confidential"
    assert require_confidential(tpm, allowed=True) is tpm
    assert require_confidential(claims(type="tdx", confidential=True), allowed=False).type == "tdx"
    assert require_confidential(claims(), allowed=False).type == "simulated"  # its own permission is checked before


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1:0", "127.1.2.3:1", "[::1]:7443", "localhost:1")))
    assert not any(map(is_loopback, ("0.0.0.0:1", "10.0.0.1:1", "localhost.example.org:1", "[::]:1", ":1", "")))
