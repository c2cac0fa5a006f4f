"""Attacks on SEV-SNP evidence, against the verifier that sessions use: genuine reports of AMD, and a test CA's.

Numbers in names are the kinds of attack: 1 measurement, 2 debug, 3 binding, 4 firmware, 5 time, 6 revocation, 7 roots,
8 confusion, 9 malformed, 11 what a good signature does not say, 15 policy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attest.backends.sev_snp_certs import pack_collateral
from cloister.attest.binding import session_report_data
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.roots import AmdChain, vendor_roots
from cloister.attest.rules import RuleTables, SnpRules, SnpTcb
from cloister.attest.verify import verify
from cloister.errors import VerificationError
from tests.attest_ca.snp_ca import (
    CHIP_IDS,
    CPUS,
    NOW,
    POLICY,
    REPORT_DATA,
    TCB,
    SnpCa,
    amd_name,
    attacker_key,
    pack_tcb,
)  # fmt: skip
from tests.evidence import needs_evidence, sample

LISTED = (
    ReferenceValue(
        label="cloister", type="sev-snp", registers={"measurement": b"\xa1" * 48, "host_data": b"\xb2" * 32}
    ),
)
POLICY_OF_PARTY = AppraisalPolicy(accept=("sev-snp",), reference_values=LISTED)
ANY = AppraisalPolicy(accept=("sev-snp",), any_measurement=True)
MILAN_AT = 1_700_000_000
DAY = 86_400


@pytest.fixture(scope="module")
def ca() -> SnpCa:
    return SnpCa("Milan")


@pytest.fixture(scope="module")
def turin() -> SnpCa:
    return SnpCa("Turin")


def accepted(ca: SnpCa, evidence: Evidence, **options: Any) -> Claims:
    given: dict[str, Any] = {"policy": POLICY_OF_PARTY, "now": NOW, "roots": ca.roots, "report_data": REPORT_DATA}
    given |= options
    return verify(evidence, given["policy"], given["report_data"], given["now"], roots=given["roots"])


def refused(code: str, ca: SnpCa, evidence: Evidence, **options: Any) -> None:
    with pytest.raises(VerificationError) as caught:
        accepted(ca, evidence, **options)
    assert caught.value.code == code, caught.value


def genuine(report: str = "milan_report", leaf: str = "milan_vcek") -> Evidence:
    blob, certificate = sample(f"snp/{report}.bin"), sample(f"snp/{leaf}.der")
    return Evidence(type="sev-snp", blob=blob, collateral=pack_collateral(leaf=certificate))


def refused_by_amd(code: str, evidence: Evidence, now: float = MILAN_AT) -> None:
    """With the vendors' roots, and the report data that are in the report."""
    with pytest.raises(VerificationError) as caught:
        verify(evidence, ANY, evidence.blob[0x50:0x90].ljust(64, b"\0"), now)
    assert caught.value.code == code, caught.value


@needs_evidence
def test_the_genuine_report_that_is_attacked_below_is_accepted(ca: SnpCa) -> None:
    evidence = genuine()
    assert verify(evidence, ANY, evidence.blob[0x50:0x90], MILAN_AT).hardware
    assert accepted(ca, ca.evidence()).measurement_label == "cloister"


# 1. Wrong measurement


@pytest.mark.parametrize("at", [0x90, 0xBF, 0xC0, 0xDF])
def test_1_another_measurement_or_host_data(ca: SnpCa, at: int) -> None:
    refused("measurement", ca, ca.evidence(ca.body(patches={at: b"\x66"})))


# 2. Debug


def test_2_debug_guest(ca: SnpCa) -> None:
    refused("debug", ca, ca.evidence(ca.body(policy=POLICY | 1 << 19)))


@needs_evidence
def test_2_debug_guest_on_genuine_hardware() -> None:
    refused_by_amd("debug", genuine("milan_debug_report", "milan_debug_vcek"))


# 3. Replay, relay, reflection


