"""Every arm is a valid job that differs from the others in what its name says, at the same budget of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from experiments.shira import takes
from experiments.silos import split_silos
from experiments.study import FOR_RATES, MAIN, RATES, Arm, Budget, _share, ablations, make_cell

from cloister.job import Job

BUDGET = Budget(steps=80, batch_tokens=2048, rounds=4, seeds=(1, 2), examples=5, tuned=True, rates=RATES)
ARMS = [*MAIN, *FOR_RATES, *(arm for arms in ablations(2, 8).values() for arm in arms)]


@pytest.mark.parametrize("arm", {arm.name: arm for arm in ARMS}.values(), ids=lambda arm: arm.name)
def test_every_arm_is_a_job_with_the_budget(arm: Arm, base: Job, tmp_path_factory: pytest.TempPathFactory) -> None:
    if arm.silos == 50:
        pytest.skip("the tiny sets have too few records")
    base = base if arm.silos == 5 else split_silos(base, tmp_path_factory.mktemp("silos"), arm.silos)
    cell = make_cell(arm, base, BUDGET, seed=2, rate=0.01)
    training = cell.job.training
    parties = len(cell.job.party) if arm.system in ("fedavg", "slice") else 1
    assert training.steps is not None
    assert parties * training.steps * training.batch_tokens == 80 * 2048
    assert (training.learning_rate, training.keep, training.evaluations) == (0.01, "last", 0)
    assert cell.job.job.seed == 2
    assert cell.judged == "test"


@pytest.mark.parametrize("silos", [5, 20, 50])
def test_shares_of_silos_add_up_to_the_budget(silos: int) -> None:
    share = _share(80 * 2048 // silos, 80, 512, BUDGET)
    assert silos * share["steps"] * share["batch_tokens"] == pytest.approx(80 * 2048, rel=0.001)
    assert share["batch_tokens"] >= 512
    assert share["steps"] >= BUDGET.rounds


def test_shira_is_left_out_where_peft_cannot_put_it() -> None:
    arms = {arm.name for table in ablations(2, 8, shira=takes("gpt2")).values() for arm in table}
    assert "shira" not in arms
    assert arms < {arm.name for table in ablations(2, 8, shira=takes("llama")).values() for arm in table}


def test_names_are_unique_and_rates_are_those_of_arms_that_are_tuned() -> None:
    named: dict[str, Arm] = {}
    for arm in ARMS:
        assert named.setdefault(arm.name, arm) == arm
    tuned = {arm.name: arm for arm in (*MAIN, *FOR_RATES)}
    for arm in ARMS:
        if arm.rate_of is not None:
            assert tuned[arm.rate_of].rate_of is None
            assert tuned[arm.rate_of].adapter["kind"] == arm.adapter["kind"]


def test_an_ablation_changes_one_thing(base: Job) -> None:
    main = {arm.name: arm for arm in MAIN}
    for title, arms in ablations(2, 8).items():
        for arm in arms:
            if arm.name in main or arm.silos != 5 or arm.system == "shira":
                continue
            origin = main["split-spf" if arm.name.startswith("spf") else "split-lora"]
            ours, theirs = (
                make_cell(a, base, BUDGET, seed=1, rate=0.01).job.model_dump(exclude={"party"}) for a in (arm, origin)
            )
            changed = {(s, k) for s in ours for k in ours[s] if ours[s][k] != theirs[s][k]}
            assert len(changed) == (2 if "rank" in title else 1), (arm.name, changed)  # alpha follows rank


def test_tuning_sees_validation_records_only_and_a_third_of_the_steps(base: Job) -> None:
    arm = next(arm for arm in MAIN if arm.name == "fedavg")
    cell = make_cell(arm, base, BUDGET, seed=1, rate=0.01, tuning=True)
    assert cell.judged == "validation"
    assert cell.job.training.steps == 5
    assert cell.job.training.batch_tokens in (2047, 2048)


def test_the_same_cell_has_the_same_job_id_and_another_seed_another(base: Job, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("cells")
    ids = [make_cell(MAIN[2], base, BUDGET, seed=s, rate=0.01).resolve(folder).job_id for s in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    other = make_cell(replace(MAIN[2], adapter={"kind": "lora", "rank": 2}), base, BUDGET, seed=1, rate=0.01)
    assert other.resolve(folder).job_id != ids[0]
