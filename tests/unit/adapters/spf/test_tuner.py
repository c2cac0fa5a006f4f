"""What PEFT expects of every tuner, after `import cloister` alone.

PEFT's own tests of this contract (tests/testing_common.py in its repository) are not in the installed package; these
are the same properties.
"""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from cloister.adapters import SPFConfig
from cloister.adapters.spf.layer import SPFLayer
from cloister.errors import AdapterError
from tests.unit.adapters.quantised import Quantised
from tests.unit.adapters.spf.models import ARCHITECTURES, adapted_model, layers_of, logits, loss, move
from tests.unit.model.tiny import tiny_model

SOME = ["llama", "phi3", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    assert torch.equal(logits(adapted_model(name)), logits(tiny_model(name)))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("options", [{}, {"tie_groups": True, "criterion": "random"}, {"unit": "row"}], ids=str)
def test_saved_and_loaded_it_is_the_same(name: str, options: dict[str, object], tmp_path: Path) -> None:
    adapted = adapted_model(name, moved=True, ratio=0.25, r=3, lora_dropout=0.1, **options)
    adapted.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    assert (logits(adapted) - logits(tiny_model(name))).abs().max() > 1e-2
    assert torch.equal(logits(loaded), logits(adapted))
    before, after = (get_peft_model_state_dict(m) for m in (adapted, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_model(name), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in adapted.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_is_adapted_and_unmerged_is_the_base(name: str) -> None:
    adapted = adapted_model(name, moved=True)
    expected = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(tiny_model(name))
    assert not any("spf" in n for n, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_alone_merge_and_unmerge_to_the_bit(name: str, dtype: torch.dtype) -> None:
    adapted = get_peft_model(tiny_model(name, dtype), SPFConfig(lora_target_modules=[]))
    move(adapted)
    expected = logits(adapted)
    adapted.merge_adapter(safe_merge=True)
    assert torch.equal(logits(adapted), expected)
    adapted.unmerge_adapter()
    for module, layer in layers_of(adapted).items():
        assert torch.equal(layer.get_base_layer().weight, tiny_model(name, dtype).get_submodule(module).weight)  # type: ignore[arg-type]
    assert torch.equal(logits(adapted.merge_and_unload()), expected)


@pytest.mark.parametrize("name", SOME)
def test_disabled_it_is_the_base_merged_or_not(name: str) -> None:
    adapted = adapted_model(name, moved=True)
    expected, base = logits(adapted), logits(tiny_model(name))
    for merged in (False, True):
        if merged:
            adapted.merge_adapter()
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted), base, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(adapted.unload()), base, rtol=1e-4, atol=1e-4)  # LoRA leaves rounding behind


@pytest.mark.parametrize("name", SOME)
def test_several_adapters(name: str) -> None:
    """Each alone is as if the other were not there; together they add what each changes; one can be deleted."""
    alone = {key: _two(name, key) for key in ("first", "second")}
    both = _two(name, "first", "second")
    assert {n for n, p in both.named_parameters() if p.requires_grad} == {
        n for n, p in both.named_parameters() if ".first" in n
    }
    for key, other in (("first", "second"), ("second", "first")):
        both.set_adapter(key)
        assert torch.equal(logits(both), logits(alone[key]))
        assert not any(p.requires_grad for n, p in both.named_parameters() if f".{other}" in n)
    both.base_model.set_adapter(["first", "second"])
    together = logits(both)
    merged = both.merge_and_unload(adapter_names=["first", "second"])
    torch.testing.assert_close(logits(merged), together, rtol=1e-4, atol=1e-4)
    base = dict(tiny_model(name).named_parameters())
    for module in layers_of(alone["first"]):
        key = f"{module}.weight"
        changes = [dict(_two(name, k).merge_and_unload().named_parameters())[key] - base[key] for k in alone]
        torch.testing.assert_close(dict(merged.named_parameters())[key], base[key] + sum(changes), rtol=1e-4, atol=1e-4)


def _two(name: str, *keys: str) -> PeftModel:
    """A model with some of two adapters, each with its own settings and weights."""
    settings = {"first": {"ratio": 0.5, "r": 2}, "second": {"ratio": 0.75, "r": 3, "unit": "row", "criterion": "l2"}}
    model = tiny_model(name)
    torch.manual_seed(len(keys[0]))  # the adapter's own, for A of LoRA
    adapted = get_peft_model(model, SPFConfig(**settings[keys[0]]), adapter_name=keys[0])  # type: ignore[arg-type]
    for key in keys[1:]:
        torch.manual_seed(len(key))
        adapted.add_adapter(key, SPFConfig(**settings[key]))  # type: ignore[arg-type]
    with torch.no_grad():
        for key in keys:
            generator = torch.Generator().manual_seed(len(key))
            for n, parameter in adapted.named_parameters():
                if n.endswith((f".{key}", f".{key}.weight")):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


def test_merging_a_second_adapter_onto_a_merged_one_and_taking_both_out() -> None:
    both = _two("llama", "first", "second")
    both.base_model.set_adapter(["first", "second"])
    together = logits(both)
    both.merge_adapter(["first"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        both.merge_adapter(["second"])
    torch.testing.assert_close(logits(both), together, rtol=1e-4, atol=1e-4)
    both.unmerge_adapter()
    for module, layer in layers_of(both).items():
        if layer.spf_rows:
            assert torch.equal(layer.weight_MK, tiny_model("llama").get_submodule(module).weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SOME)
def test_an_adapter_can_be_deleted(name: str) -> None:
    both = _two(name, "first", "second")
    both.set_adapter("second")
    both.delete_adapter("first")
    assert not any(".first" in n for n in both.state_dict())
    assert list(both.peft_config) == ["second"]
    assert torch.equal(logits(both), logits(_two(name, "second")))


def test_one_configuration_serves_several_adapters_and_models() -> None:
    config = SPFConfig(task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_model("llama"), config)
    adapted.add_adapter("other", config)
    states = [get_peft_model_state_dict(adapted, adapter_name=key) for key in ("default", "other")]
    rows = [n for n in states[0] if "lora" not in n]
    assert rows
    assert all(torch.equal(states[0][n], states[1][n]) for n in rows)
    assert get_peft_model(tiny_model("llama", seed=4), config)


def test_trainable_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    adapted = adapted_model("llama", ratio=0.5, r=4)
    adapted.print_trainable_parameters()
    # 4 layers of: q 2 of 4 heads, k and v 1 of 2, each head 8 rows; gate and up 24 of 48; LoRA 2 x 32 x 4.
    expected = 4 * ((16 + 8 + 8 + 24 + 24) * 32 + 2 * 32 * 4)
    assert f"trainable params: {expected:,} ||" in capsys.readouterr().out


def test_only_the_adapter_is_trainable() -> None:
    adapted = adapted_model("qwen2")
    trainable = {n.split(".")[-2] if n.endswith(".default") else n.split(".")[-3]
                 for n, p in adapted.named_parameters() if p.requires_grad}  # fmt: skip
    assert trainable == {"spf_rows", "spf_lora_A", "spf_lora_B"}


def test_the_model_is_what_it_was_after_training_and_unloading() -> None:
    adapted = adapted_model("llama")
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    loss(adapted).backward()
    optimiser.step()
    assert not torch.equal(logits(adapted), logits(tiny_model("llama")))
    assert torch.equal(logits(adapted.unload()), logits(tiny_model("llama")))


def test_generation_with_a_cache_is_that_of_the_merged_model() -> None:
    adapted = adapted_model("llama", moved=True, lora_target_modules=[])
    ids = torch.tensor([[5, 9, 31]])
    tokens = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=8, do_sample=False), tokens)  # type: ignore[operator]


@pytest.mark.parametrize("low", [False, True])
def test_a_second_saved_adapter_is_loaded_beside_the_first(tmp_path: Path, low: bool) -> None:
    saved = adapted_model("llama", moved=True, criterion="random", seed=1)
    saved.save_pretrained(tmp_path)
    adapted = adapted_model("llama", criterion="l2")
    adapted.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low)
    adapted.set_adapter("loaded")
    assert torch.equal(logits(adapted), logits(saved))


def test_loading_with_little_memory_is_the_same(tmp_path: Path) -> None:
    saved = adapted_model("gpt2", moved=True)
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(saved))


