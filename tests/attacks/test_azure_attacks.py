"""Attacks on evidence of Azure's machines, against the verifier that sessions use: each link from chip to quote.

Numbers in names are the kinds of attack: 1 measurement, 2 debug, 3 binding, 4 firmware, 5 time, 6 revocation, 7 roots,
8 confusion, 9 malformed, 10 TPM, 11 what a good signature does not say, 15 policy.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from cloister.attest.binding import session_report_data
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.rules import RuleTables, SnpRules, SnpTcb
from cloister.attest.verify import verify
from cloister.errors import VerificationError
from tests.attest_ca.azure_vm import PCRS, REPORT_DATA, AzureVm, jwk, pack
from tests.attest_ca.snp_ca import NOW, POLICY, TCB, attacker_key
from tests.attest_ca.tpm_ca import CERTIFY, CREATION, RSA_AK, SHA1, attest, select, sign
from tests.evidence import needs_evidence, sample

REGISTERS = {"snp_measurement": b"\xa1" * 48, "pcr4": PCRS[4], "pcr11": PCRS[11]}
POLICY_OF_PARTY = AppraisalPolicy(
    accept=("azure-vtpm",),
    reference_values=(ReferenceValue(label="cloister", type="azure-vtpm", registers=REGISTERS),),
)


@pytest.fixture(scope="module")
def vm() -> AzureVm:
    return AzureVm()


def accepted(vm: AzureVm, evidence: Evidence, **options: Any) -> Claims:
    given: dict[str, Any] = {"policy": POLICY_OF_PARTY, "now": NOW, "roots": vm.ca.roots, "report_data": REPORT_DATA}
    given |= options
    return verify(evidence, given["policy"], given["report_data"], given["now"], roots=given["roots"])


def refused(code: str, vm: AzureVm, evidence: Evidence, **options: Any) -> None:
    with pytest.raises(VerificationError) as caught:
        accepted(vm, evidence, **options)
    assert caught.value.code == code, caught.value


def with_snp(vm: AzureVm, **body: Any) -> Evidence:
    """Evidence whose SNP report is another one, signed by the chip all the same."""
    claims = vm.claims()
    return vm.evidence(hcl=vm.hcl(claims, vm.snp(claims, **body)))


def test_what_is_attacked_below_is_accepted(vm: AzureVm) -> None:
    assert accepted(vm, vm.evidence()).measurement_label == "cloister"


def test_1_another_paravisor(vm: AzureVm) -> None:
    refused("measurement", vm, with_snp(vm, patches={0x90: b"\x66"}))


@pytest.mark.parametrize("pcr", [4, 11])
def test_1_another_workload_in_a_pcr(vm: AzureVm, pcr: int) -> None:
    measured = PCRS | {pcr: bytes(32)}
    document = vm.document(quoted=measured)
    document["tpm_quote"]["pcrs"] = [measured[n].hex() for n in range(24)]
    refused("measurement", vm, pack(document))


def test_2_debug_guest(vm: AzureVm) -> None:
    refused("debug", vm, with_snp(vm, policy=POLICY | 1 << 19))


def test_3_evidence_of_another_session(vm: AzureVm) -> None:
    ours = session_report_data(role="enclave", job_id="job", transcript=b"this")
    accepted(vm, vm.evidence(extra_data=ours), report_data=ours)
    for other in (
        session_report_data(role="party", job_id="job", transcript=b"this"),
        session_report_data(role="enclave", job_id="job", transcript=b"other"),
        b"",
        ours[:32],
    ):
        refused("binding", vm, vm.evidence(extra_data=other), report_data=ours)


def test_3_report_data_only_in_the_claims_binds_nothing(vm: AzureVm) -> None:
    """The operator may fill in the claims' user data; only what the TPM signs now counts."""
    claims = vm.claims()[:-1] + b', "user-data": "' + REPORT_DATA.hex().encode() + b'"}'
    refused("binding", vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims)), extra_data=b"old"))


def test_4_old_firmware(vm: AzureVm) -> None:
    rules = RuleTables(sev_snp=SnpRules(min_tcb=SnpTcb(snp=TCB["snp"] + 1)))
    refused("tcb", vm, vm.evidence(), policy=dataclasses.replace(POLICY_OF_PARTY, rules=rules))
    refused("tcb", vm, vm.evidence(leaf=vm.ca.issue("vcek", tcb=TCB | {"snp": 23})))


@pytest.mark.parametrize("days", [(-30, -1), (1, 30)])
def test_5_certificate_out_of_time(vm: AzureVm, days: tuple[int, int]) -> None:
    refused("expired", vm, vm.evidence(leaf=vm.ca.issue("vcek", days=days)))
    refused("expired", vm, vm.evidence(crl=vm.ca.crl(days=days)))


def test_6_revoked_intermediate(vm: AzureVm) -> None:
    refused("revoked", vm, vm.evidence(crl=vm.ca.crl([vm.ca.ask.serial_number])))


def test_7_test_ca_under_a_production_policy(vm: AzureVm) -> None:
    refused("chain", vm, vm.evidence(), roots=None)


def test_7_attackers_processor(vm: AzureVm) -> None:
    attacker = AzureVm()
    attacker.ca.ask_key = attacker_key()
    refused("chain", vm, attacker.evidence(leaf=attacker.ca.issue("vcek")))