@pytest.mark.parametrize("role", ["party", "enclave"])
@pytest.mark.parametrize("job_id", ["job", "other"])
@pytest.mark.parametrize("transcript", [b"this", b"other"])
def test_3_evidence_of_another_session_role_or_job(ca: SnpCa, role: Any, job_id: str, transcript: bytes) -> None:
    ours = session_report_data(role="enclave", job_id="job", transcript=b"this")
    bound = session_report_data(role=role, job_id=job_id, transcript=transcript)
    evidence = ca.evidence(ca.body(patches={0x50: bound}))
    if bound == ours:
        accepted(ca, evidence, report_data=ours)
    else:
        refused("binding", ca, evidence, report_data=ours)


def test_3_evidence_bound_to_nothing(ca: SnpCa) -> None:
    refused("binding", ca, ca.evidence(ca.body(patches={0x50: bytes(64)})))


# 4. TCB


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode"])
def test_4_certificate_for_other_firmware_than_reported(ca: SnpCa, part: str) -> None:
    for value in (TCB[part] - 1, TCB[part] + 1):
        refused("tcb", ca, ca.evidence(leaf=ca.issue("vcek", tcb=TCB | {part: value})))
        refused("tcb", ca, ca.evidence(ca.body(key=1), ca.issue("vlek", tcb=TCB | {part: value})))


@pytest.mark.parametrize("at", [0x38, 0x39, 0x3E, 0x3F])
def test_4_firmware_that_runs_is_older_than_what_is_reported(ca: SnpCa, at: int) -> None:
    older = ca.body()[at] - 1
    refused("tcb", ca, ca.evidence(ca.body(patches={at: bytes([older])})))


@pytest.mark.parametrize("at", [0x1E0, 0x1E1, 0x1E6, 0x1E7])
def test_4_firmware_that_runs_is_older_than_what_is_committed(ca: SnpCa, at: int) -> None:
    newer = ca.body()[at] + 1
    refused("tcb", ca, ca.evidence(ca.body(patches={at: bytes([newer])})))


@pytest.mark.parametrize("at", [0x1EC, 0x1ED, 0x1EE])
def test_4_firmware_version_below_the_committed_one(ca: SnpCa, at: int) -> None:
    newer = ca.body()[at] + 1
    refused("tcb", ca, ca.evidence(ca.body(patches={at: bytes([newer])})))


def test_4_firmware_below_the_policys_minimum(ca: SnpCa) -> None:
    def with_minimum(snp: int) -> AppraisalPolicy:
        rules = RuleTables(sev_snp=SnpRules(min_tcb=SnpTcb(snp=snp)))
        return dataclasses.replace(POLICY_OF_PARTY, rules=rules)

    accepted(ca, ca.evidence(), policy=with_minimum(TCB["snp"]))
    refused("tcb", ca, ca.evidence(), policy=with_minimum(TCB["snp"] + 1))


# 5. Time


@pytest.mark.parametrize("kind", ["vcek", "vlek"])
@pytest.mark.parametrize("days", [(-30, -1), (1, 30)])
def test_5_leaf_expired_or_not_yet_valid(ca: SnpCa, kind: str, days: tuple[int, int]) -> None:
    body = ca.body(key=int(kind == "vlek"))
    refused("expired", ca, ca.evidence(body, ca.issue(kind, days=days)))


@pytest.mark.parametrize("days", [(-30, -1), (1, 30)])
def test_5_revocation_list_expired_or_not_yet_valid(ca: SnpCa, days: tuple[int, int]) -> None:
    refused("expired", ca, ca.evidence(crl=ca.crl(days=days)))


def test_5_clock_rolled_back_or_far_ahead(ca: SnpCa) -> None:
    leaf = ca.issue("vcek", days=(-4000, 9000))  # so that only the intermediate and the root are out of time
    accepted(ca, ca.evidence(leaf=leaf))
    for now in (0, NOW - 3001 * DAY, NOW + 6001 * DAY):
        refused("expired", ca, ca.evidence(leaf=leaf), now=now)


@needs_evidence
def test_5_genuine_providers_certificate_after_its_year() -> None:
    refused_by_amd("expired", genuine("aws_vlek_report", "aws_vlek"), now=1_765_404_862)


# 6. Revocation


@pytest.mark.parametrize("revoked", ["ark", "ask"])
def test_6_revoked_root_or_intermediate(ca: SnpCa, revoked: str) -> None:
    serial = {"ark": ca.ark, "ask": ca.ask}[revoked].serial_number
    refused("revoked", ca, ca.evidence(crl=ca.crl([1, serial])))


