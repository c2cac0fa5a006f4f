"""TPM quotes through the production verifier; each attack ends in a code of its own. swtpm's part is in tests/tpm."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from cloister.attest.backends.tpm import (
    NOT_ENDORSED,
    NOTHING_IS_HIDDEN,
    TpmAttester,
    pack,
    pack_event_log,
    unpack,
)
from cloister.attest.backends.tpm_quote import parse_public
from cloister.attest.checks import Checks
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.rules import RuleTables, TpmRules
from cloister.attest.verify import verify
from cloister.attest.workload import Workload, measure_workload, this_workload, workload_register
from cloister.crypto.encoding import encode
from cloister.errors import RunError, VerificationError
from cloister.tpm.commands import Tpm
from tests.attest_ca import tpm_ca
from tests.attest_ca.tpm_ca import REPORT_DATA, RSA_AK, SoftwareTpm, ecc_public, name_of, quote, rsa_public, select

NOW = 1_795_000_000
EVENT = b"workload"
PCRS = {pcr: bytes([pcr]) * 32 for pcr in range(14)} | {
    14: hashlib.sha256(bytes(32) + hashlib.sha256(EVENT).digest()).digest(),
    15: bytes(32),
}
KEYS = tuple(name_of(public).hex() for public in (ecc_public(), rsa_public(), rsa_public(scheme=tpm_ca.RSAPSS)))


def policy(*values: ReferenceValue, **rules: Any) -> AppraisalPolicy:
    tpm = TpmRules(**({"attestation_keys": KEYS} | rules))
    reference = ReferenceValue(label="release", type="tpm", registers={"pcr14": PCRS[14], "pcr7": PCRS[7]})
    return AppraisalPolicy(accept=("tpm",), reference_values=values or (reference,), rules=RuleTables(tpm=tpm))


def code(evidence: Evidence, appraisal: AppraisalPolicy | None = None, report_data: bytes = REPORT_DATA) -> str:
    with pytest.raises(VerificationError) as refused:
        verify(evidence, appraisal or policy(), report_data, NOW)
    return refused.value.code


def altered(evidence: Evidence, **changes: Any) -> Evidence:
    """With other parts in its blob."""
    return dataclasses.replace(evidence, blob=pack(**(dataclasses.asdict(unpack(evidence.blob)) | changes)))


def test_accepted() -> None:
    checks = Checks()
    claims = verify(quote(PCRS), policy(), REPORT_DATA, NOW, checks=checks)
    assert (claims.type, claims.hardware, claims.confidential) == ("tpm", False, False)
    assert claims.measurement_label == "release"
    assert claims.registers == {f"pcr{n}": value.hex() for n, value in PCRS.items()}
    assert claims.report_data == hashlib.sha256(REPORT_DATA).hexdigest()
    assert claims.tcb == {
        "attestation_key": KEYS[0],
        "reset_count": "7",
        "restart_count": "1",
        "firmware_version": "2019102300163636",
    }
    assert claims.warnings == (NOTHING_IS_HIDDEN, NOT_ENDORSED)
    names = ["type", "quote format", "attestation key", "quote", "reset counter", "binding", "measurement"]
    assert [check.name for check in checks.done] == names


@pytest.mark.parametrize("pss", [False, True])
def test_rsa_keys_are_accepted(pss: bool) -> None:
    public = rsa_public(scheme=tpm_ca.RSAPSS if pss else tpm_ca.RSASSA)
    verify(quote(PCRS, key=RSA_AK, public=public, pss=pss), policy(), REPORT_DATA, NOW)


def test_hardware_only_where_a_manufacturer_vouched() -> None:
    claims = verify(quote(PCRS), policy(endorsed=True), REPORT_DATA, NOW)
    assert (claims.hardware, claims.confidential, claims.warnings) == (True, False, (NOTHING_IS_HIDDEN,))


# Attack list, 10 ------------------------------------------------------------------------------------------------------


def test_attack_attestation_key_not_activated() -> None:
    other = ec.derive_private_key(99, ec.SECP256R1())
    assert code(quote(PCRS, key=other)) == "attestation-key"
    assert code(quote(PCRS), policy(attestation_keys=())) == "attestation-key"
    # Any bit of the public area counts: with noDA cleared the same key has another name.
    assert code(quote(PCRS, public=ecc_public(attributes=tpm_ca.RESTRICTED_SIGNING & ~0x400))) == "attestation-key"


def test_attack_swtpm_under_a_production_policy() -> None:
    """A policy that pins nothing accepts nobody's TPM, whatever it measures."""
    open_policy = AppraisalPolicy(accept=("tpm",), any_measurement=True)
    assert code(quote(PCRS), open_policy) == "attestation-key"