def test_8_bare_reports_and_quotes_are_not_this_type(vm: AzureVm) -> None:
    snp = vm.ca.evidence()
    refused("evidence-format", vm, dataclasses.replace(snp, type="azure-vtpm"))
    refused("type", vm, dataclasses.replace(vm.evidence(), type="sev-snp"))
    both = dataclasses.replace(POLICY_OF_PARTY, accept=("azure-vtpm", "sev-snp", "tpm"))
    for tag in ("sev-snp", "tpm"):
        refused("evidence-format", vm, dataclasses.replace(vm.evidence(), type=tag), policy=both)


def test_8_another_chips_certificate(vm: AzureVm) -> None:
    document = vm.document() | {"vcek": vm.document(leaf=vm.ca.issue("vcek"))["vcek"]}
    refused("signature", vm, pack(document))


def test_8_a_certificate_of_a_provider(vm: AzureVm) -> None:
    refused("signing-key", vm, vm.evidence(leaf=vm.ca.vlek))


@needs_evidence
def test_9_every_byte_of_the_genuine_snp_report_and_claims_flipped() -> None:
    policy = AppraisalPolicy(accept=("azure-vtpm",), any_measurement=True)
    document = json.loads(sample("azure/az_snp_vtpm.json"))
    report = base64.urlsafe_b64decode(document["hcl_report"])
    for at in range(len(report)):
        flipped = report[:at] + bytes([report[at] ^ 1 << at % 8]) + report[at + 1 :]
        evidence = pack(document | {"hcl_report": base64.urlsafe_b64encode(flipped).decode()})
        with pytest.raises(VerificationError) as caught:
            verify(evidence, policy, REPORT_DATA, 1_750_000_000)
        assert caught.value.code in {"evidence-format", "signature", "product", "runtime-claims"}, (at, caught.value)


def test_9_truncated_or_with_a_tail(vm: AzureVm) -> None:
    evidence = vm.evidence()
    for blob in (evidence.blob[:-1], evidence.blob[:100], evidence.blob + b"x", evidence.blob + evidence.blob, b""):
        refused("evidence-format", vm, dataclasses.replace(evidence, blob=blob))


def test_10_attestation_key_that_the_processor_does_not_vouch_for(vm: AzureVm) -> None:
    """The attacker's own TPM: its key is in claims that the SNP report is not about, or in none."""
    attacker = AzureVm(vm.ca, rsa.generate_private_key(65537, 2048))
    claims = attacker.claims()
    refused("runtime-claims", vm, attacker.evidence(hcl=vm.hcl(claims, vm.snp(vm.claims()))))
    refused("signature", vm, attacker.evidence(hcl=vm.hcl(vm.claims(), vm.snp(vm.claims()))))


def test_10_report_data_with_more_than_the_claims_hash(vm: AzureVm) -> None:
    """SNP reports that somebody else than the paravisor asked for hold other report data."""
    refused("runtime-claims", vm, with_snp(vm, patches={0x50 + 32: b"\x01"}))
    refused("runtime-claims", vm, with_snp(vm, patches={0x50: b"\x01" * 32}))


@pytest.mark.parametrize("use", [["sign", "encrypt"], ["encrypt"], [], None, "sign"])
def test_10_key_that_is_not_for_signing_only(vm: AzureVm, use: Any) -> None:
    claims = vm.claims([jwk(RSA_AK, key_ops=use)])
    refused("tpm-key", vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims))))


@pytest.mark.parametrize("kind", [CERTIFY, CREATION])
def test_10_signed_but_not_a_quote(vm: AzureVm, kind: int) -> None:
    refused("tpm-quote", vm, vm.evidence(kind=kind))


def test_10_signed_but_not_made_by_the_tpm(vm: AzureVm) -> None:
    refused("tpm-quote", vm, vm.evidence(magic=bytes(4)))


def test_10_another_bank(vm: AzureVm) -> None:
    refused("tpm-quote", vm, vm.evidence(selection=select(PCRS, bank=SHA1)))


def test_10_quote_over_fewer_pcrs(vm: AzureVm) -> None:
    """Those left out would be whatever the evidence says."""
    fewer = {n: v for n, v in PCRS.items() if n != 11}
    refused("pcr", vm, vm.evidence(quoted=fewer))


@pytest.mark.parametrize("pcr", [0, 11, 23])
def test_10_pcr_values_that_were_not_quoted(vm: AzureVm, pcr: int) -> None:
    document = vm.document()
    document["tpm_quote"]["pcrs"][pcr] = bytes(32).hex()
    refused("pcr", vm, pack(document))


def test_10_quote_of_another_key_kept_with_this_machines_claims(vm: AzureVm) -> None:
    document = vm.document()
    other = rsa.generate_private_key(65537, 2048)
    document["tpm_quote"]["signature"] = sign(attest(PCRS, extra_data=REPORT_DATA), other)[6:].hex()
    refused("signature", vm, pack(document))


@pytest.mark.parametrize("any_measurement", [False, True])
def test_11_report_that_the_guest_itself_asked_for(vm: AzureVm, any_measurement: bool) -> None:
    """Below the paravisor anybody may ask for a report about claims of their own."""
    policy = POLICY_OF_PARTY
    if any_measurement:
        policy = dataclasses.replace(policy, any_measurement=True, reference_values=())
    refused("vmpl", vm, with_snp(vm, patches={0x30: b"\x02"}), policy=policy)


def test_11_migration_agent_and_masked_keys(vm: AzureVm) -> None:
    refused("migration", vm, with_snp(vm, policy=POLICY | 1 << 18))
    refused("signing-key", vm, with_snp(vm, patches={0x48: b"\x02"}))
    refused("chip", vm, with_snp(vm, patches={0x1A0: bytes(64)}))


def test_15_empty_policy_denies(vm: AzureVm) -> None:
    refused("type", vm, vm.evidence(), policy=AppraisalPolicy())
