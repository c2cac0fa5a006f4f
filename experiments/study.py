"""Which cells the study consists of: systems of the main table, and ablations of one of them at a time. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloister.job import Job
from experiments.cells import Cell, System

MAIN_SILOS = 5


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One system of a table, for any seed. Its learning rate is found by itself, or is another arm's.

    Args:
        adapter: [adapter] of the job, beside those keys that the kind does not have.
        sections: other keys of the job that differ from the base job's.
        rate_of: the arm whose rate is taken, where tuning is the same question.
    """

    name: str
    title: str
    system: System
    adapter: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]
    silos: int = MAIN_SILOS
    rate_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The same for all systems: `steps` of `batch_tokens` tokens over all parties together."""

    steps: int
    batch_tokens: int
    rounds: int
    seeds: tuple[int, ...]
    examples: int
    """Held-out records of each task of each party."""
    tuned: bool
    rates: Mapping[str, float]
    """By kind of adapter: where tuning begins, and what is taken without it."""


_LORA = {"kind": "lora", "rank": 8, "alpha": 16.0}
_SPF = {"kind": "spf", "ratio": 0.5, "lora_modules": []}
_SPF_LORA = {"kind": "spf", "ratio": 0.5, "rank": 8, "alpha": 16.0}
_PTUNING = {"kind": "ptuning", "prefix_tokens": 16}

RATES = {"lora": 2e-3, "spf": 6e-4, "ptuning": 2e-2}


def _arm(name: str, title: str, system: System, adapter: Mapping[str, Any], **rest: Any) -> Arm:
    return Arm(name=name, title=title, system=system, adapter=adapter, sections=rest.pop("sections", {}), **rest)


MAIN = (
    _arm("base", "base, untrained", "base", _LORA),
    _arm("local", "each party alone, LoRA", "local", _LORA, rate_of="central"),
    _arm("central", "centralised, LoRA on all layers", "central", _LORA),
    _arm("latter", "centralised, LoRA on the latter layers", "latter", _LORA, rate_of="split-lora"),
    _arm("fedavg", "FedAvg, LoRA, no protection", "fedavg", _LORA),
    _arm("split-lora", "split, LoRA", "split", _LORA),
    _arm("split-spf", "split, SPF", "split", _SPF),
    _arm("split-spf-lora", "split, SPF + LoRA", "split", _SPF_LORA, rate_of="split-spf"),
    _arm("split-ptuning", "split, P-tuning v2", "split", _PTUNING),
    _arm("slice-lora", "slice, LoRA", "slice", _LORA, rate_of="fedavg"),
    _arm("slice-ptuning", "slice, P-tuning v2", "slice", _PTUNING, rate_of="fedavg-ptuning"),
)

FOR_RATES = (_arm("fedavg-ptuning", "FedAvg, P-tuning v2", "fedavg", _PTUNING),)
"""Arms that are in no table: `slice` is tuned with plain products, whose training is the same but for rounding."""

REFERENCE = "central"
"""What everything is compared with."""


def ablations(cut: int, layers: int, *, shira: bool = True) -> dict[str, list[Arm]]:
    """One thing changed at a time; the arm of the main table that it is changed in stands among them.

    Args:
        shira: False where PEFT's SHiRA cannot take the model's layers.
    """
    main = {arm.name: arm for arm in MAIN}
    lora, spf = main["split-lora"], main["split-spf"]
    cuts = sorted({1, layers // 2, layers - 2} - {cut, 0})
    return {
        "SPF: ratio": [
            *(_spf(f"ratio {r:g}", ratio=r) for r in (0.125, 0.25)), spf, _spf("ratio 1", ratio=1.0),
        ],
        "SPF: which heads and rows, and SHiRA": [
            spf,
            *(_spf(f"criterion {c}", criterion=c) for c in ("l2", "grad", "random")),
            *([_arm("shira", "SHiRA, random places", "shira", _SPF)] if shira else []),
        ],
        "Cut": [
            *(_changed(lora, f"cut {c}", model={"cut": c}) for c in cuts if c < cut), lora,
            *(_changed(lora, f"cut {c}", model={"cut": c}) for c in cuts if c > cut),
        ],
        "LoRA: rank": [_lora(2), lora, _lora(32)],
        "Activations": [_changed(lora, "int8", transport={"activation_dtype": "int8"}), lora, main["latter"]],
        "Silos": [
            lora, *(_silos(lora, n) for n in (20, 50)),
            main["fedavg"], *(_silos(main["fedavg"], n) for n in (20, 50)),
        ],
    }  # fmt: skip


def _spf(title: str, **keys: Any) -> Arm:
    name = f"spf-{title.replace(' ', '-')}"
    return _arm(name, f"SPF, {title}", "split", {**_SPF, **keys}, rate_of="split-spf")


def _lora(rank: int) -> Arm:
    adapter = {**_LORA, "rank": rank, "alpha": 2.0 * rank}
    return _arm(f"rank-{rank}", f"split, LoRA, rank {rank}", "split", adapter, rate_of="split-lora")


def _changed(arm: Arm, title: str, **sections: Mapping[str, Any]) -> Arm:
    name = f"{arm.name}-{title.replace(' ', '-')}"
    return _arm(name, f"{arm.title}, {title}", arm.system, arm.adapter, sections=sections, rate_of=arm.name)


def _silos(arm: Arm, count: int) -> Arm:
    return _arm(
        f"{arm.name}-{count}", f"{arm.title}, {count} silos", arm.system, arm.adapter, silos=count, rate_of=arm.name
    )


def make_cell(arm: Arm, base: Job, budget: Budget, *, seed: int, rate: float, tuning: bool = False) -> Cell:
    """The arm's cell.

    Args:
        base: a job of method split over the files of `arm.silos` parties.
        tuning: a third of the steps, judged by the validation records.
    """
    steps = max(8, budget.steps // 3) if tuning else budget.steps
    rounds = arm.system in ("fedavg", "slice")
    training: dict[str, Any] = {
        "steps": steps,
        "epochs": None,
        "batch_tokens": budget.batch_tokens,
        "learning_rate": rate,
        "evaluations": 0,
        "keep": "last",
    }
    if rounds:
        training |= _share(steps * budget.batch_tokens // arm.silos, steps, base.training.max_tokens, budget)
    content = base.model_dump()
    sections = {
        "job": {"name": "experiments", "seed": seed, "method": "slice" if rounds else "split"},
        "training": training,
        "evaluation": {"baselines": []},
        **arm.sections,
    }
    for name, keys in sections.items():
        content[name] = {**content[name], **keys}
    content["adapter"] = dict(arm.adapter)
    if rounds:
        content["federation"] = {"rounds": min(budget.rounds, training["steps"])}
        del content["transport"], content["model"]["cut"]
    return Cell(system=arm.system, job=Job.model_validate(content), judged="validation" if tuning else "test")


def _share(tokens: int, steps: int, max_tokens: int, budget: Budget) -> dict[str, int]:
    """A party's steps for its share: a fifth of all, of fewer tokens where silos are more, but of one pack at least."""
    batch = max(min(budget.batch_tokens, tokens * MAIN_SILOS // steps), max_tokens)
    steps = max(budget.rounds, tokens // batch)
    if batch == max_tokens:  # it may not divide the share; what is left over is spread over the steps
        batch = max(tokens // steps, max_tokens)
    return {"batch_tokens": batch, "steps": steps}
