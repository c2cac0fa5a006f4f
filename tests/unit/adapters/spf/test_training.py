"""What SPF trains is what full fine-tuning of the same modules would have trained, row by row."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cloister.adapters import SPFConfig
from cloister.errors import AdapterError
from tests.unit.adapters.spf.models import (
    ARCHITECTURES,
    adapted_model,
    dense_weights,
    layers_of,
    logits,
    loss,
    train,
)
from tests.unit.model.tiny import tiny_model

ROWS_ONLY = {"lora_target_modules": []}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ratio_1_is_full_fine_tuning_of_these_modules(name: str) -> None:
    adapted = adapted_model(name, ratio=1.0, **ROWS_ONLY)
    dense = tiny_model(name)
    train(adapted, [p for p in adapted.parameters() if p.requires_grad])
    train(dense, dense_weights(dense, list(layers_of(adapted))))
    assert not torch.equal(logits(dense), logits(tiny_model(name)))
    for module, layer in layers_of(adapted).items():
        weight = dense.get_submodule(module).weight.detach()
        assert torch.equal(layer.spf_rows["default"].detach(), weight.t() if layer.transposed else weight)
    assert torch.equal(logits(adapted), logits(dense))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("unit", ["head", "row"])
def test_gradients_are_the_dense_weights_row_by_row(name: str, unit: str) -> None:
    adapted = adapted_model(name, ratio=0.5, unit=unit, **ROWS_ONLY)
    dense = tiny_model(name)
    layers = layers_of(adapted)
    weights = dense_weights(dense, list(layers))
    loss(adapted).backward()
    loss(dense).backward()
    for layer, weight in zip(layers.values(), weights, strict=True):
        assert weight.grad is not None
        dense_grad = weight.grad.t() if layer.transposed else weight.grad
        rows = layer.spf_rows["default"]
        assert rows.grad is not None
        assert 0 < len(rows) < len(dense_grad)
        torch.testing.assert_close(rows.grad, dense_grad[layer.spf_index["default"]], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_rows_that_are_not_chosen_never_change_a_bit(name: str) -> None:
    base = tiny_model(name)
    for parameter in base.parameters():
        parameter.data.flatten()[::7] *= -0.0  # zeros of both signs, which are equal but not the same bits
    before = {n: p.clone() for n, p in base.named_parameters()}
    adapted = get_peft_model(base, SPFConfig(ratio=0.25, lora_target_modules=[]))
    train(adapted, [p for p in adapted.parameters() if p.requires_grad])
    chosen = {n: layer.spf_index["default"] for n, layer in layers_of(adapted).items()}
    transposed = {n for n, layer in layers_of(adapted).items() if layer.transposed}
    after = dict(adapted.merge_and_unload().named_parameters())
    assert set(after) == set(before)
    for key, value in before.items():
        module = key.removesuffix(".weight")
        differs = after[key].view(torch.int32) != value.view(torch.int32)
        if module in chosen:
            rows = (differs.t() if module in transposed else differs).any(dim=1)
            assert rows.nonzero().flatten().tolist() == chosen[module].tolist()
        else:
            assert not differs.any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_and_optimiser_exist_for_chosen_rows_only(name: str) -> None:
    """Bytes follow ratio; tests/unit/adapters/spf/test_product.py shows that no dense gradient comes in between."""
    bytes_at = {}
    for ratio in (0.25, 1.0):
        adapted = adapted_model(name, ratio=ratio, unit="row", **ROWS_ONLY)
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters)
        loss(adapted).backward()
        optimiser.step()
        state = [v for p in parameters for v in optimiser.state[p].values() if v.dim() > 0]
        bytes_at[ratio] = sum(t.nbytes for t in [*state, *(p.grad for p in parameters if p.grad is not None)])
        assert {n for n, p in adapted.named_parameters() if p.grad is not None} == {
            n for n, p in adapted.named_parameters() if "spf_rows" in n
        }
    full = tiny_model(name)
    modules = list(layers_of(adapted_model(name, **ROWS_ONLY)))
    dense_bytes = 3 * sum(full.get_submodule(m).weight.nbytes for m in modules)  # type: ignore[operator]  # weights
    assert bytes_at[1.0] == dense_bytes
    assert bytes_at[0.25] <= 0.27 * dense_bytes


def test_the_lora_part_is_pefts_lora() -> None:
    """The same matrices at the same place give the same logits and the same gradients."""
    ours = adapted_model("llama", r=4, lora_alpha=8.0, moved=True)
    theirs = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"]))
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for module, layer in layers_of(ours).items():
            if layer.spf_rows:
                layer.spf_rows["default"].copy_(layer.weight_MK[layer.spf_index["default"]])
            else:
                for part in ("A", "B"):
                    matrix = getattr(layer, f"spf_lora_{part}")["default"].weight
                    named[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(matrix)
    assert torch.equal(logits(ours), logits(theirs))
    loss(ours).backward()
    loss(theirs).backward()
    for module, layer in layers_of(ours).items():
        if not layer.spf_rows:
            mine = layer.spf_lora_A["default"].weight.grad
            assert torch.equal(mine, named[f"base_model.model.{module}.lora_A.default.weight"].grad)  # type: ignore[arg-type]


def test_dropout_is_in_front_of_lora_and_can_be_switched() -> None:
    adapted = adapted_model("llama", lora_dropout=0.5, moved=True)
    assert torch.equal(logits(adapted), logits(adapted))
    names = [n for n, m in adapted.named_modules() if isinstance(m, torch.nn.Dropout) and "lora_dropout" in n]
    assert len(names) == 4
    for name in names:  # as training/loop.py does: the parent's name ends with lora_dropout
        adapted.get_submodule(name.removesuffix(".default")).train()
    assert not torch.equal(logits(adapted), logits(adapted))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_bfloat16_base_keeps_rows_in_float32(name: str) -> None:
    base = tiny_model(name, torch.bfloat16)
    expected = logits(base)
    adapted = get_peft_model(base, SPFConfig())
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(adapted), expected)
    loss(adapted).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_autocast_it_is_full_fine_tuning_under_autocast(name: str) -> None:
    adapted, dense = adapted_model(name, ratio=1.0, **ROWS_ONLY), tiny_model(name)
    weights = dense_weights(dense, list(layers_of(adapted)))
    losses = []
    for model in (adapted, dense):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss(model))
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    for layer, weight in zip(layers_of(adapted).values(), weights, strict=True):
        assert weight.grad is not None
        dense_grad = weight.grad.t() if layer.transposed else weight.grad
        assert torch.equal(layer.spf_rows["default"].grad, dense_grad)  # type: ignore[arg-type]  # it has one


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("ratio", 0.0, r"ratio must lie in \(0, 1\], got 0.0"),
        ("ratio", 1.01, r"ratio must lie in \(0, 1\]"),
        ("ratio", float("nan"), r"ratio must lie in \(0, 1\]"),
        ("ratio", "0.5", r"ratio must lie in \(0, 1\], got '0.5'"),
        ("ratio", None, r"ratio must lie in \(0, 1\], got None"),
        ("criterion", "l3", "criterion must be one of l1, l2, grad, random, got 'l3'"),
        ("unit", "column", "unit must be one of head, row"),
        ("r", 0, "r must be at least 1"),
        ("r", 2.5, "r must be at least 1, got 2.5"),
        ("r", "8", "r must be at least 1, got '8'"),
        ("lora_alpha", 0.0, "lora_alpha must be positive"),
        ("lora_alpha", "16", "lora_alpha must be positive, got '16'"),
        ("lora_dropout", 1.0, r"lora_dropout must lie in \[0, 1\)"),
        ("lora_dropout", "0", r"lora_dropout must lie in \[0, 1\), got '0'"),
        ("target_modules", [], "target_modules is empty"),
        ("layers_to_transform", 1, "layers_to_transform must be numbers of layers, or None for all, got 1"),
        ("layers_to_transform", [], "layers_to_transform must be numbers of layers"),
        ("layers_to_transform", [-1], "layers_to_transform must be numbers of layers"),
        ("layers_to_transform", "01", "layers_to_transform must be numbers of layers"),
        ("layers_to_transform", b"\2\3", "layers_to_transform must be numbers of layers"),
        ("layers_to_transform", [1, 1], "layers_to_transform must be numbers of layers"),
        ("r", True, "r must be at least 1, got True"),
        ("ratio", True, r"ratio must lie in \(0, 1\], got True"),
        ("target_modules", 5, "target_modules must be names of modules, got 5"),
        ("lora_target_modules", [5], r"lora_target_modules must be names of modules, got \[5\]"),
        ("layers_pattern", "[", r"layers_pattern must be the name of a list of layers, got '\['"),
        ("seed", "x", "seed must be a whole number of at least 0, got 'x'"),
        ("tie_groups", "no", "tie_groups must be true or false, got 'no'"),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: object, says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        adapted_model("llama", **{field: value})


def test_single_rows_have_no_groups_to_tie() -> None:
    with pytest.raises(AdapterError, match='tie_groups ties heads, but unit is "row"'):
        adapted_model("llama", tie_groups=True, unit="row")
