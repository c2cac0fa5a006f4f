"""TPM 2.0: quotes of a machine's measurements, by an attestation key that was enrolled beforehand.

A TPM measures and hides nothing: the machine's operator reads its memory, so claims are never `confidential`. They say
`hardware` only where the policy says that a manufacturer vouched for the TPM at enrolment (see `attest.enrol`).

`Evidence.blob` is canonical CBOR {attest: TPMS_ATTEST, signature: TPMT_SIGNATURE, public: TPMT_PUBLIC of the key,
pcrs: {"0": 32 bytes, ...}}: exactly the PCRs quoted, SHA-256 bank. A quote has room for 32 bytes of our choice: they
are the SHA-256 of the report data. `Evidence.event_log` may explain PCRs: canonical CBOR [{pcr, event}, ...], where
SHA-256 of each event was extended in this order; a PCR that it names must have got nothing else since the boot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.attest.appraisal import Appraisal
from cloister.attest.backends.tpm_quote import (
    MAX_STRUCTURE_BYTES,
    NUM_PCRS,
    PCR_BYTES,
    AttestationKey,
    Quote,
    parse_public,
    verify_quote,
)
from cloister.attest.claims import Report
from cloister.attest.evidence import MAX_EVENT_LOG_BYTES, REPORT_DATA_BYTES, Evidence
from cloister.attest.rules import TpmRules
from cloister.attest.workload import PCR, measure_workload, this_workload
from cloister.crypto.encoding import Fields, decode, encode
from cloister.errors import ProtocolError, VerificationError
from cloister.tpm import templates
from cloister.tpm.commands import Tpm, extended
from cloister.tpm.device import DEFAULT
from cloister.tpm.wire import RH_ENDORSEMENT

TYPE = "tpm"
NOTHING_IS_HIDDEN = "a TPM measures and hides nothing: the machine's operator can read all data"
NOT_ENDORSED = "no manufacturer vouched for this TPM when its key was enrolled: it may be a program (swtpm)"

_QUOTED = tuple(range(16))
"""All PCRs that only a boot resets."""
_MAX_BLOB_BYTES = 1 << 14
_MAX_EVENTS = 1024
_ZERO = bytes(PCR_BYTES)


class TpmAttester:
    """Quotes this machine's PCRs.

    TpmAttester()                                     /dev/tpmrm0
    TpmAttester.open("swtpm:/path/to/socket")         a software TPM; also "swtpm:127.0.0.1:2321", or another device

    Making one measures this program into PCR 14, once per boot (see `attest.workload`). The attestation key is a
    primary key: the TPM derives it from its own seed, the same after every restart, so enrolment lasts and there is no
    file to keep. It hangs from the endorsement hierarchy, where quotes show the reset counter in clear.

    Raises: UsageError or TransportError if there is no such TPM, TpmError if it refuses, RunError if another program
        was measured since the boot.
    """

    type = TYPE

    def __init__(self, root: Path = Path("/"), *, address: str | None = None) -> None:
        self._address = address or str(root / DEFAULT.lstrip("/"))
        with Tpm.open(self._address) as tpm:
            measure_workload(tpm)

    @classmethod
    def open(cls, address: str) -> TpmAttester:
        """The attester of the TPM at an address, see `tpm.device`."""
        return cls(address=address)

    @staticmethod
    def found(root: Path) -> str | None:
        """The path of this machine's TPM device, if it has one."""
        path = root / DEFAULT.lstrip("/")
        return str(path) if path.exists() else None

    def collect(self, report_data: bytes) -> Evidence:
        """See `attest.attester.Attester`. The TPM is open only meanwhile: others use it too."""
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
        with Tpm.open(self._address) as tpm, tpm.primary(RH_ENDORSEMENT, templates.attestation_key()) as key:
            pcrs = tpm.pcr_read(_QUOTED)
            attest, signature = tpm.quote(key, hashlib.sha256(report_data).digest(), _QUOTED)
        blob = pack(attest=attest, signature=signature, public=key.public, pcrs=pcrs)
        return Evidence(type=TYPE, blob=blob, event_log=pack_event_log([(PCR, this_workload().event)]))


def pack(*, attest: bytes, signature: bytes, public: bytes, pcrs: Mapping[int, bytes]) -> bytes:
    """`Evidence.blob` from its parts."""
    values = {str(pcr): value for pcr, value in pcrs.items()}
    return encode({"attest": attest, "signature": signature, "public": public, "pcrs": values})


def pack_event_log(events: Iterable[tuple[int, bytes]]) -> bytes:
    """`Evidence.event_log` from (PCR, event)."""
    return encode([{"pcr": pcr, "event": event} for pcr, event in events])


@dataclass(frozen=True, kw_only=True)
class TpmEvidence:
    """The parts of `Evidence.blob`. Nothing in it was verified."""

    attest: bytes
    signature: bytes
    public: bytes
    pcrs: Mapping[int, bytes]