def test_6_revoked_intermediate_of_providers(ca: SnpCa) -> None:
    crl = ca.crl([ca.asvk.serial_number])
    refused("revoked", ca, ca.evidence(ca.body(key=1), ca.vlek, crl))
    accepted(ca, ca.evidence(crl=crl))


def test_6_revoked_leaf(ca: SnpCa) -> None:
    leaf = ca.issue("vcek", serial=77)
    accepted(ca, ca.evidence(leaf=leaf, crl=ca.crl([78])))
    refused("revoked", ca, ca.evidence(leaf=leaf, crl=ca.crl([77])))


def test_6_revocation_list_of_somebody_else(ca: SnpCa) -> None:
    for crl in (ca.crl(key=attacker_key()), ca.crl(issuer=amd_name("ARK-Genoa")), ca.crl(key=ca.ask_key)):
        refused("collateral", ca, ca.evidence(crl=crl))


# 7. Roots


def test_7_test_ca_under_a_production_policy(ca: SnpCa) -> None:
    refused("chain", ca, ca.evidence(), roots=None)


def test_7_attackers_root_with_amds_names(ca: SnpCa) -> None:
    attacker = SnpCa("Milan")
    attacker.ask_key = attacker_key()
    refused("chain", ca, ca.evidence(leaf=attacker.issue("vcek")))


def test_7_intermediate_that_the_root_never_signed(ca: SnpCa) -> None:
    chain = AmdChain(intermediate=ca.ask, root=vendor_roots().amd["Milan", "vcek"].root)
    roots = dataclasses.replace(ca.roots, amd={("Milan", "vcek"): chain})
    refused("chain", ca, ca.evidence(), roots=roots)


@needs_evidence
def test_7_certificate_that_amd_never_signed() -> None:
    refused_by_amd("chain", genuine(leaf="milan_vcek_invalid"))


def test_7_self_signed_key_in_place_of_a_leaf(ca: SnpCa) -> None:
    """The root itself as leaf: it is no chip's and no provider's."""
    collateral = pack_collateral(leaf=ca.ark.public_bytes(Encoding.DER))
    refused("collateral", ca, dataclasses.replace(ca.evidence(), collateral=collateral))


# 8. Confusion


@pytest.mark.parametrize(("kind", "key"), [("vcek", 1), ("vlek", 0), ("vcek", 7), ("vcek", 2), ("vlek", 7)])
def test_8_report_says_another_kind_of_key_than_the_certificate(ca: SnpCa, kind: str, key: int) -> None:
    leaf = {"vcek": ca.vcek, "vlek": ca.vlek}[kind]
    refused("signing-key", ca, ca.evidence(ca.body(key=key), leaf))


@pytest.mark.parametrize(("kind", "by"), [("vcek", "asvk"), ("vlek", "ask")])
def test_8_leaf_of_one_kind_under_the_intermediate_of_the_other(ca: SnpCa, kind: str, by: str) -> None:
    refused("chain", ca, ca.evidence(ca.body(key=int(kind == "vlek")), ca.issue(kind, by=by)))


@pytest.mark.parametrize("product", ["Genoa", "Turin"])
def test_8_milan_report_with_a_certificate_of_another_product(ca: SnpCa, product: str) -> None:
    other = SnpCa(product)
    refused("product", ca, ca.evidence(leaf=other.vcek), roots=other.roots)


def test_8_milan_certificate_that_calls_itself_genoa(ca: SnpCa) -> None:
    """The name leads to Genoa's intermediate, which did not sign it."""
    genoa = SnpCa("Genoa")
    roots = dataclasses.replace(ca.roots, amd={**ca.roots.amd, **genoa.roots.amd})
    leaf = ca.issue("vcek", product_name="Genoa-B1")
    for version, patches in ((2, {}), (3, {0x188: bytes(CPUS["Genoa"])})):
        refused("chain", ca, ca.evidence(ca.body(version=version, patches=patches), leaf), roots=roots)


