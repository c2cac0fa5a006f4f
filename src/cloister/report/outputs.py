"""The outputs of the single commands; `OUTPUTS` lists every output there is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from cloister.report.bench import BenchSliceReport, BenchSplitReport
from cloister.report.model import (
    Attestation,
    Comparison,
    Count,
    Host,
    Masking,
    Output,
    Part,
    Party,
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


class PadsReport(Versioned):
    """`cloister pads`: a store of pads is complete."""

    job_id: Sha256
    party: str
    path: str
    kept_by: str
    """What seals the store and counts its uses: "tpm", or "simulated"."""
    insecure: bool
    """Whoever copies the disk can use pads twice."""
    rows: Count
    """Of all streams."""
    streams: Count
    """Groups of layers times directions."""
    disk_bytes: Count
    multiply_adds: Count
    continued: bool
    """A run that was cut was continued, or the store was complete already."""
    given_up: str
    """Why pads that were here were given up; empty if there were none."""
    seconds: Seconds
    warnings: list[str] = Field(default_factory=list)


class RolePlan(Part):
    """What one process will need."""

    role: Literal["party", "accelerator", "enclave"]
    """With method `slice` "party" is the party's enclave, and an accelerator serves all parties."""
    name: str
    memory_bytes: Count
    disk_bytes: Count
    bytes_up: Count
    bytes_down: Count
    seconds: Seconds | None
    """null where nothing was measured to estimate it from."""


class PartyPads(Part):
    """What one party's enclave asks of accelerators in a job that nothing interrupts."""

    party: str
    steps: Count
    tokens: Count
    """Trained on, over all epochs."""
    rows: Count
    """Of pads, over all layers and both directions."""
    disk_bytes: Count
    """Of their sealed products, one round's more included; 0 unless they are precomputed."""
    pad_seconds: Seconds
    """To compute them on this machine; 0 unless they are precomputed."""
    bytes_up: Count
    """Masked values to an accelerator, scoring included."""
    bytes_down: Count
    """Products, from each accelerator."""


class MaskingPlan(Part):
    """Method `slice`: rounds, pads, and what they do not protect."""

    rounds: Annotated[int, Field(ge=1)]
    pads: Literal["precomputed", "dual", "none"]
    bits: Literal[8, 16]
    checked: bool
    parties: list[PartyPads]
    bytes_per_token: dict[Literal["up", "down"], Count]
    """Between a party's enclave and its accelerators for each trained token, scoring included."""
    insecure: list[str]
    """What the masking does not protect, in words."""


class PlanReport(Versioned):
    """`cloister plan`: a dry run."""

    job_id: Sha256
    job_name: str
    method: str
    architecture: str
    parameters: Count
    trainable_parameters: Count
    layers: Count
    former_layers: Count
    hidden_size: Count
    activation_dtype: str
    steps: Count
    tokens_per_step: Count
    parties: list[Party]
    roles: list[RolePlan]
    timing: dict[str, Seconds] = Field(default_factory=dict)
    masking: MaskingPlan | None = None
    """Method `slice`."""
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


class AttestCheck(Part):
    """One numbered step of a verification of evidence."""

    n: Annotated[int, Field(ge=1)]
    name: str
    passed: bool
    reason: str
    """What holds, or why it does not."""


class AttestVerifyReport(Versioned):
    """`cloister attest verify`: every step up to the end, or to the one that refused."""

    accepted: bool
    type: str
    """Of the evidence; empty where not even that could be read."""
    hardware: bool
    """It was accepted, and a hardware root of trust signed it."""
    checks: list[AttestCheck]
    claims: dict[str, Any]  # Any: JSON
    """What may be relied on, see `attest.claims.Claims`; empty if it was refused."""
    error_code: str | None
    """The code of the check that refused; null if it was accepted."""


class RegisterDiff(Part):
    """A register of a reference value beside that of the evidence, hex."""

    name: str
    expected: str
    found: str | None
    """null: the evidence has no such register."""
    equal: bool


class MeasurementDiff(Part):
    """A reference value of the policy, compared with evidence."""

    label: str
    type: str
    matches: bool
    registers: list[RegisterDiff]


class AttestShowReport(Versioned):
    """`cloister attest show`: what evidence says about itself. NOTHING in it was verified."""

    verified: Literal[False] = False
    path: str
    type: str
    report_data: str
    """Hex; what it is bound to."""
    registers: dict[str, str]
    """Measurements, hex."""
    details: dict[str, str]
    """What else it says, in words."""
    sizes: dict[str, Count]
    """Bytes of its parts."""
    devices: list[str] = Field(default_factory=list)
    """Types of the evidence of accelerators inside."""
    measurements: list[MeasurementDiff] = Field(default_factory=list)
    """The policy's, where one was given."""


class AttestCollectReport(Versioned):
    """`cloister attest collect`: evidence of this machine, written to a file."""

    path: str
    type: str
    attester: str
    """What was found here."""
    report_data: str
    """Hex; what the evidence is bound to."""
    bytes: Count


class AttestFetchReport(Versioned):
    """`cloister attest fetch`: a vendor's endorsements, written to a file."""

    path: str
    type: str
    """Of the evidence that they are for."""
    embedded: bool
    """The file is the evidence with the endorsements inside, not the endorsements alone."""
    sources: list[str]
    """Addresses that were asked, or the cache that had the answer."""
    bytes: Count


class AttestEnrolReport(Versioned):
    """`cloister attest enrol`: a TPM's attestation key that has completed credential activation."""

    attestation_key: str
    """Its TPM name, hex, for `attestation_keys` in [tpm] of a policy."""
    endorsement_key: str
    """SHA-256 of the endorsement key's public half, hex: compare it with what the machine's maker or owner says."""
    endorsed: bool
    """A manufacturer that was named vouches for the TPM."""
    tpm: str | None
    """Its address; none where its answer came in a file."""
    policy: str
    """The table for a policy file, TOML."""


class AttestEnrolStepReport(Versioned):
    """`cloister attest enrol request`, `challenge` and `answer`: a step of an enrolment across machines."""

    step: Literal["request", "challenge", "answer"]
    path: str
    """The file for the other machine."""
    next: str
    """What to do with it."""


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


class MeasureReport(Versioned):
    """`cloister attest measure`: reference values of an image."""

    image: str
    type: str
    """Of evidence."""
    label: str
    registers: dict[str, str]
    """What was computed: register name to hex."""
    missing: dict[str, str]
    """Registers that the image does not determine, with the reason. Without them the others prove nothing."""
    notes: list[str]
    """What the values assume."""
    table: str
    """The [[measurement]] table of a policy; it does not load while registers are missing."""
    policy: str
    """A whole policy with that table."""


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
