"""Where a model is cut, and how its layers are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloister.agreement.job import check_positions, count_layers, resolve_cut
from cloister.errors import ModelError
from cloister.jobfile import ModelFiles, load_job


@pytest.mark.parametrize(
    ("cut", "num_layers", "former"),
    [(1, 2, 1), (3, 4, 3), (0.5, 4, 2), (0.25, 8, 2), ("auto", 2, 1), ("auto", 8, 2), ("auto", 32, 10)],
)
def test_cuts(cut: int | float | str, num_layers: int, former: int) -> None:
    assert resolve_cut(cut, num_layers) == former


@pytest.mark.parametrize(("cut", "num_layers"), [(4, 4), (9, 4), (0.01, 4), (0.99, 4), ("auto", 1)])
def test_a_cut_leaves_layers_on_both_sides(cut: int | float | str, num_layers: int) -> None:
    with pytest.raises(ModelError) as error:
        resolve_cut(cut, num_layers, where="job.toml:7: [model] cut")
    assert error.value.where == "job.toml:7: [model] cut"
    assert f"{num_layers} layers" in error.value.message
    assert f"1 to {num_layers - 1}" in error.value.hint


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_layers"])
def test_layers_by_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({name: 7}))
    assert count_layers(ModelFiles(folder=tmp_path, files=())) == 7


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": "7"}, {"num_hidden_layers": 0}])
def test_no_layers(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="num_hidden_layers"):
        count_layers(ModelFiles(folder=tmp_path, files=()))


LORA = 'kind = "lora"'
BASE = '[evaluation]\nbaselines = ["base"]'
WHOLE = '[evaluation]\nbaselines = ["central"]'
PREFIX = 'kind = "ptuning"\nprefix_tokens = 16'


@pytest.mark.parametrize(
    ("method", "adapter", "config", "fits"),
    [
        ("split", LORA, {"n_positions": 64}, True),
        ("split", LORA, {"n_positions": 63}, False),
        ("split", LORA, {"max_position_embeddings": 63}, True),  # rotary: computed for any length
        ("split", f"{PREFIX}\n{BASE}", {"n_positions": 64}, True),  # latter layers only: tokens keep their positions
        ("split", f"{PREFIX}\n{BASE}", {"n_positions": 63}, False),
        ("split", f"{PREFIX}\n{WHOLE}", {"n_positions": 80}, True),
        ("split", f"{PREFIX}\n{WHOLE}", {"n_positions": 79}, False),
        ("slice", PREFIX, {"n_positions": 80}, True),
        ("slice", PREFIX, {"n_positions": 79}, False),
    ],
)
def test_a_table_of_positions_is_long_enough(
    tmp_path: Path, method: str, adapter: str, config: dict[str, int], fits: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = ["[job]", 'name = "x"', f'method = "{method}"', "[model]", 'path = "m"', "[adapter]", adapter]
    lines += ["[training]", "steps = 4", "max_tokens = 64"]
    for party in ("a", "b"):
        lines += ["[[party]]", f'name = "{party}"', 'train = "t"', 'test = "t"']
    text = "\n".join(lines)
    (tmp_path / "job.toml").write_text(text)
    loaded, model = load_job(tmp_path / "job.toml"), ModelFiles(folder=tmp_path, files=())
    if fits:
        check_positions(loaded, model)
        return
    with pytest.raises(ModelError, match="do not fit into the model's") as error:
        check_positions(loaded, model)
    assert str(config["n_positions"]) in error.value.hint
    assert error.value.where.endswith(
        f"job.toml:{1 + text.splitlines().index('max_tokens = 64')}: [training] max_tokens"
    )