@pytest.mark.parametrize("cpu", [(0x19, 0x61), (0x17, 0x31), (0x1A, 0x50), (0, 0)])
def test_8_processor_that_is_not_known(ca: SnpCa, cpu: tuple[int, int]) -> None:
    refused("product", ca, ca.evidence(ca.body(patches={0x188: bytes(cpu)})))


def test_8_another_chips_certificate(ca: SnpCa) -> None:
    other_chip = bytes(reversed(CHIP_IDS["Milan"]))
    refused("signature", ca, dataclasses.replace(ca.evidence(), collateral=ca.issue("vcek", chip_id=other_chip).der))
    refused("chip", ca, ca.evidence(leaf=ca.issue("vcek", chip_id=other_chip)))


@needs_evidence
def test_8_another_genuine_chips_certificate() -> None:
    refused_by_amd("signature", genuine(leaf="milan_debug_vcek"))
    refused_by_amd("signing-key", genuine(leaf="aws_vlek"), now=1_740_000_000)


@pytest.mark.parametrize("tag", ["simulated", "tdx", "sgx", "azure-vtpm", "tpm", "nitro", "snp"])
def test_8_changed_envelope_tag(ca: SnpCa, tag: str) -> None:
    refused("type", ca, dataclasses.replace(ca.evidence(), type=tag))
    policy = dataclasses.replace(ANY, accept=("sev-snp", tag), insecure_simulated=True)
    with pytest.raises(VerificationError) as caught:
        accepted(ca, dataclasses.replace(ca.evidence(), type=tag), policy=policy)
    assert caught.value.code in {"type", "simulated", "evidence-format"}


# 9. Malformed


@needs_evidence
def test_9_every_byte_of_a_genuine_report_flipped() -> None:
    evidence = genuine()
    blob, codes = evidence.blob, set()
    for at in range(len(blob)):
        flipped = blob[:at] + bytes([blob[at] ^ 1 << at % 8]) + blob[at + 1 :]
        with pytest.raises(VerificationError) as caught:
            verify(dataclasses.replace(evidence, blob=flipped), ANY, flipped[0x50:0x90], MILAN_AT)
        codes.add(caught.value.code)
    assert codes == {"evidence-format", "signature", "product"}  # "product": version 2 that became version 3


@needs_evidence
@pytest.mark.parametrize("at", [0x2D0, 0x2E7, 0x318, 0x32F, 0x330, 0x400, 0x49F])
def test_9_bytes_that_nobody_signed(at: int) -> None:
    """The upper third of r and of s, and what is behind them."""
    evidence = genuine()
    changed = evidence.blob[:at] + b"\x01" + evidence.blob[at + 1 :]
    refused_by_amd("evidence-format" if at >= 0x330 else "signature", dataclasses.replace(evidence, blob=changed))


@pytest.mark.parametrize("size", [0, 1, 0x2A0, 0x49F])
def test_9_truncated(ca: SnpCa, size: int) -> None:
    evidence = ca.evidence()
    refused("evidence-format", ca, dataclasses.replace(evidence, blob=evidence.blob[:size]))


def test_9_trailing_bytes(ca: SnpCa) -> None:
    evidence = ca.evidence()
    for tail in (b"\0", bytes(1184), bytes(100_000)):
        refused("evidence-format", ca, dataclasses.replace(evidence, blob=evidence.blob + tail))
    refused("collateral", ca, dataclasses.replace(evidence, collateral=evidence.collateral + b"\0"))


@pytest.mark.parametrize("at", [0x0B, 0x0F, 0x48, 0x49, 0x4C, 0x4F, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x1F8, 0x208, 0x29F])
def test_9_reserved_bytes_that_amd_did_sign(ca: SnpCa, at: int) -> None:
    """A field that this version does not know may mean anything."""
    refused("evidence-format", ca, ca.evidence(ca.body(patches={at: b"\x40"})))


def test_9_reserved_bytes_by_version(ca: SnpCa) -> None:
    refused("evidence-format", ca, ca.evidence(ca.body(version=2, patches={0x188: b"\x19"})))
    refused("evidence-format", ca, ca.evidence(ca.body(version=5, patches={0x208: b"\x01"})))


