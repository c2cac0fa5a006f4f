"""The two halves of a model are the model: equal bits, whole or packed, at once or token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cloister.agreement.job import resolve_cut
from cloister.errors import ModelError
from cloister.model.anatomy import find_anatomy
from cloister.model.attention import Layout, packed
from cloister.model.cut import Former, Latter, Whole
from tests.unit.model.tiny import CONFIGS, VOCABULARY, tiny_model

ARCHITECTURES = sorted(CONFIGS)


def _ids(count: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def _halves(name: str, cut: int, dtype: torch.dtype = torch.float32) -> tuple[Former, Latter]:
    return Former(tiny_model(name, dtype), cut), Latter(tiny_model(name, dtype), cut)


def _split_logits(former: Former, latter: Latter, ids_T: Tensor, position_T: Tensor, layout: Layout | None) -> Tensor:
    return latter.logits(latter.hidden(former(ids_T, position_T, layout), position_T, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_former_then_latter_equals_the_stock_model_to_0_ulp(name: str, cut: int, dtype: torch.dtype) -> None:
    ids_T, position_T = _ids(24), torch.arange(24)
    with torch.no_grad():
        whole = tiny_model(name, dtype)(input_ids=ids_T[None]).logits[0]
        split = _split_logits(*_halves(name, cut, dtype), ids_T, position_T, None)
    assert torch.equal(split, whole)


def _pack(lengths: list[int]) -> tuple[Tensor, Layout]:
    ids_T = _ids(sum(lengths))
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position_T = torch.cat([torch.arange(n) for n in lengths])
    return ids_T, Layout(document_T=document_T, branch_T=torch.zeros_like(document_T), position_T=position_T)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_see_only_themselves_on_both_sides_of_the_cut(name: str) -> None:
    lengths = [9, 1, 14, 7]
    ids_T, layout = _pack(lengths)
    former, latter = _halves(name, 2)
    activation_TD = former(ids_T, layout.position_T, layout)
    packed_TV = latter.logits(latter.hidden(activation_TD, layout.position_T, layout))
    start = 0
    for length in lengths:
        alone, position = slice(start, start + length), torch.arange(length)
        alone_TD = former(ids_T[alone], position, None)
        torch.testing.assert_close(activation_TD[alone], alone_TD, rtol=1e-5, atol=1e-5)
        alone_TV = latter.logits(latter.hidden(alone_TD, position, None))
        torch.testing.assert_close(packed_TV[alone], alone_TV, rtol=1e-5, atol=2e-5)
        start += length


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_the_layout_packed_documents_leak_into_each_other(name: str) -> None:
    """The mask is what protects: with it removed the test above would fail."""
    ids_T, layout = _pack([9, 14])
    whole = Whole(tiny_model(name))
    position_T = torch.arange(23)
    right = whole.hidden(ids_T, layout.position_T, layout)
    wrong = whole.hidden(ids_T, position_T, None)
    assert (right - wrong)[9:].abs().max() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_split_equals_packed_whole_to_0_ulp(name: str) -> None:
    ids_T, layout = _pack([9, 14, 7])
    whole = Whole(tiny_model(name))
    whole_TV = whole.logits(whole.hidden(ids_T, layout.position_T, layout))
    assert torch.equal(_split_logits(*_halves(name, 2), ids_T, layout.position_T, layout), whole_TV)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_branches_of_a_tree_equal_each_path_alone(name: str) -> None:
    """Root of 8 tokens, branches of 3, 7 and 2: each path root + branch gives what it gives as a document."""
    branches = [3, 7, 2]
    ids_T = _ids(8 + sum(branches))
    branch_T = torch.cat([torch.zeros(8), *(torch.full((n,), float(i + 1)) for i, n in enumerate(branches))]).long()
    position_T = torch.cat([torch.arange(8), *(torch.arange(8, 8 + n) for n in branches)])
    layout = Layout(document_T=torch.zeros_like(branch_T), branch_T=branch_T, position_T=position_T)
    tree_TV = _split_logits(*_halves(name, 2), ids_T, position_T, layout)
    stock = tiny_model(name)
    for branch in (1, 2, 3):
        path = (branch_T == 0) | (branch_T == branch)
        torch.testing.assert_close(tree_TV[path], stock(input_ids=ids_T[path][None]).logits[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_token_by_token_with_two_caches_equals_the_whole_context(name: str) -> None:
    former, latter = _halves(name, 2)
    ids_T = _ids(20)
    former_cache, latter_cache = former.new_cache(), latter.new_cache()
    pieces = []
    for piece in (slice(0, 9), *(slice(t, t + 1) for t in range(9, 20))):
        position = torch.arange(20)[piece]
        activation = former(ids_T[piece], position, None, former_cache)
        pieces.append(latter.logits(latter.hidden(activation, position, None, latter_cache)))
    whole = tiny_model(name)(input_ids=ids_T[None]).logits[0]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_the_latter_half_equal_the_whole_models(name: str) -> None:
    ids_T, layout = _pack([9, 14])
    former, latter = _halves(name, 2)
    whole = Whole(tiny_model(name))
    grads = []
    for half, given in ((latter, former(ids_T, layout.position_T, layout)), (whole, ids_T)):
        half.anatomy.layers(half.model)[2:].requires_grad_(True)
        half.logits(half.hidden(given, layout.position_T, layout)).square().mean().backward()
        grads.append([p.grad for p in half.anatomy.layers(half.model)[2:].parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_each_half_drops_the_parameters_of_the_other() -> None:
    former, latter = _halves("llama", 1)
    whole = sum(p.numel() for p in tiny_model("llama").parameters())
    former_size = sum(p.numel() for p in former.trunk.parameters())
    latter_size = sum(p.numel() for p in latter.model.parameters())
    assert former_size + latter_size == whole


@pytest.mark.parametrize(("cut", "layers"), [("auto", 2), (0.5, 3), (4, 4), (1, 1), (5, 5)])
def test_cut_is_resolved(cut: int | float | str, layers: int) -> None:
    assert resolve_cut(cut, 6) == layers


@pytest.mark.parametrize("cut", [0, 6, 7, -1, 0.01, 0.99])
def test_cut_outside_the_model_is_refused(cut: int | float) -> None:
    with pytest.raises(ModelError, match="leaves no layer on one side of a model with 6 layers") as refused:
        resolve_cut(cut, 6)
    assert "1 to 5" in refused.value.hint


def test_unknown_anatomy_is_refused_with_what_was_looked_for() -> None:
    model = tiny_model("llama")
    model.model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ModelError, match=r"one nn.ModuleList of 4 decoder layers in the trunk, found \['layers \(4\)'"):
        find_anatomy(model)


def test_a_layout_ends_with_its_context() -> None:
    ids_T, layout = _pack([9, 14])
    whole = Whole(tiny_model("llama"))
    plain = whole.hidden(ids_T, torch.arange(23), None)
    with packed(layout):
        pass
    assert torch.equal(whole.hidden(ids_T, torch.arange(23), None), plain)
