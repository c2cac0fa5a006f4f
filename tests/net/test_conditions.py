"""A job over a bad network ends with the adapter of the undisturbed run, byte for byte."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cloister.report.outputs import JoinReport
from tests.integration.test_faults import deployment
from tests.integration.tiny_job import PARTIES, Command, records, started, write_job, write_lines, write_model
from tests.net.network import Host, Link, network

pytestmark = [pytest.mark.net, pytest.mark.timeout(600)]

CHANGES: dict[str, dict[str, Any]] = {"training": {"steps": 40}}
RECORDS = {"north": 700, "south": 120}
"""The first one's bundle is several of an upload's pieces."""
FLAGS = ("--insecure-simulated", "--json", "--progress", "json")
BAD: dict[str, Link] = {
    "delay": Link(delay_s=0.15, jitter_s=0.05),
    "loss": Link(delay_s=0.01, loss=0.05),
    "reordering": Link(delay_s=0.02, reorder=0.25),
    "bandwidth": Link(bytes_per_s=500_000),
    "everything": Link(delay_s=0.05, jitter_s=0.02, loss=0.01, reorder=0.05, bytes_per_s=250_000),
}
KEEPALIVE_S = 30.0
"""After this time without an answer to a ping, both ends take a connection for dead."""


@dataclass
class Running:
    """An enclave and its parties, each on its own host."""

    hosts: dict[str, Host]
    enclave: Command
    parties: dict[str, Command]
    folder: Path

    def end(self) -> str:
        """Wait for the good end of all; returns the adapter's hash, which all agree on."""
        reports = {}
        for name, command in self.parties.items():
            assert command.end(300) == 0, f"{name}: {command.stdout}{command.stderr[-2000:]}"
            reports[name] = JoinReport.model_validate_json(command.stdout)
        assert self.enclave.end(60) == 0, self.enclave.stdout + self.enclave.stderr[-2000:]
        assert all(r.warnings == [] for r in reports.values())
        (adapter,) = {r.adapter_sha256 for r in reports.values()}
        return adapter


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def start(stack: ExitStack, folder: Path, model: Path, links: dict[str, Link]) -> Running:
    """A job whose parties have links of their own; those not named have good ones."""
    folder.mkdir(exist_ok=True)

    def make(changes: dict[str, dict[str, Any]], **more: Any) -> Path:
        (folder / "job").mkdir(parents=True)
        for party in PARTIES:
            write_lines(folder / "job" / "data" / f"{party}-train.jsonl", records(party, "train", RECORDS[party]))
        return write_job(folder / "job", {**changes, "model": {"path": str(model)}}, **more)

    job, keys = deployment(make, folder, CHANGES)
    hosts = stack.enter_context(network(["enclave", *PARTIES]))
    for name, link in links.items():
        hosts[name].link = replace(link)
    out = folder / "enclave"
    listen = ("enclave", job, "--listen", f"{hosts['enclave'].address}:0", "--out", out)
    enclave = stack.enter_context(started(*listen, *FLAGS, folder=folder / "e", inside=hosts["enclave"].inside))
    enclave.wait_for((out / "address").exists, "address", 300)
    address = json.loads((out / "address").read_text())["address"]
    parties = {}
    for name in PARTIES:
        call = ("join", job, "--party", name, "--key", keys[name], "--out", folder / name, "--enclave", address)
        parties[name] = stack.enter_context(
            started(*call, *FLAGS, folder=folder / f"of-{name}", inside=hosts[name].inside)
        )
    return Running(hosts, enclave, parties, folder)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter's hash over a good network."""
    with ExitStack() as stack:
        running = start(stack, tmp_path_factory.mktemp("good"), model, {})
        adapter = running.end()
        assert all(host.dropped == 0 for host in running.hosts.values())
    return adapter


@pytest.fixture
def bad(tmp_path: Path, model: Path) -> Iterator[Callable[[dict[str, Link]], Running]]:
    with ExitStack() as stack:
        yield lambda links: start(stack, tmp_path / "job", model, links)


@pytest.mark.parametrize("condition", BAD)
def test_a_bad_link(
    bad: Callable[..., Running], undisturbed: str, condition: str, measured: Callable[[str], None]
) -> None:
    began = time.monotonic()
    running = bad(dict.fromkeys(PARTIES, BAD[condition]))
    same = running.end() == undisturbed
    carried = {name: host.carried for name, host in running.hosts.items()}
    dropped = {name: host.dropped for name, host in running.hosts.items()}
    measured(f"the same adapter: {same}; {time.monotonic() - began:.0f} s; packets carried {carried}, lost {dropped}")
    assert same
    assert min(carried.values()) > 500, carried
    if BAD[condition].loss:
        assert all(running.hosts[name].dropped > 10 for name in PARTIES)


def test_a_partition_while_bundles_are_sent(bad: Callable[..., Running], undisturbed: str) -> None:
    """Longer than connections live: what was sent is kept, and the party comes back by itself."""
    running = bad({"north": Link(bytes_per_s=300_000)})
    north, part = running.hosts["north"], running.folder / "enclave" / "bundles" / "north.train.bundle.part"
    running.enclave.wait_for(lambda: part.exists() and part.stat().st_size > 1 << 20, "part of a bundle", 300)
    north.link.cut = True
    time.sleep(KEEPALIVE_S + 10)
    kept = part.stat().st_size
    north.link.cut = False
    north.link.bytes_per_s = None
    assert running.end() == undisturbed
    size = (running.folder / "enclave" / "bundles" / "north.train.bundle").stat().st_size
    assert 1 << 20 < kept < size
    everything = sum(p.stat().st_size for p in (running.folder / "north" / "bundles").glob("*.bundle"))
    assert north.carried_bytes < 1.2 * everything + (1 << 20)  # a piece that was on its way, not what had arrived


def test_a_partition_of_everybody_while_the_enclave_trains(bad: Callable[..., Running], undisturbed: str) -> None:
    """Training goes on alone; parties come back, sign and take their results."""
    running = bad({})
    running.enclave.wait_for(lambda: any(e["task"] == "training" for e in running.enclave.events()), "training", 300)
    for name in PARTIES:
        running.hosts[name].link.cut = True
    time.sleep(KEEPALIVE_S + 10)
    assert {command.process.poll() for command in running.parties.values()} == {None}
    for name in PARTIES:
        running.hosts[name].link.cut = False
    assert running.end() == undisturbed


def test_a_link_that_comes_and_goes(bad: Callable[..., Running], undisturbed: str) -> None:
    """Short cuts, again and again, from the first packet to the last."""
    running = bad({"south": Link(delay_s=0.02)})
    south, deadline = running.hosts["south"].link, time.monotonic() + 60
    while running.parties["south"].process.poll() is None and time.monotonic() < deadline:
        time.sleep(1.0)
        south.cut = not south.cut
    south.cut = False
    assert running.end() == undisturbed
    assert running.hosts["south"].dropped > 0
