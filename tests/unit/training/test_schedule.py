"""Each pack once per epoch, at the learning rate of the closed form."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.job import TrainingSection
from cloister.training.loop import evaluation_steps
from cloister.training.schedule import learning_rate, plan_steps

TOKENS = st.lists(st.integers(1, 100), min_size=1, max_size=50)


def _section(**values: object) -> TrainingSection:
    return TrainingSection.model_validate(values)


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS, epochs=st.integers(1, 4), batch=st.integers(1, 300), seed=st.integers(0, 2**31 - 1))
def test_every_epoch_sees_each_pack_once(tokens: list[int], epochs: int, batch: int, seed: int) -> None:
    steps = plan_steps(tokens, _section(epochs=float(epochs), batch_tokens=batch), seed)
    members = [i for step in steps for i in step]
    for epoch in range(epochs):
        assert sorted(members[epoch * len(tokens) : (epoch + 1) * len(tokens)]) == list(range(len(tokens)))
    assert len(members) == epochs * len(tokens)
    assert all(steps)
    assert all(len(step) == 1 or sum(tokens[i] for i in step) <= batch for step in steps)


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS, steps=st.integers(1, 60), batch=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_number_of_steps_is_kept_and_is_the_beginning_of_longer_runs(
    tokens: list[int], steps: int, batch: int, seed: int
) -> None:
    planned = plan_steps(tokens, _section(steps=steps, batch_tokens=batch), seed)
    assert len(planned) == steps
    assert plan_steps(tokens, _section(steps=steps + 5, batch_tokens=batch), seed)[:steps] == planned


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.5, 5), (1.0, 10), (1.5, 15), (2.3, 23)])
def test_a_fraction_of_an_epoch_is_that_fraction_of_its_steps(epochs: float, steps: int) -> None:
    planned = plan_steps([10] * 10, _section(epochs=epochs, batch_tokens=10), 0)
    assert len(planned) == steps
    first, rest = planned[:10], planned[10:20]
    assert len({i for s in first for i in s}) == len(first)
    assert len({i for s in rest for i in s}) == len(rest)


def test_steps_are_filled_and_a_large_pack_stands_alone() -> None:
    planned = plan_steps([10] * 12 + [500], _section(epochs=1.0, batch_tokens=40), 3)
    assert [12] in planned
    assert sum(len(s) for s in planned) == 13
    assert len(planned) <= 5


def test_the_seed_decides_the_order_and_epochs_differ() -> None:
    section = _section(epochs=2.0, batch_tokens=10)
    plans = [plan_steps([10] * 20, section, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0][:20] != plans[0][20:]


def test_nothing_to_train_on_is_a_programmers_mistake_and_does_not_hang() -> None:
    with pytest.raises(ValueError, match="no packs"):
        plan_steps([], _section(steps=3), 0)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_is_torchs_own_schedule(schedule: str, warmup: float) -> None:
    steps, peak = 40, 3e-3
    section = _section(steps=steps, schedule=schedule, warmup=warmup, learning_rate=peak)
    rise = round(warmup * steps)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    lr = torch.optim.lr_scheduler
    first = lr.LinearLR(optimiser, start_factor=1 / (rise + 1), end_factor=1.0, total_iters=rise) if rise else None
    then: dict[str, object] = {
        "cosine": lambda: lr.CosineAnnealingLR(optimiser, T_max=steps - rise),
        "linear": lambda: lr.LinearLR(optimiser, start_factor=1.0, end_factor=0.0, total_iters=steps - rise),
        "constant": lambda: lr.ConstantLR(optimiser, factor=1.0),
    }
    second = then[schedule]()  # type: ignore[operator]
    both = lr.SequentialLR(optimiser, [first, second], [rise]) if first else second
    expected = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR itself steps its parts with a deprecated argument
        for _ in range(steps):
            expected.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            both.step()
    ours = [learning_rate(step, steps, section) for step in range(steps)]
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert max(ours) == peak
    assert min(ours) > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decaying_schedule_ends_one_step_after_the_last(schedule: str) -> None:
    section = _section(steps=10, schedule=schedule, warmup=0.0, learning_rate=1.0)
    assert learning_rate(10, 10, section) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(num_steps=st.integers(1, 500), count=st.integers(0, 50))
def test_validations_are_even_and_the_last_is_at_the_end(num_steps: int, count: int) -> None:
    marks = sorted(evaluation_steps(num_steps, count))
    assert len(marks) == min(count, num_steps)
    if count:
        assert marks[-1] == num_steps
        assert marks[0] >= 1
        gaps = [b - a for a, b in zip([0, *marks], marks, strict=False)]
        assert max(gaps) - min(gaps) <= 1
        assert max(gaps) <= math.ceil(num_steps / min(count, num_steps))
