"""Attacks on the evidence of GPUs, alone and with a machine's, against the verifier that sessions use.

The numbers are those of the attack list in docs/threat-model.md. The machine is a Nitro enclave of a test CA: any
machine does, what counts is that the GPUs' nonce derives from its report data.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import pytest

from cloister.attest.backends.nvml import WithGpus
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.roots import TrustRoots, vendor_roots
from cloister.attest.rules import GpuRules, RuleTables
from cloister.attest.verify import inspect, verify
from cloister.errors import RunError, VerificationError
from tests.attest_ca.ec_ca import certify
from tests.attest_ca.nitro_ca import NOW, REPORT_DATA, NitroCa
from tests.attest_ca.nvidia_ca import MEASUREMENTS, NONCE, OPAQUE, YEAR, Gpu, NvidiaCa, pack, restate, tcb_info
from tests.evidence import needs_evidence, sample

ALONE = AppraisalPolicy(accept=("nvidia-gpu",), any_measurement=True)
NVIDIA_NOW = 1_790_000_000


def policy(count: int = 1, **gpu: Any) -> AppraisalPolicy:
    rules = RuleTables(nvidia_gpu=GpuRules(count=count, **gpu))
    return AppraisalPolicy(accept=("nitro",), any_measurement=True, rules=rules)


@pytest.fixture(scope="module")
def aws() -> NitroCa:
    return NitroCa()


@pytest.fixture(scope="module")
def ca() -> NvidiaCa:
    return NvidiaCa()


@pytest.fixture(scope="module")
def roots(aws: NitroCa, ca: NvidiaCa) -> TrustRoots:
    return dataclasses.replace(aws.roots, nvidia=ca.root.certificate)


@pytest.fixture(scope="module")
def genuine() -> Evidence:
    return Evidence(type="nvidia-gpu", blob=sample("nvidia/hopper_gpu_evidence.json"))


def accepted(aws: NitroCa, roots: TrustRoots, *gpus: Evidence, under: AppraisalPolicy | None = None) -> Claims:
    evidence = dataclasses.replace(aws.evidence(), devices=gpus)
    return verify(evidence, under or policy(), REPORT_DATA, NOW + 5, roots=roots)


def refused(
    code: str, aws: NitroCa, roots: TrustRoots, *gpus: Evidence, under: AppraisalPolicy | None = None
) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        accepted(aws, roots, *gpus, under=under)
    assert caught.value.code == code, caught.value
    return caught.value


def nvidia_refuses(evidence: Evidence, now: float = NVIDIA_NOW, under: AppraisalPolicy = ALONE) -> str:
    """The code with which genuine evidence, changed, is refused under NVIDIA's own root."""
    with pytest.raises(VerificationError) as caught:
        inspect(evidence, under, None, now)
    return caught.value.code


def changed(evidence: Evidence, at: int, mask: int = 1) -> Evidence:
    blob = bytearray(evidence.blob)
    blob[at] ^= mask
    return dataclasses.replace(evidence, blob=bytes(blob))


