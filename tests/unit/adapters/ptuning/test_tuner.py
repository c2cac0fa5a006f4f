"""Prefixes as a PEFT tuner: saving, loading, several of them, taking them out, what is refused; training and files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from cloister.adapters import PTuningConfig
from cloister.adapters.add import add_adapter
from cloister.adapters.files import CONFIG, WEIGHTS, adapter_sha256, write_adapter
from cloister.adapters.ptuning import PrefixedAttention
from cloister.adapters.ptuning.add import add_ptuning
from cloister.adapters.state import adapter_files, adapter_state, load_adapter_weights
from cloister.errors import AdapterError
from cloister.job import AdapterSection, TrainingSection
from cloister.model.cut import Former, Latter, Whole
from cloister.training.checkpoint import Checkpoint
from cloister.training.loop import PackList, train
from tests.unit.adapters.ptuning.cases import ARCHITECTURES, CUT, IDS, PREFIX, logits, prefixes, with_prefixes
from tests.unit.adapters.quantised import Quantised
from tests.unit.data.tiny_packs import random_pack
from tests.unit.model.tiny import VOCABULARY, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SECTION = AdapterSection(kind="ptuning", prefix_tokens=PREFIX)
ENCODED = AdapterSection(kind="ptuning", prefix_tokens=PREFIX, reparametrise=24)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[None]).logits[0]  # type: ignore[no-any-return]


def _two(*names: str) -> PeftModel:
    """Adapters of chosen names: "first" on all layers, "second" computed by a perceptron, on the last two layers."""
    configs = {
        "first": PTuningConfig(num_virtual_tokens=3),
        "second": PTuningConfig(num_virtual_tokens=4, encoder_hidden_size=16, layers_to_transform=[2, 3]),
    }
    adapted = get_peft_model(tiny_model("llama"), configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, configs[name])
    for parameter_name, parameter in adapted.named_parameters():
        if "ptuning" in parameter_name:
            generator = torch.Generator().manual_seed(7 if "first" in parameter_name else 8)
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


# As any tuner of PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reparametrise", [False, 24])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_and_loaded_it_is_the_same_perceptron_and_all(name: str, reparametrise: bool, tmp_path: Path) -> None:
    adapted = with_prefixes(Whole(tiny_model(name)), CUT, reparametrise=reparametrise)
    adapted.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path, is_trainable=trainable)
        assert torch.equal(_logits(loaded), _logits(adapted))
        wanted = {n for n, p in adapted.named_parameters() if p.requires_grad and trainable}
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == wanted
    assert (_logits(adapted) - _logits(tiny_model(name))).abs().max() > 1e-2


@pytest.mark.parametrize("section", [SECTION, ENCODED], ids=["plain", "encoded"])
@pytest.mark.parametrize(("saved_as", "loaded_as"), [("default", "other"), ("first", "default"), ("first", "0")])
def test_saved_under_one_name_and_loaded_under_another_it_is_the_same(
    section: AdapterSection, saved_as: str, loaded_as: str, tmp_path: Path
) -> None:
    adapted = _named(saved_as, section)
    adapted.save_pretrained(tmp_path)
    folder = tmp_path if saved_as == "default" else tmp_path / saved_as
    loaded = PeftModel.from_pretrained(tiny_model("llama"), folder, adapter_name=loaded_as)
    assert torch.equal(_logits(loaded), _logits(adapted))
    assert _saved(loaded, loaded_as).keys() == safetensors.torch.load_file(folder / WEIGHTS).keys()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("section", [SECTION, ENCODED], ids=["plain", "encoded"])
def test_a_second_one_is_loaded_beside_a_resident_which_stays_what_it_is(
    section: AdapterSection, low: bool, tmp_path: Path
) -> None:
    second = _named("default", section, seed=1)
    second.save_pretrained(tmp_path)
    both = _named("default", section, seed=2)
    before, expected = _saved(both, "default"), _logits(both)
    both.load_adapter(tmp_path, "second", low_cpu_mem_usage=low, is_trainable=True)
    assert all(p.requires_grad for n, p in both.named_parameters() if ".second" in n)
    assert _same(_saved(both, "default"), before)
    assert _same(_saved(both, "second"), _saved(second, "default"))
    assert torch.equal(_logits(both.eval()), expected)
    both.set_adapter("second")
    # A file's tensors stand elsewhere in memory, and products of a perceptron then round otherwise.
    torch.testing.assert_close(
        _logits(both), _logits(second), rtol=1e-5, atol=1e-5 if low and section is ENCODED else 0
    )


@pytest.mark.parametrize("section", [SECTION, ENCODED], ids=["plain", "encoded"])
def test_loading_with_little_memory_is_the_same(section: AdapterSection, tmp_path: Path) -> None:
    adapted = _named("default", section)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, low_cpu_mem_usage=True)
    assert _same(_saved(loaded, "default"), _saved(adapted, "default"))
    torch.testing.assert_close(_logits(loaded), _logits(adapted))


@pytest.mark.parametrize("section", [SECTION, ENCODED], ids=["plain", "encoded"])
def test_what_was_loaded_elsewhere_is_moved_to_the_base(section: AdapterSection) -> None:
    """As PEFT asks for after loading with little memory, which puts tensors onto an accelerator if there is one."""
    adapted = _named("default", section)
    for module in adapted.modules():
        if isinstance(module, PrefixedAttention):
            module.base_layer.to("meta")
            module._move_adapter_to_device_of_base_layer("default")
    assert {p.device.type for n, p in adapted.named_parameters() if "ptuning_" in n} == {"meta"}


@pytest.mark.parametrize("change", ["missing", "left over", "tokens", "hidden", "old name"])
def test_a_file_that_does_not_fit_its_configuration_is_refused(change: str, tmp_path: Path) -> None:
    _named("default", ENCODED).save_pretrained(tmp_path)
    state, config = safetensors.torch.load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    first = "base_model.ptuning_encoder.embedding.weight"
    if change == "missing":
        del state[first]
    elif change == "left over":
        state["base_model.model.model.layers.0.self_attn.ptuning_prefix"] = torch.zeros(2, 2, PREFIX, 8)
    elif change == "old name":
        state["base_model.ptuning_encoder.default.embedding.weight"] = state.pop(first)
    else:
        config["num_virtual_tokens" if change == "tokens" else "encoder_hidden_size"] += 1
    safetensors.torch.save_file(state, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    resident = _named("default", ENCODED, seed=2)
    before = _saved(resident, "default")
    with pytest.raises(AdapterError, match="do not fit the adapter's configuration"):
        resident.load_adapter(tmp_path, "second")
    assert _same(_saved(resident, "default"), before)


def _named(name: str, section: AdapterSection, seed: int = 1) -> PeftModel:
    """A model with prefixes under a name of its own."""
    hidden = section.reparametrise or None
    config = PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX, encoder_hidden_size=hidden)
    adapted = get_peft_model(tiny_model("llama"), config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


def _saved(adapted: PeftModel, name: str) -> dict[str, Tensor]:
    """What stands in an adapter's file."""
    state = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    return {name: tensor.clone() for name, tensor in state.items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_several_adapters_one_active_at_a_time() -> None:
    both = _two("first", "second")
    for name in ("second", "first"):
        both.set_adapter(name)
        assert torch.equal(_logits(both), _logits(_two(name)))
        assert {n.split(".")[-1 if name == "first" else 2] for n, p in both.named_parameters() if p.requires_grad} == {
            name
        }
    assert (_logits(_two("first")) - _logits(_two("second"))).abs().max() > 1e-2
    with pytest.raises(AdapterError, match="one prefix is active at a time, not 2"):
        both.base_model.set_adapter(["first", "second"])


def test_an_adapter_can_be_deleted_and_all_be_taken_out() -> None:
    both = _two("first", "second")
    both.set_adapter("second")
    both.delete_adapter("first")
    assert torch.equal(_logits(both), _logits(_two("second")))
    both = _two("first", "second")
    both.delete_adapter("second")
    assert not [n for n in both.state_dict() if "second" in n]
    assert torch.equal(_logits(both), _logits(_two("first")))
    base = both.unload()
    assert torch.equal(_logits(base), _logits(tiny_model("llama")))
    assert base.state_dict().keys() == tiny_model("llama").state_dict().keys()


def test_trainable_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    adapted = get_peft_model(tiny_model("llama"), PTuningConfig(num_virtual_tokens=3))
    adapted.print_trainable_parameters()
    # 4 layers, keys and values, 2 key-value heads of width 8, 3 tokens.
    assert f"trainable params: {4 * 2 * 2 * 8 * 3} ||" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_prefix_cannot_be_merged(how: str) -> None:
    adapted = with_prefixes(Whole(tiny_model("llama")), CUT)
    before = _logits(adapted)
    with pytest.raises(AdapterError, match="a prefix cannot be merged"):
        getattr(adapted, how)()
    assert torch.equal(_logits(adapted), before)


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with_prefixes(Whole(tiny_model("llama")), 1).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="layer 1 has no attention module") as refused:
        PeftModel.from_pretrained(Latter(tiny_model("llama"), 2).model, tmp_path)
    assert "same cut or an earlier one" in refused.value.hint
    assert PeftModel.from_pretrained(Latter(tiny_model("llama"), 1).model, tmp_path)
    with pytest.raises(AdapterError, match="layer 4 has no attention module"):
        get_peft_model(tiny_model("llama"), PTuningConfig(layers_to_transform=[3, 4]))


