"""Attacks on TDX and SGX evidence, each through the production `verify`, each with its own code.

Numbers are those of the attack list: 1 measurement, 2 debug, 3 replay, 4 TCB, 5 validity, 6 revocation, 7 roots,
8 type confusion, 9 malformed.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from typing import Any

import pytest

from cloister.attest.backends import event_log
from cloister.attest.binding import session_report_data
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.rules import DcapRules, RuleTables, SgxRules
from cloister.attest.verify import inspect, verify
from cloister.errors import VerificationError
from tests.attest_ca.dcap_ca import NOW, RTMRS, DcapCa, pem, sgx_body, shared_ca, tdx_body
from tests.evidence import needs_evidence, sample

CA = shared_ca()
BOUND = session_report_data(role="enclave", job_id="ab" * 32, transcript=b"t" * 64)
MR_TD, MR_ENCLAVE, MR_SIGNER = b"\x11" * 48, b"\x22" * 32, b"\x33" * 32

TDX = AppraisalPolicy(
    accept=("tdx",),
    reference_values=(
        ReferenceValue(
            label="cloister", type="tdx", registers={"mr_td": MR_TD, **{f"rtmr{i}": r for i, r in enumerate(RTMRS)}}
        ),
    ),
)
SGX = AppraisalPolicy(
    accept=("sgx",),
    reference_values=(ReferenceValue(label="cloister", type="sgx", registers={"mr_enclave": MR_ENCLAVE}),),
)


def tdx(*, collateral: bytes | None = None, body: dict[str, Any] | None = None, **how: Any) -> Evidence:
    """What an honest TD sends, except for what the test changes."""
    return CA.tdx(collateral=collateral, body=tdx_body(**{"report_data": BOUND, **(body or {})}), **how)


def sgx(*, collateral: bytes | None = None, body: dict[str, Any] | None = None, **how: Any) -> Evidence:
    return CA.sgx(collateral=collateral, body=sgx_body(**{"report_data": BOUND, **(body or {})}), **how)


def judge(evidence: Evidence, policy: AppraisalPolicy, expected: bytes = BOUND, **how: Any) -> Claims:
    return verify(evidence, policy, expected, how.pop("now", NOW), **{"roots": CA.roots, **how})


def refused(evidence: Evidence, policy: AppraisalPolicy, expected: bytes = BOUND, **how: Any) -> str:
    """The code of the refusal. Anything else than a VerificationError fails the test."""
    with pytest.raises(VerificationError) as error:
        judge(evidence, policy, expected, **how)
    return error.value.code


def tdx_rules(**rules: Any) -> AppraisalPolicy:
    return dataclasses.replace(TDX, rules=RuleTables(tdx=DcapRules(**rules)))


def test_without_an_attack_both_are_accepted() -> None:
    for evidence, policy in ((tdx(), TDX), (tdx(version=5), TDX), (sgx(), SGX)):
        claims = judge(evidence, policy)
        assert (claims.measurement_label, claims.hardware, claims.confidential) == ("cloister", True, True)


# 1. Measurement -------------------------------------------------------------------------------------------------------


def test_wrong_mr_td() -> None:
    assert refused(tdx(body={"mr_td": b"\x12" + MR_TD[1:]}), TDX) == "measurement"


@pytest.mark.parametrize("register", range(4))
def test_wrong_rtmr(register: int) -> None:
    rtmrs = [bytes(48) if i == register else value for i, value in enumerate(RTMRS)]
    assert refused(tdx(body={"rtmrs": rtmrs}), TDX) == "measurement"


def test_wrong_mr_enclave() -> None:
    assert refused(sgx(body={"mr_enclave": b"\x23" + MR_ENCLAVE[1:]}), SGX) == "measurement"


def test_a_signers_older_enclave() -> None:
    """MRSIGNER says who, not which version: the security version must be asked for, and is."""
    by_signer = AppraisalPolicy(
        accept=("sgx",),
        reference_values=(ReferenceValue(label="ours", type="sgx", registers={"mr_signer": MR_SIGNER}),),
        rules=RuleTables(sgx=SgxRules(min_isv_svn=5)),
    )
    assert judge(sgx(body={"isv_svn": 5}), by_signer).measurement_label == "ours"
    assert refused(sgx(body={"isv_svn": 4}), by_signer) == "svn"
    assert refused(sgx(body={"mr_signer": bytes(32), "isv_svn": 5}), by_signer) == "measurement"


def test_an_event_log_that_hides_what_was_measured() -> None:
    def entry(name: str) -> dict[str, Any]:
        digest = event_log.runtime_digest(name, b"").hex()
        return {"imr": 3, "event_type": event_log.RUNTIME_EVENT, "digest": digest, "event": name, "event_payload": ""}

    honest = json.dumps([entry("cloister"), entry("backdoor")]).encode()
    rtmrs = event_log.replay(event_log.parse(honest))
    policy = AppraisalPolicy(accept=("tdx",), any_measurement=True)
    assert judge(tdx(body={"rtmrs": rtmrs}, event_log=honest), policy).registers["rtmr3"] == rtmrs[3].hex()
    for log in (
        [entry("cloister")],
        [entry("backdoor"), entry("cloister")],
        [entry("cloister"), entry("backdoor") | {"event": "harmless"}],
        [],
    ):
        dishonest = tdx(body={"rtmrs": rtmrs}, event_log=json.dumps(log).encode())
        assert refused(dishonest, policy) == "event-log"


# 2. Debug -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [0, 4, 5, 6])
def test_a_td_in_debug_or_profiling(bit: int) -> None:
    attributes = (1 << 28 | 1 << bit).to_bytes(8, "little")
    assert refused(tdx(body={"td_attributes": attributes}), TDX) == "debug"


def test_an_enclave_in_debug() -> None:
    assert refused(sgx(body={"flags": 0x07}), SGX) == "debug"


@needs_evidence
def test_a_genuine_enclave_in_debug() -> None:
    evidence = Evidence(type="sgx", blob=sample("sgx/sgx_quote_debug.dat"))
    assert refused(evidence, SGX, roots=None) == "debug"


# 3. Replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expected",
    [
        session_report_data(role="enclave", job_id="ab" * 32, transcript=b"u" * 64),
        session_report_data(role="enclave", job_id="ac" * 32, transcript=b"t" * 64),
        session_report_data(role="party", job_id="ab" * 32, transcript=b"t" * 64),
        bytes(64),
    ],
    ids=["other session", "other job", "reflected", "nothing"],
)
def test_evidence_made_for_something_else(expected: bytes) -> None:
    assert refused(tdx(), TDX, expected) == "binding"
    assert refused(sgx(), SGX, expected) == "binding"


# 4. TCB ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["OutOfDate", "OutOfDateConfigurationNeeded", "SWHardeningNeeded", "Revoked"])
def test_a_platform_that_is_not_up_to_date(status: str) -> None:
    assert refused(tdx(collateral=CA.collateral(status=status)), TDX) == "tcb"
    assert refused(sgx(collateral=CA.collateral("sgx", status=status)), SGX) == "tcb"


def test_revoked_cannot_be_opted_in() -> None:
    with pytest.raises(ValueError, match="statuses"):
        DcapRules(statuses=("Revoked",))  # type: ignore[arg-type]  # that it is refused is the point
    every = tdx_rules(statuses=("UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate"))
    assert refused(tdx(collateral=CA.collateral(status="Revoked")), every) == "tcb"
    assert refused(tdx(collateral=CA.collateral(qe_status="Revoked")), every) == "tcb"


def test_an_advisory_that_nobody_accepted() -> None:
    evidence = tdx(collateral=CA.collateral(status="SWHardeningNeeded", advisories=["INTEL-SA-00615"]))
    assert refused(evidence, tdx_rules(statuses=("SWHardeningNeeded",))) == "tcb"
    assert refused(evidence, tdx_rules(statuses=("SWHardeningNeeded",), advisories=("INTEL-SA-00614",))) == "tcb"
    opted_in = tdx_rules(statuses=("SWHardeningNeeded",), advisories=("INTEL-SA-00615",))
    assert judge(evidence, opted_in).tcb["advisories"] == "INTEL-SA-00615"


def test_collateral_from_before_a_recovery() -> None:
    assert refused(tdx(collateral=CA.collateral(evaluation=16)), tdx_rules(min_tcb_evaluation=17)) == "tcb"


@needs_evidence
def test_a_genuine_platform_that_is_too_old() -> None:
    quote, collateral = sample("tdx/tdx_quote_outdated"), sample("tdx/tdx_quote_outdated_collateral.json")
    every = tdx_rules(statuses=("UpToDate", "OutOfDate", "OutOfDateConfigurationNeeded"))
    evidence = Evidence(type="tdx", blob=quote, collateral=collateral)
    assert refused(evidence, every, roots=None, now=1_771_500_000) == "tcb"


# 5. Validity ----------------------------------------------------------------------------------------------------------


def stale_and_early() -> dict[str, dict[str, Any]]:
    stale, early = (-30, -1), (1, 30)
    return {
        f"{word} {what}": {name: make(days)}
        for word, days in (("stale", stale), ("early", early))
        for what, name, make in (
            ("TCB info", "days", lambda days: days),
            ("QE identity", "qe_days", lambda days: days),
            ("root CRL", "root_ca_crl", lambda days: CA.crl(of_root=True, days=days).hex()),
            ("PCK CRL", "pck_crl", lambda days: CA.crl(of_root=False, days=days).hex()),
        )
    }


@pytest.mark.parametrize(("name", "change"), stale_and_early().items())
def test_collateral_out_of_its_time(name: str, change: dict[str, Any]) -> None:
    assert refused(tdx(collateral=CA.collateral(**change)), TDX) == "expired"
    assert refused(sgx(collateral=CA.collateral("sgx", **change)), SGX) == "expired"


@pytest.mark.parametrize("days", [(-30, -1), (1, 30)])
def test_a_platform_certificate_out_of_its_time(days: tuple[int, int]) -> None:
    assert refused(tdx(pck=CA.certify_pck(days=days)), TDX) == "expired"


@pytest.mark.parametrize("shift_s", [-2 * 86_400, 31 * 86_400, -NOW, 20 * 365 * 86_400])
def test_a_clock_set_back_or_forward(shift_s: int) -> None:
    assert refused(tdx(), TDX, now=NOW + shift_s) == "expired"
    assert refused(sgx(), SGX, now=NOW + shift_s) == "expired"


# 6. Revocation --------------------------------------------------------------------------------------------------------


def test_a_revoked_platform() -> None:
    crl = CA.crl(of_root=False, revoked=[1, CA.pck.serial_number]).hex()
    assert refused(tdx(collateral=CA.collateral(pck_crl=crl)), TDX) == "revoked"
    assert refused(sgx(collateral=CA.collateral("sgx", pck_crl=crl)), SGX) == "revoked"
    elsewhere = CA.crl(of_root=False, revoked=[1, CA.pck.serial_number + 1]).hex()
    assert judge(tdx(collateral=CA.collateral(pck_crl=elsewhere)), TDX).hardware


@pytest.mark.parametrize("name", ["pck_ca", "tcb_signer", "root"])
def test_a_revoked_issuer(name: str) -> None:
    crl = CA.crl(of_root=True, revoked=[getattr(CA, name).serial_number]).hex()
    assert refused(tdx(collateral=CA.collateral(root_ca_crl=crl)), TDX) == "revoked"


def test_revocation_lists_that_somebody_else_signed() -> None:
    """Revoked, and the host brings lists of its own CA of the same names in which it is not."""
    attacker = DcapCa()
    for name, of_root in (("root_ca_crl", True), ("pck_crl", False)):
        forged: dict[str, Any] = {name: attacker.crl(of_root=of_root).hex()}
        assert refused(tdx(collateral=CA.collateral(**forged)), TDX) in ("collateral", "chain")


# 7. Roots -------------------------------------------------------------------------------------------------------------


def test_the_test_ca_under_production_roots() -> None:
    for evidence, policy in ((tdx(), TDX), (sgx(), SGX)):
        assert refused(evidence, policy, roots=None) == "chain"


def test_an_attackers_root_of_the_same_name() -> None:
    attacker = DcapCa()
    theirs = attacker.tdx(body=tdx_body(report_data=BOUND))
    assert refused(theirs, TDX) == "chain"
    # The trusted root put behind a chain that it has not signed, with their collateral and with ours.
    chain = pem(attacker.pck, attacker.pck_ca, CA.root).encode()
    for collateral in (attacker.collateral(), CA.collateral()):
        mixed = attacker.tdx(body=tdx_body(report_data=BOUND), chain=chain, collateral=collateral)
        assert refused(mixed, TDX) in ("chain", "collateral")
    # A genuine platform's chain behind a quote that its key has not signed.
    stolen = attacker.tdx(
        body=tdx_body(report_data=BOUND),
        chain=pem(CA.pck, CA.pck_ca, CA.root).encode(),
        collateral=CA.collateral(),
    )
    assert refused(stolen, TDX) == "signature"


def test_collateral_that_the_host_wrote_itself() -> None:
    """A lenient TCB level, a quoting enclave of its own: signed by the wrong key, or not signed anew."""
    attacker = DcapCa()
    theirs, ours = (json.loads(ca.collateral()) for ca in (attacker, CA))
    for part in ("tcb_info", "qe_identity"):
        forged = ours | {name: theirs[name] for name in (f"{part}_issuer_chain", part, f"{part}_signature")}
        assert refused(tdx(collateral=json.dumps(forged).encode()), TDX) == "chain"
        edited = ours | {part: ours[part].replace('"UpToDate"', '"UpToDate" ')}
        assert refused(tdx(collateral=json.dumps(edited).encode()), TDX) == "collateral"


def test_missing_collateral_fails_closed() -> None:
    assert refused(tdx(collateral=b""), TDX) == "collateral"
    assert refused(sgx(collateral=b""), SGX) == "collateral"


# 8. Type confusion ----------------------------------------------------------------------------------------------------


def test_another_envelope() -> None:
    both = AppraisalPolicy(accept=("tdx", "sgx", "sev-snp"), any_measurement=True)
    assert refused(dataclasses.replace(tdx(), type="sgx"), both) == "evidence-format"
    assert refused(dataclasses.replace(sgx(), type="tdx"), both) == "evidence-format"
    assert refused(dataclasses.replace(sgx(collateral=CA.collateral()), type="tdx"), both) == "evidence-format"
    assert refused(tdx(), SGX) == "type"
    assert refused(sgx(), TDX) == "type"


def test_another_tee_type_or_version_in_the_header() -> None:
    both = AppraisalPolicy(accept=("tdx", "sgx"), any_measurement=True)
    for evidence in (tdx(), sgx()):
        for at, value in ((4, 0x81 ^ evidence.blob[4]), (0, 3), (0, 4), (0, 5)):
            if value == evidence.blob[at]:
                continue
            blob = evidence.blob[:at] + bytes([value]) + evidence.blob[at + 1 :]
            for kind in ("tdx", "sgx"):
                changed = dataclasses.replace(evidence, blob=blob, type=kind)
                # Version 5 puts a body type where version 4 has the report: read as such, it is unknown.
                assert refused(changed, both) == "evidence-format"


def test_an_enclaves_report_inside_a_td_quote() -> None:
    both = AppraisalPolicy(accept=("tdx", "sgx"), any_measurement=True)
    inside = CA.tdx(version=5, body_type=1, body=sgx_body(report_data=BOUND))
    assert refused(inside, both) == "evidence-format"
    assert refused(dataclasses.replace(inside, type="sgx"), both) == "evidence-format"


def test_collateral_of_the_other_tee() -> None:
    assert refused(tdx(collateral=CA.collateral("sgx")), TDX) == "collateral"
    assert refused(sgx(collateral=CA.collateral("tdx")), SGX) == "collateral"


def test_collateral_of_another_platform() -> None:
    assert refused(tdx(collateral=CA.collateral(fmspc=b"\0" * 6)), TDX) == "collateral"


# 9. Malformed ---------------------------------------------------------------------------------------------------------


GENUINE = {
    "tdx v4": ("tdx", "tdx/tdx_quote", "tdx/tdx_quote_collateral.json", 1_750_400_000),
    "tdx v5": ("tdx", "tdx/tdx_quote_v5_gcp.dat", "tdx/tdx_quote_outdated_collateral.json", 1_771_500_000),
    "sgx": ("sgx", "sgx/sgx_quote", "sgx/sgx_quote_collateral.json", 1_750_400_000),
}
ANY = AppraisalPolicy(
    accept=("tdx", "sgx"),
    any_measurement=True,
    rules=RuleTables(
        sgx=SgxRules(statuses=("ConfigurationAndSWHardeningNeeded",), advisories=("INTEL-SA-00289", "INTEL-SA-00615"))
    ),
)


def outcome(evidence: Evidence, now: float) -> str:
    try:
        inspect(evidence, ANY, None, now)
    except VerificationError as error:
        return error.code
    return "accepted"


@needs_evidence
@pytest.mark.parametrize("name", GENUINE)
def test_every_byte_of_a_genuine_quote_flipped(name: str) -> None:
    """No byte can be changed: not in the padding, not in the root certificate, not between certificates."""
    kind, quote, collateral, now = GENUINE[name]
    blob, endorsed = sample(quote), sample(collateral)
    assert outcome(Evidence(type=kind, blob=blob, collateral=endorsed), now) == "accepted"
    codes: Counter[str] = Counter()
    for at in range(0, len(blob), 1 if name == "tdx v4" else 3):  # the others differ in their first 700 bytes only
        flipped = blob[:at] + bytes([blob[at] ^ 1 << at % 8]) + blob[at + 1 :]
        codes[outcome(Evidence(type=kind, blob=flipped, collateral=endorsed), now)] += 1
    assert {"evidence-format", "signature", "chain"} <= codes.keys()
    assert codes.keys() <= {"evidence-format", "signature", "chain", "attributes", "debug", "expired"}


@needs_evidence
@pytest.mark.parametrize("name", GENUINE)
def test_a_genuine_quote_cut_anywhere_or_longer(name: str) -> None:
    kind, quote, collateral, now = GENUINE[name]
    blob, endorsed = sample(quote), sample(collateral)
    for end in range(len(blob)):
        cut = Evidence(type=kind, blob=blob[:end], collateral=endorsed)
        # Without the zero bytes that Intel's quoting enclave leaves behind it, a version 4 quote is complete.
        padding_removed = name == "tdx v4" and end == len(blob) - 70
        assert outcome(cut, now) == ("accepted" if padding_removed else "evidence-format")
    for extra in (b"\0", b"x", bytes(70), blob, bytes(100_000)):
        longer = Evidence(type=kind, blob=blob + extra, collateral=endorsed)
        assert outcome(longer, now) == "evidence-format"


@needs_evidence
@pytest.mark.parametrize("name", GENUINE)
def test_genuine_collateral_with_any_byte_flipped(name: str) -> None:
    """Refused, or it still means the same: space, certificates that nothing depends on."""
    kind, quote, collateral, now = GENUINE[name]
    blob, endorsed = sample(quote), sample(collateral)
    rng = random.Random(5)  # noqa: S311  # changes to try, repeatable
    codes: Counter[str] = Counter()
    for at in range(0, len(endorsed), 11):
        flipped = endorsed[:at] + bytes([endorsed[at] ^ 1 << rng.randrange(8)]) + endorsed[at + 1 :]
        codes[outcome(Evidence(type=kind, blob=blob, collateral=flipped), now)] += 1
    assert codes.keys() <= {"accepted", "collateral", "chain", "expired", "revoked"}
    assert codes["collateral"] > codes["accepted"]


def test_every_byte_of_signed_collateral_flipped() -> None:
    """What Intel signs, and the revocation lists, cannot be changed at all."""
    table = json.loads(CA.collateral())
    for part in ("tcb_info", "tcb_info_signature", "qe_identity", "qe_identity_signature", "root_ca_crl", "pck_crl"):
        text = table[part]
        for at in range(0, len(text), 3):
            other = "1" if text[at] == "0" else "0"
            forged = table | {part: text[:at] + other + text[at + 1 :]}
            code = refused(tdx(collateral=json.dumps(forged).encode()), TDX)
            assert code in ("collateral", "chain", "expired"), (part, at)


def test_bytes_at_random() -> None:
    rng = random.Random(3)  # noqa: S311  # changes to try, repeatable
    for kind in ("tdx", "sgx"):
        for size in (0, 1, 47, 48, 52, 432, 632, 700, 5006, 1 << 18):
            evidence = Evidence(type=kind, blob=rng.randbytes(size), collateral=CA.collateral())
            assert refused(evidence, ANY) == "evidence-format"


def test_many_changes_at_once() -> None:
    """Only VerificationError leaves the verifier, whatever a quote was mixed from."""
    rng = random.Random(4)  # noqa: S311  # changes to try, repeatable
    sources = [tdx().blob, tdx(version=5).blob, sgx().blob]
    for _ in range(600):
        blob = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            at, size = rng.randrange(len(blob)), rng.randint(1, 40)
            blob[at : at + size] = rng.choice((rng.randbytes(size), b"", bytes(size), rng.choice(sources)[at:][:size]))
        kind = rng.choice(("tdx", "sgx"))
        if bytes(blob) not in sources:
            evidence = Evidence(type=kind, blob=bytes(blob), collateral=CA.collateral(kind))
            assert refused(evidence, ANY) in ("evidence-format", "signature", "attributes", "debug", "chain")
