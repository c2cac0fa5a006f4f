"""The job of the trials as parties on different machines have it: keys, a policy, and every role's command."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cloister.attest.backends.simulated import measure_source
from cloister.crypto.keys import PartyKey
from tests.crash.forking import in_child
from tests.integration.tiny_job import SLICE, records, write_job, write_lines, write_model

Method = Literal["split", "slice"]
PARTIES: dict[Method, tuple[str, ...]] = {"split": ("north", "south", "west"), "slice": ("north", "south")}
FLAGS = ("--insecure-simulated", "--json", "--progress", "json")
_SPLIT: dict[str, dict[str, Any]] = {
    "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
    "training": {"steps": 24, "batch_tokens": 128, "max_tokens": 64, "evaluations": 2, "learning_rate": 0.05},
    "checkpoint": {"count": 4},
}
_SLICE: dict[str, dict[str, Any]] = {
    "training": {"steps": 4, "batch_tokens": 64, "max_tokens": 64, "evaluations": 1, "learning_rate": 0.05},
    "checkpoint": {"count": 2},
    "federation": {"rounds": 2, "deadline_s": 600.0},
    "evaluation": {"baselines": []},
}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A job's files. Trials share them and write into folders of their own."""

    method: Method
    folder: Path

    @property
    def job(self) -> Path:
        return self.folder / "job.toml"

    @property
    def own_job(self) -> Path:
        """The same for `cloister run`, which makes keys and a policy itself."""
        return self.folder / "own" / "job.toml"

    @property
    def parties(self) -> tuple[str, ...]:
        return PARTIES[self.method]

    def key(self, party: str) -> Path:
        return self.folder / f"{party}.key"

    def enclave(self, out: Path, listen: str, *more: object) -> tuple[object, ...]:
        return ("enclave", self.job, "--listen", listen, "--out", out, *FLAGS, *more)

    def join(self, party: str, out: Path, address: str, job: Path | None = None) -> tuple[object, ...]:
        """`job`: the party's own copy, which may name other accelerators."""
        call = ("join", job or self.job, "--party", party, "--key", self.key(party), "--out", out)
        samples = 1 if self.method == "split" else 0  # behind masks an answer takes as long as all the rest
        return (*call, "--enclave", address, "--samples", samples, *FLAGS)

    def job_with_accelerator(self, path: Path, address: str) -> Path:
        """A party's own copy of the job, naming its accelerator; paths in it are absolute."""
        text = self.job.read_text().replace("[masking]", f'[masking]\naccelerators = ["{address}"]', 1)
        path.write_text(text.replace('"data/', f'"{self.folder}/data/'))
        return path

    @staticmethod
    def accelerator(out: Path, address: str) -> tuple[object, ...]:
        return ("accelerator", "--listen", address, "--out", out, "--threads", "1", "--device", "cpu", "--json")


def make_deployment(method: Method, folder: Path, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Deployment:
    """Write model, data, keys, policy and job into a folder. Needs one thread, and starts none."""
    made = Deployment(method=method, folder=folder)
    folder.mkdir(parents=True)
    if in_child(lambda: _write(made, changes or {})) != 0:
        raise RuntimeError("the job cannot be written")
    return made


def _write(made: Deployment, changes: Mapping[str, Mapping[str, Any]]) -> None:
    folder = made.folder
    keys = {name: PartyKey.generate() for name in made.parties}
    for name, key in keys.items():
        key.save(made.key(name))
        write_lines(folder / "data" / f"{name}-train.jsonl", records(name, "train", 24))
    policy = folder / "policy.toml"
    policy.write_text(policy_text())
    sections = copy.deepcopy(_SPLIT)
    if made.method == "slice":
        sections = copy.deepcopy(SLICE) | {"masking": {}} | copy.deepcopy(_SLICE)
    sections |= {
        "model": {"path": str(write_model(folder / "model")), **sections.get("model", {})},
        "enclave": {"policy": str(policy), "attester": "simulated", "threads": 1, "device": "cpu"},
        "release": {"to": list(made.parties)},
    }
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    public = {name: {"public_key": key.public.hex()} for name, key in keys.items()}
    write_job(folder, sections, parties=made.parties, keys=public)
    made.own_job.parent.mkdir()
    write_job(made.own_job.parent, {"model": sections["model"]}, parties=made.parties)


def policy_text() -> str:
    """Accepts this very source, simulated."""
    return (
        '[policy]\naccept = ["simulated"]\ninsecure_simulated = true\n[[measurement]]\nlabel = "this"\n'
        f'type = "simulated"\nregisters = {{ source = "{measure_source().hex()}" }}\n'
    )