@pytest.mark.parametrize(
    "attributes",
    [
        tpm_ca.RESTRICTED_SIGNING & ~tpm_ca.RESTRICTED,
        tpm_ca.RESTRICTED_SIGNING & ~tpm_ca.FIXED_TPM,
        tpm_ca.RESTRICTED_SIGNING & ~tpm_ca.FIXED_PARENT,
        tpm_ca.RESTRICTED_SIGNING & ~tpm_ca.ORIGIN,
        tpm_ca.RESTRICTED_SIGNING & ~tpm_ca.SIGN,
        tpm_ca.RESTRICTED_SIGNING | tpm_ca.DECRYPT,
        tpm_ca.RESTRICTED_SIGNING | 1 << 19,
    ],
)
def test_attack_unrestricted_attestation_key(attributes: int) -> None:
    """Even if somebody enrolled it: a key that signs anything can sign a forged quote."""
    public = ecc_public(attributes=attributes)
    assert code(quote(PCRS, public=public), policy(attestation_keys=(name_of(public).hex(),))) == "tpm-key"


@pytest.mark.parametrize("kind", [tpm_ca.CERTIFY, tpm_ca.CREATION, 0x8014, 0x8019, 0x0000])
def test_attack_not_a_quote(kind: int) -> None:
    assert code(quote(PCRS, kind=kind)) == "tpm-quote"


def test_attack_not_made_by_a_tpm() -> None:
    assert code(quote(PCRS, magic=b"\xffTCH")) == "tpm-quote"


def test_attack_wrong_bank() -> None:
    assert code(quote(PCRS, selection=select(PCRS, bank=tpm_ca.SHA1))) == "tpm-quote"
    two = b"\0\0\0\2" + select(PCRS)[4:] + select([0], bank=tpm_ca.SHA1)[4:]
    assert code(quote(PCRS, selection=two)) == "tpm-quote"


def test_attack_pcr_subset() -> None:
    """Quoted without the one that the policy names; and shown with one that was not quoted."""
    subset = {n: PCRS[n] for n in PCRS if n != 14}
    assert code(quote(subset)) == "measurement"
    assert code(quote(subset, shown=PCRS)) == "pcr"
    assert code(quote(PCRS, shown=subset)) == "pcr"
    assert code(quote({})) == "pcr"


def test_attack_other_pcr_values() -> None:
    assert code(quote(PCRS, shown=PCRS | {7: bytes(32)})) == "pcr"
    assert code(quote(PCRS | {7: bytes(32)})) == "measurement"


def test_attack_reset_counter_moved() -> None:
    verify(quote(PCRS, resets=7), policy(min_reset_count=7, max_reset_count=7), REPORT_DATA, NOW)
    assert code(quote(PCRS, resets=8), policy(min_reset_count=7, max_reset_count=7)) == "tpm-reset"
    assert code(quote(PCRS, resets=6), policy(min_reset_count=7)) == "tpm-reset"


def test_attack_replay_with_another_nonce() -> None:
    assert code(quote(PCRS), report_data=bytes(64)) == "binding"
    assert code(quote(PCRS, extra_data=b"")) == "binding"


def test_attack_signature_by_another_key() -> None:
    other = ec.derive_private_key(99, ec.SECP256R1())
    assert code(quote(PCRS, key=other, public=ecc_public())) == "signature"
    assert code(quote(PCRS, key=RSA_AK, public=ecc_public())) == "signature"


# Malformed ------------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_refused() -> None:
    evidence = quote(PCRS, event_log=pack_event_log([(14, EVENT)]))
    verify(evidence, policy(), REPORT_DATA, NOW)
    for at in range(len(evidence.blob)):
        blob = bytearray(evidence.blob)
        blob[at] ^= 1 << at % 8
        code(dataclasses.replace(evidence, blob=bytes(blob)))
    for at in range(len(evidence.event_log)):
        log = bytearray(evidence.event_log)
        log[at] ^= 1 << at % 8
        assert code(dataclasses.replace(evidence, event_log=bytes(log))) == "event-log"


