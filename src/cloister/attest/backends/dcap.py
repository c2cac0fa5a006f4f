"""Intel TDX and SGX: quotes verified with Intel's collateral by `dcap-qvl`, strictly.

Guarantees: a genuine platform below the pinned root made this quote, nothing of it is altered or left over, no debug,
its TCB status and every advisory are in the policy's lists, collateral is present and valid now, and an event log
replays to the quoted RTMRs. Left to the caller: binding and measurement (`attest.verify`). Collateral can be written in
several ways that mean the same (order of keys, space), so a hash of evidence is no identity.

Steps: (1) layout, (2) attributes, (3) collateral is there, (4) the pinned root, (5) certificates and revocation lists,
(6) signatures, (7) TCB status, (8) advisories, then (9) event log (TDX) or security version (SGX).

Source: Intel TDX Module ABI (TDREPORT, ATTRIBUTES), Intel SDM vol. 3D (REPORT, ATTRIBUTES), `dcap-qvl` 0.7.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding
from dcap_qvl import QuoteCollateralV3, QuotePolicy, QuoteVerifier

from cloister.attest.appraisal import Appraisal
from cloister.attest.backends import dcap_quote, event_log
from cloister.attest.backends.dcap_faults import Refusal, Stage, translate
from cloister.attest.backends.dcap_quote import Quote, Tee
from cloister.attest.claims import Report
from cloister.attest.evidence import Evidence
from cloister.attest.rules import DcapRules
from cloister.errors import VerificationError

TDX_REGISTERS: Mapping[str, slice] = {
    "mr_td": slice(136, 184),
    **{f"rtmr{i}": slice(328 + 48 * i, 376 + 48 * i) for i in range(4)},
    "mr_config_id": slice(184, 232),
    "mr_owner": slice(232, 280),
    "mr_owner_config": slice(280, 328),
    "mr_seam": slice(16, 64),
    "td_attributes": slice(120, 128),
}
SGX_REGISTERS: Mapping[str, slice] = {
    "mr_enclave": slice(64, 96),
    "mr_signer": slice(128, 160),
    "isv_prod_id": slice(256, 258),
    "config_id": slice(192, 256),
}
"""Where they lie in the report; numbers are little endian."""

_TDX_REPORT_DATA, _SGX_REPORT_DATA = slice(520, 584), slice(320, 384)
_TDX_SERVICE_TD = slice(600, 648)
"""In TD report 1.5: the measurement of bound service TDs, such as a migration TD; it could move this TD elsewhere."""
_SGX_ISV_SVN = slice(258, 260)
_SGX_FLAGS = slice(48, 56)
_SGX_RESERVED = (slice(20, 32), slice(96, 128), slice(160, 192), slice(262, 304))

_TD_DEBUG = 0x71
"""DEBUG, and the three profiling bits: each lets the host look inside."""
_TD_REQUIRED = 1 << 28
"""SEPT_VE_DISABLE: without it the host can raise exceptions in the guest at pages of its choice."""
_TD_ALLOWED = _TD_REQUIRED | 1 << 16 | 1 << 27 | 1 << 30 | 1 << 31 | 1 << 63
"""Also ICSSD, LASS, PKS, KL, PERFMON. Not allowed: migration, service TD extensions, reserved bits."""
_SGX_INIT, _SGX_DEBUG, _SGX_KNOWN = 0x01, 0x02, 0x04F7
"""Known: INIT, DEBUG, MODE64BIT, PROVISIONKEY, EINITTOKENKEY, CET, KSS, AEXNOTIFY."""

_OUT_OF_DATE = {"OutOfDate", "OutOfDateConfigurationNeeded"}
_FOREVER_S = 1 << 40
"""Later than any certificate can expire, and within what the library can count."""
_MAX_EVALUATION = (1 << 32) - 1


def verify_tdx(evidence: Evidence, appraisal: Appraisal) -> Report:
    """A trust domain's quote (version 4 or 5), and its event log if there is one.

    Raises: VerificationError("evidence-format" | "debug" | "attributes" | "collateral" | "chain" | "expired" |
        "revoked" | "signature" | "tcb" | "event-log").
    """
    rules = appraisal.rules.tdx
    quote, claims = _verify(evidence, "tdx", rules, appraisal)
    registers = {name: quote.body[where] for name, where in TDX_REGISTERS.items()}
    with appraisal.checks.step("event log") as step:
        if evidence.event_log:
            events = event_log.check(evidence.event_log, [registers[f"rtmr{i}"] for i in range(4)])
            step.reason = f"its {len(events)} events replay to the quoted RTMR 0 to 3"
        else:
            step.reason = "none was sent: what the RTMRs stand for is known only where the policy lists their values"
    return _report(quote, claims, registers, quote.body[_TDX_REPORT_DATA])


def verify_sgx(evidence: Evidence, appraisal: Appraisal) -> Report:
    """An enclave's quote (version 3).

    Raises: VerificationError as `verify_tdx`, and with code "svn".
    """
    rules = appraisal.rules.sgx
    quote, claims = _verify(evidence, "sgx", rules, appraisal)
    isv_svn = int.from_bytes(quote.body[_SGX_ISV_SVN], "little")
    with appraisal.checks.step("security version") as step:
        if isv_svn < rules.min_isv_svn:
            hint = "an older release of the enclave, with known faults, may have been started on purpose"
            message = f"the enclave's security version is {isv_svn}, the policy asks for at least {rules.min_isv_svn}"
            raise VerificationError("svn", message, hint=hint)
        step.reason = f"the enclave's security version is {isv_svn}, at least {rules.min_isv_svn} is needed"
    registers = {name: quote.body[where] for name, where in SGX_REGISTERS.items()}
    return _report(quote, claims, registers, quote.body[_SGX_REPORT_DATA], {"isv_svn": str(isv_svn)})


def _verify(evidence: Evidence, tee: Tee, rules: DcapRules, appraisal: Appraisal) -> tuple[Quote, dict[str, Any]]:
    """Steps 1 to 8. Returns the quote and the library's claims about it."""
    checks, now = appraisal.checks, min(max(0, int(appraisal.now)), _FOREVER_S)
    with checks.step("layout") as step:
        quote = _parse(evidence, tee)
        step.reason = f"{tee.upper()} quote, version {quote.version}: every byte is accounted for"
    with checks.step("attributes") as step:
        _check_attributes(quote)
        step.reason = "debug and profiling are off, no reserved bit is set"
    with checks.step("collateral") as step:
        collateral = _parse_collateral(evidence.collateral)
        step.reason = "Intel's certificates, revocation lists and TCB information came with the quote"
    root = appraisal.roots.intel.public_bytes(Encoding.DER)
    with checks.step("root") as step:
        if quote.chain[-1] != root:
            hint = "it is from a test CA or an attacker's: nothing that it signs counts"
            raise VerificationError("chain", "the quote's root certificate is not the one that we trust", hint=hint)
        step.reason = f"the quote's chain ends in {appraisal.roots.intel.subject.rfc4514_string()}"
    outcome = _ask_library(evidence.blob, quote, collateral, root, now, rules)
    with checks.step("certificates") as step:
        _raise_at("certificates", outcome)
        step.reason = _check_dates(outcome, now)
    with checks.step("signatures") as step:
        _raise_at("signatures", outcome)
        step.reason = "the platform vouches for Intel's quoting enclave, which signed this report"
    with checks.step("TCB status") as step:
        _raise_at("tcb", outcome)
        step.reason = _check_status(outcome, rules, tee)
    with checks.step("advisories") as step:
        step.reason = _check_advisories(outcome, rules, tee)
    return quote, outcome


