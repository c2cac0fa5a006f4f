"""Attacks on AWS Nitro evidence, against the verifier that sessions use: genuine documents of AWS, and a test CA's.

The numbers are those of the attack list in docs/threat-model.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cloister.attest.binding import session_report_data
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.roots import vendor_roots
from cloister.attest.verify import verify
from cloister.errors import VerificationError
from tests.attest_ca.ec_ca import certify
from tests.attest_ca.nitro_ca import HOUR, NOW, PCRS, REPORT_DATA, NitroCa
from tests.evidence import needs_evidence, sample

LISTED = (ReferenceValue(label="cloister", type="nitro", registers={"pcr0": PCRS[0], "pcr8": PCRS[8]}),)
POLICY_OF_PARTY = AppraisalPolicy(accept=("nitro",), reference_values=LISTED)
ANY = AppraisalPolicy(accept=("nitro",), any_measurement=True)
AWS_NOW = 1_766_678_660
AWS_USER_DATA = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" + "00" * 32)


@pytest.fixture(scope="module")
def ca() -> NitroCa:
    return NitroCa()


@pytest.fixture(scope="module")
def genuine() -> Evidence:
    return Evidence(type="nitro", blob=sample("nitro/nitro_prod_2025.cbor"))


def accepted(ca: NitroCa, evidence: Evidence, **options: Any) -> Claims:
    given: dict[str, Any] = {"policy": POLICY_OF_PARTY, "now": NOW + 5, "roots": ca.roots, "report_data": REPORT_DATA}
    given |= options
    return verify(evidence, given["policy"], given["report_data"], given["now"], roots=given["roots"])


def refused(code: str, ca: NitroCa, evidence: Evidence, **options: Any) -> None:
    with pytest.raises(VerificationError) as caught:
        accepted(ca, evidence, **options)
    assert caught.value.code == code, caught.value


def aws_refuses(evidence: Evidence, now: float = AWS_NOW, user_data: bytes = AWS_USER_DATA) -> str:
    """The code with which genuine evidence, changed, is refused under AWS's own root."""
    with pytest.raises(VerificationError) as caught:
        verify(evidence, ANY, user_data, now)
    return caught.value.code


def changed(evidence: Evidence, at: int, mask: int = 1) -> Evidence:
    blob = bytearray(evidence.blob)
    blob[at] ^= mask
    return dataclasses.replace(evidence, blob=bytes(blob))


def test_what_is_not_attacked_is_accepted(ca: NitroCa) -> None:
    assert accepted(ca, ca.evidence()).measurement_label == "cloister"


# 1 and 2: measurement and debug -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pcr", [0, 8])
def test_wrong_pcr(ca: NitroCa, pcr: int) -> None:
    refused("measurement", ca, ca.evidence(pcrs={**PCRS, pcr: b"\xee" * 48}))


def test_a_listed_pcr_left_out(ca: NitroCa) -> None:
    refused("measurement", ca, ca.evidence(pcrs={n: v for n, v in PCRS.items() if n != 8}))


def test_pcrs_exchanged(ca: NitroCa) -> None:
    refused("measurement", ca, ca.evidence(pcrs={**PCRS, 0: PCRS[8], 8: PCRS[0]}))


@pytest.mark.parametrize("pcr", [0, 1, 2])
def test_debug_even_if_any_measurement_is_accepted(ca: NitroCa, pcr: int) -> None:
    refused("debug", ca, ca.evidence(pcrs={**PCRS, pcr: bytes(48)}), policy=ANY)


def test_debug_even_if_the_policy_lists_zeros(ca: NitroCa) -> None:
    zeros = ReferenceValue(label="debug", type="nitro", registers={"pcr0": bytes(48)})
    policy = AppraisalPolicy(accept=("nitro",), reference_values=(zeros,))
    refused("debug", ca, ca.evidence(pcrs={**PCRS, 0: bytes(48)}), policy=policy)


@needs_evidence
def test_debug_genuine() -> None:
    evidence = Evidence(type="nitro", blob=sample("nitro/nitro_debug_2025.cbor"))
    assert aws_refuses(evidence, now=1_766_650_850, user_data=bytes(64)) == "debug"


# 3: replay --------------------------------------------------------------------------------------------------------


def test_replayed_into_another_session_role_or_job(ca: NitroCa) -> None:
    ours: dict[str, Any] = {"role": "enclave", "job_id": "ab" * 32, "transcript": b"t" * 64}
    report_data = session_report_data(**ours)
    evidence = ca.evidence(user_data=report_data)
    assert accepted(ca, evidence, report_data=report_data)
    for other in ({"role": "party"}, {"job_id": "cd" * 32}, {"transcript": b"u" * 64}):
        refused("binding", ca, evidence, report_data=session_report_data(**(ours | other)))


def test_report_data_in_another_field(ca: NitroCa) -> None:
    """`nonce` and `public_key` are chosen by whoever asks as well: only user_data binds."""
    refused("binding", ca, ca.evidence(user_data=None, nonce=REPORT_DATA, public_key=REPORT_DATA))


# 5: time ----------------------------------------------------------------------------------------------------------


def test_too_old_and_from_the_future(ca: NitroCa) -> None:
    refused("age", ca, ca.evidence(), now=NOW + 301)
    refused("age", ca, ca.evidence(), now=NOW - 61)  # its leaf is an hour old