@pytest.mark.parametrize("version", [0, 1, 6, 2**31])
def test_9_unknown_version(ca: SnpCa, version: int) -> None:
    refused("evidence-format", ca, ca.evidence(ca.body(patches={0: version.to_bytes(4, "little")})))


@pytest.mark.parametrize("algorithm", [0, 2, 0x101])
def test_9_unknown_signature_algorithm(ca: SnpCa, algorithm: int) -> None:
    refused("evidence-format", ca, ca.evidence(ca.body(patches={0x34: algorithm.to_bytes(4, "little")})))


def test_9_guest_policy_without_the_bit_that_must_be_one(ca: SnpCa) -> None:
    refused("evidence-format", ca, ca.evidence(ca.body(policy=POLICY & ~(1 << 17))))


@pytest.mark.parametrize("signature", [bytes(144), b"\xff" * 144, b"\x01".ljust(72, b"\0") * 2])
def test_9_signatures_that_are_none(ca: SnpCa, signature: bytes) -> None:
    evidence = ca.evidence()
    refused("signature", ca, dataclasses.replace(evidence, blob=(ca.body() + signature).ljust(1184, b"\0")))


# 11. What a good signature does not say


@pytest.mark.parametrize("vmpl", [1, 2, 3, 256])
def test_11_asked_for_by_a_less_privileged_program(ca: SnpCa, vmpl: int) -> None:
    refused("vmpl", ca, ca.evidence(ca.body(patches={0x30: vmpl.to_bytes(4, "little")})))


def test_11_migration_agent(ca: SnpCa) -> None:
    refused("migration", ca, ca.evidence(ca.body(policy=POLICY | 1 << 18)))
    refused("migration", ca, ca.evidence(ca.body(patches={0x160: b"\x07" * 32})))
    refused("migration", ca, ca.evidence(ca.body(patches={0x160: bytes(32)})))


def test_11_masked_chip_key(ca: SnpCa) -> None:
    body = ca.body(patches={0x48: b"\x02"})
    refused("signing-key", ca, ca.evidence(body))
    unsigned = dataclasses.replace(ca.evidence(), blob=body.ljust(1184, b"\0"))
    refused("signing-key", ca, unsigned)


def test_11_masked_chip_id(ca: SnpCa) -> None:
    refused("chip", ca, ca.evidence(ca.body(patches={0x1A0: bytes(64)})))
    all_zero = ca.issue("vcek", chip_id=bytes(64))
    refused("chip", ca, ca.evidence(ca.body(patches={0x1A0: bytes(64)}), all_zero))


def test_11_turin_versions_read_as_milans(turin: SnpCa) -> None:
    """The same bytes mean other versions: FMC 2 must not pass for a bootloader, nor SNP's place be empty."""
    accepted(turin, turin.evidence())
    laid_out_as_milan = pack_tcb("Milan")
    patches = dict.fromkeys((56, 384, 480, 496), laid_out_as_milan)
    refused("evidence-format", turin, turin.evidence(turin.body(patches=patches)))


def test_11_milan_versions_read_as_turins(ca: SnpCa) -> None:
    patches = {at: pack_tcb("Turin") for at in (0x38, 0x180, 0x1E0, 0x1F0)}
    refused("evidence-format", ca, ca.evidence(ca.body(patches=patches)))


@pytest.mark.parametrize("part", ["fmc", "bootloader", "tee", "snp", "microcode"])
def test_11_turin_certificate_for_other_firmware(turin: SnpCa, part: str) -> None:
    refused("tcb", turin, turin.evidence(leaf=turin.issue("vcek", tcb=TCB | {part: TCB[part] - 1})))


def test_11_turin_chip_id_with_more_bytes_than_turin_has(turin: SnpCa) -> None:
    refused("chip", turin, turin.evidence(turin.body(patches={0x1A0 + 8: b"\x01"})))


# 15. Policy


def test_15_empty_policy_denies(ca: SnpCa) -> None:
    refused("type", ca, ca.evidence(), policy=AppraisalPolicy())
    refused("measurement", ca, ca.evidence(), policy=AppraisalPolicy(accept=("sev-snp",)))


def test_15_missing_collateral_fails_closed(ca: SnpCa) -> None:
    refused("collateral", ca, dataclasses.replace(ca.evidence(), collateral=b""))
