"""Repacked layers against those that they are made of: results, gradients, adapters, changes of weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cloister.model import repacked
from cloister.model.cut import Former, Latter, Whole
from cloister.model.repacked import RepackedLinear, repack, works
from tests.unit.model.tiny import CONFIGS, VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (20,), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(20)

pytestmark = pytest.mark.skipif(not works(), reason="this torch was built without oneDNN")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repacked, "LEAST_WEIGHTS", 1)


def plain(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias).requires_grad_(False)


def close(a: Tensor, b: Tensor) -> bool:
    """Up to the order of sums."""
    largest = b.abs().max() if b.numel() else 0.0
    return a.shape == b.shape and bool(((a - b).abs() <= 2e-5 * largest).all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (0, 48), (1, 48), (5, 48), (1, 700, 48), (2, 3, 48)])
def test_a_layer_gives_what_it_gave_before(shape: tuple[int, ...], bias: bool) -> None:
    layer = plain(bias)
    ours, theirs = (torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in "ab")
    found, expected = RepackedLinear(layer)(ours), layer(theirs)
    assert close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert close(ours.grad, theirs.grad)


@pytest.mark.parametrize("x", [torch.randn(48, 7).t(), torch.randn(7, 96)[:, ::2], torch.randn(1, 96)[:, 48:]])
def test_strides_do_not_matter(x: Tensor) -> None:
    layer = plain()
    assert close(RepackedLinear(layer)(x), layer(x))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_halves_of_every_architecture_give_what_they_gave(name: str) -> None:
    former, ours = (Former(model, 2) for model in (tiny_model(name), repack(tiny_model(name))))
    given = former(IDS, POSITIONS, None)
    assert close(ours(IDS, POSITIONS, None), given)
    latter, ours = (Latter(model, 2) for model in (tiny_model(name), repack(tiny_model(name))))
    expected, found = (half.logits(half.hidden(given, POSITIONS, None)) for half in (latter, ours))
    assert close(found, expected)


def test_layers_are_replaced_and_keep_their_parameters() -> None:
    model = tiny_model("llama-tied")
    names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert repack(model) is model
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == names
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {RepackedLinear}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gradients_of_lora_are_those_of_the_plain_model() -> None:
    gradients = []
    for model in (tiny_model("llama"), repack(tiny_model("llama"))):
        torch.manual_seed(4)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, config)
        half = Whole(model)
        half.logits(half.hidden(IDS, POSITIONS, None)).logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    plain_ones, ours = gradients
    assert plain_ones.keys() == ours.keys()
    assert len(ours) == 2 * 4 * 7
    for name, expected in plain_ones.items():
        assert close(ours[name], expected), name


def test_a_weight_that_changes_in_place_is_copied_again() -> None:
    layer = RepackedLinear(plain())
    x = torch.randn(5, 48, requires_grad=True)
    layer(x).sum().backward()
    layer.weight[:, 1:].mul_(2.0)  # none of the values that are looked at
    x.grad = None
    found = layer(x)
    found.sum().backward()
    assert close(found, nn.functional.linear(x, layer.weight, layer.bias))
    assert x.grad is not None
    assert close(x.grad, layer.weight.sum(0).expand(5, -1))


def test_a_merged_adapter_counts() -> None:
    torch.manual_seed(5)
    model = repack(tiny_model("llama"))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
    before = adapted(input_ids=IDS[None]).logits
    assert close(adapted.merge_and_unload()(input_ids=IDS[None]).logits, before)  # type: ignore[operator]


def test_a_layer_that_learns_is_an_ordinary_one() -> None:
    layer = RepackedLinear(plain())
    layer.weight.requires_grad_()
    layer(torch.ones(3, 48)).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.full((80, 48), 3.0))


def test_layers_can_be_copied_and_pickled_after_use() -> None:
    layer = RepackedLinear(plain())
    x = torch.randn(5, 48)
    expected = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301  # our own
        assert torch.equal(again(x), expected)


def test_other_dtypes_small_layers_and_a_torch_without_it_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(dtype: torch.dtype = torch.float32) -> set[type]:
        return {type(m) for m in repack(tiny_model("llama", dtype)).modules() if isinstance(m, nn.Linear)}

    assert kinds(torch.bfloat16) == {nn.Linear}
    with monkeypatch.context() as context:
        context.setattr(repacked, "works", lambda: False)
        assert kinds() == {nn.Linear}
    monkeypatch.setattr(repacked, "LEAST_WEIGHTS", 33 * 32)
    assert kinds() == {nn.Linear, RepackedLinear}


def test_an_operator_that_multiplies_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bias(x: Tensor, arranged: Tensor, bias: Tensor | None) -> Tensor:
        return right(x, arranged, None)

    right = repacked._multiply
    monkeypatch.setattr(repacked, "_multiply", without_bias)
    assert not works.__wrapped__()


def test_unpacked_it_is_what_it_was() -> None:
    model, expected = repack(tiny_model("llama")), tiny_model("llama")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4)).eval()  # begins with no change
    adapted(input_ids=IDS[None])
    repacked.unpack(adapted)
    assert not any(isinstance(m, RepackedLinear) for m in adapted.modules())
    assert torch.equal(adapted(input_ids=IDS[None]).logits, expected(input_ids=IDS[None]).logits)
