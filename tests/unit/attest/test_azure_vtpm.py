"""Azure's machines: the genuine sample, and the chain from chip to quote with each link broken."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import pytest

from cloister.attest.appraisal import Appraisal
from cloister.attest.backends.azure_vtpm import MAX_BLOB_BYTES, PARAVISOR_WARNING
from cloister.attest.backends.sev_snp import NO_CRL
from cloister.attest.checks import Checks
from cloister.attest.claims import Report
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.rules import RuleTables, SnpRules
from cloister.attest.verify import VERIFIERS, inspect
from cloister.crypto.encoding import encode
from cloister.errors import VerificationError
from tests.attest_ca.azure_vm import PCRS, REPORT_DATA, AzureVm, b64, jwk, pack
from tests.attest_ca.snp_ca import NOW
from tests.attest_ca.tpm_ca import RSA_AK
from tests.evidence import needs_evidence, sample

AZURE_AT = 1_750_000_000
ANY = AppraisalPolicy(accept=("azure-vtpm",), any_measurement=True)


@pytest.fixture(scope="module")
def vm() -> AzureVm:
    return AzureVm()


def appraise(vm: AzureVm, evidence: Evidence, rules: SnpRules | None = None, checks: Checks | None = None) -> Report:
    tables = RuleTables(sev_snp=rules or SnpRules())
    appraisal = Appraisal(rules=tables, roots=vm.ca.roots, now=NOW, checks=checks or Checks())
    return VERIFIERS["azure-vtpm"](evidence, appraisal)


def refused(code: str, vm: AzureVm, evidence: Evidence, rules: SnpRules | None = None) -> None:
    checks = Checks()
    with pytest.raises(VerificationError) as caught:
        appraise(vm, evidence, rules, checks)
    assert caught.value.code == code, caught.value
    assert not checks.done or not checks.done[-1].passed


@needs_evidence
def test_the_genuine_sample_is_accepted() -> None:
    checks = Checks()
    evidence = Evidence(type="azure-vtpm", blob=sample("azure/az_snp_vtpm.json"))
    claims = inspect(evidence, ANY, None, AZURE_AT, checks=checks)
    assert (claims.hardware, claims.confidential) == (True, True)
    assert claims.report_data.startswith("982f5c6e45df0ed3f10b6f60b02f0c83")
    assert len(claims.report_data) == 96
    assert claims.registers["pcr0"] == "84275b2f4312cd4fc6cbe6b152ad3c3683e513d9f1e23c34fca160c8cca7a6a7"
    assert {f"pcr{n}" for n in range(24)} <= set(claims.registers)
    assert claims.registers["snp_measurement"].startswith("5b0ce64ad1c1f6375dbda5f760b98526")
    assert claims.tcb["paravisor: secure-boot"] == "True"
    assert all(check.passed for check in checks.done)
    assert [check.name for check in checks.done][-4:] == ["runtime claims", "attestation key", "quote", "measurement"]


@needs_evidence
def test_the_genuine_sample_outside_of_its_certificates_time() -> None:
    evidence = Evidence(type="azure-vtpm", blob=sample("azure/az_snp_vtpm.json"))
    for now in (1_700_000_000, 2_000_000_000):
        with pytest.raises(VerificationError) as caught:
            inspect(evidence, ANY, None, now)
        assert caught.value.code == "expired"


@needs_evidence
def test_every_changed_character_of_the_genuine_sample() -> None:
    """A character of JSON that keeps its meaning when it changes does not exist in this form."""
    evidence = Evidence(type="azure-vtpm", blob=sample("azure/az_snp_vtpm.json"))
    codes = set()
    for at in range(0, len(evidence.blob), 5):
        changed = evidence.blob[:at] + bytes([evidence.blob[at] ^ 1]) + evidence.blob[at + 1 :]
        with pytest.raises(VerificationError) as caught:
            inspect(dataclasses.replace(evidence, blob=changed), ANY, None, AZURE_AT)
        codes.add(caught.value.code)
    assert {"evidence-format", "signature", "pcr", "chain", "runtime-claims"} <= codes


def test_a_machine_is_reported_with_everything_that_was_measured(vm: AzureVm) -> None:
    report = appraise(vm, vm.evidence(crl=vm.ca.crl([3]), resets=5))
    assert (report.type, report.report_data) == ("azure-vtpm", REPORT_DATA)
    assert {n: report.registers[f"pcr{n}"] for n in range(24)} == PCRS
    assert report.registers["snp_measurement"] == b"\xa1" * 48
    assert set(report.registers) - {f"pcr{n}" for n in range(24)} == {
        "snp_measurement", "snp_host_data", "snp_id_key_digest", "snp_author_key_digest", "snp_family_id",
        "snp_image_id",
    }  # fmt: skip
    assert (report.hardware, report.confidential, report.issued_at) == (True, True, None)
    assert report.tcb["boots"] == "5"
    assert report.tcb["paravisor: console-enabled"] == "False"
    assert report.tcb["reported firmware"].startswith("bootloader 4")
    assert report.warnings == (PARAVISOR_WARNING,)


def test_without_a_revocation_list_it_says_so(vm: AzureVm) -> None:
    assert NO_CRL in appraise(vm, vm.evidence()).warnings


def test_the_rules_of_sev_snp_hold(vm: AzureVm) -> None:
    refused("guest-policy", vm, vm.evidence(), SnpRules(min_guest_svn=4))
    refused("guest-policy", vm, vm.evidence(), SnpRules(smt=False))


def test_claims_that_are_not_known_are_nobodys_business(vm: AzureVm) -> None:
    machines: list[Any] = [None, [], {"secure-boot": [1]}]
    for machine in machines:
        claims = json.dumps({"keys": [jwk(RSA_AK)], "vm-configuration": machine, "new": 1}).encode()
        report = appraise(vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims))))
        assert not any(name.startswith("paravisor") for name in report.tcb)


@pytest.mark.parametrize("version", [1, 2])
def test_both_known_versions_of_the_header(vm: AzureVm, version: int) -> None:
    claims = vm.claims()
    appraise(vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims), header={4: bytes([version])})))
    appraise(vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims), header={4: bytes([version])}, tail=b"")))


# Malformed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blob",
    [
        b"", b"{", b"[]", b"null", b"2", b"\xff\xfe", b"[" * 30_000, b"{}", "{}".encode("utf-16"),
        b'{"version": 2, "tpm_quote": {}, "hcl_report": "", "vcek": ""}', b"1" * 30_000,
        b'{"version": 2, "version": 2, "tpm_quote": {}, "hcl_report": "", "vcek": ""}', b" " * (MAX_BLOB_BYTES + 1),
    ],
)  # fmt: skip
def test_what_is_no_such_document(vm: AzureVm, blob: bytes) -> None:
    refused("evidence-format", vm, Evidence(type="azure-vtpm", blob=blob))


def test_a_document_with_more_blanks_than_anybody_needs(vm: AzureVm) -> None:
    evidence = vm.evidence()
    appraise(vm, dataclasses.replace(evidence, blob=evidence.blob.ljust(MAX_BLOB_BYTES)))
    refused("evidence-format", vm, dataclasses.replace(evidence, blob=evidence.blob.ljust(MAX_BLOB_BYTES + 1)))


def _without(document: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in document.items() if k != key}


@pytest.mark.parametrize("key", ["version", "tpm_quote", "hcl_report", "vcek"])
def test_a_key_missing_or_of_another_type(vm: AzureVm, key: str) -> None:
    document = vm.document()
    refused("evidence-format", vm, pack(_without(document, key)))
    values: list[Any] = [None, [], {}, "!", 3, True, 2.0]
    for value in values:
        refused("evidence-format", vm, pack(document | {key: value}))
    refused("evidence-format", vm, pack(document | {"more": 1}))


@pytest.mark.parametrize("key", ["signature", "message", "pcrs"])
def test_a_key_of_the_quote_missing_or_of_another_type(vm: AzureVm, key: str) -> None:
    document = vm.document()
    quote = document["tpm_quote"]
    refused("evidence-format", vm, pack(document | {"tpm_quote": _without(quote, key)}))
    values: list[Any] = [None, {}, "0", "zz", "AA", 3, ["00"] * 24, ["aa" * 33] * 24, [None] * 24, "aa" * 2000]
    for value in values:
        refused("evidence-format", vm, pack(document | {"tpm_quote": quote | {key: value}}))
    for pcrs in (quote["pcrs"][:-1], [*quote["pcrs"], quote["pcrs"][0]]):
        refused("evidence-format", vm, pack(document | {"tpm_quote": quote | {"pcrs": pcrs}}))


def test_bytes_are_written_in_one_way(vm: AzureVm) -> None:
    document = vm.document()
    quote = document["tpm_quote"]
    for key in ("signature", "message"):
        refused("evidence-format", vm, pack(document | {"tpm_quote": quote | {key: quote[key].upper()}}))
    leaf = vm.ca.vcek.der
    appraise(vm, pack(document | {"vcek": base64.urlsafe_b64encode(leaf).decode()}))
    bare = b64(leaf[: len(leaf) // 3 * 3 - 1])  # ends with a character of which two bits mean nothing
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    sloppy = bare[:-1] + last[last.index(bare[-1]) + 1]
    for wrong in ("AAAAA", sloppy, bare + "==", b64(leaf).replace("-", "+").replace("_", "/"), " " + b64(leaf)):
        refused("evidence-format", vm, pack(document | {"vcek": wrong}))


def test_a_certificate_or_revocation_list_that_is_none(vm: AzureVm) -> None:
    refused("collateral", vm, pack(vm.document() | {"vcek": b64(b"\x30\x00")}))
    refused("collateral", vm, pack(vm.document() | {"vcek": ""}))
    refused("collateral", vm, vm.evidence(crl=b"\x30\x00"))
    for collateral in (b"\x00", encode({"leaf": vm.ca.vcek.der, "crl": b""}), encode({"crl": 1}), vm.ca.vcek.der):
        refused("collateral", vm, dataclasses.replace(vm.evidence(), collateral=collateral))


def test_an_event_log_is_refused(vm: AzureVm) -> None:
    refused("evidence-format", vm, dataclasses.replace(vm.evidence(), event_log=b"log"))


@pytest.mark.parametrize(
    "change",
    [
        {"header": {0: b"X"}}, {"header": {4: b"\x03"}}, {"header": {4: b"\x00"}}, {"header": {8: b"\xff"}},
        {"header": {12: b"\x01"}}, {"header": {16: b"\x01"}}, {"header": {31: b"\x01"}}, {"kind": 4}, {"kind": 3},
        {"hash_type": 2}, {"hash_type": 3}, {"version": 2}, {"tail": b"\x01"}, {"tail": bytes(9000)},
    ],
)  # fmt: skip
def test_what_nobody_signed_around_the_report_has_one_value(vm: AzureVm, change: dict[str, Any]) -> None:
    claims = vm.claims()
    refused("evidence-format", vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims), **change)))


def test_a_paravisors_report_of_any_length(vm: AzureVm) -> None:
    claims = vm.claims()
    whole = vm.hcl(claims, vm.snp(claims), tail=b"")
    for size in (0, 1, 31, 32, 1215, 1216, 1235, 1236, len(whole) - 1):
        refused("evidence-format", vm, vm.evidence(hcl=whole[:size]))


@pytest.mark.parametrize("claims", [b"", b"{", b"[]", b'{"keys": 1, "keys": 2}', b"\xff"])
def test_claims_that_are_no_table(vm: AzureVm, claims: bytes) -> None:
    refused("evidence-format", vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims))))


@pytest.mark.parametrize(
    "keys",
    [
        [], ["HCLAkPub"], [jwk(RSA_AK), jwk(RSA_AK)], [jwk(RSA_AK, kid="HCLEkPub")], [jwk(RSA_AK, kty="EC")],
        [jwk(RSA_AK, e="Aw")], [jwk(RSA_AK, n=b64(b"\x81" + bytes(126) + b"\x01"))],
    ],
)  # fmt: skip
def test_claims_without_exactly_one_attestation_key(vm: AzureVm, keys: list[Any]) -> None:
    claims = vm.claims(keys)
    refused("tpm-key", vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims))))


@pytest.mark.parametrize("keys", [{"n": None}, {"n": "!"}, {"e": 65537}, {"n": "A" * 2000}])
def test_claims_with_a_malformed_key(vm: AzureVm, keys: dict[str, Any]) -> None:
    claims = vm.claims([jwk(RSA_AK, **keys)])
    refused("evidence-format", vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims))))


def test_claims_whose_keys_are_no_list(vm: AzureVm) -> None:
    claims = b'{"keys": {"kid": "HCLAkPub"}}'
    refused("tpm-key", vm, vm.evidence(hcl=vm.hcl(claims, vm.snp(claims))))
