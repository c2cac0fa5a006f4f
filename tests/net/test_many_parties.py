"""64 parties at once: all get through, and each costs the enclave no more than a few MiB."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from cloister.attest.backends.simulated import measure_source
from cloister.crypto.keys import PartyKey
from tests.integration.tiny_job import records, started, write_job, write_lines, write_model
from tests.net.test_strangers import FLAGS, MIB, watching

pytestmark = [pytest.mark.net, pytest.mark.timeout(1200)]

COUNT, PROCESSES = 64, 2
MIB_PER_PARTY = 12
"""Of memory: its session, its upload, their threads, and its share of what the training takes."""
NAMES = tuple(f"party-{number:02d}" for number in range(COUNT))


def test_64_parties_at_once(tmp_path: Path, measured: Callable[[str], None]) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        '[policy]\naccept = ["simulated"]\ninsecure_simulated = true\n[[measurement]]\nlabel = "this"\n'
        f'type = "simulated"\nregisters = {{ source = "{measure_source().hex()}" }}\n'
    )
    keys = {name: PartyKey.generate() for name in NAMES}
    for name, key in keys.items():
        key.save(tmp_path / f"{name}.key")
        for part, count in (("train", 10), ("test", 2)):
            write_lines(tmp_path / "data" / f"{name}-{part}.jsonl", records(name, part, count))
    changes = {
        "model": {"path": str(write_model(tmp_path / "model"))},
        "enclave": {"policy": str(policy), "attester": "simulated"},
        "release": {"to": [NAMES[0]]},
    }
    of_party = {name: {"public_key": key.public.hex()} for name, key in keys.items()}
    job = write_job(tmp_path, changes, parties=NAMES, keys=of_party)
    out = tmp_path / "enclave"
    with ExitStack() as stack:
        call = ("enclave", job, "--listen", "127.0.0.1:0", "--out", out)
        enclave = stack.enter_context(started(*call, *FLAGS, folder=tmp_path / "e"))
        enclave.wait_for((out / "address").exists, "address", 400)
        address = json.loads((out / "address").read_text())["address"]
        watched = stack.enter_context(watching(enclave.process.pid))
        crowds = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.net.crowd", str(job), address, str(tmp_path), *NAMES[i::PROCESSES]],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for i in range(PROCESSES)
        ]  # fmt: skip
        found: dict[str, str] = {}
        for crowd in crowds:
            stack.callback(crowd.kill)
        for crowd in crowds:
            said, errors = crowd.communicate(timeout=1000)
            assert crowd.returncode == 0, errors[-3000:]
            found |= json.loads(said)
        assert enclave.end(120) == 0, enclave.stdout + enclave.stderr[-2000:]
    before, most = watched.rss[0] / MIB, max(watched.rss) / MIB
    measured(
        f"RSS {before:.0f} MiB before anybody came, {most:.0f} MiB at most, {(most - before) / COUNT:.1f} MiB for each "
        f"party; {max(watched.files)} open files; {len(set(found.values()))} adapter, {len(found)} parties"
    )
    assert set(found) == set(NAMES)
    assert len(set(found.values())) == 1
    assert most - before < COUNT * MIB_PER_PARTY
