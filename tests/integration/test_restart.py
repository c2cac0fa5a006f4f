"""kill -9 in the middle of training, with real processes: the same adapter to the last bit, and nothing sent twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cloister.agreement.history import History
from cloister.agreement.receipt import Receipt, verify_receipt
from cloister.attest.backends.simulated import measure_source
from cloister.attest.policy import AppraisalPolicy
from cloister.crypto.keys import PartyKey
from cloister.enclave.checkpoints import CheckpointFolder
from cloister.report.model import RunReport
from cloister.report.outputs import JoinReport
from tests.integration.conftest import MakeJob
from tests.integration.tiny_job import (
    PARTIES,
    Command,
    alive,
    children_of,
    finish,
    records,
    started,
    write_job,
    write_lines,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

STEPS, CHECKPOINTS = 64, 8
CHANGES: dict[str, dict[str, Any]] = {
    "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
    "training": {"steps": STEPS, "batch_tokens": 128, "max_tokens": 64, "evaluations": 2, "learning_rate": 0.01},
    "checkpoint": {"count": CHECKPOINTS},
}
FLAGS = ("--insecure-simulated", "--json", "--progress", "json")
POLICY = (
    '[policy]\naccept = ["simulated"]\ninsecure_simulated = true\n[[measurement]]\nlabel = "this"\n'
    f'type = "simulated"\nregisters = {{ source = "{measure_source().hex()}" }}\n'
)


def write_data(make_job: MakeJob, tmp_path: Path, **keys: Any) -> Path:
    for party in PARTIES:
        write_lines(tmp_path / "job" / "data" / f"{party}-train.jsonl", records(party, "train", 60))
    return make_job(CHANGES, **keys)


def newest(folder: Path) -> int:
    stored = CheckpointFolder(folder).newest()
    return 0 if stored is None else stored.seal.number


def committed(folder: Path) -> bool:
    return any(folder.glob("*.certificate"))


def history(receipt: Path) -> History:
    """Of a receipt that holds."""
    policy = AppraisalPolicy.from_toml(POLICY)
    verdict = verify_receipt(receipt.read_bytes(), policy=policy, adapter_sha256=None, allow_simulated=True)
    assert verdict.passed, [check for check in verdict.checks if not check.passed]
    return History.of(json.loads(Receipt.from_bytes(receipt.read_bytes()).body))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> RunReport:
    """The same job and data, from beginning to end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for party in PARTIES:
        write_lines(folder / "data" / f"{party}-train.jsonl", records(party, "train", 60))
    job = write_job(folder, {**CHANGES, "model": {"path": str(tiny_model_folder)}})
    command = finish("run", job, "--out", folder / "out", "--json", folder=folder / "command")
    assert command.process.returncode == 0, command.stdout
    report = RunReport.model_validate_json(command.stdout)
    assert len(history(folder / "out" / "receipt.json").chain) == CHECKPOINTS
    return report