def test_the_saved_configuration_is_the_whole_choice(tmp_path: Path) -> None:
    adapted_model("gpt2", ratio=0.3, criterion="l2", tie_groups=True, r=3, seed=9).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"peft_type": "CLOISTER_SPF", "ratio": 0.3, "criterion": "l2", "unit": "head", "tie_groups": True, "r": 3}
    wanted |= {"target_modules": ["c_attn", "c_fc"], "lora_target_modules": ["attn.c_proj"], "seed": 9}
    assert wanted.items() <= config.items()
    assert "gradient_norms" not in config
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SPFConfig)
    assert loaded.ratio == 0.3


def test_a_copy_of_the_model_is_a_model_of_its_own() -> None:
    adapted = adapted_model("llama", moved=True)
    copied = deepcopy(adapted)
    expected = logits(adapted)
    move(copied)
    assert torch.equal(logits(adapted), expected)
    assert not torch.equal(logits(copied), expected)


def test_peft_tells_the_adapters_status() -> None:
    adapted = adapted_model("llama")
    adapted.merge_adapter()
    status = adapted.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], ["default"])
    assert status.trainable_params == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert {layer.name for layer in adapted.get_layer_status()} == {f"model.{name}" for name in layers_of(adapted)}


def test_a_configuration_can_be_copied() -> None:
    config = SPFConfig(ratio=0.25, target_modules=["up_proj"])
    assert deepcopy(config) == config


