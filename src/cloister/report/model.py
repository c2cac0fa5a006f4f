"""Every machine-readable output, one typed model each; `docs/schema/` holds their JSON Schemas.

Models are frozen, refuse unknown keys and refuse NaN and infinity (JSON has neither). Numbers carry their unit in the
name or in the docstring: bits per byte (lower is better), accuracy as a share, bytes, seconds. An interval is a 95 %
interval `[lo, hi]`, or null where a single example cannot give one.

In results, party "all" and task "all" are pooled rows: sums of bits over sums of response bytes, sums of correct
choices over sums of examples that have choices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from cloister.errors import DataError

SCHEMA_VERSION: Literal[1] = 1
"""Raised whenever a reader of the previous version could misread an output."""

ALL = "all"
"""The party or task of a pooled row."""

OTHERS = "others"
"""In a comparison with one party's own model: the pooled test sets of all other parties."""

System = Literal["base", "local", "central", "cloister"]
Metric = Literal["bits_per_byte", "accuracy"]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Interval = tuple[float, float]


class Part(BaseModel):
    """A piece of an output."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_serialization_defaults_required=True,
    )


class Output(Part):
    """A whole output: what `--json` prints and what a run folder keeps."""

    def to_json(self) -> str:
        """Indented JSON text that ends in a newline."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """The output in a file.

        Raises:
            DataError: the file is missing, is not JSON, or does not follow the schema; names the first bad field.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as exc:
            raise DataError(f"cannot read the file: {exc.strerror}", where=str(path)) from exc
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise DataError(
                f"{field}: {first['msg']}", where=str(path), hint=f"expected a {cls.__name__}, see docs/schema/"
            ) from exc


class Versioned(Output):
    """An output with the version of its schema."""

    schema_version: Literal[1] = SCHEMA_VERSION


# --- a run ------------------------------------------------------------------------------------------------------------


class Attestation(Part):
    """What protected the enclave. `hardware` false means: nothing did."""

    type: str
    """Type of the evidence: "simulated", "tdx", "sev-snp", ..."""
    hardware: bool
    """The evidence was signed by a hardware vendor's key chain."""
    confidential: bool
    """The hardware also hides memory from the operator (a TPM does not)."""
    measurement: str
    policy_sha256: Sha256
    devices: list[dict[str, str]] = Field(default_factory=list)
    """Accelerators that attested together with the enclave: type, identity, firmware, driver."""
    warnings: list[str] = Field(default_factory=list)
    """What the evidence does not show, or shows with a reservation."""


class Records(Part):
    """Records of one party, after `max_examples`."""

    train: Count
    validation: Count
    test: Count


class Truncated(Part):
    """What `max_tokens` cut off."""

    prompts: Count
    """Texts whose prompt lost tokens."""
    responses: Count
    """Texts whose response lost tokens."""


class Party(Part):
    """One party of the run."""

    name: str
    public_key_fingerprint: str
    records: Records
    truncated: Truncated = Truncated(prompts=0, responses=0)


class Scored(Part):
    """Scores of some test examples."""

    party: str
    """Owner of the test set, or "all"."""
    task: str
    """Task of the examples, or "all"."""
    examples: Count
    bits_per_byte: float
    bits_per_byte_ci: Interval | None
    accuracy: Share | None
    """null where no example has choices."""
    accuracy_ci: Interval | None


class ResultRow(Scored):
    """One line of the results."""

    system: System
    trained_on: str | None = None
    """For "local": the party whose model this is, always the test set's owner. Null otherwise and in pooled rows."""


class CrossRow(Scored):
    """One party's own model on another party's test set; party "others" pools all of those."""

    trained_on: str


class Comparison(Part):
    """a - b on the same examples."""

    a: str
    b: str
    party: str
    """Owner of the test set, "all", or "others" (of `trained_on`)."""
    metric: Metric
    delta: float
    """Of bits per byte: negative means that a is better. Of accuracy: positive does."""
    ci: Interval | None
    """Paired bootstrap over examples."""
    p: Share
    """Two-sided: paired bootstrap for bits per byte, exact McNemar for accuracy."""
    p_holm: Share
    """Holm-corrected over the parties of the same a, b and metric."""
    examples: Count
    trained_on: str | None = None
    """Where b is "local" and the test sets are not its owner's: the party whose model it is."""


class WireBytes(Part):
    """Bytes between a party, or all parties, and the enclave; up is towards the enclave."""

    bytes_up: Count
    bytes_down: Count
    activation_dtype: str
    """Of what method `split` sends; without meaning for `slice`."""


class PartyWire(WireBytes):
    """Bytes between one party and the enclave."""

    party: str