def test_the_enclave_is_killed_and_another_goes_on(make_job: MakeJob, tmp_path: Path, uninterrupted: RunReport) -> None:
    """Parties stay up: they find the new instance, attest it, and release shares and keys."""
    keys = {name: PartyKey.generate() for name in PARTIES}
    for name, key in keys.items():
        key.save(tmp_path / f"{name}.key")
    (tmp_path / "policy.toml").write_text(POLICY)
    job = write_data(make_job, tmp_path, keys={name: {"public_key": key.public.hex()} for name, key in keys.items()})
    text = job.read_text().replace("[enclave]", f'[enclave]\npolicy = "{tmp_path / "policy.toml"}"', 1)
    job.write_text(text if "attester" in text else text.replace("[enclave]", '[enclave]\nattester = "simulated"', 1))
    out, checkpoints = tmp_path / "enclave", tmp_path / "enclave" / "checkpoints"

    def enclave(listen: str) -> tuple[object, ...]:
        return ("enclave", job, "--listen", listen, "--out", out, *FLAGS)

    def join(party: str, address: str) -> tuple[object, ...]:
        call = ("join", job, "--party", party, "--key", tmp_path / f"{party}.key", "--out", tmp_path / party)
        return (*call, "--enclave", address, *FLAGS)

    with started(*enclave("127.0.0.1:0"), folder=tmp_path / "e1") as first:
        first.wait_for((out / "address").exists, "address")
        address = json.loads((out / "address").read_text())["address"]
        with (
            started(*join("north", address), folder=tmp_path / "n") as north,
            started(*join("south", address), folder=tmp_path / "s") as south,
        ):
            first.wait_for(lambda: committed(checkpoints), "a committed checkpoint")
            first.process.send_signal(signal.SIGKILL)
            assert first.end() == -signal.SIGKILL
            made = newest(checkpoints)
            assert 1 <= made < CHECKPOINTS
            arrived = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (out / "bundles").iterdir()}
            with started(*enclave(address), folder=tmp_path / "e2") as second:
                assert second.end() == 0, second.stdout
            assert north.end() == 0, north.stdout
            assert south.end() == 0, south.stdout
    report = JoinReport.model_validate_json(north.stdout)
    assert report.adapter_sha256 == uninterrupted.adapter_sha256
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (out / "bundles").iterdir()} == arrived
    size = sum(path.stat().st_size for path in (tmp_path / "north" / "bundles").glob("*.bundle"))
    assert size <= report.wire.bytes_up < size + 100_000 < 2 * size
    told = history(tmp_path / "north" / "receipt.json")
    assert [seal.number for seal, _ in told.chain] == list(range(1, CHECKPOINTS + 1))
    assert [seal.step for seal, _ in told.chain] == [STEPS * i // CHECKPOINTS for i in range(1, CHECKPOINTS + 1)]
    assert len(told.earlier) == 1
    assert [seal.instance_id == told.earlier[0].id for seal, _ in told.chain] == [
        *[True] * made,
        *[False] * (CHECKPOINTS - made),
    ]
    _operator_reads_no_secret(out, tmp_path)


def _operator_reads_no_secret(out: Path, tmp_path: Path) -> None:
    """Nothing of the sealed state is in clear on the enclave's disk; shares lie with their parties alone."""
    memories = [tmp_path / party / "manifest.memory" for party in PARTIES]
    assert {path.stat().st_mode & 0o777 for path in memories} == {0o600}
    stored = [path.read_bytes() for path in (out / "checkpoints").iterdir()]
    assert not any(b"lora_A" in content for content in stored)


def test_everything_is_killed_and_the_same_command_goes_on(
    make_job: MakeJob, tmp_path: Path, uninterrupted: RunReport
) -> None:
    job = write_data(make_job, tmp_path)
    out = tmp_path / "out"
    call = ("run", job, "--out", out, "--json", "--progress", "json")
    checkpoints = out / "enclave" / "checkpoints"
    with started(*call, folder=tmp_path / "first") as first:
        first.wait_for(lambda: committed(checkpoints), "a committed checkpoint")
        _kill_with_children(first)
    made = newest(checkpoints)
    assert 1 <= made < CHECKPOINTS
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints, copy)
    second = finish(*call, folder=tmp_path / "second")
    assert second.process.returncode == 0, second.stdout
    report = RunReport.model_validate_json(second.stdout)
    assert report.adapter_sha256 == uninterrupted.adapter_sha256
    told = history(out / "receipt.json")
    assert len(told.earlier) == 1
    assert told.starts[1]["north"].position.number == made

    # An old copy of the checkpoints put back, and results lost: parties have seen newer ones.
    (out / "report.json").unlink()
    for receipt in out.rglob("receipt.json"):
        receipt.unlink()
    shutil.rmtree(checkpoints)
    shutil.copytree(copy, checkpoints)
    third = finish(*call, folder=tmp_path / "third")
    assert third.process.returncode == 3
    error = json.loads(third.stdout)["error"]
    assert error["code"] == "rollback"
    assert "--accept-checkpoint" in error["hint"]


def _kill_with_children(command: Command) -> None:
    children = children_of(command.process.pid)
    command.process.kill()
    command.end()
    for pid in alive(children):
        with suppress(ProcessLookupError):  # it ends by itself when its parent is gone
            os.kill(pid, signal.SIGKILL)
