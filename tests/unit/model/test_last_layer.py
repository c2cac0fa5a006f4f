"""The last layer at wanted tokens only: hidden states, losses and gradients of the full computation, with less work."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from cloister.adapters.add import add_adapter
from cloister.data.packing import Pack
from cloister.job import AdapterSection
from cloister.model import attention
from cloister.model.attention import Layout
from cloister.model.cut import Latter, Whole
from cloister.training.loss import target_nll
from tests.unit.data.tiny_packs import random_pack
from tests.unit.model.tiny import CONFIGS, VOCABULARY, tiny_model

ARCHITECTURES = sorted(CONFIGS)
ADAPTERS = {
    "lora": {"kind": "lora", "rank": 4},
    "ptuning": {"kind": "ptuning", "prefix_tokens": 3},
    "spf": {"kind": "spf", "ratio": 0.2},
}


def _tree() -> Pack:
    """Documents of one token, of a few, longer than any window; and one whose two branches share the root's last."""
    pack = random_pack([9, 1, 14, 12], VOCABULARY)
    branch_T = torch.zeros(36, dtype=torch.int64)
    branch_T[28:32], branch_T[32:] = 1, 2
    position_T = pack.layout.position_T.clone()
    position_T[32:] = torch.arange(4, 8)
    target_pos_N = torch.tensor([7, 12, 17, 22, 27, 28, 27, 32, 33])
    return Pack(
        given=pack.given,
        layout=Layout(document_T=pack.layout.document_T, branch_T=branch_T, position_T=position_T),
        target_pos_N=target_pos_N,
        target_id_N=pack.given[torch.tensor([8, 13, 18, 23, 28, 29, 32, 33, 34])],
        target_group_N=torch.arange(9),
        group_example_G=torch.arange(9),
        group_role_G=torch.zeros(9, dtype=torch.int64),
    )


PACK = _tree()


def _adapted(name: str, kind: str, *, all_tokens: bool, eager: bool = False) -> tuple[Whole, PeftModel]:
    model = tiny_model(name, torch.float64)
    if eager:
        model.set_attn_implementation("eager")
    half = Whole(model, all_tokens=all_tokens)
    adapted = add_adapter(half, AdapterSection.model_validate(ADAPTERS[kind]), first_layer=1, seed=1)
    torch.manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double() + 0.3 * torch.randn_like(parameter, dtype=torch.float64)
    return half, adapted.eval()


def _loss_and_gradients(half: Whole, adapted: PeftModel) -> list[Tensor]:
    logits = half.logits(half.hidden(PACK.given, PACK.layout.position_T, PACK.wanted)[PACK.wanted_N])
    nll_N = nn.functional.cross_entropy(logits, PACK.target_id_N, reduction="none")
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return [nll_N, *torch.autograd.grad(nll_N.mean(), trained)]


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_all_tokens_to_a_few_ulp(name: str, kind: str, eager: bool) -> None:
    ours = _loss_and_gradients(*_adapted(name, kind, all_tokens=False, eager=eager))
    full = _loss_and_gradients(*_adapted(name, kind, all_tokens=True, eager=eager))
    assert all(bool(gradient.any()) for gradient in full[1:])
    # Everything is in float64 but the inside of RMS norms, whose code asks for float32 and sums over the tokens given.
    ulp = 1e-12 if name in ("gpt2", "gpt_neox") else 2e-6
    torch.testing.assert_close(ours[0], full[0], rtol=1e-11, atol=1e-12)
    for mine, right in zip(ours[1:], full[1:], strict=True):
        torch.testing.assert_close(mine, right, rtol=0.0, atol=ulp * float(right.abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_mlp_sees_wanted_tokens_only(name: str) -> None:
    """What is saved: without it the rest of this file holds trivially."""
    half = Whole(tiny_model(name))
    seen = [_tokens_seen(half, number) for number in (-2, -1)]
    target_nll(half, PACK)
    assert [max(s) for s in seen] == [len(PACK), len(PACK.target_pos_N.unique())]


def _tokens_seen(half: Whole, number: int) -> list[int]:
    """How many tokens the MLP of a layer is given, a number for each call."""
    seen: list[int] = []
    mlp = half.anatomy.layers(half.model)[number].mlp
    assert isinstance(mlp, nn.Module)
    mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-2]))
    return seen


def test_where_most_tokens_are_wanted_all_are_computed_at_once() -> None:
    half = Whole(tiny_model("llama"))
    seen = _tokens_seen(half, -1)
    layout = Layout(**{n: getattr(PACK.layout, n) for n in ("document_T", "branch_T", "position_T")})
    wanted = Layout(**{**layout.__dict__, "query_N": torch.arange(1, len(PACK))})
    hidden_ND = half.hidden(PACK.given, layout.position_T, wanted)
    assert seen == [len(PACK)]
    assert torch.equal(hidden_ND, half.hidden(PACK.given, layout.position_T, layout)[1:])


def test_a_layer_that_asks_no_cache_computes_all_tokens() -> None:
    """Say, one whose tokens meet in a convolution: running it for some tokens would be wrong."""

    class Mixing(nn.Module):
        def forward(self, hidden_states: Tensor, past_key_values: object = None, **_: object) -> Tensor:
            return hidden_states + hidden_states.cumsum(1)

    def half() -> Whole:
        model = tiny_model("llama")
        model.model.layers[-1] = Mixing()
        return Whole(model)

    right_TD = half().hidden(PACK.given, PACK.layout.position_T, PACK.layout)
    found_ND = half().hidden(PACK.given, PACK.layout.position_T, PACK.wanted)
    assert torch.equal(found_ND, right_TD[PACK.wanted.query_N])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_latter_half_gives_the_whole_models_bits(name: str) -> None:
    whole, latter = Whole(tiny_model(name)), Latter(tiny_model(name), 3)
    with torch.no_grad():
        given_TD = _at_cut(whole, 3)
        ours = latter.hidden(given_TD, PACK.layout.position_T, PACK.wanted)
        assert torch.equal(ours, whole.hidden(PACK.given, PACK.layout.position_T, PACK.wanted))


def _at_cut(whole: Whole, cut: int) -> Tensor:
    caught: list[Tensor] = []
    handle = whole.anatomy.layers(whole.model)[cut].register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    whole.hidden(PACK.given, PACK.layout.position_T, PACK.layout)
    handle.remove()
    return caught[0][0]


def test_a_layout_without_queries_is_left_alone() -> None:
    whole = Whole(tiny_model("llama"))
    assert attention.current() is None
    hidden_TD = whole.hidden(PACK.given, PACK.layout.position_T, PACK.layout)
    full = Whole(tiny_model("llama"), all_tokens=True)
    assert torch.equal(hidden_TD, full.hidden(PACK.given, PACK.layout.position_T, PACK.layout))