def _parse(evidence: Evidence, tee: Tee) -> Quote:
    quote = dcap_quote.parse(evidence.blob)
    if quote.tee != tee:
        message = f"the envelope says {tee.upper()}, but the quote is of {quote.tee.upper()}"
        raise VerificationError("evidence-format", message)
    if tee == "sgx" and evidence.event_log:
        raise VerificationError("evidence-format", "SGX has no runtime registers, so it has no event log")
    return quote


def _check_attributes(quote: Quote) -> None:
    body = quote.body
    if quote.tee == "tdx":
        flags = int.from_bytes(body[TDX_REGISTERS["td_attributes"]], "little")
        debug, required, allowed = _TD_DEBUG, _TD_REQUIRED, _TD_ALLOWED
        zero = body[_TDX_SERVICE_TD]
    else:
        flags = int.from_bytes(body[_SGX_FLAGS], "little")
        debug, required, allowed = _SGX_DEBUG, _SGX_INIT, _SGX_KNOWN
        zero = b"".join(body[where] for where in _SGX_RESERVED)
    if flags & debug:
        hint = "the host can read its memory; debug is never accepted"
        raise VerificationError("debug", "debug or profiling is switched on", hint=hint)
    if flags & required != required or flags & ~allowed:
        raise VerificationError("attributes", f"the attributes {flags:#018x} are not those of a production workload")
    if any(zero):
        raise VerificationError("attributes", "reserved bytes are not zero, or a service TD is bound to it")


