"""The server's enclave process: listens, waits for the parties, works, serves until nobody needs it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from cloister.agreement.job import OpenJob, open_job
from cloister.agreement.own import find_own_attester, own_claims
from cloister.agreement.receipt import Receipt
from cloister.attest.attester import Attester, Found
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.production import require_confidential, require_listed_measurements
from cloister.attest.verify import verify
from cloister.channel.handshake import Peer, Responder, ResponderSettings, VerifyEvidence
from cloister.channel.limits import Limits
from cloister.channel.server import EnclaveServer
from cloister.crypto.bundle import IncomingStore
from cloister.crypto.encoding import Fields
from cloister.crypto.sealing import write_durably
from cloister.enclave.checkpoints import CheckpointFolder
from cloister.enclave.core import EnclaveCore
from cloister.enclave.intake import Handler, Intake
from cloister.enclave.results import Outcome
from cloister.enclave.slice import SliceService
from cloister.enclave.split import SplitService
from cloister.errors import CapacityError, CloisterError, DataError, RunError, UsageError
from cloister.jobfile import LoadedJob
from cloister.progress import Progress, Task, task
from cloister.report.claims import attestation_of
from cloister.report.model import Training
from cloister.report.outputs import Countersignature, EnclaveReport

REPORT = "enclave.json"
"""In OUT once every party has countersigned the receipt."""
PARTY_TIMEOUT_S = 24 * 3600.0
"""How long to wait for parties that have not come."""
TELL_TIMEOUT_S = 5.0
"""How long a failed enclave waits for parties to ask, so that they can be told why."""
LEAVE_TIMEOUT_S = 600.0
"""How long finished results wait for parties to fetch them, unless the enclave is asked to serve."""


class Service(Protocol):
    """What a method adds to the core."""

    intake: Intake
    incoming: IncomingStore
    handlers: Mapping[str, Handler]
    parties_have_enclaves: bool
    """Whether every party must bring evidence of its own."""

    def met(self, peer: Peer, method: str) -> None:
        """Told of every request before it is answered."""

    def prepare(self, progress: Progress) -> None:
        """Load what takes a while, before parties come."""

    def work(self, core: EnclaveCore, progress: Progress) -> Outcome:
        """From the parties' keys to the outcome."""

    def query(self, party: str, method: str, fields: Fields) -> dict[str, Any]:
        """Answer a question to the tuned model."""


def serve_job(
    loaded: LoadedJob,
    out: Path,
    *,
    listen: str,
    insecure_simulated: bool,
    serve: bool,
    progress: Progress,
    insecure_not_confidential: bool = False,
) -> EnclaveReport:
    """Run a job's enclave to its end.

    A job that every party has countersigned is over, which OUT/enclave.json says. Its enclave may have ended before all
    parties heard of it: started again, it hands out the countersignatures that are in that report, and returns it.

    Args:
        out: folder for arriving (sealed) bundles, for sealed checkpoints, and for `address` once it listens. What is
            there of an earlier instance of this job is taken up.
        serve: go on answering queries after every party has left, until interrupted.

    Raises:
        UsageError: a real TEE's evidence would not cover what this Python runs: it is not isolated.
        CloisterError: what stopped the job; parties that are connected were told.
    """
    if serve and loaded.job.job.method == "slice":
        raise UsageError(
            'with method "slice" the tuned model is in the parties\' enclaves, the server has no answers',
            where="--serve",
            hint="leave it out; parties answer sample prompts at the end of their part",
        )
    opened = open_job(loaded, progress=progress)
    require_listed_measurements(opened.policy, address=listen, insecure_simulated=insecure_simulated)
    found = find_own_attester(opened, insecure_simulated=insecure_simulated, progress=progress)
    claims = own_claims(
        opened,
        found,
        role="enclave",
        insecure_simulated=insecure_simulated,
        insecure_not_confidential=insecure_not_confidential,
    )
    service: Service
    if loaded.job.job.method == "slice":
        service = SliceService(opened, out, insecure_simulated=insecure_simulated)
    else:
        service = SplitService(opened, out)
    core = _core(opened, found, claims, service, out)
    appraise = _appraise(opened, insecure_simulated=insecure_simulated, allowed=insecure_not_confidential)
    settings = responder_settings(opened, found.attester, service, appraise)
    server = EnclaveServer(
        listen,
        responder_factory=functools.partial(Responder, settings),
        handler=functools.partial(_answer, core, service),
        incoming=service.incoming,
        limits=Limits.of_job(len(opened.parties), loaded.job.enclave.max_connections),
    )
    with server:
        _write_address(out / "address", server.address)
        report = functools.partial(_report, core, opened, claims, found, server.address)
        core.concluded = None if serve else _ended(out / REPORT, opened)
        if core.concluded is not None:
            with task(progress, "handing out countersignatures"):
                core.wait_until_left(LEAVE_TIMEOUT_S)
            return core.concluded
        outcome = _work(core, service, opened, progress, lambda o, receipt: _keep(out / REPORT, report(o, receipt)))
        with task(progress, "answering queries" if serve else "handing out results"):
            if serve:
                core.wait_forever()
            core.wait_until_left(LEAVE_TIMEOUT_S)
    return report(outcome, outcome.receipt)


