"""How an adapter fits a party's packs: against the slow way, without a trace, and within its share of the time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloister.adapters.add import add_adapter
from cloister.adapters.state import adapter_state
from cloister.data.packing import Pack
from cloister.errors import ProtocolError
from cloister.job import AdapterSection, TrainingSection
from cloister.model.cut import Whole
from cloister.training.examine import SHARE, examine, sample_packs
from cloister.training.loop import PackList, Stepper, train
from cloister.training.loss import target_nll
from tests.unit.data.tiny_packs import random_pack
from tests.unit.model.tiny import VOCABULARY, tiny_model

TRAINING = TrainingSection(steps=3, batch_tokens=20, max_tokens=32, learning_rate=0.05)


def packs(count: int) -> list[Pack]:
    return [random_pack([9, 8], VOCABULARY, seed=i, first_example=2 * i) for i in range(count)]


def test_loss_and_gradient_are_those_of_all_targets_together() -> None:
    whole, source = Whole(tiny_model("llama")), PackList(packs(5))
    adapted = add_adapter(whole, AdapterSection(rank=2, dropout=0.5), first_layer=0, seed=1)
    train(whole, adapted, source, TRAINING, seed=1)
    before = {name: value.clone() for name, value in adapter_state(adapted).items()}
    stepper = Stepper(whole, adapted, TRAINING)
    random = torch.get_rng_state()
    first, second = examine(stepper, source, [[0, 2], [4]], "bundle {}".format)

    parameters = [p for p in adapted.parameters() if p.requires_grad]
    nll_N = torch.cat([target_nll(whole, source[i]) for i in (0, 2)])
    gradients = torch.autograd.grad(nll_N.mean(), parameters, allow_unused=True)
    norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
    assert first.loss == pytest.approx(float(nll_N.detach().mean()), rel=1e-5)
    assert first.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert (first.tokens, second.tokens) == (len(source[0]) + len(source[2]), len(source[4]))
    assert second.loss == pytest.approx(float(target_nll(whole, source[4]).detach().mean()), rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in adapter_state(adapted).items())
    assert all(p.grad is None for p in parameters)
    assert torch.equal(random, torch.get_rng_state())


def test_what_is_not_finite_is_named() -> None:
    whole = Whole(tiny_model("llama"))
    adapted = add_adapter(whole, AdapterSection(rank=2), first_layer=0, seed=1)
    with torch.no_grad():
        next(p for p in adapted.parameters() if p.requires_grad).fill_(torch.inf)
    with pytest.raises(ProtocolError, match="not finite") as error:
        examine(Stepper(whole, adapted, TRAINING), PackList(packs(2)), [[1]], "bundle {}".format)
    assert error.value.where == "bundle 1"


@given(
    st.lists(st.lists(st.integers(1, 512), min_size=1, max_size=20), min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.integers(0, 2**31),
)
def test_a_sample_costs_a_hundredth_of_the_training(owned: list[list[int]], trained: int, seed: int) -> None:
    tokens = [t for own in owned for t in own]
    ends = [sum(map(len, owned[: i + 1])) for i in range(len(owned))]
    places = [range(end - len(own), end) for end, own in zip(ends, owned, strict=True)]
    chosen = sample_packs(tokens, places, trained, seed)
    for own, members in zip(places, chosen, strict=True):
        assert members
        assert len(set(members)) == len(members)
        assert set(members) <= set(own)
        spent = sum(tokens[i] for i in members)
        assert len(members) == 1 or spent <= SHARE * trained / len(owned)
    assert chosen == sample_packs(tokens, places, trained, seed)