def _parse_collateral(data: bytes) -> QuoteCollateralV3:
    """Without a PCK chain of its own: the quote's is the one that counts."""
    if not data:
        hint = "the evidence must carry Intel's collateral for its platform; without it nothing can be judged"
        raise VerificationError("collateral", "the collateral is missing", hint=hint)
    try:
        given = QuoteCollateralV3.from_json(data.decode())
    except ValueError as exc:
        raise VerificationError("collateral", f"the collateral is malformed: {str(exc)[:200]}") from exc
    return QuoteCollateralV3(
        given.pck_crl_issuer_chain, given.root_ca_crl, given.pck_crl, given.tcb_info_issuer_chain, given.tcb_info,
        given.tcb_info_signature, given.qe_identity_issuer_chain, given.qe_identity, given.qe_identity_signature,
    )  # fmt: skip


def _ask_library(
    blob: bytes, quote: Quote, collateral: QuoteCollateralV3, root: bytes, now: int, rules: DcapRules
) -> Any:
    """The library's claims, or a Refusal."""
    try:
        claims = QuoteVerifier(root).verify_with_policy(blob, collateral, now, _policy(rules, now))
    except ValueError as exc:
        return translate(str(exc), quote.tee, quote, collateral, now)
    return json.loads(claims.to_json())


def _policy(rules: DcapRules, now: int) -> QuotePolicy:
    policy = (
        QuotePolicy.strict(now)
        .min_tcb_eval_data_number(min(rules.min_tcb_evaluation, _MAX_EVALUATION))
        .allow_dynamic_platform(rules.dynamic_platform)
        .allow_cached_keys(rules.cached_keys)
        .allow_smt(rules.smt)
    )
    for status in rules.statuses:
        policy = policy.allow_status(status)
    if _OUT_OF_DATE & set(rules.statuses):  # the library wants a grace period besides; whoever lists it sets no end
        policy = policy.platform_grace_period(_FOREVER_S).qe_grace_period(_FOREVER_S)
    return policy


def _raise_at(stage: Stage, outcome: Any) -> None:
    if isinstance(outcome, Refusal) and outcome.stage == stage:
        raise outcome.error


def _check_dates(outcome: Any, now: int) -> str:
    """The library takes revocation lists from the future; we do not."""
    if isinstance(outcome, Refusal):
        return "the chains lead to that root; nothing in them has expired or is revoked"
    if outcome["latest_issue_date"] > now:
        raise VerificationError("expired", "the collateral is dated in the future", hint="compare this machine's clock")
    return f"nothing expired or revoked; the collateral is valid until {_date(outcome['earliest_expiration_date'])}"


def _check_status(claims: dict[str, Any], rules: DcapRules, tee: Tee) -> str:
    """`strict` always takes UpToDate, and ignores statuses of the quoting enclave that Intel does not define."""
    status, of_enclave = claims["tcb"]["status"], claims["qe"]["tcb_level"]["tcbStatus"]
    if status not in rules.statuses:
        raise VerificationError("tcb", f"the platform's TCB status is {status}", hint=f"see statuses in [{tee}]")
    if of_enclave not in ("UpToDate", "OutOfDate"):
        raise VerificationError("tcb", f"the quoting enclave's TCB status {of_enclave} is unknown")
    return f"{status}, by TCB evaluation {claims['tcb']['eval_data_number']}; the policy accepts it"


def _check_advisories(claims: dict[str, Any], rules: DcapRules, tee: Tee) -> str:
    """Those of the platform's level and of the quoting enclave's, together."""
    named = sorted(claims["tcb"]["advisory_ids"])
    if refused := [name for name in named if name not in rules.advisories]:
        hint = f"read them at intel.com; a policy that takes the risk lists them in advisories of [{tee}]"
        message = f"Intel names unfixed vulnerabilities of this platform: {', '.join(refused)[:400]}"
        raise VerificationError("tcb", message, hint=hint)
    return f"the policy accepts each that Intel names: {', '.join(named)}" if named else "Intel names none"


def _report(
    quote: Quote,
    claims: dict[str, Any],
    registers: Mapping[str, bytes],
    report_data: bytes,
    more: Mapping[str, str] | None = None,
) -> Report:
    status, advisories = claims["tcb"]["status"], sorted(claims["tcb"]["advisory_ids"])
    tcb = {
        "status": status,
        "advisories": ", ".join(advisories) or "none",
        "tcb_date": claims["platform"]["tcb_level"]["tcbDate"],
        "tcb_evaluation": str(claims["tcb"]["eval_data_number"]),
        "fmspc": bytes(claims["platform"]["pck"]["fmspc"]).hex(),
        "quote_version": str(quote.version),
        "collateral_until": _date(claims["earliest_expiration_date"]),
        **(more or {}),
    }
    warnings = [] if status == "UpToDate" else [f"the platform's TCB status is {status}, which the policy accepts"]
    if advisories:
        warnings.append(f"known vulnerabilities that the policy accepts: {', '.join(advisories)}")
    return Report(
        type=quote.tee,
        report_data=report_data,
        registers=registers,
        hardware=True,
        confidential=True,
        tcb=tcb,
        warnings=tuple(warnings),
    )


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