def _report(
    core: EnclaveCore, opened: OpenJob, claims: Claims, found: Found, address: str, outcome: Outcome, receipt: Receipt
) -> EnclaveReport:
    declared = json.loads(outcome.declared)
    return EnclaveReport(
        job_id=core.job_id,
        address=address,
        attestation=attestation_of(claims),
        attester=found.how,
        parties=list(opened.parties),
        training=Training(**{k: declared["training"][k] for k in ("tokens", "tokens_per_s", "steps")}),
        timing=declared["timing"],
        adapter_sha256=json.loads(receipt.body)["adapter_sha256"],
        receipt_sha256=hashlib.sha256(receipt.to_bytes()).hexdigest(),
        receipt_body_sha256=receipt.body_sha256.hex(),
        countersignatures={
            party: Countersignature(time=at, signature=signature.hex())
            for party, (at, signature) in receipt.countersignatures.items()
        },
    )


def _keep(path: Path, report: EnclaveReport) -> None:
    """Note that the job is over: an instance started later would wait for parties that have left, and what those lack
    that have not yet been told."""
    with suppress(CapacityError, DataError):  # every party has its results: a full disk must not cost them those
        write_durably(path, report.to_json().encode())


def _ended(path: Path, opened: OpenJob) -> EnclaveReport | None:
    """The report of this job, if it is over. Its operator, who could forge it, could as well not start the enclave."""
    try:
        report = EnclaveReport.read(path)
    except DataError:  # there is none, or half of one
        return None
    return report if report.job_id == opened.resolved.job_id else None


def responder_settings(
    opened: OpenJob, attester: Attester, service: Service, appraise: VerifyEvidence
) -> ResponderSettings:
    """How sessions begin: where parties have enclaves, none goes without evidence of its own."""
    return ResponderSettings(
        job_id=opened.resolved.job_id,
        public_keys=opened.parties,
        attester=attester,
        verify_evidence=appraise if service.parties_have_enclaves else None,
        require_evidence=service.parties_have_enclaves,
    )


def _core(opened: OpenJob, found: Found, claims: Claims, service: Service, out: Path) -> EnclaveCore:
    job = opened.resolved.job
    return EnclaveCore(
        job_id=opened.resolved.job_id,
        parties=opened.parties,
        intake=service.intake,
        attester=found.attester,
        claims=claims,
        recipients=frozenset(() if job.release.to == "none" else job.release.to),
        checkpoints=CheckpointFolder(out / "checkpoints"),
        quorum=job.quorum,
        query=service.query,
        handlers=service.handlers,
    )


def _appraise(opened: OpenJob, *, insecure_simulated: bool, allowed: bool) -> VerifyEvidence:
    """Parties' enclaves are judged by the job's policy, as this one is by the parties."""

    def appraise(evidence: Evidence, expected: bytes, now: float) -> Claims:
        claims = verify(evidence, opened.policy, expected, now, allow_simulated=insecure_simulated)
        return require_confidential(claims, allowed=allowed)

    return appraise


def _answer(core: EnclaveCore, service: Service, peer: Peer, method: str, body: dict[str, Any]) -> dict[str, Any]:
    service.met(peer, method)
    return core.handle(peer.party, method, body)


def _work(
    core: EnclaveCore,
    service: Service,
    opened: OpenJob,
    progress: Progress,
    on_complete: Callable[[Outcome, Receipt], None],
) -> Outcome:
    if (threads := opened.resolved.job.enclave.threads) is not None:
        torch.set_num_threads(threads)
    try:
        service.prepare(progress)
        with task(progress, "waiting for parties") as waiting:
            core.wait_for_keys(PARTY_TIMEOUT_S, functools.partial(_note_missing, waiting))
        outcome = service.work(core, progress)
        core.finish(outcome, functools.partial(on_complete, outcome))
        return outcome
    except Exception as error:
        fault = RunError(
            "an unexpected fault ended the enclave's work", where="enclave", hint="its operator knows more"
        )
        core.fail(error if isinstance(error, CloisterError) else fault)
        core.wait_until_left(TELL_TIMEOUT_S)
        raise


def _note_missing(waiting: Task, missing: list[str]) -> None:
    waiting.set(0.0, note=", ".join(missing))


def _write_address(path: Path, address: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"address": address, "pid": os.getpid()}))
    part.replace(path)