def test_what_is_not_attacked_is_accepted(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    gpus = [ca.for_machine(REPORT_DATA), ca.for_machine(REPORT_DATA, ca.make_gpu())]
    claims = accepted(aws, roots, *gpus, under=policy(2))
    assert len({device["identity"] for device in claims.devices}) == 2
    assert {device["driver"] for device in claims.devices} == {"590.12"}
    assert len([w for w in claims.warnings if "revoked" in w]) == 1


# 12: devices and their machine ------------------------------------------------------------------------------------


def test_fewer_gpus_than_promised(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    one = ca.for_machine(REPORT_DATA)
    refused("devices", aws, roots, one, under=policy(2))
    refused("devices", aws, roots)


def test_gpus_that_the_policy_does_not_expect(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    refused("devices", aws, roots, ca.for_machine(REPORT_DATA), under=policy(0))


def test_the_same_gpu_twice(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    one = ca.for_machine(REPORT_DATA)
    refused("devices", aws, roots, one, one, under=policy(2))
    refused("devices", aws, roots, one, ca.for_machine(REPORT_DATA), under=policy(2))


def test_the_same_gpu_twice_with_another_firmware_key(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    """A GPU has a new signing key after an update: its burnt-in key tells that it is the same one."""
    updated = Gpu(device=ca.gpu.device, leaf=ca.issue(ca.gpu.device))
    gpus = [ca.for_machine(REPORT_DATA), ca.for_machine(REPORT_DATA, updated)]
    error = refused("devices", aws, roots, *gpus, under=policy(2))
    assert "more than once" in str(error)


def test_nonce_not_derived_from_the_machines_evidence(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    for gpu in (ca.evidence(), ca.for_machine(b"x" * 64), ca.evidence(nonce=REPORT_DATA[:32])):
        refused("devices", aws, roots, gpu)


def test_machines_evidence_missing(ca: NvidiaCa, roots: TrustRoots) -> None:
    """A session never takes a GPU for a machine, even if the policy names the type."""
    evidence = ca.for_machine(REPORT_DATA)
    for accept in (("nvidia-gpu",), ("nitro", "nvidia-gpu")):
        with pytest.raises(VerificationError) as caught:
            verify(evidence, dataclasses.replace(ALONE, accept=accept), REPORT_DATA, NOW, roots=roots)
        assert caught.value.code == "type"


def test_a_gpu_on_a_machine_that_is_refused(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    evidence = dataclasses.replace(aws.evidence(user_data=b"x" * 64), devices=(ca.for_machine(b"x" * 64),))
    with pytest.raises(VerificationError) as caught:
        verify(evidence, policy(), REPORT_DATA, NOW + 5, roots=roots)
    assert caught.value.code == "binding"


# 1 and 2: measurement and developer tools -------------------------------------------------------------------------


def listed(measurements: dict[int, bytes]) -> AppraisalPolicy:
    pcr0 = ReferenceValue(label="cloister", type="nitro", registers={"pcr0": b"\xa0" * 48})
    values = {f"measurement_{index}": value for index, value in measurements.items()}
    gpu = ReferenceValue(label="driver 590.12", type="nvidia-gpu", registers=values)
    return dataclasses.replace(policy(), any_measurement=False, reference_values=(pcr0, gpu))


def test_devtools_by_their_measurements(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    """With developer tools the driver's measurements are others than those of production."""
    assert accepted(aws, roots, ca.for_machine(REPORT_DATA), under=listed(MEASUREMENTS)).measurement_label == "cloister"
    devtools = ca.for_machine(REPORT_DATA, measurements={**MEASUREMENTS, 3: b"\xdd" * 48})
    refused("measurement", aws, roots, devtools, under=listed(MEASUREMENTS))
    without = ca.for_machine(REPORT_DATA, measurements={n: v for n, v in MEASUREMENTS.items() if n != 3})
    refused("measurement", aws, roots, without, under=listed(MEASUREMENTS))


def test_devtools_by_the_collector(aws: NitroCa) -> None:
    """The measured program refuses such a GPU before it asks for evidence."""
    from tests.unit.attest.test_nvml import FakeNvml

    class Machine:
        type = "nitro"

        def collect(self, report_data: bytes) -> Evidence:
            return aws.evidence(user_data=report_data)

    with pytest.raises(RunError, match="developer tools"):
        WithGpus(Machine(), nvml=FakeNvml(dev_tools=1)).collect(REPORT_DATA)


def test_firmware_that_the_hardware_did_not_certify(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    other = ca.for_machine(REPORT_DATA, opaque={**OPAQUE, 20: b"\xdd" * 48})
    refused("debug", aws, roots, other)


@pytest.mark.parametrize("extensions", [{}, {"2.23.133.5.4.1": b"\x05\x00"}, {"2.23.133.5.4.1": tcb_info(bytes(48))}])
def test_a_certificate_that_names_no_firmware(
    aws: NitroCa, ca: NvidiaCa, roots: TrustRoots, extensions: dict[str, bytes]
) -> None:
    gpu = ca.make_gpu(extensions=extensions)
    refused("debug", aws, roots, ca.for_machine(REPORT_DATA, gpu))


# 3: replay --------------------------------------------------------------------------------------------------------


def test_replayed_nonce(ca: NvidiaCa) -> None:
    with pytest.raises(VerificationError) as caught:
        inspect(ca.evidence(), ALONE, b"x" * 32, NOW, roots=ca.roots)
    assert caught.value.code == "binding"


def test_a_nonce_rewritten_around_the_report(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    fresh = ca.for_machine(REPORT_DATA)
    table = json.loads(fresh.blob)[0]
    old = json.loads(ca.evidence().blob)[0]
    refused("evidence-format", aws, roots, restate(fresh, evidence=old["evidence"]))
    refused("devices", aws, roots, restate(fresh, evidence=old["evidence"], nonce=old["nonce"]))
    report = bytearray(base64.b64decode(old["evidence"]))
    report[4:36] = bytes.fromhex(table["nonce"])
    refused("signature", aws, roots, restate(fresh, evidence=base64.b64encode(report).decode()))


# 5: time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [(-7200, -3600), (3600, 7200)])
def test_an_expired_or_not_yet_valid_chain(
    aws: NitroCa, ca: NvidiaCa, roots: TrustRoots, seconds: tuple[float, float]
) -> None:
    refused("expired", aws, roots, ca.for_machine(REPORT_DATA, ca.make_gpu(seconds=seconds)))
    device = certify("GH100 A01 GSP BROM", ca.family, now=NOW, seconds=seconds)
    gpu = Gpu(device=device, leaf=ca.issue(device, seconds=(-YEAR, YEAR)))
    refused("expired", aws, roots, ca.for_machine(REPORT_DATA, gpu))


@needs_evidence
def test_a_not_yet_valid_chain_genuine(genuine: Evidence) -> None:
    assert nvidia_refuses(genuine, now=1_600_000_000) == "expired"


# 7: roots ---------------------------------------------------------------------------------------------------------


def test_test_ca_under_production_roots(aws: NitroCa, ca: NvidiaCa) -> None:
    refused("chain", aws, dataclasses.replace(aws.roots), ca.for_machine(REPORT_DATA))
    with pytest.raises(VerificationError) as caught:
        inspect(ca.evidence(), ALONE, NONCE, NOW, roots=vendor_roots())
    assert caught.value.code == "chain"


def test_attacker_root_with_the_same_names(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    attacker = NvidiaCa()
    refused("chain", aws, roots, attacker.for_machine(REPORT_DATA))
    chain = [*attacker.chain(attacker.gpu)[:3], ca.root]
    refused("chain", aws, roots, attacker.for_machine(REPORT_DATA, chain=chain))


def test_another_vendors_root(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    """AWS's keys are on the same curve: what it certified is no GPU."""
    leaf = ca.issue(aws.machine)
    gpu = Gpu(device=aws.machine, leaf=leaf)
    chain = [leaf, aws.machine, aws.zone, aws.region, aws.root]
    refused("chain", aws, roots, ca.for_machine(REPORT_DATA, gpu, chain=chain))


def test_signed_by_another_gpu(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    refused("signature", aws, roots, ca.for_machine(REPORT_DATA, ca.make_gpu(), chain=ca.chain(ca.gpu)))


@needs_evidence
def test_the_genuine_report_under_another_root(ca: NvidiaCa, genuine: Evidence) -> None:
    with pytest.raises(VerificationError) as caught:
        inspect(genuine, ALONE, None, NVIDIA_NOW, roots=ca.roots)
    assert caught.value.code == "chain"


# 8: type confusion ------------------------------------------------------------------------------------------------


def test_a_switch_as_a_gpu(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    """NVIDIA's device root certifies NVSwitches, network cards and others."""
    for name in ("LS10 A01 FSP FMC LF", "GH100", "XGH100 A01 GSP FMC LF", "GA100 A01 GSP FMC LF"):
        refused("product", aws, roots, ca.for_machine(REPORT_DATA, ca.make_gpu(name=name)))


def test_an_architecture_that_the_policy_or_the_certificate_does_not_name(
    aws: NitroCa, ca: NvidiaCa, roots: TrustRoots
) -> None:
    hopper = ca.for_machine(REPORT_DATA)
    refused("product", aws, roots, hopper, under=policy(architectures=("blackwell",)))
    refused("product", aws, roots, ca.for_machine(REPORT_DATA, arch="BLACKWELL"))
    blackwell = ca.for_machine(REPORT_DATA, ca.make_gpu(name="GB100 A01 FSP FMC LF"), arch="BLACKWELL")
    assert accepted(aws, roots, blackwell).devices[0]["architecture"] == "blackwell"
    refused("product", aws, roots, blackwell, under=policy(architectures=("hopper",)))


def test_another_tag_on_the_envelope(aws: NitroCa, ca: NvidiaCa, roots: TrustRoots) -> None:
    gpu = ca.for_machine(REPORT_DATA)
    refused("devices", aws, roots, dataclasses.replace(gpu, type="nitro"))
    refused("devices", aws, roots, dataclasses.replace(gpu, type="simulated"))
    refused("evidence-format", aws, roots, dataclasses.replace(aws.evidence(), type="nvidia-gpu"))


# 9: malformed -----------------------------------------------------------------------------------------------------


@needs_evidence
def test_truncated_trailing_oversized(genuine: Evidence) -> None:
    for blob in (*(genuine.blob[:n] for n in range(0, 12_300, 331)), genuine.blob[:-1]):
        assert nvidia_refuses(dataclasses.replace(genuine, blob=blob)) == "evidence-format"
    for more in (b"x", b"\0", genuine.blob, b" " * 70_000):
        assert nvidia_refuses(dataclasses.replace(genuine, blob=genuine.blob + more)) == "evidence-format"


def test_something_behind_the_signature(ca: NvidiaCa) -> None:
    report = base64.b64decode(json.loads(ca.evidence().blob)[0]["evidence"])
    for wrong in (report + b"\0", report[:-1], report[:40], report[:36], b""):
        with pytest.raises(VerificationError) as caught:
            inspect(pack(wrong, ca.chain(ca.gpu)), ALONE, None, NOW, roots=ca.roots)
        assert caught.value.code == "evidence-format"


def test_every_byte_of_the_report_flipped(ca: NvidiaCa) -> None:
    report = base64.b64decode(json.loads(ca.evidence().blob)[0]["evidence"])
    survivors = []
    for at in range(len(report)):
        flipped = bytearray(report)
        flipped[at] ^= 1
        try:
            inspect(pack(bytes(flipped), ca.chain(ca.gpu)), ALONE, None, NOW, roots=ca.roots)
        except VerificationError:
            continue
        survivors.append(at)
    assert survivors == []


@needs_evidence
@pytest.mark.parametrize("mask", [0x01, 0x20])
def test_bytes_of_the_genuine_evidence_flipped(genuine: Evidence, mask: int) -> None:
    """Base64, PEM and JSON around the signed report have one form each (every 19th byte, to be quick)."""
    codes = set()
    for at in range(mask % 19, len(genuine.blob), 19):
        if not genuine.blob[at : at + 1].isspace():
            codes.add(nvidia_refuses(changed(genuine, at, mask)))
    assert codes <= {"evidence-format", "chain", "expired", "signature", "product"}
    assert {"evidence-format", "chain", "signature"} <= codes


@needs_evidence
def test_white_space_changes_nothing(genuine: Evidence) -> None:
    """Why that is harmless: everything that the verifier reads is the same, down to the device's identity."""
    compact = dataclasses.replace(genuine, blob=json.dumps(json.loads(genuine.blob)[0]).encode())
    assert compact.blob != genuine.blob
    first, second = (inspect(e, ALONE, None, NVIDIA_NOW) for e in (genuine, compact))
    assert first == second
