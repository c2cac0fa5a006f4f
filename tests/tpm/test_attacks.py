"""Attack list 10 with a real TPM protocol peer: the TPM itself makes what the production verifier then refuses."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from cloister.attest.backends.tpm import TYPE, TpmAttester, pack, pack_event_log
from cloister.attest.enrol import enrol
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.rules import RuleTables, TpmRules
from cloister.attest.verify import verify
from cloister.attest.workload import PCR, this_workload, workload_register
from cloister.errors import RunError, VerificationError
from cloister.tpm import templates
from cloister.tpm.commands import Tpm
from cloister.tpm.wire import ALG_SHA1, RH_ENDORSEMENT, TpmError, sized, u16, u32
from tests.tpm.conftest import Swtpm
from tests.tpm.extra import Extra, certify, quote_bank, send

pytestmark = pytest.mark.tpm
REPORT_DATA = bytes(range(64))
EXTRA_DATA = hashlib.sha256(REPORT_DATA).digest()
NOW = 1_795_000_000
ALL = range(16)


def policy(swtpm: Swtpm, **rules: Any) -> AppraisalPolicy:
    """What the operator of this machine would write: its key, and this program."""
    name, value = workload_register()
    keys = {"attestation_keys": (enrol(swtpm.address).attestation_key,)}
    return AppraisalPolicy(
        accept=(TYPE,),
        reference_values=(ReferenceValue(label="this", type=TYPE, registers={name: value, "pcr7": bytes(32)}),),
        rules=RuleTables(tpm=TpmRules(**(keys | rules))),
    )


def code(evidence: Evidence, accepted: AppraisalPolicy, report_data: bytes = REPORT_DATA) -> str:
    with pytest.raises(VerificationError) as refused:
        verify(evidence, accepted, report_data, NOW)
    return refused.value.code


def quote(tpm: Tpm, *, pcrs: Any = ALL, shown: Any = None, template: bytes | None = None) -> Evidence:
    with tpm.primary(RH_ENDORSEMENT, template or templates.attestation_key()) as key:
        attest, signature = tpm.quote(key, EXTRA_DATA, pcrs)
    values = tpm.pcr_read(pcrs if shown is None else shown)
    return Evidence(type=TYPE, blob=pack(attest=attest, signature=signature, public=key.public, pcrs=values))


def test_accepted(swtpm: Swtpm) -> None:
    evidence = TpmAttester.open(swtpm.address).collect(REPORT_DATA)
    claims = verify(Evidence.from_bytes(evidence.to_bytes()), policy(swtpm), REPORT_DATA, NOW)
    assert claims.measurement_label == "this"
    assert (claims.hardware, claims.confidential) == (False, False)
    assert set(claims.registers) == {f"pcr{n}" for n in ALL}
    assert evidence.event_log == pack_event_log([(PCR, this_workload().event)])


def test_attack_swtpm_under_a_production_policy(swtpm: Swtpm, other_swtpm: Swtpm) -> None:
    """The same program with the same measurements, on a TPM that nobody enrolled."""
    evidence = TpmAttester.open(other_swtpm.address).collect(REPORT_DATA)
    assert code(evidence, policy(swtpm)) == "attestation-key"
    assert code(evidence, AppraisalPolicy(accept=(TYPE,), any_measurement=True)) == "attestation-key"


def test_attack_another_key_of_the_same_tpm(swtpm: Swtpm) -> None:
    TpmAttester.open(swtpm.address)
    accepted = policy(swtpm)
    with swtpm.open() as tpm:
        assert code(quote(tpm, template=templates.attestation_key("other")), accepted) == "attestation-key"
        verify(quote(tpm), accepted, REPORT_DATA, NOW)


def test_attack_unrestricted_key_signs_a_forged_quote(swtpm: Swtpm) -> None:
    """TPM2_Sign refuses for the attestation key what it does for an unrestricted one, which cannot be pinned."""
    TpmAttester.open(swtpm.address)
    with swtpm.open() as tpm:
        genuine = tpm.pcr_read(ALL)
        with tpm.primary(RH_ENDORSEMENT, templates.attestation_key()) as key:
            forged, _ = tpm.quote(key, EXTRA_DATA, ALL)
            digest = sized(hashlib.sha256(forged).digest())
            no_ticket = u16(0x8024) + u32(0x40000007) + sized(b"")
            with pytest.raises(TpmError, match="SIGN"):
                send(tpm, Extra.SIGN, (key.handle,), digest + u16(0x10) + no_ticket)
        template = templates.attestation_key()
        attributes = int.from_bytes(template[4:8], "big") & ~templates.RESTRICTED
        with tpm.primary(RH_ENDORSEMENT, template[:4] + attributes.to_bytes(4, "big") + template[8:]) as key:
            signature = send(tpm, Extra.SIGN, (key.handle,), digest + u16(0x10) + no_ticket).rest()
    blob = pack(attest=forged, signature=signature, public=key.public, pcrs=genuine)
    pinned = policy(swtpm, attestation_keys=(key.name.hex(),))
    assert code(Evidence(type=TYPE, blob=blob), pinned) == "tpm-key"


def test_attack_a_certification_instead_of_a_quote(swtpm: Swtpm) -> None:
    TpmAttester.open(swtpm.address)
    with swtpm.open() as tpm, tpm.primary(RH_ENDORSEMENT, templates.attestation_key()) as key:
        attest, signature = certify(tpm, key, key, EXTRA_DATA)
        blob = pack(attest=attest, signature=signature, public=key.public, pcrs=tpm.pcr_read(ALL))
    assert code(Evidence(type=TYPE, blob=blob), policy(swtpm)) == "tpm-quote"


def test_attack_wrong_bank(swtpm: Swtpm) -> None:
    TpmAttester.open(swtpm.address)
    with swtpm.open() as tpm, tpm.primary(RH_ENDORSEMENT, templates.attestation_key()) as key:
        attest, signature = quote_bank(tpm, key, EXTRA_DATA, ALL, ALG_SHA1)
        blob = pack(attest=attest, signature=signature, public=key.public, pcrs=tpm.pcr_read(ALL))
    assert code(Evidence(type=TYPE, blob=blob), policy(swtpm)) == "tpm-quote"


def test_attack_pcr_subset(swtpm: Swtpm) -> None:
    TpmAttester.open(swtpm.address)
    accepted, subset = policy(swtpm), [pcr for pcr in ALL if pcr != 7]
    with swtpm.open() as tpm:
        assert code(quote(tpm, pcrs=subset), accepted) == "measurement"
        assert code(quote(tpm, pcrs=subset, shown=ALL), accepted) == "pcr"
        assert code(quote(tpm, shown=subset), accepted) == "pcr"


def test_attack_other_software_was_measured(swtpm: Swtpm) -> None:
    """Before our program: it refuses to start. After it: the register no longer fits."""
    attester = TpmAttester.open(swtpm.address)
    accepted = policy(swtpm)
    with swtpm.open() as tpm:
        tpm.pcr_extend(PCR, b"other program".ljust(32))
    evidence = attester.collect(REPORT_DATA)
    assert code(evidence, accepted) == "event-log"
    assert code(Evidence(type=TYPE, blob=evidence.blob), accepted) == "measurement"
    with pytest.raises(RunError, match="does not measure this program"):
        TpmAttester.open(swtpm.address)


def test_attack_changed_firmware(swtpm: Swtpm) -> None:
    with swtpm.open() as tpm:
        tpm.pcr_extend(7, b"secure boot off".ljust(32))
    evidence = TpmAttester.open(swtpm.address).collect(REPORT_DATA)
    assert code(evidence, policy(swtpm)) == "measurement"


def test_attack_reset_counter_moved(swtpm: Swtpm) -> None:
    """A boot to start over with empty PCRs is visible, and so is a TPM whose older state was put back."""
    first = verify(TpmAttester.open(swtpm.address).collect(REPORT_DATA), policy(swtpm), REPORT_DATA, NOW)
    boots = int(first.tcb["reset_count"])
    copied = {path: path.read_bytes() for path in swtpm.folder.glob("*.permall")}
    assert copied
    this_boot = policy(swtpm, min_reset_count=boots, max_reset_count=boots)
    verify(TpmAttester.open(swtpm.address).collect(REPORT_DATA), this_boot, REPORT_DATA, NOW)
    for _ in range(2):
        swtpm.restart()
        evidence = TpmAttester.open(swtpm.address).collect(REPORT_DATA)
        assert code(evidence, this_boot) == "tpm-reset"
    known = policy(swtpm, min_reset_count=boots + 2)
    verify(evidence, known, REPORT_DATA, NOW)
    swtpm.stop()
    for path, content in copied.items():
        path.write_bytes(content)
    swtpm.start()
    assert code(TpmAttester.open(swtpm.address).collect(REPORT_DATA), known) == "tpm-reset"


def test_attack_replay_with_another_nonce(swtpm: Swtpm) -> None:
    evidence = TpmAttester.open(swtpm.address).collect(REPORT_DATA)
    assert code(evidence, policy(swtpm), bytes(64)) == "binding"


def test_every_flipped_byte_is_refused(swtpm: Swtpm) -> None:
    evidence, accepted = TpmAttester.open(swtpm.address).collect(REPORT_DATA), policy(swtpm)
    verify(evidence, accepted, REPORT_DATA, NOW)
    for at in range(len(evidence.blob)):
        blob = bytearray(evidence.blob)
        blob[at] ^= 1 << at % 8
        code(Evidence(type=TYPE, blob=bytes(blob), event_log=evidence.event_log), accepted)