class Wire(Part):
    """Everything that crossed the network."""

    parties: list[PartyWire]
    total: WireBytes
    activation_dtype: str

    @classmethod
    def of(cls, counts: dict[str, tuple[int, int]], activation_dtype: str) -> Self:
        """From {party: (bytes up, bytes down)}."""
        parties = [
            PartyWire(party=name, bytes_up=up, bytes_down=down, activation_dtype=activation_dtype)
            for name, (up, down) in counts.items()
        ]
        total = WireBytes(
            bytes_up=sum(p.bytes_up for p in parties),
            bytes_down=sum(p.bytes_down for p in parties),
            activation_dtype=activation_dtype,
        )
        return cls(parties=parties, total=total, activation_dtype=activation_dtype)


class Training(Part):
    """The training of the cloister system."""

    tokens: Count
    tokens_per_s: Annotated[float, Field(ge=0)]
    steps: Count


class CurvePoint(Part):
    """One measurement during a training; either number may be absent."""

    step: Count
    tokens: Count
    train_loss: float | None = None
    """Nats per response token."""
    validation_bits_per_byte: float | None = None


class RoundParty(Part):
    """One party's part in one round of method `slice`."""

    party: str
    tokens: Count
    train_loss: float
    """Mean over the round, nats per response token, as the party's enclave states it."""
    update_norm: Annotated[float, Field(ge=0)]
    """Euclidean norm of its change of the adapter, before clipping."""
    clipped: bool
    cosine: Annotated[float, Field(ge=-1, le=1)] | None
    """Between its change and the mean change of the others."""


class RoundRow(Part):
    """One round of method `slice`."""

    round: Annotated[int, Field(ge=1)]
    train_loss: float
    """Mean over the parties, weighted by tokens."""
    validation_bits_per_byte: float | None = None
    """Of the state after the round, all parties pooled."""
    parties: list[RoundParty]
    absent: list[str]
    """Parties whose updates did not come in time."""


class PartyFit(Part):
    """How the trained adapter fits one party's training data, in method `split`."""

    party: str
    tokens: Count
    """Looked at: a sample."""
    train_loss: Annotated[float, Field(ge=0)]
    """Mean, nats per response token, without dropout."""
    loss_z: float | None
    """Robust z-score of its logarithm among the parties; null with fewer than three."""
    gradient_norm: Annotated[float, Field(ge=0)]
    """Of the gradient of that mean, over all trained parameters."""
    gradient_z: float | None


class Masking(Part):
    """How parties' enclaves used their accelerators in method `slice`."""

    pads: Literal["precomputed", "dual", "none"]
    bits: Literal[8, 16]
    """Of a frozen weight."""
    checked: bool
    """Every product was checked."""
    one_host: bool = False
    """Both accelerators of `dual` are on one machine, whose owner can take the masks off."""
    bytes_up: Count
    """Masked values and pad positions, from all parties to accelerators."""
    bytes_down: Count
    """Products, back to them."""

    @property
    def hides(self) -> bool:
        """What the accelerators' operators saw was random numbers."""
        return self.pads != "none" and not self.one_host


class ReceiptRef(Part):
    """The run's receipt, which holds the evidence and the signatures."""

    path: str
    sha256: Sha256


class Sample(Part):
    """An answer of the tuned model to one of a party's test prompts."""

    party: str
    prompt: str
    response: str
    reference: str


class Host(Part):
    """Where the run took place."""

    platform: str
    cpus: Count
    memory_bytes: Count | None
    python: str
    torch: str
    transformers: str
    peft: str


class RunReport(Versioned):
    """`report.json`, and the output of `cloister run` and `cloister demo`."""

    job_id: Sha256
    job_name: str
    method: str
    version: str
    """Of cloister."""
    created: AwareDatetime
    command: str
    model: str = ""
    """Name of the base model."""
    cut: str = ""
    """Former and latter layers in words, such as "3 of 8 layers at the parties"."""
    attestation: Attestation
    parties: list[Party]
    released_to: list[str] = []
    """Parties that received the adapter; empty: it stayed in the enclave."""
    results: list[ResultRow]
    local_cross: list[CrossRow] = []
    comparisons: list[Comparison] = []
    wire: Wire
    timing: dict[str, Seconds]
    """Seconds per phase. Phases may overlap: baselines are trained beside the rest. "total" is wall-clock time."""
    training: Training
    rounds: list[RoundRow] = []
    """Method `slice`."""
    fits: list[PartyFit] = []
    """Method `split`."""
    masking: Masking | None = None
    """Method `slice`."""
    curves: dict[str, list[CurvePoint]] = {}
    """By label: "cloister", "central", "local:NAME"."""
    adapter_sha256: Sha256
    receipt: ReceiptRef | None
    samples: list[Sample] = []
    host: Host
    warnings: list[str] = []
