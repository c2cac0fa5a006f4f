"""SEV-SNP reports: AMD's own ones, and layouts and rules with a test CA in AMD's place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attest.appraisal import Appraisal
from cloister.attest.backends.sev_snp import NO_CRL, product_line
from cloister.attest.backends.sev_snp_certs import load_certificate, pack_collateral
from cloister.attest.backends.sev_snp_report import Tcb, parse_report, parse_tcb
from cloister.attest.checks import Checks
from cloister.attest.claims import Report
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.roots import AmdChain, TrustRoots
from cloister.attest.rules import RuleTables, SnpRules, SnpTcb
from cloister.attest.verify import VERIFIERS, inspect
from cloister.attest.verify import verify as verify_for_session
from cloister.crypto.encoding import encode
from cloister.errors import VerificationError
from tests.attest_ca import snp_ca
from tests.attest_ca.snp_ca import CPUS, NOW, POLICY, REPORT_DATA, TCB, SnpCa, der_ia5, der_integer, pack_tcb
from tests.evidence import needs_evidence, sample

MILAN_AT = 1_700_000_000
AWS_FROM, AWS_TO = 1_733_868_861, 1_765_404_861  # 2024-12-10 22:14:21 to 2025-12-10 22:14:21 UTC
ANY = AppraisalPolicy(accept=("sev-snp",), any_measurement=True)


@pytest.fixture(scope="module", params=["Milan", "Genoa", "Turin"])
def ca(request: pytest.FixtureRequest) -> SnpCa:
    return SnpCa(request.param)


@pytest.fixture(scope="module")
def milan() -> SnpCa:
    return SnpCa("Milan")


def genuine(report: str, leaf: str) -> Evidence:
    blob, certificate = sample(f"snp/{report}.bin"), sample(f"snp/{leaf}.der")
    return Evidence(type="sev-snp", blob=blob, collateral=pack_collateral(leaf=certificate))


def appraise(
    evidence: Evidence,
    roots: TrustRoots,
    *,
    now: float = NOW,
    any_measurement: bool = False,
    checks: Checks | None = None,
    **rules: Any,  # fields of SnpRules
) -> Report:
    tables = RuleTables(sev_snp=SnpRules(**rules))
    appraisal = Appraisal(
        rules=tables, roots=roots, now=now, any_measurement=any_measurement, checks=checks or Checks()
    )
    return VERIFIERS["sev-snp"](evidence, appraisal)


def refused(code: str, evidence: Evidence, roots: TrustRoots, **options: Any) -> str:
    checks = Checks()
    with pytest.raises(VerificationError) as caught:
        appraise(evidence, roots, checks=checks, **options)
    assert caught.value.code == code, caught.value
    assert not checks.done or not checks.done[-1].passed
    return str(caught.value)


# AMD's own ------------------------------------------------------------------------------------------------------------


@needs_evidence
def test_a_genuine_milan_report_is_accepted() -> None:
    checks = Checks()
    claims = inspect(genuine("milan_report", "milan_vcek"), ANY, None, MILAN_AT, checks=checks)
    assert claims.hardware
    assert claims.confidential
    assert claims.tcb["reported firmware"] == "bootloader 3, tee 0, snp 8, microcode 115"
    assert claims.registers["measurement"].startswith("a1f3930413247bb38cfc171579ea3c12")
    assert claims.registers["id_key_digest"].startswith("0356215882a825279a85b300b0b74293")
    assert NO_CRL in claims.warnings
    names = [check.name for check in checks.done]
    assert names[:3] == ["type", "report format", "endorsement format"]
    assert "revocation" not in names  # what was not checked is no check that passed
    assert all(check.passed and check.reason for check in checks.done)


@needs_evidence
@pytest.mark.parametrize("now", [AWS_FROM, (AWS_FROM + AWS_TO) // 2, AWS_TO])
def test_a_genuine_report_signed_with_a_providers_key_is_accepted_in_its_year(now: int) -> None:
    claims = inspect(genuine("aws_vlek_report", "aws_vlek"), ANY, None, now)
    assert claims.tcb["signed with"] == "VLEK of CN=cc-us-east-2.amazonaws.com"
    assert claims.tcb["reported firmware"] == "bootloader 4, tee 0, snp 24, microcode 217"
    assert claims.tcb["chip"] == "not named"
    assert any("VMPL 1" in warning for warning in claims.warnings)


@needs_evidence
@pytest.mark.parametrize("now", [AWS_FROM - 1, AWS_TO + 1, float("nan"), 1e300])
def test_that_report_is_refused_at_any_other_time(now: float) -> None:
    with pytest.raises(VerificationError) as caught:
        inspect(genuine("aws_vlek_report", "aws_vlek"), ANY, None, now)
    assert caught.value.code == "expired"


@needs_evidence
def test_a_bare_certificate_serves_as_collateral_in_der_and_pem() -> None:
    evidence = genuine("milan_report", "milan_vcek")
    der = sample("snp/milan_vcek.der")
    pem = load_certificate(der)[0].public_bytes(Encoding.PEM)
    expected = inspect(evidence, ANY, None, MILAN_AT).to_dict()
    for collateral in (der, pem):
        bare = Evidence(type="sev-snp", blob=evidence.blob, collateral=collateral)
        assert inspect(bare, ANY, None, MILAN_AT).to_dict() == expected


@needs_evidence
def test_serial_number_zero_warns_nobody_and_other_warnings_go_on() -> None:
    der = sample("snp/milan_vcek.der")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_certificate(der)[1] == 0
        assert [str(w.message) for w in caught] == []
        x509.load_der_x509_certificate(der)
        assert len(caught) == 1


# With the test CA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_every_layout_of_every_product_is_read_the_same(ca: SnpCa, version: int, kind: str) -> None:
    leaf = {"vcek": ca.vcek, "vlek": ca.vlek}[kind]
    body = ca.body(version=version, key={"vcek": 0, "vlek": 1}[kind])
    report = appraise(ca.evidence(body, leaf, ca.crl([99])), ca.roots)
    assert (report.type, report.report_data) == ("sev-snp", REPORT_DATA)
    assert (report.hardware, report.confidential, report.issued_at) == (True, True, None)
    assert report.registers == {
        "measurement": b"\xa1" * 48,
        "host_data": b"\xb2" * 32,
        "id_key_digest": b"\xc3" * 48,
        "author_key_digest": b"\xd4" * 48,
        "family_id": b"family".ljust(16, b"\0"),
        "image_id": b"image".ljust(16, b"\0"),
    }
    fmc = "fmc 2, " if ca.product == "Turin" else ""
    for name in ("reported", "committed", "current", "launch"):
        assert report.tcb[f"{name} firmware"] == f"{fmc}bootloader 4, tee 1, snp 24, microcode 219"
    assert report.tcb["product"] == ca.product
    assert report.tcb["signed with"] == ("VCEK" if kind == "vcek" else "VLEK of CN=cc.test.example")
    assert (report.tcb["firmware"], report.tcb["guest security version"]) == ("1.55 build 29", "3")
    assert report.tcb["multithreading"] == "on"
    assert report.warnings == ()


def test_a_session_and_a_listed_measurement_go_all_the_way(milan: SnpCa) -> None:
    value = ReferenceValue(label="ours", type="sev-snp", registers={"measurement": b"\xa1" * 48})
    policy = AppraisalPolicy(accept=("sev-snp",), reference_values=(value,))
    claims = verify_for_session(milan.evidence(), policy, REPORT_DATA, NOW, roots=milan.roots)
    assert (claims.measurement_label, claims.report_data) == ("ours", REPORT_DATA.hex())


@pytest.mark.parametrize(
    ("cpu", "product"),
    [
        ((0x19, 0x00), "Milan"), ((0x19, 0x0F), "Milan"), ((0x19, 0x10), "Genoa"), ((0x19, 0x1F), "Genoa"),
        ((0x19, 0xA0), "Genoa"), ((0x19, 0xAF), "Genoa"), ((0x19, 0x20), None), ((0x19, 0x61), None),
        ((0x1A, 0x00), "Turin"), ((0x1A, 0x1F), "Turin"), ((0x1A, 0x20), None), ((0x17, 0x31), None),
    ],
)  # fmt: skip
def test_product_lines_by_processor(cpu: tuple[int, int], product: str | None) -> None:
    assert product_line(*cpu) == product


@pytest.mark.parametrize("name", ["Genoa-B1", "Siena-A0", "Bergamo-A0"])
def test_genoas_relatives_have_genoas_keys(name: str) -> None:
    ca = SnpCa("Genoa")
    leaf = ca.issue("vcek", product_name=name)
    report = appraise(ca.evidence(ca.body(patches={0x188: bytes(CPUS["Bergamo"])}), leaf), ca.roots)
    assert report.tcb["product"] == "Genoa"


def test_a_chip_id_in_a_der_octet_string_is_the_same_chip(ca: SnpCa) -> None:
    chip = snp_ca.CHIP_IDS[ca.product]
    leaf = ca.issue("vcek", chip_id=bytes([4, len(chip)]) + chip)
    assert appraise(ca.evidence(leaf=leaf), ca.roots).tcb["chip"] == chip.ljust(64, b"\0").hex()


def test_tcb_layouts() -> None:
    raw = bytes([1, 2, 3, 4, 0, 0, 0, 8])
    assert parse_tcb(raw, "Turin") == Tcb(fmc=1, bootloader=2, tee=3, snp=4, microcode=8)
    raw = bytes([1, 2, 0, 0, 0, 0, 7, 8])
    assert parse_tcb(raw, "Milan") == parse_tcb(raw, "Genoa") == Tcb(bootloader=1, tee=2, snp=7, microcode=8)
    assert str(Tcb(bootloader=1, tee=2, snp=7, microcode=8)) == "bootloader 1, tee 2, snp 7, microcode 8"


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode", "fmc"])
def test_no_part_may_be_older_than_the_minimum(part: str) -> None:
    minimum = Tcb(bootloader=5, tee=5, snp=5, microcode=5, fmc=5)
    values = {"bootloader": 9, "tee": 9, "snp": 9, "microcode": 9, "fmc": 9}
    assert Tcb(**values | {part: 5}).is_at_least(minimum)
    assert not Tcb(**values | {part: 4}).is_at_least(minimum)


@pytest.mark.parametrize("days", [(-31, 1), (-1, 31)])
def test_a_current_revocation_list_is_accepted_and_said_so(milan: SnpCa, days: tuple[int, int]) -> None:
    checks = Checks()
    crl = milan.crl([1, 2, 3], days=days)
    assert appraise(milan.evidence(crl=crl), milan.roots, checks=checks).warnings == ()
    assert [c.reason for c in checks.done if c.name == "revocation"] == ["AMD's list names none of the certificates"]


# Rules ----------------------------------------------------------------------------------------------------------------


def test_smt_can_be_forbidden(milan: SnpCa) -> None:
    off = {0x40: (0x24).to_bytes(8, "little")}
    fine = milan.evidence(milan.body(policy=POLICY & ~(1 << 16), patches=off))
    assert appraise(fine, milan.roots, smt=False).tcb["multithreading"] == "off"
    refused("guest-policy", milan.evidence(milan.body(policy=POLICY & ~(1 << 16))), milan.roots, smt=False)
    refused("guest-policy", milan.evidence(milan.body(patches=off)), milan.roots, smt=False)


def test_one_socket_can_be_required(milan: SnpCa) -> None:
    appraise(milan.evidence(milan.body(policy=POLICY | 1 << 20)), milan.roots, single_socket=True)
    refused("guest-policy", milan.evidence(), milan.roots, single_socket=True)


def test_a_guests_security_version_can_be_required(milan: SnpCa) -> None:
    appraise(milan.evidence(), milan.roots, min_guest_svn=3)
    assert "is 3" in refused("guest-policy", milan.evidence(), milan.roots, min_guest_svn=4)


def test_providers_keys_can_be_forbidden(milan: SnpCa) -> None:
    evidence = milan.evidence(milan.body(key=1), milan.vlek)
    appraise(evidence, milan.roots)
    refused("guest-policy", evidence, milan.roots, vlek=False)


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode", "fmc"])
def test_the_policys_minimum_holds_for_every_part(part: str) -> None:
    ca = SnpCa("Turin")
    appraise(ca.evidence(), ca.roots, min_tcb=SnpTcb(**{part: TCB[part]}))
    refused("tcb", ca.evidence(), ca.roots, min_tcb=SnpTcb(**{part: TCB[part] + 1}))


def test_the_minimum_also_holds_for_the_firmware_that_launched_the_guest(milan: SnpCa) -> None:
    old = pack_tcb("Milan", TCB | {"snp": 20})
    evidence = milan.evidence(milan.body(patches={0x1F0: old}))
    appraise(evidence, milan.roots, min_tcb=SnpTcb(snp=20))
    assert "launch" in refused("tcb", evidence, milan.roots, min_tcb=SnpTcb(snp=21))


def test_privilege_level_matters_only_where_the_program_does(milan: SnpCa) -> None:
    evidence = milan.evidence(milan.body(patches={0x30: b"\x01"}))
    refused("vmpl", evidence, milan.roots)
    assert any("VMPL 1" in warning for warning in appraise(evidence, milan.roots, any_measurement=True).warnings)


# Malformed ------------------------------------------------------------------------------------------------------------


def test_only_verification_errors_leave_the_parser_whatever_the_length(milan: SnpCa) -> None:
    blob = milan.evidence().blob
    for wrong in (b"", blob[:-1], blob[:100], blob + b"\0", bytes(1184), b"\xff" * 1184):
        refused("evidence-format", Evidence(type="sev-snp", blob=wrong, collateral=milan.vcek.der), milan.roots)
    assert parse_report(blob).version == 3


def test_an_event_log_is_refused(milan: SnpCa) -> None:
    evidence = milan.evidence()
    with_log = Evidence(type="sev-snp", blob=evidence.blob, collateral=evidence.collateral, event_log=b"log")
    refused("evidence-format", with_log, milan.roots)


MALFORMED: list[Callable[[bytes], bytes]] = [
    lambda der: b"",
    lambda der: b"\x30",
    lambda der: b"-----BEGIN CERTIFICATE-----\n",
    lambda der: der[:-1],
    lambda der: der + b"\0",
    lambda der: pack_collateral(leaf=der)[:-1],
    lambda der: pack_collateral(leaf=der) + b"\0",
    lambda der: pack_collateral(leaf=b""),
    lambda der: pack_collateral(leaf=der, crl=b"\x30\x00"),
    lambda der: encode({"leaf": der}),
    lambda der: encode({"leaf": der, "crl": b"", "more": b""}),
    lambda der: encode({"leaf": 1, "crl": b""}),
    lambda der: encode([der]),
    lambda der: encode({"leaf": der.ljust(8193, b"\0"), "crl": b""}),
    lambda der: 2 * load_certificate(der)[0].public_bytes(Encoding.PEM),
]


@pytest.mark.parametrize("change", MALFORMED)
def test_malformed_collateral_is_refused(milan: SnpCa, change: Callable[[bytes], bytes]) -> None:
    evidence = Evidence(type="sev-snp", blob=milan.evidence().blob, collateral=change(milan.vcek.der))
    refused("collateral", evidence, milan.roots)


@pytest.mark.parametrize(
    "extensions",
    [
        {"2": None}, {"2": b""}, {"2": b"\x0c\x08Milan-B0"}, {"2": b"\x16\x09Milan-B0"}, {"2": der_ia5("Venice-A0")},
        {"2": b"\x16\x02\xff\xff"}, {"2": b"\x16\x80" + b"M" * 128}, {"2": b"\x16\x81\x80" + b"M" * 128},
        {"3.1": None}, {"3.1": b"\x02\x01"}, {"3.1": b"\x02\x02\x00\x04"}, {"3.1": b"\x02\x02\x01\x00"},
        {"3.1": b"\x02\x01\x84"}, {"3.1": b"\x03\x01\x04"}, {"3.1": b"\x02\x01\x04\x00"}, {"3.8": None},
        {"3.4": der_integer(1)}, {"3.7": b""}, {"3.9": der_integer(2)},
        {"4": None}, {"4": bytes(63)}, {"4": bytes(8)}, {"4": b"\x04\x41" + bytes(65)}, {"5": der_ia5("CN=provider")},
    ],
)  # fmt: skip
def test_malformed_extensions_are_refused(milan: SnpCa, extensions: dict[str, bytes | None]) -> None:
    leaf = milan.issue("vcek", extensions=extensions)
    refused("collateral", milan.evidence(leaf=leaf), milan.roots)


def test_a_leaf_without_a_p384_key_is_refused(milan: SnpCa) -> None:
    leaf = milan.issue("vcek", key=ec.generate_private_key(ec.SECP256R1()))
    evidence = Evidence(type="sev-snp", blob=milan.evidence().blob, collateral=leaf.der)
    refused("collateral", evidence, milan.roots)


def test_a_leaf_with_another_hash_is_refused(milan: SnpCa) -> None:
    leaf = milan.issue("vcek", hash_algorithm=hashes.SHA256())
    refused("chain", milan.evidence(leaf=leaf), milan.roots)


def test_any_byte_of_the_leaf_may_be_wrong_and_only_a_verification_error_comes_out(milan: SnpCa) -> None:
    """Each flip is refused, even those outside of what the issuer signed."""
    evidence = milan.evidence()
    der = milan.vcek.der
    for at in range(len(der)):
        changed = der[:at] + bytes([der[at] ^ 1 << at % 8]) + der[at + 1 :]
        with pytest.raises(VerificationError) as caught:
            appraise(
                Evidence(type="sev-snp", blob=evidence.blob, collateral=pack_collateral(leaf=changed)), milan.roots
            )
        assert caught.value.code in {"collateral", "chain", "product", "expired"}, (at, caught.value)


def test_any_byte_of_the_revocation_list_may_be_wrong(milan: SnpCa) -> None:
    crl = milan.crl([3, 4])
    blob, leaf = milan.evidence().blob, milan.vcek.der
    for at in range(len(crl)):
        changed = crl[:at] + bytes([crl[at] ^ 1 << at % 8]) + crl[at + 1 :]
        evidence = Evidence(type="sev-snp", blob=blob, collateral=pack_collateral(leaf=leaf, crl=changed))
        with pytest.raises(VerificationError) as caught:
            appraise(evidence, milan.roots)
        assert caught.value.code == "collateral", (at, caught.value)


def _sequence(content: bytes) -> bytes:
    """DER SEQUENCE of 128 to 65535 bytes."""
    size = len(content)
    return (b"\x30\x81" + bytes([size]) if size < 256 else b"\x30\x82" + size.to_bytes(2, "big")) + content


def test_a_revocation_list_that_says_two_things_about_its_signature(milan: SnpCa) -> None:
    """The second one is behind the signed part, where anybody can change it."""
    crl = milan.crl()
    sha384, sha512 = bytes.fromhex("608648016503040202"), bytes.fromhex("608648016503040203")
    signed = len(x509.load_der_x509_crl(crl).tbs_certlist_bytes) + 4
    changed = crl[:signed] + crl[signed:].replace(sha384, sha512)
    assert changed != crl
    refused("collateral", milan.evidence(crl=changed), milan.roots)


def test_a_revocation_list_without_an_end(milan: SnpCa) -> None:
    """It would hold for ever: who has an old one could use it for ever."""
    crl = milan.crl()
    tbs = x509.load_der_x509_crl(crl).tbs_certlist_bytes
    assert tbs[-15:-13] == b"\x17\x0d"  # nextUpdate, a UTCTime, is last
    content = tbs[2 + (tbs[1] & 0x7F) : -15]  # without tag and length, of which there are more than one byte
    endless = _sequence(_sequence(content) + crl[crl.index(tbs) + len(tbs) :])
    assert x509.load_der_x509_crl(endless).next_update_utc is None
    evidence = milan.evidence(crl=endless)
    refused("collateral", evidence, milan.roots)


def test_a_product_without_a_pinned_root_is_refused(milan: SnpCa) -> None:
    refused("chain", milan.evidence(), dataclasses.replace(milan.roots, amd={}))


def test_a_pinned_root_that_is_not_rsa_verifies_nothing(milan: SnpCa) -> None:
    """Never with AMD's; but a root of another kind must not end in anything else than a refusal."""
    chain = AmdChain(intermediate=milan.ask, root=load_certificate(milan.vcek.der)[0])
    refused("chain", milan.evidence(), dataclasses.replace(milan.roots, amd={("Milan", "vcek"): chain}))