def unpack(blob: bytes) -> TpmEvidence:
    """Parse `Evidence.blob`. Raises: VerificationError("evidence-format")."""
    try:
        fields = Fields.decode(blob, max_bytes=_MAX_BLOB_BYTES, max_items=128, what="the TPM's evidence")
        parts = {name: fields.blob(name, max_size=MAX_STRUCTURE_BYTES) for name in ("attest", "signature", "public")}
        table = fields.table("pcrs")
        fields.end()
        values = Fields(table, "the PCR values")
        pcrs = {n: values.blob(str(n), size=PCR_BYTES) for n in range(NUM_PCRS) if str(n) in table}
        values.end()
    except ProtocolError as exc:
        raise VerificationError("evidence-format", f"the TPM's evidence is malformed: {exc}") from exc
    return TpmEvidence(**parts, pcrs=pcrs)


def verify(evidence: Evidence, appraisal: Appraisal) -> Report:
    """Is it a quote by a key that this policy enrolled? See `attest.appraisal.Verifier`.

    Raises: VerificationError with code "evidence-format", "tpm-key", "attestation-key", "signature", "tpm-quote",
        "pcr", "tpm-reset" or "event-log".
    """
    rules, checks = appraisal.rules.tpm, appraisal.checks
    with checks.step("quote format") as step:
        parts = unpack(evidence.blob)
        if evidence.collateral:
            raise VerificationError("evidence-format", "evidence of a TPM has no collateral")
        step.reason = f"a quote with {len(parts.pcrs)} PCR values"
    with checks.step("attestation key") as step:
        key = parse_public(parts.public)
        _check_enrolled(key, rules)
        step.reason = f"{key.name.hex()} is enrolled: a restricted signing key that cannot leave its TPM"
    with checks.step("quote") as step:
        quote = verify_quote(parts.attest, parts.signature, key.public_key, parts.pcrs)
        step.reason = f"signed by that key, over exactly the {len(quote.pcrs)} PCR values given (SHA-256)"
    with checks.step("reset counter") as step:
        _check_resets(quote.reset_count, rules)
        step.reason = f"{quote.reset_count}, within what the policy accepts"
    if evidence.event_log:
        with checks.step("event log") as step:
            named = _replay(evidence.event_log, quote.pcrs)
            step.reason = f"replays to PCR {', '.join(map(str, named))}"
    return _report(quote, key, rules)


def _check_enrolled(key: AttestationKey, rules: TpmRules) -> None:
    """Only enrolment says that a key is in a TPM at all: anybody can write a public area that claims to be."""
    if key.name.hex() not in rules.attestation_keys:
        hint = "`cloister attest enrol` activates a credential for it; then add its name to attestation_keys in [tpm]"
        raise VerificationError("attestation-key", f"the attestation key {key.name.hex()} is not enrolled", hint=hint)


def _check_resets(count: int, rules: TpmRules) -> None:
    if count < rules.min_reset_count:
        hint = "an older state of the TPM was restored, or it was replaced"
        raise VerificationError(
            "tpm-reset", f"the TPM was reset {count} times, at least {rules.min_reset_count} are known", hint=hint
        )
    if rules.max_reset_count is not None and count > rules.max_reset_count:
        hint = "the machine was restarted, or its TPM reset under a running system, which empties the PCRs"
        raise VerificationError(
            "tpm-reset", f"the TPM was reset {count} times, at most {rules.max_reset_count} are accepted", hint=hint
        )


def _replay(log: bytes, pcrs: Mapping[int, bytes]) -> list[int]:
    """The PCRs that the log explains. Raises: VerificationError("event-log")."""
    values: dict[int, bytes] = {}
    try:
        for entry in _entries(log):
            fields = Fields(entry, "an event")
            pcr = fields.integer("pcr", low=0, high=NUM_PCRS - 1)
            event = fields.blob("event", max_size=MAX_EVENT_LOG_BYTES)
            fields.end()
            values[pcr] = extended(values.get(pcr, _ZERO), hashlib.sha256(event).digest())
    except ProtocolError as exc:
        raise VerificationError("event-log", f"the event log is malformed: {exc}") from exc
    wrong = [str(pcr) for pcr, value in sorted(values.items()) if pcrs.get(pcr) != value]
    if wrong:
        hint = "events were left out, added or changed; or the log is of another boot than the quote"
        raise VerificationError(
            "event-log", f"the event log does not give PCR {', '.join(wrong)} of the quote", hint=hint
        )
    return sorted(values)


def _entries(log: bytes) -> list[Any]:
    entries = decode(log, max_bytes=MAX_EVENT_LOG_BYTES, max_items=8 * _MAX_EVENTS, what="the event log")
    if not isinstance(entries, list) or not 0 < len(entries) <= _MAX_EVENTS:
        raise ProtocolError(f"it must be a list of 1 to {_MAX_EVENTS} events")
    return entries


def _report(quote: Quote, key: AttestationKey, rules: TpmRules) -> Report:
    return Report(
        type=TYPE,
        report_data=quote.extra_data,
        registers={f"pcr{pcr}": value for pcr, value in quote.pcrs.items()},
        hardware=rules.endorsed,
        confidential=False,
        tcb={
            "attestation_key": key.name.hex(),
            "reset_count": str(quote.reset_count),
            "restart_count": str(quote.restart_count),
            "firmware_version": f"{quote.firmware_version:016x}",
        },
        warnings=(NOTHING_IS_HIDDEN,) if rules.endorsed else (NOTHING_IS_HIDDEN, NOT_ENDORSED),
    )