def test_another_base_or_cut_is_refused(tmp_path: Path) -> None:
    half = Latter(tiny_model("llama"), CUT)
    write_adapter(adapter_files(add_ptuning(half, SECTION, first_layer=CUT, seed=0), "llama"), tmp_path / "a")
    other = tiny_model("llama", seed=1)
    with pytest.raises(AdapterError, match="another base model"):
        PeftModel.from_pretrained(other, tmp_path / "a")
    assert not any("ptuning" in name for name, _ in other.named_parameters()), "nothing was put into it"
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"layers_to_transform": [CUT - 1, CUT]}))
    with pytest.raises(AdapterError, match="another base model"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a")


def test_a_base_in_bf16_is_the_same_base() -> None:
    config = add_ptuning(Whole(tiny_model("llama", torch.bfloat16)), SECTION, first_layer=0, seed=0).peft_config
    wide = tiny_model("llama", torch.bfloat16).float()
    again = get_peft_model(wide, PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)).peft_config
    assert config["default"].base_sha256 == again["default"].base_sha256 is not None


def test_a_base_that_only_seems_to_hold_numbers_cannot_be_told() -> None:
    model = tiny_model("llama")
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    query.weight = Quantised.parameter(32, 32)
    assert get_peft_model(model, PTuningConfig()).peft_config["default"].base_sha256 is None


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_virtual_tokens", 0, "num_virtual_tokens must be at least 1, got 0"),
        ("num_virtual_tokens", "16", "num_virtual_tokens must be at least 1, got '16'"),
        ("encoder_hidden_size", 0, "encoder_hidden_size must be at least 1, got 0"),
        ("encoder_hidden_size", 8.5, "encoder_hidden_size must be at least 1, got 8.5"),
        ("layers_to_transform", [], r"layers_to_transform must be numbers of layers, or None for all, got \[\]"),
        ("layers_to_transform", 1, "layers_to_transform must be numbers of layers"),
        ("layers_to_transform", [-1], "layers_to_transform must be numbers of layers"),
        ("layers_to_transform", ["1"], "layers_to_transform must be numbers of layers"),
        ("encoder_hidden_size", True, "encoder_hidden_size must be at least 1, got True"),
        ("position_offset", "x", "position_offset must be a whole number of at least 0, got 'x'"),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: object, says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        PTuningConfig(**{field: value})  # type: ignore[arg-type]  # that is the point


