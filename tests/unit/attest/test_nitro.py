"""Nitro documents: the genuine ones at their own time, the form, the chain, every refusal with its code."""

from __future__ import annotations

import dataclasses
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.attest.backends import ec_chain, nitro, nitro_document
from cloister.attest.checks import Checks
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.roots import TrustRoots
from cloister.attest.verify import inspect, verify
from cloister.errors import ProtocolError, VerificationError
from tests.attest_ca.ec_ca import certify
from tests.attest_ca.nitro_ca import HOUR, NOW, PCRS, REPORT_DATA, NitroCa, indefinite
from tests.evidence import needs_evidence, sample

ANY = AppraisalPolicy(accept=("nitro",), any_measurement=True)


@pytest.fixture(scope="module")
def ca() -> NitroCa:
    return NitroCa()


def code(ca: NitroCa, evidence: Evidence, now: float = NOW + 5, roots: TrustRoots | None = None) -> str:
    with pytest.raises(VerificationError) as caught:
        verify(evidence, ANY, REPORT_DATA, now, roots=roots or ca.roots)
    return caught.value.code


def test_accepted(ca: NitroCa) -> None:
    checks = Checks()
    claims = verify(ca.evidence(), ANY, REPORT_DATA, NOW + 5, roots=ca.roots, checks=checks)
    assert claims.registers == {f"pcr{index}": value.hex() for index, value in PCRS.items()}
    assert (claims.type, claims.hardware, claims.confidential, claims.issued_at) == ("nitro", True, True, NOW)
    assert claims.tcb == {"module": "i-test-enc1"}
    assert nitro.WARNING in claims.warnings
    names = ["type", "format", "chain", "validity", "signature", "debug", "binding", "age", "measurement"]
    assert [check.name for check in checks.done] == names
    assert all(check.passed for check in checks.done)


@needs_evidence
def test_the_genuine_document_is_accepted_at_its_own_time() -> None:
    evidence = Evidence(type="nitro", blob=sample("nitro/nitro_prod_2025.cbor"))
    claims = inspect(evidence, ANY, None, 1_766_678_660)
    user_data = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" + "00" * 32  # as its maker chose it
    assert (claims.report_data, claims.issued_at) == (user_data, 1_766_678_659)
    assert claims.registers["pcr0"].startswith("eb7d0dab08ff41546d7e5659aee883af")
    assert len(claims.registers) == 16
    assert verify(evidence, ANY, bytes.fromhex(user_data), 1_766_678_660).registers == claims.registers


@needs_evidence
def test_the_genuine_document_of_an_enclave_with_debugging_is_refused() -> None:
    evidence = Evidence(type="nitro", blob=sample("nitro/nitro_debug_2025.cbor"))
    checks = Checks()
    with pytest.raises(VerificationError) as caught:
        inspect(evidence, ANY, None, 1_766_650_850, checks=checks)
    assert caught.value.code == "debug"
    assert [c.name for c in checks.done if c.passed] == ["type", "format", "chain", "validity", "signature"]


@pytest.mark.parametrize("absent", [None, ..., b""])
def test_a_document_may_lack_user_data_but_is_then_bound_to_nothing(ca: NitroCa, absent: Any) -> None:
    evidence = ca.evidence(user_data=absent, nonce=b"n" * 40, public_key=...)
    assert inspect(evidence, ANY, None, NOW, roots=ca.roots).report_data == ""
    assert code(ca, evidence) == "binding"


def test_a_payload_of_definite_length_and_any_order_is_as_good(ca: NitroCa) -> None:
    fields = dict(reversed(ca.payload().items()))
    evidence = Evidence(type="nitro", blob=ca.sign(cbor2.dumps(fields)))
    assert verify(evidence, ANY, REPORT_DATA, NOW, roots=ca.roots).issued_at == NOW


# The form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "SHA256"},
        {"digest": ...},
        {"module_id": b"i-1"},
        {"timestamp": 0},
        {"timestamp": -1},
        {"timestamp": 1 << 60},
        {"timestamp": 1.5},
        {"pcrs": {}},
        {"pcrs": {0: b"\xa0" * 48, 1: b"\xa1" * 48}},
        {"pcrs": {**PCRS, 32: b"\0" * 48}},
        {"pcrs": {**PCRS, 4: b"\0" * 32}},
        {"pcrs": {**PCRS, 4: None}},
        {"pcrs": {"0": b"\xa0" * 48}},
        {"pcrs": [b"\xa0" * 48]},
        {"certificate": None},
        {"certificate": b"x"},
        {"certificate": b"\x30" * 5000},
        {"certificate": b"-----BEGIN CERTIFICATE-----"},
        {"cabundle": [None]},
        {"cabundle": [b"\x30\x03\x02\x01\x00"]},
        {"cabundle": [b"x"] * 9},
        {"user_data": "text"},
        {"user_data": b"x" * 1025},
        {"nonce": b"x" * 1025},
        {"public_key": 7},
        {"more": 1},
    ],
)
def test_malformed_documents(ca: NitroCa, changes: dict[str, Any]) -> None:
    """Each is signed: only its content is wrong."""
    assert code(ca, ca.evidence(**changes)) == "evidence-format"


@pytest.mark.parametrize("payload", [cbor2.dumps([b"x" * 300]), b"\xbf" + b"\0" * 300, b"\0" * 300, b"\xbf\xff"])
def test_payloads_that_are_no_documents(ca: NitroCa, payload: bytes) -> None:
    assert code(ca, Evidence(type="nitro", blob=ca.sign(payload))) == "evidence-format"