def test_truncated_and_trailing_bytes_are_refused() -> None:
    evidence = quote(PCRS)
    for end in range(len(evidence.blob)):
        assert code(dataclasses.replace(evidence, blob=evidence.blob[:end])) == "evidence-format"
    assert code(dataclasses.replace(evidence, blob=evidence.blob + b"\0")) == "evidence-format"
    parts = unpack(evidence.blob)
    assert code(altered(evidence, signature=parts.signature + b"\0")) == "evidence-format"
    assert code(altered(evidence, public=parts.public + b"\0")) == "evidence-format"
    assert code(altered(evidence, public=parts.public[:-1])) == "evidence-format"
    signed = parts.attest + b"\0"
    assert code(altered(evidence, attest=signed, signature=tpm_ca.sign(signed))) == "evidence-format"


def test_oversized_fields_are_refused() -> None:
    evidence = quote(PCRS)
    assert code(altered(evidence, attest=bytes(4097))) == "evidence-format"
    assert code(altered(evidence, public=unpack(evidence.blob).public[:8] + b"\xff\xff")) == "evidence-format"
    assert code(dataclasses.replace(evidence, blob=bytes(1 << 15))) == "evidence-format"
    assert code(quote(PCRS, selection=select(PCRS, size=5))) == "evidence-format"
    with pytest.raises(VerificationError, match="too long"):
        parse_public(bytes(4097))


@pytest.mark.parametrize("more", [{"24": bytes(32)}, {"00": bytes(32)}, {"x": b""}, {"0": bytes(31)}, {"0": "text"}])
def test_malformed_pcr_tables_are_refused(more: dict[str, Any]) -> None:
    parts = dataclasses.asdict(unpack(quote(PCRS).blob))
    table = {str(pcr): value for pcr, value in PCRS.items()} | more
    assert code(Evidence(type="tpm", blob=encode(parts | {"pcrs": table}))) == "evidence-format"


def test_unknown_fields_are_refused() -> None:
    parts = dataclasses.asdict(unpack(quote(PCRS).blob)) | {"pcrs": {str(pcr): v for pcr, v in PCRS.items()}}
    verify(Evidence(type="tpm", blob=encode(parts)), policy(), REPORT_DATA, NOW)
    assert code(Evidence(type="tpm", blob=encode(parts | {"more": b""}))) == "evidence-format"


def test_collateral_is_refused() -> None:
    assert code(dataclasses.replace(quote(PCRS), collateral=b"x")) == "evidence-format"


@pytest.mark.parametrize(
    "public",
    [
        ecc_public(name_alg=tpm_ca.SHA1),
        ecc_public(scheme=tpm_ca.RSASSA),
        ecc_public(curve=4),
        ecc_public(point=(1, 1)),
        b"\0\x08" + ecc_public()[2:],
        rsa_public(scheme=tpm_ca.ECDSA),
        rsa_public(exponent=3),
        rsa_public(bits=1024, modulus=b"\xff" * 128),
    ],
)
def test_keys_that_no_tpm_attests_with_are_refused(public: bytes) -> None:
    pinned = policy(attestation_keys=(name_of(public).hex(),))
    assert code(quote(PCRS, public=public), pinned) == "tpm-key"


def test_rsa_key_of_another_length_than_it_says_is_refused() -> None:
    assert code(quote(PCRS, public=rsa_public(bits=3072))) == "evidence-format"


def test_signature_over_another_hash_is_refused() -> None:
    evidence = quote(PCRS)
    signature = unpack(evidence.blob).signature
    assert code(altered(evidence, signature=signature[:2] + b"\0\4" + signature[4:])) == "signature"


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    code(Evidence(type="tpm", blob=data))
    code(altered(quote(PCRS), public=data))
    code(quote(PCRS, event_log=data or b"x"))


# Event log ------------------------------------------------------------------------------------------------------------


