"""Opening a job on this machine: its canonical form and id, and the policy by which evidence is judged."""

from __future__ import annotations

from dataclasses import dataclass

from cloister.attest.policy import AppraisalPolicy
from cloister.errors import JobError, ModelError
from cloister.jobfile import LoadedJob, ModelFiles, ResolvedJob, find_model, resolve
from cloister.progress import Progress, task

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
"""How config.json files name the number of decoder layers."""


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """A job ready to run here."""

    resolved: ResolvedJob
    policy: AppraisalPolicy

    @property
    def parties(self) -> dict[str, bytes]:
        """Public keys by name, in the order of the job."""
        return {p.name: bytes.fromhex(p.public_key or "") for p in self.resolved.job.party}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of data that each party brings: sealed bundles, or commitments to what stays with it."""
        return ("train", "validation", "test") if self.resolved.job.data.validation > 0 else ("train", "test")


def open_job(loaded: LoadedJob, *, progress: Progress) -> OpenJob:
    """Read policy and model of a job whose parties all have keys.

    Raises:
        JobError, ModelError: something the job names is missing or wrong.
    """
    path = loaded.policy_file()
    if path is None:
        raise JobError(
            "the job names no appraisal policy",
            where=loaded.where("enclave", "policy"),
            hint='add policy = "policy.toml": which enclaves the parties accept; only `run` and `demo` make one up',
        )
    policy = AppraisalPolicy.load(path)
    model = find_model(loaded.local_path(loaded.job.model.path), where=loaded.where("model", "path"))
    cut = find_cut(loaded, model)
    check_positions(loaded, model)
    with task(progress, "hashing the model", total=model.num_bytes, unit="bytes") as running:
        resolved = resolve(loaded, cut=cut, policy_bytes=policy.to_bytes(), count=running.advance)
    return OpenJob(resolved=resolved, policy=policy)


def find_cut(loaded: LoadedJob, model: ModelFiles) -> int:
    """The number of former layers that the job means for this model: none with method "slice".

    Raises:
        ModelError: the cut leaves no layer on one side.
    """
    if loaded.job.job.method == "slice":
        return 0
    return resolve_cut(loaded.job.model.cut, count_layers(model), where=loaded.where("model", "cut"))


def check_positions(loaded: LoadedJob, model: ModelFiles) -> None:
    """See that a model with a table of positions (GPT-2) has one for every token of the longest document.

    Raises:
        ModelError: it has fewer.
    """
    positions = model.config().get("n_positions")
    if not isinstance(positions, int):
        return  # positions are computed, for any length
    job = loaded.job
    # Where all layers have a prefix, tokens stand behind it: so they do in baselines that train the whole model.
    whole = job.job.method == "slice" or not {"local", "central"}.isdisjoint(job.evaluation.baselines)
    in_front = job.adapter.prefix_tokens if job.adapter.kind == "ptuning" and whole else 0
    longest = job.training.max_tokens
    if longest + in_front > positions:
        behind = f" behind a prefix of {in_front}" if in_front else ""
        raise ModelError(
            f"documents of up to {longest} tokens{behind} do not fit into the model's {positions} positions",
            where=loaded.where("training", "max_tokens"),
            hint=f"{'max_tokens and prefix_tokens together' if in_front else 'max_tokens'} can be at most {positions}",
        )


def count_layers(model: ModelFiles) -> int:
    """The number of decoder layers that config.json declares.

    Raises:
        ModelError: it declares none.
    """
    config = model.config()
    for name in _LAYER_COUNTS:
        count = config.get(name)
        if isinstance(count, int) and count > 0:
            return count
    raise ModelError(f"config.json has none of {', '.join(_LAYER_COUNTS)}", where=str(model.folder / "config.json"))


def resolve_cut(cut: int | float | str, num_layers: int, *, where: str = "[model] cut") -> int:
    """The number of former layers, from a count, a share of all layers, or "auto" (a third).

    Raises:
        ModelError: the cut leaves no layer on one side.
    """
    if cut == "auto":
        layers = max(1, num_layers // 3)
    elif isinstance(cut, float):
        layers = round(cut * num_layers)
    else:
        layers = int(cut)
    if not 1 <= layers < num_layers:
        raise ModelError(
            f"the cut {cut} leaves no layer on one side of a model with {num_layers} layers",
            where=where,
            hint=f"choose 1 to {num_layers - 1}, a share between 0 and 1, or 'auto'",
        )
    return layers
