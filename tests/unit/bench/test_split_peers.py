"""Federated averaging against what it must come to, and the clock of all peers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloister.bench.split_clock import Clock, Logbook, due_steps
from cloister.bench.split_data import Workload, party_data
from cloister.bench.split_peers import PEERS, Peer, PeerTask, Silo, run_peer, weighted_mean
from cloister.errors import UsageError
from cloister.progress import Event, Silent, Task
from cloister.report.bench import BenchMeasured
from tests.unit.bench.small import small_workload


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return small_workload(tmp_path_factory.mktemp("bench"))


def run(peer: Peer, workload: Workload, folder: Path, rounds: int = 1) -> BenchMeasured:
    asked = PeerTask(loaded=workload.loaded, evaluations=2, rounds=rounds, folder=folder)
    run_peer(peer, asked, folder / "measured.json", progress=Silent())
    return BenchMeasured.read(folder / "measured.json")


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_trains_on_the_whole_budget(workload: Workload, tmp_path: Path, peer: Peer) -> None:
    measured = run(peer, workload, tmp_path, rounds=2)
    assert measured.tokens == 2 * workload.epoch_tokens == measured.curve[-1].tokens
    assert 0 < measured.setup_s < measured.seconds
    assert measured.setup_s + measured.train_s == pytest.approx(measured.seconds)
    assert [p.seconds for p in measured.curve] == sorted(p.seconds for p in measured.curve)
    assert (measured.wire_bytes > 0) == (peer == "fedavg")


def test_with_held_out_records_losses_are_measured_at_regular_steps(workload: Workload, tmp_path: Path) -> None:
    held = Workload(**{**vars(workload), "loaded": workload.changed("data", validation=0.3)})
    curves = {peer: run(peer, held, tmp_path).curve for peer in ("trainer", "central")}  # type: ignore[arg-type]
    for curve in curves.values():
        marks = [p.step for p in curve if p.held_out is not None]
        assert marks == sorted(due_steps(len(curve), 2))
    ends = [curve[-1].held_out for curve in curves.values()]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)  # the same training, measured the same way


def test_bytes_on_the_wire_are_adapters_down_and_up(workload: Workload, tmp_path: Path) -> None:
    rank, hidden, wide, layers = 4, 64, 256, 3
    attention, mlp = 4 * rank * (hidden + hidden), 3 * rank * (hidden + wide)
    silos, rounds = 5, 2
    assert run("fedavg", workload, tmp_path, rounds).wire_bytes == 2 * silos * rounds * 4 * layers * (attention + mlp)


def test_the_mean_is_weighted() -> None:
    found = weighted_mean([({"a": torch.tensor([1.0, 4.0])}, 1), ({"a": torch.tensor([5.0, 0.0])}, 3)])
    assert found["a"].tolist() == [4.0, 1.0]
    assert found["a"].dtype == torch.float32


def test_a_silo_with_too_few_steps_is_named(workload: Workload) -> None:
    packs = party_data(workload.loaded)["north"].parts["train"].packs
    with pytest.raises(UsageError, match="north has") as refused:
        Silo("north", packs, workload.loaded.job, rounds=99)
    assert refused.value.where == "--rounds"


# The clock -----------------------------------------------------------------------------------------------------------


def test_the_clock_stands_still_while_the_held_out_loss_is_measured() -> None:
    now = [0.0]
    clock = Clock(lambda: now[0], lambda: 2 * now[0])

    def held_out() -> float:
        now[0] += 100.0
        return 1.5

    book = Logbook(clock, {2}, held_out, Task(Silent(), Event(task="t")))
    now[0] += 3.0
    book.begin()
    for number in (1, 2, 3):
        now[0] += 10.0
        book.step(number, 3, 10 * number, 2.0)
    measured = book.close(steps=3, wire_bytes=0, how="")
    assert (measured.setup_s, measured.train_s, measured.seconds) == (3.0, 30.0, 33.0)
    assert measured.cpu_s == 66.0
    assert [(p.seconds, p.held_out) for p in measured.curve] == [(13.0, None), (23.0, 1.5), (33.0, None)]
