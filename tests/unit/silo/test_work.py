"""Rounds of one party are local training bit for bit, behind masks too; a round begun again is the same round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cloister.adapters.add import add_adapter
from cloister.adapters.state import adapter_state
from cloister.errors import DataError, VerificationError
from cloister.job import Job
from cloister.model.cut import Whole
from cloister.silo.work import SiloWork
from cloister.training.loop import PackList, train
from tests.unit.masking.local import LocalAccelerator, integer_model, masked_model, saved
from tests.unit.model.tiny import tiny_model
from tests.unit.silo.small import differing, federate, first_state, party_data, slice_job, train_packs


def locally(whole: Whole, job: Job) -> dict[str, torch.Tensor]:
    """The oracle: plain training of the same steps in one go."""
    adapted = add_adapter(whole, job.adapter, first_layer=0, seed=job.job.seed)
    train(whole, adapted, PackList(train_packs(party_data())), job.training, seed=job.job.seed)
    return adapter_state(adapted)


def test_rounds_of_one_party_are_local_training_bit_for_bit() -> None:
    """The optimiser's moments travel with the state: a round's border leaves no trace."""
    for rounds in (1, 2, 5):
        job = slice_job(federation={"rounds": rounds})
        work = SiloWork(Whole(tiny_model("llama")), party_data(), job, "north")
        ended = federate({"north": work}, first_state(Whole(tiny_model("llama")), job), job)
        assert differing(dict(ended.weights), locally(Whole(tiny_model("llama")), job)) == []


PREFIX = {"kind": "ptuning", "prefix_tokens": 3}


@pytest.mark.parametrize("adapter", [{}, PREFIX, PREFIX | {"reparametrise": True}], ids=["lora", "prefix", "encoder"])
def test_masked_rounds_are_local_training_on_the_same_integers_bit_for_bit(
    tmp_path: Path, adapter: dict[str, Any]
) -> None:
    """One party, one accelerator and its pads, two packs in flight, against plain integer products, one at a time."""
    job = slice_job(adapter=adapter)
    masked, _ = masked_model(saved("llama", tmp_path), bits=8)[:2]
    work = SiloWork(Whole(masked.model, all_tokens=True), party_data(), job, "north", in_flight=2, verify=masked.verify)
    ended = federate({"north": work}, first_state(Whole(tiny_model("llama")), job), job)
    assert differing(dict(ended.weights), locally(Whole(integer_model("llama", 8), all_tokens=True), job)) == []


def test_packs_in_flight_change_no_bit() -> None:
    job = slice_job(training={"batch_tokens": 96})
    ended = [
        federate(
            {"north": SiloWork(Whole(tiny_model("llama")), party_data(), job, "north", in_flight=count)},
            first_state(Whole(tiny_model("llama")), job),
            job,
        )
        for count in (1, 2, 3)
    ]
    assert differing(dict(ended[0].weights), dict(ended[1].weights)) == []
    assert differing(dict(ended[0].weights), dict(ended[2].weights)) == []


def test_a_round_that_is_begun_again_gives_the_same_update() -> None:
    """By a party that crashed: with a new process, and after it has worked on something else."""
    job = slice_job(adapter={"dropout": 0.1})
    state = first_state(Whole(tiny_model("llama")), job)
    once = SiloWork(Whole(tiny_model("llama")), party_data(), job, "north")
    first = once.train(0, state.weights, state.moments)
    once.train(1, first.weights, first.moments)
    for work in (once, SiloWork(Whole(tiny_model("llama")), party_data(), job, "north")):
        again = work.train(0, state.weights, state.moments)
        assert differing(dict(again.weights), dict(first.weights)) == []
        assert again.loss == first.loss


def test_rounds_share_the_steps_and_name_their_tokens() -> None:
    job = slice_job(federation={"rounds": 2})
    work = SiloWork(Whole(tiny_model("llama")), party_data(), job, "north")
    assert [list(work.steps_of(number)) for number in range(2)] == [[0, 1], [2, 3, 4]]
    state = first_state(Whole(tiny_model("llama")), job)
    tokens = [work.train(number, state.weights, state.moments).tokens for number in range(2)]
    assert work.round_tokens == max(tokens)
    assert work.num_steps == 5


def test_fewer_steps_than_rounds_is_an_error_that_names_the_party() -> None:
    job = slice_job(training={"steps": None, "epochs": 1.0}, federation={"rounds": 50})
    with pytest.raises(DataError, match="steps cannot be spread over 50 rounds") as error:
        SiloWork(Whole(tiny_model("llama")), party_data(), job, "north")
    assert error.value.where == "north"


def test_ffa_trains_b_alone() -> None:
    job = slice_job(federation={"aggregation": "ffa"})
    state = first_state(Whole(tiny_model("llama")), job)
    work = SiloWork(Whole(tiny_model("llama")), party_data(), job, "north")
    result = work.train(0, state.weights, {})
    changed = differing(dict(result.weights), dict(state.weights))
    assert changed
    assert all("lora_B" in name for name in changed)
    assert all("lora_B" in name for name in result.moments)


def test_a_wrong_product_applies_nothing(tmp_path: Path) -> None:
    """The check stands before the optimiser: the adapter is what it was."""
    job = slice_job()
    masked, accelerator = masked_model(saved("llama", tmp_path), bits=8)[:2]
    assert isinstance(accelerator, LocalAccelerator)
    work = SiloWork(Whole(masked.model), party_data(), job, "north", in_flight=2, verify=masked.verify)
    state = first_state(Whole(tiny_model("llama")), job)

    def lie(group: str, direction: str, answer: list[torch.Tensor]) -> None:
        if direction == "backward":
            answer[0][0, 0] += 1

    accelerator.change = lie
    with pytest.raises(VerificationError) as error:
        work.train(0, state.weights, state.moments)
    assert error.value.code == "wrong-product"
    assert differing(adapter_state(work.adapted), dict(state.weights)) == []


def test_scores_of_base_and_tuned_differ_and_base_ignores_the_state() -> None:
    job = slice_job()
    work = SiloWork(Whole(tiny_model("llama")), party_data(), job, "north")
    state = first_state(Whole(tiny_model("llama")), job)
    tuned = federate({"north": work}, state, job)
    before = work.score(state.weights, lambda tokens: None)
    after = work.score(tuned.weights, lambda tokens: None)
    assert before["base"].bits.tolist() == before["cloister"].bits.tolist() == after["base"].bits.tolist()
    assert after["cloister"].bits.tolist() != after["base"].bits.tolist()
    bits, size = work.validate(tuned.weights)
    assert (bits, size) == (pytest.approx(after["cloister"].bits.sum()), 20)
