"""`cloister accelerator` as a process: how it is found, how it ends, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cloister.accelerator.client import AcceleratorClient
from cloister.accelerator.tls import LinkKey
from cloister.crypto.keys import PartyKey
from cloister.errors import TransportError
from cloister.methods.processes import PARENT_VARIABLE
from cloister.report.outputs import AcceleratorReport
from tests.integration.tiny_job import Command, alive, started
from tests.unit.accelerator.serving import WEIGHTS_ID, oracle, plan, push

pytestmark = pytest.mark.integration

WEIGHT = torch.arange(-12, 12, dtype=torch.int8).view(6, 4)
Z = torch.tensor([[2**31 - 1, -(2**31), 3, 4]], dtype=torch.int32)


@contextmanager
def accelerator(listen: str, *more: object, folder: Path) -> Iterator[tuple[Command, str]]:
    """The process, and its address."""
    out = folder / "out"
    with started("accelerator", "--listen", listen, "--out", out, *more, "--json", folder=folder) as command:
        command.wait_for((out / "address").is_file, "address")
        told = json.loads((out / "address").read_text())
        assert told["pid"] == command.process.pid
        yield command, told["address"]


def works(client: AcceleratorClient) -> bool:
    push(client, [plan("g", 4, 6)], {"g": [WEIGHT]}, WEIGHTS_ID)
    return torch.equal(client.submit("g", "forward", Z)()[0], oracle(Z, WEIGHT.T))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 'a.sock'}"
    with accelerator(listen, "--device", "cpu", "--threads", 1, folder=tmp_path / "1") as (command, address):
        assert address == listen
        with AcceleratorClient(address) as client:
            assert works(client)
            command.process.send_signal(signal.SIGTERM)
            assert command.end(30) == 0
            with pytest.raises(TransportError):
                client.submit("g", "forward", Z)()
        report = AcceleratorReport.model_validate_json(command.stdout)
    assert (report.address, report.device, report.products) == (listen, "cpu", 1)
    assert left(tmp_path) == ["1"]
    assert left(command.temporary) == []


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    with accelerator(f"unix:{tmp_path / 'a.sock'}", folder=tmp_path / "1") as (command, _):
        command.interrupt()
        assert command.end(30) == 130
        assert "Traceback" not in command.stderr
    assert left(tmp_path) == ["1"]


def test_a_killed_one_is_noticed_and_replaced(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 'a.sock'}"
    shared = set(os.listdir("/dev/shm"))  # noqa: PTH208, S108
    with (
        accelerator(listen, folder=tmp_path / "1") as (command, _),
        AcceleratorClient(listen, name="acc") as client,
    ):
        assert works(client)
        reply = client.submit("g", "forward", Z.expand(4096, 4))
        command.process.kill()
        command.end(30)
        with contextlib.suppress(TransportError):  # it may have been done
            reply()
        with pytest.raises(TransportError, match="accelerator acc"):
            client.submit("g", "forward", Z)()
    assert set(os.listdir("/dev/shm")) - shared == set()  # noqa: PTH208, S108
    assert left(command.temporary) == []
    with accelerator(listen, folder=tmp_path / "2"), AcceleratorClient(listen) as client:
        assert works(client)


def test_a_stopped_one_is_noticed_at_the_deadline(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path / 'a.sock'}"
    with accelerator(listen, folder=tmp_path) as (command, _), AcceleratorClient(listen, timeout_s=5) as client:
        assert works(client)
        command.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, command.process.pid, os.WSTOPPED)  # returns when the last thread stands still
        with pytest.raises(TransportError, match="within 5 s"):
            client.submit("g", "forward", Z)()


def test_over_the_network_with_keys_from_files(tmp_path: Path) -> None:
    for name in ("server", "client"):
        PartyKey.generate().save(tmp_path / name)
    key = LinkKey.load(tmp_path / "client")
    keys = ("--key", tmp_path / "server", "--allow", key.public.hex())
    with accelerator("127.0.0.1:0", *keys, folder=tmp_path / "1") as (command, address):
        assert address.endswith(f"#{LinkKey.load(tmp_path / 'server').public.hex()}")
        with AcceleratorClient(address, key=key) as client:
            assert works(client)
        assert left(command.temporary) == []


@pytest.mark.parametrize(
    "arguments",
    [("--listen", "127.0.0.1:0"), ("--listen", "nowhere"), ("--listen", "unix:/proc/none/a"), ("--allow", "x")],
)
def test_wrong_arguments(tmp_path: Path, arguments: tuple[str, str]) -> None:
    default = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
    with started("accelerator", *arguments, *default, "--json", folder=tmp_path) as command:
        assert command.end(60) == 2
        assert json.loads(command.stdout)["error"]["code"] == "usage"


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    starts = (
        "import os, subprocess, sys, time;"
        f"os.environ[{PARENT_VARIABLE!r}] = str(os.getpid());"
        "print(subprocess.Popen([sys.executable, '-m', 'cloister', *sys.argv[1:]]).pid, flush=True);"
        "time.sleep(600)"
    )
    out = tmp_path / "out"
    arguments = ["accelerator", "--listen", f"unix:{tmp_path / 'a.sock'}", "--out", str(out)]
    with (tmp_path / "stderr").open("wb") as stderr:
        parent = subprocess.Popen([sys.executable, "-c", starts, *arguments], stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while not (out / "address").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.communicate()
    while alive({child}):
        assert time.monotonic() < deadline
        time.sleep(0.05)
