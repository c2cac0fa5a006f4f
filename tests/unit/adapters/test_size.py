"""What `plan` says is trained is what would be trained."""

from __future__ import annotations

from typing import Any

import pytest

from cloister.adapters.add import add_adapter
from cloister.adapters.size import Sizes, trained_parameters
from cloister.adapters.spf.rows import Heads
from cloister.job import AdapterSection
from cloister.methods.estimate import matrices
from cloister.model.cut import Latter
from tests.unit.model.tiny import CONFIGS, tiny_model

CUT = 2
SECTIONS: list[dict[str, Any]] = [
    {"kind": "lora"},
    {"kind": "ptuning", "prefix_tokens": 5},
    {"kind": "ptuning", "reparametrise": 24},
    {"kind": "ptuning", "reparametrise": True},
    {"kind": "spf"},
    {"kind": "spf", "ratio": 0.3, "unit": "row", "lora_modules": []},
    {"kind": "spf", "ratio": 0.3, "tie_groups": True, "rank": 3, "lora_modules": "all-linear"},
]


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_trained_parameters_are_those_of_the_adapter(name: str, section: dict[str, Any]) -> None:
    model = tiny_model(name)
    config = model.config.get_text_config()
    heads = Heads.of(config)
    assert heads is not None
    sizes = Sizes(
        hidden=config.hidden_size,
        heads=heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads.query,
        matrices=matrices({n: tuple(p.shape) for n, p in model.named_parameters()}, CUT),
    )
    adapter = AdapterSection.model_validate(section)
    adapted = add_adapter(Latter(model, CUT), adapter, first_layer=CUT, seed=0)
    expected = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained_parameters(adapter, sizes, 2) == expected


@pytest.mark.parametrize(("tied", "share"), [(False, 0.267), (True, 0.3)])
def test_few_key_value_heads_train_more_than_the_ratio(tied: bool, share: float) -> None:
    """As the documentation says, of a model whose MLP is three times as wide."""
    shapes = {"q_proj": (64, 64), "k_proj": (16, 64), "v_proj": (16, 64), "gate_proj": (192, 64), "up_proj": (192, 64)}
    sizes = Sizes(hidden=64, heads=Heads(query=8, key_value=2), head_width=8, matrices=shapes)
    section = AdapterSection(kind="spf", ratio=0.25, tie_groups=tied, lora_modules=[])
    assert trained_parameters(section, sizes, 1) / sum(m * k for m, k in shapes.values()) == pytest.approx(
        share, abs=1e-3
    )
