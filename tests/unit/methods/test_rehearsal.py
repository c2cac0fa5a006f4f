"""What a rehearsal says of a whole half: the same bytes that the half keeps, and a share for each layer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from cloister.adapters.add import add_adapter
from cloister.bench.shape import Shape, packs
from cloister.job import EnclaveSection, Job
from cloister.methods import rehearsal
from cloister.methods.rehearsal import Cost, Rehearsal, rehearse
from cloister.model import repacked
from cloister.model.cut import Latter
from cloister.model.repacked import RepackedLinear, repack
from cloister.training.loss import target_nll
from tests.unit.model.tiny import CONFIGS, VOCABULARY, tiny_model

PACKS = packs(Shape(vocabulary=VOCABULARY, tokens=96, packs=2))
COSTS = ("former", "training", "scoring", "kept")  # "copied" is nothing for models this small


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_ENOUGH_S", 0.0)
    monkeypatch.setattr(rehearsal, "_LEAST_RUNS", 1)


def job(**adapter: Any) -> Job:
    return Job.model_validate(
        {
            "job": {"name": "trial"},
            "model": {"path": "model"},
            "training": {"epochs": 2.0, "batch_tokens": 512, "max_tokens": 48},
            "adapter": adapter,
            "party": [{"name": "a"}],
        }
    )


def layered(costs: Rehearsal) -> list[float]:
    return [getattr(costs, name).of(layers) for name in COSTS for layers in (1, 4)]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture_is_rehearsed(name: str) -> None:
    config = CONFIGS[name]
    before = deepcopy(config.to_dict())
    assert all(cost > 0 for cost in layered(rehearse(config, job(), PACKS, PACKS)))
    assert config.to_dict() == before


@pytest.mark.parametrize("adapter", [{"kind": "ptuning"}, {"kind": "spf"}, {"kind": "spf", "criterion": "grad"}])
def test_every_kind_of_adapter_is_rehearsed(adapter: dict[str, str]) -> None:
    assert all(cost > 0 for cost in layered(rehearse(CONFIGS["llama"], job(**adapter), PACKS, PACKS)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_what_is_kept_is_what_the_whole_half_keeps(name: str) -> None:
    costs, half = rehearse(CONFIGS[name], job(), PACKS, PACKS), Latter(tiny_model(name), 1)
    add_adapter(half, job().adapter, first_layer=1, seed=0).eval()  # a frozen base has no dropout
    given = PACKS[0].with_activations(torch.randn(len(PACKS[0]), 32))
    with rehearsal._kept(half) as kept:
        target_nll(half, given)
    assert costs.kept.of(3) * len(given) == pytest.approx(sum(kept.values()), rel=0.02)


@pytest.mark.parametrize(
    ("name", "enclave", "copied"),
    [
        ("llama", {}, True),
        ("gpt2", {}, False),
        ("llama", {"repack": False}, False),
        ("llama", {"device": "cuda"}, False),
        ("llama", {"processes": 2, "sharding": "full"}, False),
    ],
)
def test_copies_of_weights_are_those_that_a_half_makes(
    monkeypatch: pytest.MonkeyPatch, name: str, enclave: dict[str, Any], copied: bool
) -> None:
    monkeypatch.setattr(repacked, "LEAST_WEIGHTS", 32 * 32)
    asked = job().model_copy(update={"enclave": EnclaveSection(**enclave)})
    costs = rehearse(CONFIGS[name], asked, PACKS, PACKS)
    half = Latter(repack(tiny_model(name)), 1)
    made = [4.0 * m.weight.numel() for m in half.model.modules() if isinstance(m, RepackedLinear)]
    head = 4.0 * VOCABULARY * 32 if copied or (name == "gpt2") else 0.0
    assert costs.copied.of(3) == (sum(made) if copied else head)
    assert (costs.copied.layer > 0) == copied


def test_what_takes_long_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_LEAST_RUNS", 5)
    runs = []
    rehearsal._seconds(lambda: runs.append(1))
    assert len(runs) == 6
    monkeypatch.setattr(rehearsal, "_LONG_S", 0.0)
    rehearsal._seconds(lambda: runs.append(1))
    assert len(runs) == 7


def test_a_model_of_two_layers_has_no_other_to_compare_with() -> None:
    config = deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 2
    costs = rehearse(config, job(), PACKS, PACKS)
    assert [getattr(costs, name).layer for name in COSTS] == [0.0] * 4
    assert all(cost > 0 for cost in layered(costs))


def test_one_layer_more_costs_the_difference() -> None:
    assert rehearsal._cost([5.0, 7.0]) == Cost(once=3.0, layer=2.0)
    assert rehearsal._cost([5.0, 7.0]).of(10) == 23.0
    assert rehearsal._cost([5.0, 4.0]) == Cost(once=5.0, layer=0.0)  # noise, in a model too small to tell


def test_random_numbers_of_others_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    rehearse(CONFIGS["llama"], job(), PACKS, PACKS)
    assert torch.equal(torch.rand(4), expected)
