"""The job file: what a fine-tuning job is, as strict types.

Two kinds of content stand in it. *Shared* fields are what every party agrees to; they are hashed into `job_id`.
*Local* fields (marked `local` below: paths, devices, addresses) differ per machine and are never hashed.
Reading the TOML text, errors with line numbers, and the canonical bytes live in `jobfile.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Criterion = Literal["l1", "l2", "grad", "random"]
Unit = Literal["head", "row"]


def local(default: Any = ..., **kwargs: Any) -> Any:
    """A field that differs per machine and is not part of the job's identity."""
    return Field(default, json_schema_extra={"local": True}, **kwargs)


class MisfitError(ValueError):
    """Values that are each valid but do not fit together; `path` leads to the one to point at, from the section."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


class Section(BaseModel):
    """A table of the job file: frozen, unknown keys, infinities and silent type conversions refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class JobSection(Section):
    """[job]"""

    name: Name
    method: Literal["split", "slice"] = "split"
    seed: int = Field(0, ge=0, lt=2**31)
    version: Literal[1] = 1


class ModelSection(Section):
    """[model]: a Hugging Face causal language model with safetensors weights."""

    path: str = local()
    revision: str | None = None
    cut: int | float | Literal["auto"] = "auto"
    """Number of former layers (int), share of all layers (float in (0, 1)), or "auto" (a third)."""
    dtype: Literal["float32", "bfloat16"] = "float32"

    @field_validator("cut")
    @classmethod
    def _cut_is_inside(cls, cut: int | float | str) -> int | float | str:
        if isinstance(cut, int) and cut < 1:
            raise MisfitError(f"must be at least 1 layer, got {cut}")
        if isinstance(cut, float) and not 0.0 < cut < 1.0:
            raise MisfitError(f"a share of the layers lies between 0 and 1, got {cut}; write a whole number for layers")
        return cut


class DataSection(Section):
    """[data]: how records become text."""

    format: Literal["auto", "prompt-response", "prompt-completion", "messages"] = "auto"
    template: str | None = None
    """Text with {prompt} and {response} placed around a record; None joins them with one space."""
    truncation: Literal["left", "right"] = "left"
    """Which side of the prompt is dropped when prompt and response exceed `max_tokens`."""
    validation: float = Field(0.05, ge=0.0, lt=0.5)
    """Share of each party's training records kept for choosing the best checkpoint."""

    @field_validator("template")
    @classmethod
    def _template_has_its_places(cls, template: str | None) -> str | None:
        if template is None:
            return None
        for place in ("{prompt}", "{response}"):
            if template.count(place) != 1:
                raise MisfitError(f"must hold {place} exactly once, holds it {template.count(place)} times")
        if template.index("{prompt}") > template.index("{response}"):
            raise MisfitError("must hold {prompt} before {response}")
        others = set(re.findall(r"\{\w*\}", template)) - {"{prompt}", "{response}"}
        if others:
            raise MisfitError(f"holds {min(others)}, which is neither {{prompt}} nor {{response}}")
        return template


_LORA = {"rank", "alpha", "dropout"}
KEYS_OF_KIND = {
    "lora": _LORA | {"target_modules"},
    "ptuning": {"prefix_tokens", "reparametrise"},
    "spf": _LORA | {"ratio", "criterion", "unit", "tie_groups", "row_modules", "lora_modules"},
}
"""Which keys of [adapter] have a meaning for which kind."""


class AdapterSection(Section):
    """[adapter]: `kind` decides which of the other keys may be there."""

    kind: Literal["lora", "ptuning", "spf"] = "lora"
    rank: int = Field(8, ge=1, le=1024)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    prefix_tokens: int = Field(16, ge=1, le=1024)
    """Trained keys and values in front of each layer's own."""
    reparametrise: bool | Annotated[int, Field(ge=1, le=65536)] = False
    """Whether a perceptron computes the prefixes while they are trained; a number is its hidden size."""
    ratio: float = Field(0.5, gt=0.0, le=1.0)
    """Share of heads (or rows) whose weights are trained."""
    criterion: Criterion = "l1"
    """What they are ranked by: norm of their weights, of their first gradients, or chance."""
    unit: Unit = "head"
    """What is chosen in q, k and v; in the MLP it is always rows."""
    tie_groups: bool = False
    """Whether a key/value head and the query heads that use it are chosen together."""
    row_modules: Literal["all-linear"] | list[str] | None = None
    """Modules with trained rows; None: q, k, v and the MLP's input projections."""
    lora_modules: Literal["all-linear"] | list[str] | None = None
    """Modules with LoRA beside them; None: the attention output projection; []: none."""

    @property
    def keys(self) -> set[str]:
        """Those that have a meaning for this kind."""
        return {"kind"} | KEYS_OF_KIND[self.kind]

    @property
    def merges(self) -> bool:
        """Whether the adapter is a change of weights, to be merged into the base's; a prefix is not."""
        return self.kind != "ptuning"

    @model_validator(mode="after")
    def _keys_are_of_the_kind(self) -> AdapterSection:
        for key in sorted(self.model_fields_set - self.keys):
            kinds = " or ".join(f'"{kind}"' for kind, keys in KEYS_OF_KIND.items() if key in keys)
            raise MisfitError(f'is for kind {kinds}, not "{self.kind}"', key)
        if self.tie_groups and self.unit == "row":
            raise MisfitError('ties heads, but unit is "row"', "tie_groups")
        if self.row_modules == []:
            raise MisfitError('is empty, so no rows would be trained; kind = "lora" is LoRA alone', "row_modules")
        return self