def test_plain_modules_have_rows_too() -> None:
    model = nn.Sequential()
    model.add_module("lin0", nn.Linear(8, 6))
    model.add_module("lin1", nn.Linear(6, 4))
    model.requires_grad_(False)
    adapted = get_peft_model(model, SPFConfig(target_modules=["lin0"], lora_target_modules=["lin1"], r=2))
    x = torch.randn(3, 8)
    adapted(x).sum().backward()
    names = {n.removeprefix("base_model.model.") for n, p in adapted.named_parameters() if p.grad is not None}
    assert names == {"lin0.spf_rows.default", "lin1.spf_lora_A.default.weight", "lin1.spf_lora_B.default.weight"}


# Loaded by transformers alone -----------------------------------------------------------------------------------------


def test_transformers_loads_a_folder_with_its_base(tmp_path: Path) -> None:
    saved = adapted_model("llama", moved=True, criterion="random", seed=1)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    saved.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    saved.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(saved))


@pytest.mark.parametrize("name", SOME)
def test_transformers_loads_saves_and_deletes_an_adapter_under_any_name(name: str, tmp_path: Path) -> None:
    saved = adapted_model(name, moved=True, criterion="random", seed=1)
    saved.save_pretrained(tmp_path)
    model = tiny_model(name)
    model.load_adapter(str(tmp_path), adapter_name="other")
    assert torch.equal(logits(model), logits(saved))
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["peft_type"] == "CLOISTER_SPF"
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(name), tmp_path / "again")), logits(saved))
    model.delete_adapter("other")
    assert torch.equal(logits(model), logits(tiny_model(name)))


def test_rows_that_were_replaced_or_deleted_are_not_kept(tmp_path: Path) -> None:
    adapted_model("llama", moved=True).save_pretrained(tmp_path)
    model = tiny_model("llama")
    model.load_adapter(str(tmp_path), adapter_name="other")
    logits(model)
    layers = [module for module in model.modules() if isinstance(module, SPFLayer) and "other" in module.spf_rows]
    assert layers
    assert all(layer._begun["other"] is layer.spf_rows["other"] and not layer._assigned for layer in layers)
    model.delete_adapter("other")
    assert not any(layer._begun for layer in layers)


def test_transformers_loads_a_choice_by_gradients(tmp_path: Path) -> None:
    from cloister.adapters import gradient_norms

    model = tiny_model("llama")
    norms = gradient_norms(model, list(layers_of(adapted_model("llama"))), lambda: loss(model).backward())
    ranked = get_peft_model(model, SPFConfig(criterion="grad", gradient_norms=norms))
    move(ranked)
    ranked.save_pretrained(tmp_path)
    again = tiny_model("llama")
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), logits(ranked))


