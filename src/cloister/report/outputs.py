"""The outputs of the single commands; `OUTPUTS` lists every output there is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from cloister.report.attest import (
    AttestCollectReport,
    AttestEnrolReport,
    AttestEnrolStepReport,
    AttestFetchReport,
    AttestShowReport,
    AttestVerifyReport,
    MeasureReport,
)
from cloister.report.bench import BenchSliceReport, BenchSplitReport
from cloister.report.model import (
    Attestation,
    Comparison,
    Count,
    Host,
    Masking,
    Output,
    Part,
    PartyFit,
    ReceiptRef,
    Records,
    ResultRow,
    RunReport,
    Scored,
    Seconds,
    Sha256,
    System,
    Training,
    Truncated,
    Versioned,
    WireBytes,
)
from cloister.report.plan import PadsReport, PlanReport


class JoinReport(Versioned):
    """`cloister join`: what one party got and sent."""

    job_id: Sha256
    party: str
    attestation: Attestation
    records: Records
    truncated: Truncated
    results: list[ResultRow]
    """The metrics that the job declares to all parties."""
    wire: WireBytes
    timing: dict[str, Seconds]
    adapter_sha256: Sha256
    released: bool
    """The adapter was released to this party."""
    receipt: ReceiptRef
    masking: Masking | None = None
    """Method `slice`: what crossed between this party's enclave and its accelerators."""
    fits: list[PartyFit] = Field(default_factory=list)
    """Method `split`: how the trained adapter fits every party's training data, as the job declares it to all."""
    warnings: list[str] = Field(default_factory=list)


class Countersignature(Part):
    """A party's, under a receipt."""

    time: Count
    """Seconds since 1970."""
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class EnclaveReport(Versioned):
    """`cloister enclave`, when it ends: what its operator may know."""

    job_id: Sha256
    address: str
    attestation: Attestation
    attester: str
    """What attested this machine, and where it was found."""
    parties: list[str]
    training: Training
    timing: dict[str, Seconds]
    adapter_sha256: Sha256
    receipt_sha256: Sha256
    receipt_body_sha256: Sha256
    """What the parties have countersigned."""
    countersignatures: dict[str, Countersignature]
    """By party."""


class AcceleratorReport(Versioned):
    """`cloister accelerator`, when it was ended."""

    address: str
    device: str
    products: Count
    """How many it computed."""


class InitReport(Versioned):
    """`cloister init`."""

    path: str


class KeygenReport(Versioned):
    """`cloister keygen`: the public half; the private one is only in the file."""

    path: str
    public_key: str
    fingerprint: str


class EvaluateReport(Versioned):
    """`cloister evaluate`: the scores of all systems of a finished run, from its per-example scores."""

    source: str
    """The run folder, or one party's folder: that holds the party's own test set only."""
    job_id: Sha256
    results: list[ResultRow]
    warnings: list[str] = Field(default_factory=list)


class RunRef(Part):
    """One side of a comparison of runs."""

    path: str
    job_id: Sha256
    job_name: str
    system: System
    created: AwareDatetime


class CompareReport(Versioned):
    """`cloister compare A B`: paired over the examples that both runs scored."""

    a: RunRef
    b: RunRef
    comparisons: list[Comparison]
    scores_a: list[Scored]
    scores_b: list[Scored]
    warnings: list[str] = Field(default_factory=list)


class DoctorCheck(Part):
    """One look at the machine."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""


class DoctorReport(Versioned):
    """`cloister doctor`: what this machine can do."""

    ok: bool
    """No check failed."""
    checks: list[DoctorCheck]
    host: Host


class VerifyCheck(Part):
    """One numbered step of a verification; a step has the same number in every report."""

    n: Annotated[int, Field(ge=1)]
    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str
    """What was found, or why the step was skipped."""


class Signer(Part):
    """A party whose signatures on job, manifest and receipt hold."""

    party: str
    public_key_fingerprint: str
    """Compare it with what the party told you by another way."""
    vouched_at: AwareDatetime
    """When it verified the enclave live and countersigned the receipt."""


class VerifyReport(Versioned):
    """`cloister verify`: an offline check of a run's receipt."""

    path: str
    verdict: Literal["verified", "integrity only, origin not verified", "refused"]
    """With "integrity only" nothing was altered, but no policy said which enclave may have made it."""
    policy: str
    """The policy that the evidence was judged by; "none" without one."""
    valid_at: AwareDatetime | None
    """The time for which the evidence was judged: when the first party vouched for the enclave. Null if refused."""
    job_id: Sha256 | None
    """Null where the receipt cannot be read."""
    adapter_sha256: Sha256 | None
    attestation: Attestation | None
    """Null unless the evidence was verified."""
    signers: list[Signer]
    checks: list[VerifyCheck]
    warnings: list[str] = Field(default_factory=list)


