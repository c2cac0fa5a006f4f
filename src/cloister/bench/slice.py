"""`cloister bench slice`: a masked step against a plain one, on the same processors, in one run.

Every system is a process that waits for its turn: one step of each, then the next, so that whatever else the machine
does falls on all of them. Masked systems share their accelerators, which are processes too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from cloister.accelerator.address import socket_folder
from cloister.bench.shape import Shape, write_model
from cloister.errors import RunError
from cloister.masking.budget import Work, first_trained, pad_budget
from cloister.masking.skeleton import plan_groups
from cloister.methods.host import describe_host, usable_cpus
from cloister.methods.processes import Role, Roles
from cloister.progress import Progress, task
from cloister.report.bench import BenchRow, BenchSliceReport
from cloister.training.loss import MAX_LOGITS

SYSTEMS = ("plain-float32", "plain-bfloat16", "precomputed", "dual", "unchecked")
_WARM_UP = 1


class _System:
    """One stepping process."""

    def __init__(
        self, name: str, folder: Path, steps: int, in_flight: int, addresses: Sequence[str], shape: Shape, log: Path
    ) -> None:
        arguments = [name, str(folder), str(steps), str(in_flight), ",".join(addresses), *shape.arguments()]
        self.name, self.steps = name, list[dict[str, Any]]()
        self._log = log.open("wb")
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-m", "cloister.bench.stepping", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def listen(self) -> dict[str, Any]:
        """The next line that it says. Raises: RunError: it ended."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RunError("a benchmarked process ended", where=self.name, hint=Path(self._log.name).read_text()[-500:])
        found = json.loads(line)
        return dict(found)

    def step(self) -> dict[str, Any]:
        """Let it take one step."""
        if self._process.stdin:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        return self.listen()

    def __enter__(self) -> _System:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def bench_slice(
    shape: Shape, *, runs: int, systems: Sequence[str], in_flight: int, command: str, progress: Progress
) -> BenchSliceReport:
    """Measure.

    Args:
        runs: steps of each system that count. in_flight: packs that a masked step works on at once.

    Raises:
        RunError: a process ended.
    """
    masked = [name for name in systems if not name.startswith("plain-")]
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="cloister-")))
        with task(progress, "random weights"):
            write_model(shape, folder / "model")
        roles = ends.enter_context(Roles())
        sockets = ends.enter_context(socket_folder())
        addresses = _accelerators(roles, sockets, 2 if "dual" in masked else 1, progress) if masked else []
        started, first = list[_System](), dict[str, dict[str, Any]]()
        for name in systems:
            with task(progress, f"starting {name}"):
                own = addresses[: 2 if name == "dual" else 1]
                steps = runs + _WARM_UP
                system = _System(name, folder / "model", steps, in_flight, own, shape, folder / f"{name}.log")
                started.append(ends.enter_context(system))
                first[name] = system.listen()
        with task(progress, "steps", total=(runs + _WARM_UP) * len(started), unit="steps") as running:
            for number in range(runs + _WARM_UP):
                for system in started:
                    took = system.step()
                    running.advance(note=f"{system.name} {took['seconds']:.2f} s")
                    if number >= _WARM_UP:
                        system.steps.append(took)
        up, down = _bytes_per_token(shape, folder / "model")
    torch_bytes = _torch_alone()
    rows = {system.name: _row(system, first[system.name], torch_bytes) for system in started}
    return BenchSliceReport(
        command=command,
        shape={name: getattr(shape, name) for name in ("hidden", "layers", "vocabulary", "tokens", "packs", "rank")},
        rows=list(rows.values()),
        ratios=_ratios(rows, 4 * shape.weights),
        bytes_per_token={"up": up, "down": down},
        host=describe_host(),
    )


def _accelerators(roles: Roles, folder: Path, count: int, progress: Progress) -> list[str]:
    addresses = []
    for index in range(count):
        address, out = f"unix:{folder}/a{index}", folder / f"out{index}"
        arguments = ["accelerator", "--listen", address, "--out", str(out)]
        role = roles.add(
            Role(f"accelerator {index}", arguments, log=folder / "acc.log", threads=usable_cpus(), progress=progress)
        )
        while not (out / "address").exists():
            roles.check()
            if role.process.poll() is not None:
                raise RunError("the accelerator ended", where=role.name, hint=f"see {folder / 'acc.log'}")
            time.sleep(0.05)
        addresses.append(address)
    return addresses


def _row(system: _System, ready: dict[str, Any], torch_bytes: int) -> BenchRow:
    seconds = [step["seconds"] for step in system.steps]
    return BenchRow(
        name=system.name,
        median_s=median(seconds),
        min_s=min(seconds),
        max_s=max(seconds),
        runs=len(seconds),
        cpu_s=median(step["cpu"] for step in system.steps),
        model_bytes=max(0, ready["resident"] - torch_bytes),
        resident_bytes=max(0, max(step["resident"] for step in system.steps) - torch_bytes),
    )


def _ratios(rows: dict[str, BenchRow], weight_bytes: int) -> dict[str, float]:
    """Of medians; those whose systems were not measured are left out."""

    def over(one: str, other: str) -> float | None:
        return rows[one].median_s / rows[other].median_s if {one, other} <= set(rows) else None

    found = {
        "precomputed_over_plain": over("precomputed", "plain-float32"),
        "dual_over_plain": over("dual", "plain-float32"),
        "precomputed_over_bfloat16": over("precomputed", "plain-bfloat16"),
        "dual_over_bfloat16": over("dual", "plain-bfloat16"),
    }
    if {"precomputed", "unchecked"} <= set(rows):
        checked, unchecked = rows["precomputed"].cpu_s, rows["unchecked"].cpu_s
        found["freivalds_share"] = max(0.0, checked - unchecked) / (usable_cpus() * rows["precomputed"].median_s)
    if "precomputed" in rows:
        found["enclave_rss_over_weights"] = rows["precomputed"].model_bytes / weight_bytes
        found["enclave_rss_in_steps_over_weights"] = rows["precomputed"].resident_bytes / weight_bytes
    return {name: value for name, value in found.items() if value is not None}


def _torch_alone() -> int:
    """Resident bytes of a process that has imported torch and nothing else of size."""
    code = "import torch, re; print(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    return 1024 * int(run.stdout)


def _bytes_per_token(shape: Shape, model: Path) -> tuple[float, float]:
    """Masked values up and products down, of training."""
    plans = plan_groups(model)
    budget = pad_budget(
        plans,
        Work(trained=[shape.pack_tokens - 1] * shape.packs, scored=[]),
        rows=shape.pack_tokens,
        head_rows=max(1, MAX_LOGITS // shape.vocabulary),
        first_trained=first_trained(plans, "all-linear"),
        bits=8,
    )
    return budget.bytes_up / shape.tokens, budget.bytes_down / shape.tokens