def test_event_log_replays() -> None:
    checks = Checks()
    evidence = quote(PCRS, event_log=pack_event_log([(14, EVENT)]))
    verify(evidence, policy(), REPORT_DATA, NOW, checks=checks)
    assert ("event log", "replays to PCR 14") in [(check.name, check.reason) for check in checks.done]


@pytest.mark.parametrize(
    "events",
    [
        [(14, b"other")],
        [(14, EVENT), (14, EVENT)],
        [(13, EVENT)],
        [(16, EVENT)],
        [(14, EVENT), (15, b"")],
        [(24, EVENT)],
        [],
    ],
)
def test_event_logs_that_do_not_explain_the_quote_are_refused(events: list[tuple[int, bytes]]) -> None:
    assert code(quote(PCRS, event_log=pack_event_log(events))) == "event-log"


@pytest.mark.parametrize(
    "log", [{"pcr": 14}, [{"pcr": 14, "event": EVENT, "x": 1}], [14], [{"event": EVENT}], [{}] * 1025]
)
def test_malformed_event_logs_are_refused(log: Any) -> None:
    assert code(quote(PCRS, event_log=encode(log))) == "event-log"


# The attester and the measured workload -------------------------------------------------------------------------------


@pytest.fixture
def tpm(monkeypatch: pytest.MonkeyPatch) -> SoftwareTpm:
    software = SoftwareTpm()
    opened: list[str] = []

    def open_tpm(address: str) -> SoftwareTpm:
        opened.append(address)
        return software

    monkeypatch.setattr(Tpm, "open", open_tpm)
    monkeypatch.setattr(software, "opened", opened, raising=False)
    return software


def test_attester(tpm: SoftwareTpm) -> None:
    name, value = workload_register()
    accepted = policy(ReferenceValue(label="this", type="tpm", registers={name: value}))
    for attester in (TpmAttester(), TpmAttester.open("swtpm:/socket"), TpmAttester(Path("/elsewhere"))):
        claims = verify(attester.collect(REPORT_DATA), accepted, REPORT_DATA, NOW)
        assert claims.measurement_label == "this"
        assert not tpm.is_open
    opened = tpm.opened  # type: ignore[attr-defined]  # the fixture's
    assert opened == 2 * ["/dev/tpmrm0", "swtpm:/socket", "/elsewhere/dev/tpmrm0"]  # to measure, and to collect
    with pytest.raises(ValueError, match="64"):
        attester.collect(bytes(32))


def test_attester_is_found_by_its_device(tmp_path: Path) -> None:
    assert TpmAttester.found(tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "tpmrm0").touch()
    assert TpmAttester.found(tmp_path) == str(tmp_path / "dev" / "tpmrm0")


def test_workload_is_measured_once_per_boot(tpm: SoftwareTpm) -> None:
    workload = Workload(source=b"s" * 32, python="CPython 3.11", packages=("a==1", "b==2"))
    for _ in range(2):
        measure_workload(tpm, workload)  # type: ignore[arg-type]  # a stand-in
    assert tpm.pcrs[14] == hashlib.sha256(bytes(32) + hashlib.sha256(workload.event).digest()).digest()
    assert workload_register(workload) == ("pcr14", tpm.pcrs[14])
    newer = dataclasses.replace(workload, packages=("a==1", "b==3"))
    before = dict(tpm.pcrs)
    with pytest.raises(RunError, match="does not measure this program"):
        measure_workload(tpm, newer)  # type: ignore[arg-type]
    assert tpm.pcrs == before


@pytest.mark.parametrize("pcr", [7, 16, 23])
def test_workload_is_never_measured_where_it_could_be_undone(tpm: SoftwareTpm, pcr: int) -> None:
    with pytest.raises(ValueError, match="reset"):
        measure_workload(tpm, pcr=pcr)  # type: ignore[arg-type]


def test_every_part_of_the_workload_counts() -> None:
    workload = this_workload()
    assert any(package.startswith("cryptography==") for package in workload.packages)
    assert workload.packages == tuple(sorted(workload.packages))
    others = [{"source": bytes(32)}, {"python": "CPython 3.0"}, {"packages": workload.packages[1:]}]
    digests = {dataclasses.replace(workload, **change).digest for change in others}
    assert len(digests | {workload.digest}) == 4
