"""Each system against a plainer way to the same training, and results that are kept and not made twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiments import __main__ as main
from experiments import report, run, systems
from experiments.cells import Cell, Outcome
from experiments.study import MAIN, RATES, Arm, Budget, make_cell

from cloister.adapters.add import add_adapter
from cloister.errors import AdapterError, DataError
from cloister.evaluation import statistics
from cloister.evaluation.scores import Scores, score
from cloister.job import Job
from cloister.model.anatomy import load_model
from cloister.model.cut import Whole
from cloister.progress import Silent
from cloister.training.loop import PackList, train

BUDGET = Budget(steps=10, batch_tokens=64, rounds=2, seeds=(1, 2), examples=3, tuned=True, rates=RATES)
CUT = 2


def cell(name: str, base: Job, **changes: Any) -> Cell:
    arm: Arm = next(arm for arm in MAIN if arm.name == name)
    return make_cell(replace(arm, **changes), base, BUDGET, seed=1, rate=0.01)


def bits(scores: dict[str, Scores]) -> dict[str, list[float]]:
    return {party: own.bits.tolist() for party, own in scores.items()}


def plainly(job: Job, first_layer: int) -> dict[str, list[float]]:
    """The oracle: the whole model, trained on all packs."""
    data = systems.read_data(job)
    whole = Whole(load_model(Path(job.model.path), "float32"))
    adapted = add_adapter(whole, job.adapter, first_layer=first_layer, seed=1)
    packs = PackList([p for own in data.values() for p in own.parts["train"].packs])
    train(whole, adapted, packs, job.training, seed=1)
    parts = {party: own.parts["test"] for party, own in data.items()}
    return bits({p: score(whole, PackList(part.packs), part.examples, where=p) for p, part in parts.items()})


def test_central_and_latter_are_plain_training(base: Job) -> None:
    for name, first_layer in (("central", 0), ("latter", CUT)):
        wanted = cell(name, base)
        assert bits(systems.run_cell(wanted, CUT).scores) == plainly(wanted.job, first_layer)


def test_the_wire_format_is_the_only_difference_between_split_and_latter(base: Job) -> None:
    latter = bits(systems.run_cell(cell("latter", base), CUT).scores)
    exact = cell("split-lora", base, sections={"transport": {"activation_dtype": "float32"}})
    assert bits(systems.run_cell(exact, CUT).scores) == latter
    rough = cell("split-lora", base, sections={"transport": {"activation_dtype": "int8"}})
    assert bits(systems.run_cell(rough, CUT).scores) != latter


def test_fedavg_of_one_party_in_one_round_is_central_training(base: Job) -> None:
    alone = base.model_copy(update={"party": base.party[:1]})
    budget = replace(BUDGET, rounds=1)
    arms = {arm.name: arm for arm in MAIN}
    central = make_cell(arms["central"], alone, budget, seed=1, rate=0.01)
    rounds = make_cell(replace(arms["fedavg"], silos=1), alone, budget, seed=1, rate=0.01)
    own = systems.run_cell(rounds, 0)
    assert bits(own.scores) == bits(systems.run_cell(central, CUT).scores)
    assert own.trained_parameters == systems.run_cell(central, CUT).trained_parameters


def test_slice_is_fedavg_but_for_rounding(base: Job) -> None:
    plain, integers = (systems.run_cell(cell(name, base), 0) for name in ("fedavg", "slice-lora"))
    assert bits(plain.scores) != bits(integers.scores)
    assert integers.bits_per_byte() == pytest.approx(plain.bits_per_byte(), rel=0.01)


def test_alone_is_each_party_by_itself(base: Job) -> None:
    both = systems.run_cell(cell("local", base), CUT)
    for party in base.party[:2]:
        one = base.model_copy(update={"party": [party]})
        assert bits(systems.run_cell(cell("central", one), CUT).scores) == bits({party.name: both.scores[party.name]})


def test_shira_trains_as_many_weights_as_spf_and_no_others(base: Job) -> None:
    spf = systems.run_cell(cell("split-spf", base), CUT)
    shira = systems.run_cell(cell("split-spf", base, system="shira"), CUT)
    assert shira.trained_parameters == pytest.approx(spf.trained_parameters, rel=0.02)
    assert bits(shira.scores) != bits(spf.scores)
    with pytest.raises(AdapterError, match="SPF alone"):
        systems.run_cell(cell("split-lora", base, system="shira"), CUT)


def test_a_result_is_kept_and_made_again_only_for_other_data(
    base: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted, made = tmp_path / "out", cell("base", base), list[Cell]()

    def counted(cell: Cell, cut: int) -> Outcome:
        made.append(cell)
        return systems.run_cell(cell, cut)

    monkeypatch.setattr(run, "run_cell", counted)
    folder.mkdir()
    first, again = run.work(wanted, folder), run.work(wanted, folder)
    assert len(made) == 1
    assert first.outcome is not None
    assert again.outcome is not None
    assert bits(again.outcome.scores) == bits(first.outcome.scores)
    test = Path(base.party[0].test or "")
    test.write_text(test.read_text().replace("what is", "how is"))
    run.work(wanted, folder)
    assert len(made) == 2
    kept = next((folder / "results").glob("*.json"))
    kept.write_text('{"job_id": 1}')
    with pytest.raises(DataError, match="not a result"):
        run.work(wanted, folder)


def test_a_study_begun_again_gives_the_same_text_without_training(
    base: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [arm for arm in MAIN if arm.name in ("base", "central", "split-lora")]
    for module in (main, report):
        monkeypatch.setattr(module, "MAIN", few)
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    budget = replace(BUDGET, steps=8, seeds=(1,), rates={"lora": 1e-2})

    def once() -> str:
        results = main.study(base, budget, tmp_path / "out", 4, CUT, 2, Silent(), ablate=False)
        return report.write_report(results, tmp_path / "docs")

    text = once()
    assert all(f"| {arm.title} |" in text for arm in few)
    assert (tmp_path / "docs" / "figures" / "differences.svg").exists()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "results").iterdir()}
    assert len(files) >= 3 + 2 * 3
    assert once() == text
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "results").iterdir()} == files