class TrainingSection(Section):
    """[training]: exactly one of `epochs` and `steps`."""

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    batch_tokens: int = Field(4096, ge=1)
    """Tokens per optimiser step, reached by accumulating packs."""
    max_tokens: int = Field(512, ge=8)
    """Longest document and longest pack, in tokens."""
    learning_rate: float = Field(2e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0)
    evaluations: int = Field(4, ge=0)
    """How often the validation loss is measured during training (the last time at its end)."""
    keep: Literal["best", "last"] = "best"
    """Which checkpoint becomes the result, by validation loss."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if self.epochs is None and self.steps is None:
            raise MisfitError("says neither epochs nor steps: give exactly one of them")
        if self.epochs is not None and self.steps is not None:
            raise MisfitError("epochs and steps are both given: give exactly one of them", "steps")
        return self


class PartySection(Section):
    """[[party]]: `train` and `test` are JSONL, CSV or Parquet files, local to the party."""

    name: Name
    rank: int | None = Field(None, ge=1, le=1024)
    """LoRA rank of this party, where [federation] aggregation = "svd" lets them differ; None: [adapter] rank."""
    public_key: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Ed25519 public key, hex. Generated in a one-machine simulation, required elsewhere."""
    train: str | None = local(None)
    test: str | None = local(None)


class EnclaveSection(Section):
    """[enclave]: all local; what the parties accept is in the policy, whose content is shared."""

    attester: Literal["auto", "simulated", "tdx", "sev-snp", "sgx", "nitro", "dstack", "tpm"] = local("auto")
    tpm: str | None = local(None)
    """Which TPM, for attester "tpm": a device, or "swtpm:PATH" for the socket of a software TPM."""
    collateral: str | None = local(None)
    """Path of endorsements by `cloister attest fetch`, which the enclave adds to its evidence."""
    policy: str | None = local(None)
    """Path of the appraisal policy; its content is hashed into the job."""
    listen: str = local("127.0.0.1:0")
    threads: int | None = local(None, ge=1)
    processes: int = local(1, ge=1, le=64)
    """Processes that train together in the enclave of method "split"; each has `threads` of its own."""
    sharding: Literal["auto", "none", "full"] = local("auto")
    """Whether each process holds a part of the frozen layers only ("full") or all of them ("none"); "auto" parts them
    where they do not fit on a device."""
    device: Literal["auto", "cpu", "cuda", "mps"] = local("auto")
    repack: bool = local(True)
    """Whether large frozen weights are copied into the order in which the processor's products read them."""
    cache_mib: int = local(2048, ge=0)
    """Memory for decrypted activations; what does not fit is decrypted again each epoch."""
    max_connections: int = local(1024, ge=8, le=65_536)
    """TCP connections at one time, strangers' included."""
    max_bundle_mib: int = local(1 << 20, ge=1, le=1 << 26)
    """Largest bundle taken from a party; with the number of bundles it bounds the disk that parties can fill."""

    @model_validator(mode="after")
    def _device_is_a_tpms(self) -> EnclaveSection:
        if self.tpm is not None and self.attester != "tpm":
            raise MisfitError('names a TPM, but attester is not "tpm"', "tpm")
        return self

    @model_validator(mode="after")
    def _parts_need_processes(self) -> EnclaveSection:
        if self.sharding == "full" and self.processes == 1:
            raise MisfitError('"full" spreads layers over processes, of which there is only 1', "sharding")
        return self