class PartyFingerprint(Part):
    """A party's key, to be compared by voice or on paper."""

    party: str
    public_key_fingerprint: str


class MeasurementRef(Part):
    """A program that a policy accepts."""

    label: str
    type: str
    registers: dict[str, str]


class SliceTerms(Part):
    """What a party approves with method `slice` beside the rest, and its own accelerators."""

    rounds: Annotated[int, Field(ge=1)]
    aggregation: str
    clip_norm: float | None
    """Longest change of the adapter that one party may make in a round."""
    quorum: Count
    """Parties whose updates end a round after its deadline."""
    pads: Literal["precomputed", "dual", "none"]
    bits: Literal[8, 16]
    checked: bool
    accelerators: list[str]
    """Addresses that this party's file names; they are no part of what is signed."""
    insecure: list[str]
    """What the masking does not protect, in words."""


class SignReport(Versioned):
    """`cloister sign`: what a party approves, and where its approval was written."""

    job_id: Sha256
    job_name: str
    party: str
    parties: list[PartyFingerprint]
    recipients: list[str]
    """Who gets the adapter; empty: nobody, it is used by split inference."""
    inference: dict[str, Any]  # Any: JSON
    """Who may query the tuned model, and what a query returns."""
    policy_sha256: Sha256
    accepts: list[str]
    """Types of evidence."""
    measurements: list[MeasurementRef]
    """Programs that the policy accepts; empty: any, or none."""
    any_measurement: bool
    slice: SliceTerms | None = None
    """Method `slice`."""
    path: str | None
    """The approval file; null where nothing was signed."""


class Alternative(Part):
    """A token that the model might have continued with."""

    text: str
    logprob: float
    """Natural logarithm of its probability."""


class Generated(Part):
    """One answer by split inference."""

    prompt: str
    response: str
    tokens: Count
    token_ids: list[int] = Field(default_factory=list)
    finish: Literal["end", "length", "quota"]
    seconds: Seconds
    alternatives: list[list[Alternative]] = Field(default_factory=list)
    """For each token of the response the likeliest ones, itself first, where the job returns "top-k"."""


class GenerateReport(Versioned):
    """`cloister generate`."""

    job_id: Sha256
    party: str
    attestation: Attestation
    answers: list[Generated]
    warnings: list[str] = Field(default_factory=list)


class ExportedFile(Part):
    """A file that was written."""

    path: str
    bytes: Count
    sha256: Sha256


class ExportReport(Versioned):
    """`cloister export`."""

    job_id: Sha256
    kind: Literal["adapter", "merged"]
    path: str
    adapter_sha256: Sha256
    files: list[ExportedFile]
    warnings: list[str] = Field(default_factory=list)


class ErrorDetail(Part):
    """What went wrong, where, and what to do."""

    code: str
    message: str
    where: str
    hint: str


class ErrorReport(Output):
    """Any command that fails; the code is the error class of `errors.py` or the check that refused."""

    error: ErrorDetail


OUTPUTS: dict[str, type[Output]] = {
    "run": RunReport,
    "join": JoinReport,
    "enclave": EnclaveReport,
    "accelerator": AcceleratorReport,
    "bench-slice": BenchSliceReport,
    "bench-split": BenchSplitReport,
    "init": InitReport,
    "keygen": KeygenReport,
    "evaluate": EvaluateReport,
    "compare": CompareReport,
    "pads": PadsReport,
    "plan": PlanReport,
    "doctor": DoctorReport,
    "verify": VerifyReport,
    "attest-verify": AttestVerifyReport,
    "attest-show": AttestShowReport,
    "attest-collect": AttestCollectReport,
    "attest-fetch": AttestFetchReport,
    "attest-enrol": AttestEnrolReport,
    "attest-enrol-step": AttestEnrolStepReport,
    "sign": SignReport,
    "generate": GenerateReport,
    "export": ExportReport,
    "attest-measure": MeasureReport,
    "error": ErrorReport,
}
"""Schema name to model."""


def json_schema(name: str) -> dict[str, Any]:  # Any: JSON
    """The JSON Schema of an output, as it is when written."""
    schema = OUTPUTS[name].model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
