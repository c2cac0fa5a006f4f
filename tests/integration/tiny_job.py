"""A job so small that starting its processes is most of its time: a random 4-layer model, two parties, eight steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.unit.data.tiny_tokenizers import tiny_tokenizer
from tests.unit.model.tiny import CONFIGS

PARTIES = ("north", "south")
SLICE: dict[str, dict[str, Any]] = {
    "job": {"method": "slice"},
    "model": {"cut": None},
    "transport": {"activation_dtype": None},
    "federation": {"rounds": 2},
}
"""What makes it a job of method `slice`."""
SECTIONS: dict[str, dict[str, Any]] = {
    "job": {"name": "tiny", "seed": 1},
    "model": {"path": "model", "cut": 2, "dtype": "float32"},
    "data": {"validation": 0.1},
    "adapter": {"rank": 2, "alpha": 4.0},
    "training": {"steps": 8, "batch_tokens": 128, "max_tokens": 64, "evaluations": 2, "learning_rate": 0.05},
    "enclave": {"threads": 1, "device": "cpu"},
    "transport": {"activation_dtype": "float32"},
    "evaluation": {"baselines": ["base"]},
    "release": {"to": ["north"]},
}

Changes = Mapping[str, Mapping[str, Any]]


def write_model(folder: Path) -> Path:
    """A random Llama of 32 dimensions with a byte-level tokenizer, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("bos")
    config = deepcopy(CONFIGS["llama"])
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def records(party: str, part: str, count: int) -> list[dict[str, Any]]:
    """Text to answer, and every third record a choice; no two parties share one."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {"id": f"{party}-{part}-{i}", "prompt": f"{party} {part}: what is {i} and {i % 7}?"}
        row |= {"task": "answer", "response": f"It is {i + i % 7}, says {party}."}
        if i % 3 == 2:
            choices = ["yes", "no", "maybe"]
            row |= {"task": "choose", "choices": choices, "answer": i % 2, "response": choices[i % 2]}
        rows.append(row)
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_job(
    folder: Path, changes: Changes | None = None, *, parties: tuple[str, ...] = PARTIES, keys: Changes | None = None
) -> Path:
    """A job file with data files beside it; the model folder must be at its `[model] path`.

    Args:
        changes: keys to set by section, None to leave one out. keys: further keys to set by party.
    """
    sections = {name: {**values, **(changes or {}).get(name, {})} for name, values in SECTIONS.items()}
    sections = {name: {k: v for k, v in values.items() if v is not None} for name, values in sections.items()}
    sections |= {name: dict(values) for name, values in (changes or {}).items() if name not in sections}
    blocks = [_block(f"[{name}]", values) for name, values in sections.items()]
    for party in parties:
        paths = {part: f"data/{party}-{part}.jsonl" for part in ("train", "test")}
        blocks.append(_block("[[party]]", {"name": party, **paths, **(keys or {}).get(party, {})}))
        for part, path in paths.items():
            if not (folder / path).exists():
                write_lines(folder / path, records(party, part, 40 if part == "train" else 6))
    job = folder / "job.toml"
    job.write_text("\n".join(blocks))
    return job


def _block(header: str, values: Mapping[str, Any]) -> str:
    return "\n".join([header, *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])


class Command:
    """A running `cloister` command with its own temporary folder; stderr goes to a file, so that no pipe fills up."""

    def __init__(self, *arguments: object, folder: Path, inside: Sequence[str] = ()) -> None:
        """inside: what to put before the command, to run it somewhere else."""
        folder.mkdir(parents=True, exist_ok=True)
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-m", "cloister", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
            )

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    def events(self) -> list[dict[str, Any]]:
        """Progress events so far, of a command run with `--progress json`."""
        lines = self.stderr.splitlines()
        return [json.loads(line)["progress"] for line in lines if line.startswith('{"progress"') and line.endswith("}")]

    def wait_for(self, fact: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        """Wait until something is true while the command runs."""
        deadline = time.monotonic() + timeout_s
        while not fact():
            assert self.process.poll() is None, f"ended before {what}: {self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s: {self.stderr[-2000:]}"
            time.sleep(0.02)

    def end(self, timeout_s: float = 240.0) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(timeout_s)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@contextmanager
def started(*arguments: object, folder: Path, inside: Sequence[str] = ()) -> Iterator[Command]:
    """A command that is killed if it still runs when the block is left."""
    command = Command(*arguments, folder=folder, inside=inside)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
        command.process.wait()


def finish(*arguments: object, folder: Path, timeout_s: float = 240.0) -> Command:
    """Run a command to its end."""
    with started(*arguments, folder=folder) as command:
        command.end(timeout_s)
        return command


def children_of(pid: int) -> set[int]:
    """Process ids of a process's children, from /proc."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid:
            found.add(int(stat.parent.name))
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run (a zombie does not)."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.add(pid)
    return running