class TransportSection(Section):
    """[transport]"""

    activation_dtype: Literal["float32", "bfloat16", "bfloat16-deflate", "int8"] = "bfloat16"
    chunk_mib: int = Field(1, ge=1, le=3)


class MaskingSection(Section):
    """[masking], for method "slice": how what leaves a party's enclave for an accelerator is masked and checked."""

    pads: Literal["precomputed", "dual", "none"] = "precomputed"
    """Where a pad's own product comes from: computed beforehand, or by a second accelerator of another operator. "none"
    masks nothing (INSECURE): for benchmarks and attacks only."""
    bits: Literal[8, 16] = 8
    """Of a frozen weight."""
    check: bool = True
    """Whether every product is checked. False is for benchmarks only (INSECURE)."""
    accelerators: list[str] = local([])
    """Addresses: "unix:PATH" on this machine, "HOST:PORT#KEY" elsewhere; two for `dual`."""
    pad_store: str | None = local(None)
    """Folder made by `cloister pads`; None computes pads when the party starts."""


class FederationSection(Section):
    """[federation], for method "slice": rounds of local training and what the server makes of their results."""

    rounds: int = Field(4, ge=1, le=100_000)
    """A party's steps ([training]) are spread evenly over them."""
    aggregation: Literal["mean", "ffa", "svd", "trimmed-mean", "median"] = "mean"
    """mean: of the parameters, weighted by tokens. ffa: A frozen, mean of B. svd: exact mean of B A, factored anew.
    trimmed-mean, median: of each parameter, every party alike; one party cannot drag it away from the others."""
    local_state: Literal["average", "reset"] = "average"
    """What becomes of the parties' optimiser moments between rounds: averaged by the rule of `aggregation`, or new each
    time. With "svd" always new: they belong to matrices that it replaces."""
    server_optimiser: Literal["none", "momentum", "adam"] = "none"
    """none: the aggregate is the new state. momentum: FedAvgM. adam: FedAdam."""
    server_learning_rate: float = Field(1.0, gt=0)
    server_momentum: float = Field(0.9, ge=0.0, lt=1.0)
    clip_norm: float | None = Field(None, gt=0)
    """Longest change that one party may send in a round; what is longer is scaled down."""
    trim: float = Field(0.2, gt=0.0, lt=0.5)
    """Share of values dropped at each end, for trimmed-mean."""
    quorum: int | None = Field(None, ge=1)
    """Parties whose updates end a round once `deadline_s` is over; None: all."""
    deadline_s: float = Field(3600.0, gt=0)
    """How long a round waits for the parties beyond the quorum."""

    @model_validator(mode="after")
    def _server_optimiser_fits(self) -> FederationSection:
        if self.server_optimiser == "none" and self.server_learning_rate != 1.0:
            raise MisfitError('is without effect: server_optimiser is "none"', "server_learning_rate")
        if self.server_optimiser == "adam" and self.server_learning_rate > 0.1:
            message = f"must be at most 0.1 for adam, got {self.server_learning_rate}: it moves a parameter that far"
            raise MisfitError(message, "server_learning_rate")
        if self.server_optimiser != "none" and self.aggregation == "svd":
            message = f'"{self.server_optimiser}" follows parameters over rounds; "svd" replaces them each time'
            raise MisfitError(message, "server_optimiser")
        return self


class EvaluationSection(Section):
    """[evaluation]"""

    baselines: list[Literal["base", "local", "central"]] = ["base"]
    max_examples: int | None = Field(None, ge=1)
    """At most this many test records per party, the first ones of a seeded shuffle."""


class ReleaseSection(Section):
    """[release]: who gets the adapter when training has ended."""

    to: Literal["none"] | list[Name] = "none"


class InferenceSection(Section):
    """[inference]: who may query the tuned model by split inference, and what a query returns."""

    allow: Literal["none", "all"] | list[Name] = "all"
    returns: Literal["token", "top-k"] = "token"
    top_k: int = Field(1, ge=1, le=64)
    quota_tokens: int = Field(100_000, ge=0)
    """New tokens that one party may have generated over the job's life."""


class CheckpointSection(Section):
    """[checkpoint]: sealed states of training, from which a new enclave instance goes on."""

    count: int = Field(4, ge=0)
    """How many in a run, evenly, the last when training has ended; 0 makes none."""
    quorum: int | None = Field(None, ge=1)
    """How many parties must have noted a checkpoint, and how many shares open it; None: all parties."""