def test_a_name_with_a_dot_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"an adapter's name has no dot, got 'a\.b'"):
        get_peft_model(tiny_model("llama"), PTuningConfig(), adapter_name="a.b")


def test_layers_as_a_range_can_be_saved(tmp_path: Path) -> None:
    config = PTuningConfig(layers_to_transform=range(2, 4))  # type: ignore[arg-type]  # users do
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["layers_to_transform"] == [2, 3]


def test_loading_by_transformers_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Its models have no place for what layers share."""
    _named("default", SECTION).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not support CLOISTER_PTUNING .* Please use `get_peft_model` instead"):
        tiny_model("llama").load_adapter(str(tmp_path))


def test_what_takes_no_prefix_is_refused() -> None:
    whole = Whole(tiny_model("llama"))
    whole.model.config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(AdapterError, match="attention of kind 'flash_attention_2'"):
            add_ptuning(whole, SECTION, first_layer=0, seed=0)
    finally:
        whole.model.config._attn_implementation = "sdpa"  # the tiny models share their configuration
    adapted = with_prefixes(whole, 0)
    for module in adapted.modules():
        if hasattr(module, "ptuning_prefix"):
            module.ptuning_prefix["default"] = nn.Parameter(torch.zeros(2, 3, PREFIX, 8))
    with pytest.raises(AdapterError, match=r"3 key-value heads of width 8 does not fit keys of shape \(1, 2, 21, 8\)"):
        logits(whole, IDS)


# What is released -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reparametrise", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_latter_halfs_files_mean_the_same_in_the_whole_model(
    name: str, reparametrise: bool, tmp_path: Path
) -> None:
    """Only prefixes are in the file, whatever computed them."""
    latter = Latter(tiny_model(name), CUT)
    adapted = with_prefixes(latter, CUT, std=0.5, reparametrise=reparametrise)
    activation_TD = Former(tiny_model(name), CUT)(IDS, torch.arange(len(IDS)), None)
    with torch.no_grad():
        ours_TV = logits(latter, activation_TD)
    write_adapter(adapter_files(adapted, "base"), tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    assert torch.equal(_logits(loaded), ours_TV)
    saved = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in prefixes(adapted))
    assert {n.rpartition(".")[2] for n in saved} == {"ptuning_prefix"}


_PLAIN = """
import sys
import safetensors.torch, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    out = adapted(input_ids=torch.tensor([eval(sys.argv[3])])).logits[0]
safetensors.torch.save_file({"logits": out.contiguous()}, sys.argv[4])
assert not any(name.startswith("cloister") for name in sys.modules)
"""


@pytest.mark.parametrize("reparametrise", [False, True])
def test_prefixes_on_all_layers_load_with_plain_peft(reparametrise: bool, tmp_path: Path) -> None:
    whole = Whole(tiny_model("llama"))
    adapted = with_prefixes(whole, 0, std=0.5, reparametrise=reparametrise)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    write_adapter(adapter_files(adapted, "base"), tmp_path / "adapter")
    arguments = [str(tmp_path / "base"), str(tmp_path / "adapter"), str(IDS.tolist()), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", _PLAIN, *arguments], check=True, timeout=200)
    torch.testing.assert_close(safetensors.torch.load_file(tmp_path / "out")["logits"], _logits(adapted))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pefts_format_is_used_where_it_means_the_same(name: str, tmp_path: Path) -> None:
    """PEFT's prefix leaves a sliding window behind, and covers all layers."""
    adapted = with_prefixes(Whole(tiny_model(name)), 0)
    write_adapter(adapter_files(adapted, "base"), tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    own = PTuningConfig if name in ("qwen2", "mistral", "gemma2") else PrefixTuningConfig
    assert type(loaded.peft_config["default"]) is own
    assert torch.equal(_logits(loaded), _logits(adapted))
    partial = json.loads(adapter_files(with_prefixes(Whole(tiny_model(name)), 1), "base")[CONFIG])
    assert (partial["peft_type"], partial["layers_to_transform"]) == ("CLOISTER_PTUNING", [1, 2, 3])


@pytest.mark.parametrize("section", [SECTION, ENCODED], ids=["plain", "encoded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_whole_model_and_its_latter_half_begin_with_the_same_prefixes(name: str, section: AdapterSection) -> None:
    halves = (Latter(tiny_model(name), CUT), Whole(tiny_model(name)))
    files = [adapter_files(add_adapter(half, section, first_layer=CUT, seed=7), "base") for half in halves]
    assert files[0] == files[1]
    again = adapter_files(add_adapter(Whole(tiny_model(name)), section, first_layer=CUT, seed=8), "base")
    assert adapter_sha256(again) != adapter_sha256(files[0])


# Training -------------------------------------------------------------------------------------------------------------

PACKS = [
    random_pack(lengths, VOCABULARY, seed=i) for i, lengths in enumerate(([9, 14], [20], [5, 6, 11], [8, 8], [17]))
]
TRAINING = TrainingSection(steps=6, batch_tokens=48, learning_rate=3e-2, evaluations=0)


def _trained(half: Whole, section: AdapterSection, packs: PackList, **options: Any) -> PeftModel:
    adapted = add_adapter(half, section, first_layer=CUT, seed=3)
    train(half, adapted, packs, TRAINING, seed=3, **options)
    return adapted


@pytest.mark.parametrize("section", [SECTION, ENCODED], ids=["plain", "encoded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_split_training_is_unsplit_training_to_the_byte(name: str, section: AdapterSection) -> None:
    former = Former(tiny_model(name), CUT)
    at_the_cut = [p.with_activations(former(p.given, p.layout.position_T, p.layout)) for p in PACKS]
    split = _trained(Latter(tiny_model(name), CUT), section, PackList(at_the_cut))
    whole = _trained(Whole(tiny_model(name)), section, PackList(PACKS))
    assert adapter_files(split, "base") == adapter_files(whole, "base")
    start = add_adapter(Whole(tiny_model(name)), section, first_layer=CUT, seed=3)
    assert adapter_files(split, "base")[WEIGHTS] != adapter_files(start, "base")[WEIGHTS]


@pytest.mark.parametrize("section", [SECTION, ENCODED], ids=["plain", "encoded"])
def test_prefixes_learn_to_say_one_word(section: AdapterSection) -> None:
    packs = PackList([replace(p, target_id_N=torch.full_like(p.target_id_N, 7)) for p in PACKS])
    whole = Whole(tiny_model("gpt2"))
    adapted = add_adapter(whole, section, first_layer=CUT, seed=3)
    curve = train(whole, adapted, packs, TRAINING.model_copy(update={"steps": 20, "learning_rate": 0.1}), seed=3).curve
    assert curve[0].train_loss > 4.5, "the word is one of 97, which a random model cannot know"
    assert curve[-1].train_loss < 3.5


def test_training_goes_on_from_a_checkpoint_to_the_same_byte() -> None:
    """With the perceptron's weights and moments, which no file of the adapter holds."""
    saved: list[bytes] = []
    options: dict[str, Any] = {
        "checkpoints": 3,
        "on_checkpoint": lambda checkpoint: saved.append(checkpoint.to_bytes()),
    }
    whole = _trained(Whole(tiny_model("llama")), ENCODED, PackList(PACKS), **options)
    assert any("ptuning_encoder" in name for name in Checkpoint.from_bytes(saved[0]).moments)
    checkpoint = Checkpoint.from_bytes(saved[0])
    resumed = _trained(Whole(tiny_model("llama")), ENCODED, PackList(PACKS), resume=checkpoint)
    assert adapter_files(resumed, "base") == adapter_files(whole, "base")


@pytest.mark.parametrize("section", [SECTION, ENCODED], ids=["plain", "encoded"])
def test_saved_weights_come_back_and_anothers_are_refused(section: AdapterSection) -> None:
    first, second = (add_adapter(Whole(tiny_model("llama")), section, first_layer=CUT, seed=s) for s in (1, 2))
    state = {name: value.clone() for name, value in adapter_state(first).items()}
    assert any(not torch.equal(state[n], t) for n, t in adapter_state(second).items())
    load_adapter_weights(second, state)
    assert all(torch.equal(state[n], t) for n, t in adapter_state(second).items())
    for other in ({"prefix_tokens": 4}, {"prefix_tokens": PREFIX, "reparametrise": 8}):
        foreign = AdapterSection.model_validate({"kind": "ptuning", **other})
        with pytest.raises(AdapterError, match="of another adapter"):
            load_adapter_weights(add_adapter(Whole(tiny_model("llama")), foreign, first_layer=CUT, seed=1), state)
