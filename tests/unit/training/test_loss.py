"""The loss without a full logits tensor is the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cloister.data.packing import Pack
from cloister.model.cut import Former, Latter, Whole
from cloister.training.loss import target_nll
from tests.unit.data.tiny_packs import random_pack
from tests.unit.model.tiny import CONFIGS, VOCABULARY, tiny_model

PACK = random_pack([9, 14, 12], VOCABULARY)


def _gradients(half: Whole, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in half.anatomy.layers(half.model)[2:].parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("max_logits", [1, VOCABULARY * 3, VOCABULARY * 7 + 1])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_logits_in_parts_give_the_same_loss_and_gradients(name: str, max_logits: int) -> None:
    half = Whole(tiny_model(name))
    half.anatomy.layers(half.model)[2:].requires_grad_(True)
    whole, parts = target_nll(half, PACK), target_nll(half, PACK, max_logits)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    pairs = zip(_gradients(half, parts.mean()), _gradients(half, whole.mean()), strict=True)
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not target_nll(half, PACK, max_logits).requires_grad


def test_no_more_logits_than_allowed_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Whole(tiny_model("llama"))
    sizes: list[int] = []
    stock = half.logits

    def logits(hidden_ND: Tensor) -> Tensor:
        sizes.append(len(hidden_ND) * VOCABULARY)
        return stock(hidden_ND)

    monkeypatch.setattr(half, "logits", logits)
    target_nll(half, PACK, VOCABULARY * 5)
    assert max(sizes) <= VOCABULARY * 5
    assert sum(sizes) == VOCABULARY * len(PACK.target_pos_N)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_each_target_costs_what_the_stock_model_says_of_its_document_alone(name: str) -> None:
    nll_N = target_nll(Whole(tiny_model(name)), PACK)
    model = tiny_model(name)
    expected = []
    for document in range(3):
        here = PACK.layout.document_T == document
        first = int(here.nonzero()[0])
        mine = PACK.target_group_N == document
        logits_TV = model(input_ids=PACK.given[here][None]).logits[0]
        predictor, target = PACK.target_pos_N[mine] - first, PACK.target_id_N[mine]
        expected.append(-logits_TV.log_softmax(-1)[predictor, target])
    torch.testing.assert_close(nll_N, torch.cat(expected), rtol=1e-5, atol=2e-5)


def test_the_latter_half_gives_the_whole_models_loss() -> None:
    active = PACK.with_activations(Former(tiny_model("gemma2"), 2)(PACK.given, PACK.layout.position_T, PACK.layout))
    assert torch.equal(
        target_nll(Latter(tiny_model("gemma2"), 2), active), target_nll(Whole(tiny_model("gemma2")), PACK)
    )


def test_soft_caps_are_in_the_loss() -> None:
    """A Gemma 2 with a low cap: the head code used is the model's own, not its matrix alone."""
    half = Whole(tiny_model("gemma2"))
    half.model.config.final_logit_softcapping = 2.0
    hidden_TD = half.hidden(PACK.given, PACK.layout.position_T, PACK.layout)
    head = half.model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    uncapped = cross_entropy(head(hidden_TD[PACK.target_pos_N]), PACK.target_id_N, reduction="none")
    assert (uncapped - target_nll(half, PACK)).abs().max() > 1e-2


def test_the_loss_is_fp32_for_a_bf16_model() -> None:
    half = Whole(tiny_model("llama", torch.bfloat16))
    assert target_nll(half, PACK).dtype == torch.float32


def _pack_of(pack: Pack, document: int) -> Pack:
    """One document of a pack as a pack."""
    lengths = torch.bincount(pack.layout.document_T).tolist()
    single = random_pack([lengths[document]], VOCABULARY)
    here = pack.layout.document_T == document
    ids_T = pack.given[here]
    return Pack(
        given=ids_T,
        layout=single.layout,
        target_pos_N=single.target_pos_N,
        target_id_N=ids_T[single.target_pos_N + 1],
        target_group_N=single.target_group_N,
        group_example_G=single.group_example_G,
        group_role_G=single.group_role_G,
    )


def test_a_pack_costs_the_sum_of_its_documents() -> None:
    half = Whole(tiny_model("llama"))
    alone = sum(target_nll(half, _pack_of(PACK, d)).sum() for d in range(3))
    torch.testing.assert_close(target_nll(half, PACK).sum(), torch.as_tensor(alone), rtol=1e-5, atol=1e-4)
