"""The peer trains the same thing as our loop: the same batches, losses, gradients; attention within documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloister.adapters.add import add_adapter
from cloister.bench.split_data import Workload, party_data, train_packs
from cloister.bench.split_trainer import add_peft_lora, rows_of, train_with_trainer
from cloister.data.packing import Pack
from cloister.model.anatomy import load_model
from cloister.model.cut import Whole
from cloister.training.loop import PackList, snapshot, train
from cloister.training.loss import target_nll
from cloister.training.schedule import learning_rate, plan_steps
from tests.unit.bench.small import small_workload

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-5, 2e-4
"""Nats, and of weights that move by 0.01 a step: float32 sums in another order."""


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return small_workload(tmp_path_factory.mktemp("bench"))


def packs_of(workload: Workload) -> list[Pack]:
    return train_packs(party_data(workload.loaded))


def model_of(workload: Workload) -> Whole:
    return Whole(load_model(workload.loaded.local_path(workload.loaded.job.model.path), "float32"))


def test_trainer_and_our_loop_take_the_same_steps(workload: Workload, tmp_path: Path) -> None:
    job, packs, losses = workload.loaded.job, packs_of(workload), list[float]()
    training = job.training.model_copy(update={"learning_rate": 1e-2, "max_grad_norm": 0.05, "batch_tokens": 1536})
    steps = plan_steps([len(pack) for pack in packs], training, job.job.seed)
    assert len(steps) > 4
    assert len({len(step) for step in steps}) > 1  # with batches of different sizes

    theirs = add_peft_lora(model_of(workload).model, job.adapter, job.job.seed)
    before = snapshot(theirs)
    train_with_trainer(
        theirs,
        [[packs[i] for i in step] for step in steps],
        [learning_rate(step, len(steps), training) for step in range(len(steps))],
        training,
        seed=0,
        folder=tmp_path,
        on_step=lambda number, loss: losses.append(loss),
    )
    whole = model_of(workload)
    ours = add_adapter(whole, job.adapter, first_layer=0, seed=job.job.seed)
    result = train(whole, ours, PackList(packs), training, seed=job.job.seed)

    assert losses == pytest.approx([point.train_loss for point in result.curve], abs=LOSS_TOLERANCE)
    assert abs(losses[-1] - losses[0]) > 100 * LOSS_TOLERANCE  # it does learn
    after = {name.replace("base_model.model.", ""): value for name, value in snapshot(theirs).items()}
    for name, value in snapshot(ours).items():
        torch.testing.assert_close(after[name.replace("base_model.model.", "")], value, atol=WEIGHT_TOLERANCE, rtol=0.0)
    assert any(not torch.equal(before[name], value) for name, value in snapshot(theirs).items())
    assert list(tmp_path.iterdir()) == []


def test_rows_carry_every_target_once_and_nothing_else(workload: Workload) -> None:
    packs = packs_of(workload)[:3]
    rows = rows_of(packs)
    assert rows["input_ids"].shape == rows["labels"].shape == (3, max(map(len, packs)))
    for row, pack in enumerate(packs):
        found = {int(p): int(rows["labels"][row, p]) for p in (rows["labels"][row] != -100).nonzero()}
        assert found == {int(p) + 1: int(t) for p, t in zip(pack.target_pos_N, pack.target_id_N, strict=True)}
        assert torch.equal(rows["position_ids"][row, : len(pack)], pack.layout.position_T)
        starts = int((rows["position_ids"][row] == 0).sum())
        assert starts == int(pack.layout.document_T.max()) + 1  # what pads a row begins no document


def test_documents_of_a_row_do_not_see_each_other(workload: Workload) -> None:
    """transformers' own mask from positions against ours, which is tested by itself; one mask over all would differ."""
    pack = max(packs_of(workload), key=lambda pack: int(pack.layout.document_T.max()))
    assert pack.layout.document_T.max() > 0
    whole, batch = model_of(workload), rows_of([pack])
    with torch.no_grad():
        theirs = whole.model(**batch, use_cache=False).loss  # as Trainer has it: with a cache positions bound nothing
        ours = target_nll(whole, pack).mean()
        seeing_all = whole.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0.0)
    assert abs(seeing_all - ours) > 1e-4