def test_transformers_cannot_load_an_adapter_of_another_base(tmp_path: Path) -> None:
    adapted_model("llama", moved=True).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="trained on another base model"):
        tiny_model("llama", seed=1).load_adapter(str(tmp_path))


@pytest.mark.parametrize("part", ["spf_rows", "spf_index", "spf_base"])
def test_transformers_cannot_use_an_adapter_without_some_of_its_tensors(part: str, tmp_path: Path) -> None:
    adapted_model("llama", moved=True, criterion="random", seed=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if part not in key}, file)
    model = tiny_model("llama")
    model.load_adapter(str(tmp_path))
    with pytest.raises(AdapterError, match=f"the saved adapter has no {part}"):
        logits(model)


# Becoming known to PEFT -----------------------------------------------------------------------------------------------

_LOAD = """
import sys
{imports}
{peft_is_not_loaded}
from transformers import AutoModelForCausalLM
from peft import PeftModel
import peft, inspect
base = AutoModelForCausalLM.from_pretrained({base!r})
adapted = PeftModel.from_pretrained(base, {adapter!r})
assert type(adapted.peft_config["default"]).__name__ == "SPFConfig"
assert inspect.getsource(peft)
print(type(peft.__loader__).__name__, peft.__spec__.loader is peft.__loader__)
"""