@pytest.mark.parametrize(
    "data",
    [
        "",
        "18",  # truncated number
        "42 00",  # truncated bytes
        "5f 41 00 ff",  # bytes of indefinite length
        "5b ffffffffffffffff",  # more bytes than there are
        "9b ffffffffffffffff",  # more entries than there are
        "1c",  # reserved length
        "61 ff",  # not UTF-8
        "20",  # negative number
        "c0 00",  # tag
        "f9 0000",  # float
        "f7",  # undefined
        "ff",  # break outside of anything
        "a1 40 00",  # key of bytes
        "a1 f6 00",  # key null
        "a1 80 00",  # key that cannot be hashed
        "a2 00 00 00 00",  # repeated key
        "a2 00 00 61 61 00",  # keys of two types
        "bf 00",  # truncated map
        "8181818181 00",  # too deep
        "00 00",  # something behind the end
    ],
)
def test_cbor_that_a_module_does_not_write(data: str) -> None:
    with pytest.raises(ProtocolError):
        nitro_document.decode(bytes.fromhex(data))


def test_cbor_bounds() -> None:
    assert nitro_document.decode(cbor2.dumps([0] * 255)) == [0] * 255
    with pytest.raises(ProtocolError, match="too many"):
        nitro_document.decode(cbor2.dumps([0] * 256))


@pytest.mark.parametrize("value", [0, 23, 24, 255, 1 << 16, 1 << 40, b"b", "text", [], [1, [2]], {}, {"a": {0: True}}])
def test_cbor_as_another_reader_reads_it(value: Any) -> None:
    assert nitro_document.decode(cbor2.dumps(value)) == value
    assert nitro_document.decode(cbor2.dumps([value, None, False])) == [value, None, False]


def test_no_collateral_and_no_event_log(ca: NitroCa) -> None:
    for name in ("collateral", "event_log"):
        evidence = dataclasses.replace(ca.evidence(), **{name: b"x"})  # type: ignore[arg-type]  # both are bytes
        assert code(ca, evidence) == "evidence-format"


# The chain --------------------------------------------------------------------------------------------------------


def test_a_bundle_without_the_root_in_another_order_or_with_too_many(ca: NitroCa) -> None:
    bundle = [ca.root, ca.region, ca.zone, ca.machine]
    for wrong in (bundle[1:], [ca.root, ca.zone, ca.region, ca.machine], [ca.root], [], bundle[:1] * 8):
        assert code(ca, ca.with_leaf(ca.enclave, wrong)) == "chain"


@pytest.mark.parametrize(
    "options",
    [
        {"ca": True},  # an issuer's certificate as the leaf
        {"usage": {"digital_signature": False, "key_agreement": True}},
        {"curve": ec.SECP256R1()},
        {"extensions": {"1.2.3": b"\x05\x00"}, "critical": True},
    ],
)
def test_leaves_that_may_not_sign(ca: NitroCa, options: dict[str, Any]) -> None:
    assert code(ca, ca.with_leaf(ca.issue(**options))) == "chain"


@pytest.mark.parametrize(
    "options",
    [
        {"ca": False},
        {"usage": {"key_cert_sign": False}},
        {"constraints": False, "extensions": {"1.2.3": b"\x05\x00"}},
        {"curve": ec.SECP256R1()},
        {"extensions": {"1.2.3": b"\x05\x00"}, "critical": True},
    ],
)
def test_issuers_that_may_not_issue(ca: NitroCa, options: dict[str, Any]) -> None:
    machine = certify("test.machine", ca.zone, now=NOW, **options)
    leaf = certify("test.enclave", machine, now=NOW, ca=False)
    assert code(ca, ca.with_leaf(leaf, [ca.root, ca.region, ca.zone, machine])) == "chain"


def test_a_chain_longer_than_an_issuer_allows(ca: NitroCa) -> None:
    """The machine's certificate has a path length of 0: an enclave cannot certify another."""
    below = certify("below", ca.machine, now=NOW)
    leaf = certify("test.enclave", below, now=NOW, ca=False)
    assert code(ca, ca.with_leaf(leaf, [ca.root, ca.region, ca.zone, ca.machine, below])) == "chain"


def test_a_leaf_without_constraints_is_none_of_an_issuer(ca: NitroCa) -> None:
    leaf = ca.issue(constraints=False, extensions={"1.2.3": b"\x05\x00"})
    assert verify(ca.with_leaf(leaf), ANY, REPORT_DATA, NOW, roots=ca.roots).type == "nitro"


def test_the_time_must_be_a_date(ca: NitroCa) -> None:
    assert code(ca, ca.evidence(), now=1e20) == "expired"


def test_a_signature_of_another_length() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(VerificationError, match="altered"):
        ec_chain.check_signature(key.public_key(), b"short", b"message")


def test_a_document_made_when_its_certificate_was_not_valid(ca: NitroCa) -> None:
    """Now is within the leaf's life, the document's own time is not."""
    leaf = ca.issue(seconds=(-10, HOUR))
    evidence = ca.evidence(signer=leaf, certificate=leaf.der, timestamp=(NOW - 60) * 1000)
    assert code(ca, evidence) == "expired"


def test_indefinite_is_what_the_genuine_ones_have(ca: NitroCa) -> None:
    assert indefinite(ca.payload())[:1] == b"\xbf"


def test_a_certificate_whose_serial_number_is_negative(ca: NitroCa) -> None:
    leaf = ca.enclave
    serial = leaf.certificate.serial_number
    size = serial.bit_length() // 8 + 1
    number = serial.to_bytes(size, "big")
    assert leaf.der.count(number) == 1
    negative = leaf.der.replace(number, bytes([number[0] | 0x80]) + number[1:])
    assert code(ca, ca.evidence(certificate=negative)) == "evidence-format"
    assert code(ca, ca.with_leaf(ca.issue(constraints=False, extensions={}))) == "evidence-format"
