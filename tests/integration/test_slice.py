"""Method `slice` with all its processes: the adapter is that of plain integer products, whatever dies on the way."""

from __future__ import annotations

import copy
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister.adapters.files import adapter_sha256
from cloister.adapters.state import adapter_files, load_adapter_weights
from cloister.agreement.job import open_job
from cloister.crypto.keys import PartyKey
from cloister.data.prepare import prepare
from cloister.federation.state import GlobalState
from cloister.jobfile import LoadedJob, load_job
from cloister.model.anatomy import load_model, load_tokenizer
from cloister.model.cut import Whole
from cloister.progress import Silent
from cloister.report.model import RunReport
from cloister.silo.work import SiloWork
from cloister.training.loop import snapshot
from tests.integration.conftest import MakeJob
from tests.integration.search import (
    canary,
    files_under,
    holding,
    left_elsewhere,
    left_for_a_while,
    misplaced,
    planted,
    secrets_of,
    text_forms,
    weights_of,
    without,
)
from tests.integration.test_restart import FLAGS, POLICY, committed, history
from tests.integration.tiny_job import PARTIES, SLICE, finish, records, started, write_lines
from tests.unit.masking.local import integers_in_place
from tests.unit.silo.small import federate

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def unmasked(loaded: LoadedJob) -> dict[str, bytes]:
    """The job's rounds in this process, without enclaves, accelerators, pads or masks: plain products of integers."""
    torch.set_num_threads(1)
    resolved = open_job(loaded, progress=Silent()).resolved
    job, tokenizer = resolved.job, load_tokenizer(resolved.model.folder)
    works = {}
    for party in job.party:
        files = [loaded.data_file(party.name, part) for part in ("train", "test")]
        model = integers_in_place(load_model(resolved.model.folder, "float32"), 8)
        works[party.name] = SiloWork(Whole(model, all_tokens=True), prepare(job, tokenizer, *files), job, party.name)
    first = next(iter(works.values())).adapted
    ended = federate(works, GlobalState(round=0, weights=snapshot(first)), job)
    load_adapter_weights(first, ended.weights)
    return adapter_files(first, resolved.model.folder.name)


@pytest.mark.parametrize("pads", ["precomputed", "dual"])
def test_the_whole_system_gives_the_adapter_of_plain_integer_products(
    make_job: MakeJob, tmp_path: Path, pads: str
) -> None:
    """And leaves no party's text, keys or weights where they do not belong."""
    changes = copy.deepcopy(SLICE) | {"masking": {"pads": pads}, "training": {"keep": "last"}}
    out, since = tmp_path / "out", time.time()
    canaries = plant(tmp_path / "job")
    command = finish("run", make_job(changes), "--out", out, "--json", folder=tmp_path / "c", timeout_s=600.0)
    assert command.process.returncode == 0, command.stdout + command.stderr
    report = RunReport.model_validate_json(command.stdout)
    assert report.adapter_sha256 == adapter_sha256(unmasked(load_job(out / "job.toml")))
    assert [row.round for row in report.rounds] == [1, 2]
    assert all({p.party for p in row.parties} == set(PARTIES) for row in report.rounds)
    assert report.masking is not None
    assert (report.masking.pads, report.masking.checked) == (pads, True)
    assert report.masking.bytes_up > 0
    assert any("INSECURE: both accelerators are on one machine" in w for w in report.warnings) == (pads == "dual")
    verified = finish("verify", out, "--insecure-simulated", "--json", folder=tmp_path / "v")
    assert verified.process.returncode == 0, verified.stdout
    checks = {check["name"]: check["status"] for check in json.loads(verified.stdout)["checks"]}
    assert checks["party enclaves"] == "ok"
    assert set(checks.values()) == {"ok"}
    nothing_is_left(tmp_path, canaries, since)


def plant(job: Path) -> dict[str, str]:
    """Writes the data of "north" with canaries; returns them by part."""
    canaries = {part: canary(part) for part in ("train", "test")}
    for part, text in canaries.items():
        rows = records("north", part, 40 if part == "train" else 6)
        write_lines(job / "data" / f"north-{part}.jsonl", planted(rows, text))
    return canaries