@pytest.mark.parametrize(
    ("imports", "check"),
    [
        ("import cloister", "assert not {'peft', 'torch'} & set(sys.modules)"),
        ("import peft\nimport cloister", ""),
        ("import cloister.adapters.ptuning", ""),
    ],
    ids=["before PEFT", "after PEFT", "through a tuner"],
)
def test_importing_cloister_is_enough(imports: str, check: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    adapted_model("llama", moved=True).save_pretrained(tmp_path / "adapter")
    code = _LOAD.format(
        imports=imports, peft_is_not_loaded=check, base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter")
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["SourceFileLoader", "True"]


# Refusals -------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapted_model("llama", moved=True).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="trained on another base model") as refused:
        PeftModel.from_pretrained(tiny_model("llama", seed=1), tmp_path)
    assert refused.value.where.startswith("model.layers.0.")


def test_a_base_in_another_precision_is_the_same_base(tmp_path: Path) -> None:
    base = tiny_model("llama", torch.bfloat16).float()
    adapted = get_peft_model(base, SPFConfig())
    adapted.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_model("llama", torch.bfloat16), tmp_path)


@pytest.mark.parametrize("layers", [[1], [1, 2, 3]])
def test_an_adapter_of_another_cut_is_refused(layers: list[int], tmp_path: Path) -> None:
    from cloister.model.cut import Latter

    adapted_model("llama", layers_to_transform=layers, layers_pattern="layers").save_pretrained(tmp_path)
    with pytest.raises(
        AdapterError, match="layer 1 has no linear modules: it is not in this model or its half"
    ) as refused:
        PeftModel.from_pretrained(Latter(tiny_model("llama"), 2).model, tmp_path)
    assert "same cut or an earlier one" in refused.value.hint
    assert PeftModel.from_pretrained(Latter(tiny_model("llama"), 1).model, tmp_path)


@pytest.mark.parametrize("change", ["descending", "double", "outside", "negative", "float"])
def test_altered_row_numbers_are_refused(change: str) -> None:
    adapted = adapted_model("llama")
    state = get_peft_model_state_dict(adapted)
    key = next(n for n in state if n.endswith("gate_proj.spf_index"))
    index = state[key].clone()
    if change == "descending":
        index = index.flip(0)
    elif change == "double":
        index[1] = index[0]
    elif change == "outside":
        index[-1] = 48
    elif change == "negative":
        index[0] = -1
    else:
        index = index.float()
    with pytest.raises(AdapterError, match="rows do not fit"):
        set_peft_model_state_dict(adapted, {**state, key: index})


@pytest.mark.parametrize("part", ["spf_index", "spf_base", "spf_rows"])
def test_rows_without_their_numbers_or_their_base_are_refused(part: str) -> None:
    adapted = adapted_model("llama")
    state = get_peft_model_state_dict(adapted_model("llama", moved=True))
    incomplete = {n: t for n, t in state.items() if n != f"base_model.model.model.layers.2.mlp.up_proj.{part}"}
    assert len(incomplete) == len(state) - 1
    with pytest.raises(AdapterError, match=f"the saved adapter has no {part}") as refused:
        set_peft_model_state_dict(adapted, incomplete)
    assert refused.value.where == "model.layers.2.mlp.up_proj"
    assert "with all its tensors" in refused.value.hint


@pytest.mark.parametrize("fields", [{"target_modules": ["query"]}, {"lora_target_modules": ["o_proj", "query"]}])
def test_modules_that_do_not_exist_are_named_with_what_there_is(fields: dict[str, list[str]]) -> None:
    with pytest.raises(AdapterError, match="called 'query'; there are down_proj, gate_proj, k_proj, lm_head, o_proj"):
        adapted_model("llama", **fields)


def test_a_model_without_known_names_is_refused_with_what_there_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(AdapterError, match=r"none|known names .*; there are 0"):
        get_peft_model(model, SPFConfig())


def test_heads_that_do_not_divide_the_rows_are_refused() -> None:
    model = tiny_model("llama")
    model.config = deepcopy(model.config)  # the tiny models share theirs
    model.config.num_attention_heads = 5
    with pytest.raises(AdapterError, match="q_proj has 32 rows, which is not the query of 5 query heads"):
        get_peft_model(model, SPFConfig())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_base_is_refused(dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    linear.weight = nn.Parameter(torch.zeros(32, 32).to(dtype), requires_grad=False)
    with pytest.raises(AdapterError, match="weights of floating-point numbers") as refused:
        get_peft_model(model, SPFConfig())
    assert refused.value.where == "model.layers.0.self_attn.q_proj"


def test_a_base_that_only_seems_to_hold_numbers_is_refused() -> None:
    model = tiny_model("llama")
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    linear.weight = Quantised.parameter(32, 32)
    assert linear.weight.is_floating_point()
    with pytest.raises(AdapterError, match="Linear has bfloat16 Quantised weights") as refused:
        get_peft_model(model, SPFConfig())
    assert "without quantisation" in refused.value.hint


@pytest.mark.parametrize(
    "weight",
    [nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False), Quantised.parameter(48, 32)],
    ids=["int8", "Quantised"],
)
def test_merging_into_a_base_that_was_quantised_since_is_refused(weight: nn.Parameter) -> None:
    adapted = adapted_model("llama")
    all_layers = set(layers_of(adapted))
    layer = layers_of(adapted)["model.layers.3.mlp.up_proj"]
    layer.base_layer.weight = weight
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(AdapterError, match=r"merging needs plain weights.*(int8|Quantised)"):
            merge()
        assert set(layers_of(adapted)) == all_layers, "nothing was taken out half-way"
        assert not any(layer.merged for layer in layers_of(adapted).values()), "nothing was merged half-way"


def test_broken_values_are_not_merged_in_safety() -> None:
    adapted = adapted_model("llama", moved=True)
    layers_of(adapted)["model.layers.3.mlp.up_proj"].spf_rows["default"].data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="infinite or undefined"):
        adapted.merge_and_unload(safe_merge=True)


def test_an_adapter_onto_a_merged_one_is_refused() -> None:
    adapted = adapted_model("llama", moved=True)
    adapted.merge_adapter()
    with pytest.raises(AdapterError, match="an adapter is merged"):
        adapted.add_adapter("second", SPFConfig())


def test_ranking_by_gradients_needs_gradients_and_a_saved_choice_does_not(tmp_path: Path) -> None:
    from cloister.adapters import gradient_norms

    adapted = adapted_model("llama", criterion="grad")
    with pytest.raises(AdapterError, match="ranks by gradients, and there are none"):
        logits(adapted)
    model = tiny_model("llama")
    norms = gradient_norms(model, list(layers_of(adapted)), lambda: loss(model).backward())
    ranked = get_peft_model(model, SPFConfig(criterion="grad", gradient_norms=norms))
    move(ranked)
    ranked.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(ranked))
    partial = {n: v for n, v in norms.items() if "up_proj" not in n}
    with pytest.raises(AdapterError, match="no norms"):
        get_peft_model(tiny_model("llama"), SPFConfig(criterion="grad", gradient_norms=partial))