@needs_evidence
def test_expired_and_not_yet_valid_genuine(genuine: Evidence) -> None:
    """Its leaf lives from 16:04:16 to 19:04:19, and it was made three seconds after the first; today it is nothing."""
    assert verify(genuine, ANY, AWS_USER_DATA, AWS_NOW - 30).type == "nitro"  # a clock that is a little behind
    for now in (1_766_678_656 - 61, 1_766_678_656 - HOUR, 1_766_689_459 + 1, 1_795_000_000):
        assert aws_refuses(genuine, now=now) == "expired"


@pytest.mark.parametrize("seconds", [(-2 * HOUR, -1), (10, HOUR)])
@pytest.mark.parametrize("which", ["leaf", "intermediate", "root"])
def test_a_certificate_expired_or_not_yet_valid(which: str, seconds: tuple[float, float]) -> None:
    ca = NitroCa()
    root, machine, leaf_seconds = ca.root, ca.machine, seconds if which == "leaf" else (-HOUR, HOUR)
    if which == "root":
        root = certify("aws.nitro-enclaves", None, now=NOW, seconds=seconds)
        machine = certify("test.machine", root, now=NOW)
    elif which == "intermediate":
        machine = certify("test.machine", root, now=NOW, seconds=seconds)
    else:
        machine = certify("test.machine", root, now=NOW)
    leaf = certify("test.enclave", machine, now=NOW, seconds=leaf_seconds, ca=False)
    evidence = ca.with_leaf(leaf, [root, machine])
    refused("expired", ca, evidence, roots=dataclasses.replace(ca.roots, aws=root.certificate))


# 7: roots ---------------------------------------------------------------------------------------------------------


def test_test_ca_under_production_roots(ca: NitroCa) -> None:
    refused("chain", ca, ca.evidence(), roots=vendor_roots())


def test_attacker_root_with_the_same_name(ca: NitroCa) -> None:
    refused("chain", ca, NitroCa().evidence())


def test_attacker_chain_that_ends_in_the_true_root(ca: NitroCa) -> None:
    attacker = NitroCa()
    bundle = [ca.root, attacker.region, attacker.zone, attacker.machine]
    refused("chain", ca, attacker.with_leaf(attacker.enclave, bundle))


def test_signed_by_another_key_than_the_certificate_has(ca: NitroCa) -> None:
    refused("signature", ca, ca.evidence(signer=NitroCa().enclave))


def test_another_vendors_root(ca: NitroCa) -> None:
    """NVIDIA's keys are on the same curve: its root certifies no Nitro enclave."""
    refused("chain", ca, ca.evidence(), roots=dataclasses.replace(vendor_roots(), nvidia=ca.root.certificate))


# 8: type confusion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["tdx", "sgx", "sev-snp", "tpm", "azure-vtpm"])
def test_another_tag_on_the_envelope(ca: NitroCa, tag: str) -> None:
    evidence = dataclasses.replace(ca.evidence(), type=tag)
    refused("type", ca, evidence)
    with pytest.raises(VerificationError) as caught:
        accepted(ca, evidence, policy=AppraisalPolicy(accept=(tag,), any_measurement=True))
    assert caught.value.code != "type"


def test_other_evidence_tagged_as_nitro(ca: NitroCa) -> None:
    refused("evidence-format", ca, Evidence(type="nitro", blob=b"\x02\x00\x00\x00" + bytes(1180)))


# 9: malformed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tagged", "with an unprotected header", "another algorithm", "a longer length"])
def test_the_unsigned_envelope_has_one_form(ca: NitroCa, form: str) -> None:
    """The outer CBOR is not signed: a document in another encoding is refused, not read."""
    blob = ca.evidence().blob
    blob = {
        "tagged": b"\xd2" + blob,
        "with an unprotected header": blob.replace(b"\xa0\x59", b"\xa1\x01\x01\x59", 1),
        "another algorithm": blob.replace(b"\x44\xa1\x01\x38\x22", b"\x43\xa1\x01\x26", 1),
        "a longer length": blob[:6] + b"\x5a\x00\x00" + blob[7:],
    }[form]
    assert blob not in (ca.evidence().blob, b"")
    refused("evidence-format", ca, Evidence(type="nitro", blob=blob))


def test_truncated(ca: NitroCa) -> None:
    blob = ca.evidence().blob
    for size in (*range(0, len(blob), 37), len(blob) - 1):
        refused("evidence-format", ca, Evidence(type="nitro", blob=blob[:size]))


def test_trailing_and_oversized(ca: NitroCa) -> None:
    blob = ca.evidence().blob
    for more in (b"\0", blob, bytes(0x3000)):
        refused("evidence-format", ca, Evidence(type="nitro", blob=blob + more))


def test_every_byte_flipped(ca: NitroCa) -> None:
    evidence = ca.evidence()
    survivors = []
    for at in range(len(evidence.blob)):
        try:
            accepted(ca, changed(evidence, at), policy=ANY)
        except VerificationError:
            continue
        survivors.append(at)
    assert survivors == []


@needs_evidence
def test_every_seventh_byte_of_the_genuine_document_flipped(genuine: Evidence) -> None:
    codes = {aws_refuses(changed(genuine, at, 0xFF)) for at in range(3, len(genuine.blob), 7)}
    assert codes <= {"evidence-format", "chain", "expired", "signature"}
    assert "signature" in codes


# 12: accelerators -------------------------------------------------------------------------------------------------


def test_devices_that_nobody_promised(ca: NitroCa) -> None:
    evidence = dataclasses.replace(ca.evidence(), devices=(Evidence(type="nvidia-gpu", blob=b"x"),))
    refused("devices", ca, evidence)