def nothing_is_left(folder: Path, canaries: dict[str, str], since: float) -> None:
    """Training text is in no file at all, test text and the adapter in none but those of "north", keys in their own."""
    parties = {party: folder / "out" / "parties" / party for party in PARTIES}
    files = without(files_under(folder), folder / "job") + left_elsewhere(since, besides=folder)
    assert left_for_a_while(folder) == []
    assert holding(files, *text_forms(canaries["train"])) == []
    assert holding(without(files, parties["north"]), *text_forms(canaries["test"])) == []
    owned = {path: s for at in parties.values() for path, s in secrets_of(at, at / "party.key").items()}
    assert len(owned) == 2 * len(PARTIES)
    assert misplaced(files, owned) == []
    released = [parties["north"] / "adapter", folder / "out" / "adapter"]
    for stretch in weights_of(released[0]):
        assert holding(without(files, *released), stretch) == []


def test_accelerator_party_and_server_die_and_the_adapter_is_the_same(make_job: MakeJob, tmp_path: Path) -> None:
    """kill -9 of a party in a round, of the server after a checkpoint: they come back and go on."""
    keys = {name: PartyKey.generate() for name in PARTIES}
    for name, key in keys.items():
        key.save(tmp_path / f"{name}.key")
    (tmp_path / "policy.toml").write_text(POLICY)
    changes: dict[str, Any] = copy.deepcopy(SLICE) | {
        "masking": {"pads": "dual", "accelerators": [f"unix:{tmp_path}/a1", f"unix:{tmp_path}/a2"]},
        "training": {"steps": 16, "keep": "last"},
        "federation": {"rounds": 4},
        "checkpoint": {"count": 4},
    }
    changes["enclave"] = {"attester": "simulated", "policy": str(tmp_path / "policy.toml")}
    job = make_job(changes, keys={name: {"public_key": key.public.hex()} for name, key in keys.items()})
    out = tmp_path / "enclave"

    def enclave(listen: str) -> tuple[object, ...]:
        return ("enclave", job, "--listen", listen, "--out", out, *FLAGS)

    def join(party: str, address: str) -> tuple[object, ...]:
        call = ("join", job, "--party", party, "--key", tmp_path / f"{party}.key", "--out", tmp_path / party)
        return (*call, "--enclave", address, *FLAGS)

    def multiplier(name: str) -> tuple[object, ...]:
        return ("accelerator", "--listen", f"unix:{tmp_path}/{name}", "--out", tmp_path / f"{name}-out", "--json")

    with (
        started(*multiplier("a1"), folder=tmp_path / "c1") as one,
        started(*multiplier("a2"), folder=tmp_path / "c2") as two,
        started(*enclave("127.0.0.1:0"), folder=tmp_path / "e1") as first,
    ):
        for command, name in ((one, "a1"), (two, "a2")):
            command.wait_for((tmp_path / f"{name}-out" / "address").exists, "accelerator")
        first.wait_for((out / "address").exists, "address")
        address = json.loads((out / "address").read_text())["address"]
        with started(*join("south", address), folder=tmp_path / "s") as south:
            with started(*join("north", address), folder=tmp_path / "n1") as north:
                in_a_round = lambda: any(e["task"].startswith("round 1") for e in north.events())  # noqa: E731
                north.wait_for(in_a_round, "a round", timeout_s=300.0)
                north.process.send_signal(signal.SIGKILL)
                assert north.end() == -signal.SIGKILL
            with started(*join("north", address), folder=tmp_path / "n2") as north:
                first.wait_for(lambda: committed(out / "checkpoints"), "a checkpoint", timeout_s=300.0)
                first.process.send_signal(signal.SIGKILL)
                assert first.end() == -signal.SIGKILL
                with started(*enclave(address), folder=tmp_path / "e2") as second:
                    assert second.end(600.0) == 0, second.stdout
                    assert north.end() == 0, north.stdout
                    assert south.end() == 0, south.stdout
    ended = json.loads((tmp_path / "n2" / "stdout").read_text())
    assert ended["adapter_sha256"] == adapter_sha256(unmasked(load_job(job)))
    assert len(history(tmp_path / "north" / "receipt.json").earlier) == 1
