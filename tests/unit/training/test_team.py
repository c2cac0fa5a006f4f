"""Two processes train what one trains, up to the order of additions, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloister.adapters.state import adapter_files
from cloister.model.cut import Latter
from cloister.training.checkpoint import Checkpoint
from cloister.training.loop import PackList, train
from cloister.training.schedule import plan_steps
from cloister.training.team import digest, spread
from tests.unit.model.tiny import tiny_model
from tests.unit.training.test_loop import CUT, PACKS, _at_the_cut, _prepare, _section

TOLERANCE = 1e-5
"""Relative, of each step's loss: float32 sums of the same terms in another order."""


def one_process(resume: Checkpoint | None = None) -> tuple[list[float], dict[str, bytes], list[Checkpoint]]:
    latter, saved = Latter(tiny_model("llama"), CUT), list[Checkpoint]()
    adapted = _prepare(latter)
    result = train(
        latter, adapted, PackList(_at_the_cut("llama", PACKS)), _section(),
        seed=0, resume=resume, checkpoints=5, on_checkpoint=saved.append,
    )  # fmt: skip
    return [p.train_loss for p in result.curve], adapter_files(adapted, "base"), saved


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], dict[str, bytes], list[Checkpoint]]:
    return one_process()


@pytest.fixture(scope="module")
def team(
    alone: tuple[list[float], dict[str, bytes], list[Checkpoint]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("team")
    (folder / "one.checkpoint").write_bytes(alone[2][1].to_bytes())
    command = [sys.executable, "-m", "tests.unit.training.member"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    members = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], env=environment, cwd=Path(__file__).parents[3])
        for rank in range(2)
    ]
    try:
        assert [member.wait(200) for member in members] == [0, 0]
    finally:
        for member in members:
            member.kill()
            member.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@given(tokens=st.lists(st.integers(1, 512), max_size=30), count=st.integers(1, 9))
def test_every_pack_goes_to_one_process(tokens: list[int], count: int) -> None:
    parts = spread(tokens, count)
    assert len(parts) == count
    assert sorted(place for part in parts for place in part) == list(range(len(tokens)))
    assert all(part == sorted(part) for part in parts)
    filled = [sum(tokens[place] for place in part) for part in parts]
    # The process with the most got its last pack when it had the fewest.
    assert max(filled) - min(filled) <= max(tokens, default=0)
    assert spread(tokens, count) == parts


def test_the_curve_is_that_of_one_process(
    alone: tuple[list[float], dict[str, bytes], list[Checkpoint]], team: list[dict[str, Any]]
) -> None:
    """With dropout in the adapter, which is drawn per pack."""
    assert team[0]["first"]["loss"] == pytest.approx(alone[0], rel=TOLERANCE)
    assert team[1]["first"]["loss"] == team[0]["first"]["loss"]
    assert team[1]["first"]["adapter"] == team[0]["first"]["adapter"]


def test_for_two_processes_every_byte_is_the_same_again(team: list[dict[str, Any]]) -> None:
    assert team[0]["again"] == team[0]["first"]


def test_each_process_reads_its_own_packs_only(team: list[dict[str, Any]]) -> None:
    """What it does not read it does not decrypt."""
    section = _section()
    steps = plan_steps([len(p) for p in PACKS], section, 0)
    read = [member["first"]["read"] for member in team]
    assert sorted(read[0] + read[1]) == sorted(index for step in steps for index in step)
    assert read[0]
    assert read[1]


def test_passes_without_effect_change_no_byte(team: list[dict[str, Any]]) -> None:
    """Where all processes must make the same number of passes."""
    assert team[0]["uneven"]["adapter"] == team[0]["first"]["adapter"]
    assert team[0]["uneven"]["loss"] == team[0]["first"]["loss"]
    read = [len(member["uneven"]["read"]) for member in team]
    assert read[0] == read[1]
    assert sum(read) > sum(len(member["first"]["read"]) for member in team)


def test_two_processes_go_on_from_the_checkpoint_of_one(
    alone: tuple[list[float], dict[str, bytes], list[Checkpoint]], team: list[dict[str, Any]]
) -> None:
    resumed = team[0]["resumed"]["loss"]
    assert resumed[:2] == alone[0][:2]
    assert resumed == pytest.approx(alone[0], rel=TOLERANCE)


def test_one_process_goes_on_from_the_checkpoint_of_two(
    alone: tuple[list[float], dict[str, bytes], list[Checkpoint]], team: list[dict[str, Any]]
) -> None:
    saved = Checkpoint.from_bytes(bytes.fromhex(team[0]["first"]["checkpoint"]))
    loss, _, _ = one_process(saved)
    assert loss[:2] == team[0]["first"]["loss"][:2]
    assert loss == pytest.approx(alone[0], rel=TOLERANCE)


def test_gradients_are_summed_and_absent_ones_stay_absent(team: list[dict[str, Any]]) -> None:
    """AdamW leaves a parameter without a gradient alone; a gradient of zeros would let weight decay act."""
    for member in team:
        assert member["totals"]["loss"] == pytest.approx(0.3)
        both, one, none = member["totals"]["gradients"]
        assert both == [[3.0] * 3] * 2
        assert one == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        assert none is None


def test_parted_layers_give_the_same_loss_and_gradients_bit_for_bit(team: list[dict[str, Any]]) -> None:
    for member in team:
        assert len(member["parted"]) == 4
        for case, found in member["parted"].items():
            assert found["same"], case
            assert found["moved"], case
            assert found["share"] == pytest.approx(0.5, abs=0.05), case


def test_rows_are_gathered_in_the_order_of_the_processes(team: list[dict[str, Any]]) -> None:
    assert team[0]["rows"] == team[1]["rows"] == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


def test_processes_that_disagree_do_not_go_on(team: list[dict[str, Any]]) -> None:
    assert [member["drift"] for member in team] == [
        "[enclave] processes: something differs between process 0 and 1"
    ] * 2


def test_a_lost_process_is_an_error_of_ours(team: list[dict[str, Any]]) -> None:
    assert team[0]["lost"] == "[enclave] processes: the connection to another process is lost"


def test_a_digest_covers_names_types_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].int(), "b": base["b"]},
        {"a": base["a"], "b": torch.zeros(1)},
        {"a": base["a"]},
    ]
    assert len({digest(tensors) for tensors in (base, *others)}) == 6
    assert digest(dict(reversed(base.items()))) == digest(base)
    assert digest({"a": torch.ones(2, dtype=torch.bfloat16)}) != digest({"a": torch.zeros(2, dtype=torch.bfloat16)})