class Job(Section):
    """A whole job file."""

    job: JobSection
    model: ModelSection
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection
    party: list[PartySection] = Field(min_length=1)
    enclave: EnclaveSection = EnclaveSection()
    transport: TransportSection = TransportSection()
    masking: MaskingSection = MaskingSection()
    federation: FederationSection = FederationSection()
    evaluation: EvaluationSection = EvaluationSection()
    release: ReleaseSection = ReleaseSection()
    inference: InferenceSection = InferenceSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @property
    def quorum(self) -> int:
        """`[checkpoint] quorum`, or the number of parties."""
        return self.checkpoint.quorum or len(self.party)

    @model_validator(mode="after")
    def _sections_are_of_the_method(self) -> Job:
        """What the other method needs would be silently without effect."""
        if self.job.method == "slice" and self.model.cut != "auto":
            raise MisfitError('is for method "split"; with "slice" no party holds whole layers', "model", "cut")
        if self.job.method == "slice" and self.adapter.kind == "spf":
            raise MisfitError(
                '"spf" is for method "split": it changes rows of the base\'s own weights, which with "slice" an '
                "untrusted accelerator holds, so it would have to be given the tuned ones",
                "adapter",
                "kind",
            )
        if self.job.method == "slice" and self.enclave.processes != 1:
            message = 'is for method "split"; with "slice" nothing is trained in the server\'s enclave'
            raise MisfitError(message, "enclave", "processes")
        if self.adapter.kind == "spf" and self.enclave.sharding == "full":
            message = '"full" parts the base\'s weights between processes, but kind "spf" trains rows of them'
            raise MisfitError(message, "enclave", "sharding")
        foreign: dict[str, tuple[Section, ...]] = {"split": (self.masking, self.federation), "slice": (self.transport,)}
        for section in foreign[self.job.method]:
            if section != type(section)():
                name = type(section).__name__.removesuffix("Section").lower()
                raise MisfitError(f'is not for method "{self.job.method}"', name)
        return self

    @model_validator(mode="after")
    def _aggregation_fits(self) -> Job:
        rule, quorum = self.federation.aggregation, self.federation.quorum or len(self.party)
        if rule in ("ffa", "svd") and self.adapter.kind != "lora":
            message = f'"{rule}" is for kind "lora", which has matrices A and B, not "{self.adapter.kind}"'
            raise MisfitError(message, "federation", "aggregation")
        if quorum > len(self.party):
            message = f"must be at most {len(self.party)}, the number of parties, got {quorum}"
            raise MisfitError(message, "federation", "quorum")
        if rule in ("trimmed-mean", "median") and quorum < 3:
            message = f'"{rule}" needs updates of at least 3 parties in a round, not {quorum}'
            raise MisfitError(message, "federation", "aggregation")
        steps = self.training.steps
        if self.job.method == "slice" and steps is not None and self.federation.rounds > steps:
            message = f"must be at most {steps}, the number of steps, got {self.federation.rounds}"
            raise MisfitError(message, "federation", "rounds")
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> Job:
        for index, party in enumerate(self.party):
            if party.rank is None or (self.adapter.kind == "lora" and party.rank == self.adapter.rank):
                continue
            if self.adapter.kind != "lora" or self.federation.aggregation != "svd":
                message = (
                    f'{party.rank} differs from [adapter] rank: only aggregation = "svd" of kind "lora" allows that'
                )
                raise MisfitError(message, "party", index, "rank")
        return self

    @model_validator(mode="after")
    def _quorums_overlap(self) -> Job:
        """Two quorums must share a party: else two halves could sign two different histories."""
        if not len(self.party) < 2 * self.quorum <= 2 * len(self.party):
            least = len(self.party) // 2 + 1
            message = f"must be from {least} to {len(self.party)}, more than half of the parties, got {self.quorum}"
            raise MisfitError(message, "checkpoint", "quorum")
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> Job:
        first: dict[tuple[str, str], int] = {}
        for index, party in enumerate(self.party):
            for key, value in (("name", party.name), ("public_key", party.public_key)):
                if value is not None and first.setdefault((key, value), index) != index:
                    message = f"{value!r} is already the {key} of party {first[key, value] + 1}"
                    raise MisfitError(message, "party", index, key)
        return self

    @model_validator(mode="after")
    def _lists_name_parties(self) -> Job:
        names = {party.name for party in self.party}
        for section, key, listed in (("release", "to", self.release.to), ("inference", "allow", self.inference.allow)):
            for name in listed if isinstance(listed, list) else []:
                if name not in names:
                    raise MisfitError(f"names {name!r}, which is not a party of this job", section, key)
        return self
