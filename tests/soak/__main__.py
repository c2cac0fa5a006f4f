"""Hours of jobs with faults beside an enclave that serves: memory, descriptors, processes and files must not grow.

    python -m tests.soak [--hours 2] [--seed 1] [--json]

One enclave has trained a tiny job and answers queries; one accelerator serves job after job of method `slice`. Clients
ask, are killed, stop in the middle of a handshake and send garbage; beside them runs one job after the other of the
crash matrix, in which roles are killed. The exit code is 1 if something grows more than its bound (`gauges.BOUNDS`).
"""

from __future__ import annotations

import tests.crash.clock  # isort: skip

tests.crash.clock.install()  # as in the crash matrix, whose jobs are used

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from random import Random  # noqa: E402
from typing import Any  # noqa: E402

from tests.crash.deployment import Deployment, make_deployment  # noqa: E402
from tests.crash.forking import Forked, import_everything  # noqa: E402
from tests.crash.matrix import Matrix  # noqa: E402
from tests.crash.trial import Job, what_differs  # noqa: E402
from tests.soak.clients import Clients  # noqa: E402
from tests.soak.gauges import (  # noqa: E402
    Samples,
    adopt_orphans,
    descendants,
    files_under,
    process_gauges,
    reap,
    save,
    shared_memory,
)

SAMPLE_S = 10.0
JOB_S = 60.0
"""A job of the crash matrix begins this long after the last one began."""
START_S = 900.0
"""Most time for a start and for training, on a machine that is busy with other work."""


class Serving:
    """The long-lived processes: real ones, as an operator starts them."""

    def __init__(self, deployment: Deployment, folder: Path, sockets: Path) -> None:
        self._deployment, self._folder = deployment, folder
        self.accelerator = f"unix:{sockets / 'accelerator'}"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        out = folder / "enclave"
        self.processes = {
            "enclave": self._start("enclave", *deployment.enclave(out, self.address, "--serve")),
            "accelerator": self._start("accelerator", *deployment.accelerator(folder / "multiplier", self.accelerator)),
        }

    def train(self) -> None:
        """Until the enclave answers queries. Raises: RuntimeError: it does not."""
        self._wait((self._folder / "enclave" / "address").exists, "address")
        joined = [
            Forked(self._deployment.join(party, self._folder / party, self.address), self._folder / f"join-{party}")
            for party in self._deployment.parties
        ]
        for each in joined:
            if each.wait(START_S) != 0:
                raise RuntimeError(f"a party failed: {each.stdout}{each.stderr[-1000:]}")

    def check(self) -> None:
        """Raises: RuntimeError: one has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}, see {self._folder}/{name}.stderr")

    def end(self) -> dict[str, int]:
        """Interrupt them; returns their exit codes."""
        for process in self.processes.values():
            process.send_signal(signal.SIGINT)
        try:
            return {name: process.wait(120.0) for name, process in self.processes.items()}
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("an interrupted process does not end") from error

    def _start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.stdout").open("wb") as out, (self._folder / f"{name}.stderr").open("wb") as err:
            command = [sys.executable, "-m", "cloister", *map(str, arguments)]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    def _wait(self, fact: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not fact():
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} in {START_S:.0f} s")
            time.sleep(0.05)


class Soak:
    """One run in a folder of its own, which is also the home of all temporary files."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, Random(seed)  # noqa: S311  # seeded on purpose
        self.samples, self.actions, self.jobs = Samples(), Counter[str](), Counter[str]()
        self._homes = [folder / name for name in ("tmp", "cache", "data", "config", "runtime", "home")]
        for home in self._homes:
            home.mkdir(parents=True, mode=0o700)
        names = ("TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "HOME")
        os.environ.update({name: str(home) for name, home in zip(names, self._homes, strict=True)})
        tempfile.tempdir = None
        self._shared = frozenset(os.listdir("/dev/shm"))  # noqa: S108, PTH208  # names only
        self._began = time.monotonic()
        self._paused = False
        signal.signal(signal.SIGCONT, self._note_pause)

    def _note_pause(self, number: int, frame: object) -> None:
        """Somebody has stopped this group of processes and lets it go on: what ran meanwhile may have timed out."""
        self._paused = True

    def run(self, seconds: float) -> None:
        """Raises: RuntimeError: a process ended, a query was not answered, or a job did not end as it must."""
        sockets = Path(tempfile.mkdtemp(prefix="cs-", dir="/tmp"))  # a socket's path is short
        serving = None
        try:
            with Matrix(self._folder / "matrix") as matrix:
                deployment = make_deployment("split", self._folder / "job", {"inference": {"quota_tokens": 10**9}})
                serving = Serving(deployment, self._folder, sockets)
                serving.train()
                path = serving.accelerator.removeprefix("unix:")
                clients = Clients(deployment, serving.address, path, self._folder / "clients", self._random)
                matrix.ground("split")
                matrix.ground("slice")
                self._began = time.monotonic()
                self._loop(matrix, serving, clients, seconds)
            codes = serving.end()
            if codes != {"enclave": 130, "accelerator": 130}:
                raise RuntimeError(f"interrupted, they ended with {codes}")
        finally:
            for process in serving.processes.values() if serving is not None else ():
                if process.poll() is None:
                    process.kill()
            shutil.rmtree(sockets, ignore_errors=True)

    def _loop(self, matrix: Matrix, serving: Serving, clients: Clients, seconds: float) -> None:
        sampled = worked = -1e9
        while (now := time.monotonic() - self._began) < seconds:
            serving.check()
            if now - sampled >= SAMPLE_S:
                self._sample(serving, now)
                sampled = now
            if now - worked >= JOB_S:
                worked = now
                number = sum(self.jobs.values())
                self._tolerate(functools.partial(self._job, matrix, serving, number), self.jobs)
            kind, act = clients.draw()
            if self._tolerate(act, self.actions):
                self.actions[kind] += 1
            shutil.rmtree(self._folder / "clients", ignore_errors=True)

    def _tolerate(self, work: Callable[[], None], counts: Counter[str]) -> bool:
        """Whether it went well. Raises: RuntimeError: it did not, and no pause explains that."""
        self._paused = False
        try:
            work()
        except RuntimeError:
            if not self._paused:
                raise
            counts["paused"] += 1
            return False
        return True

    def _job(self, matrix: Matrix, serving: Serving, number: int) -> None:
        """One trial of the crash matrix; every third uses the accelerator that goes on."""
        if number % 3 != 2:
            result = matrix.kill("split", number)
            if result.outcome == "lost":
                raise RuntimeError(f"job {number} was lost: {result.fault}")
            self.jobs[f"split {result.outcome}"] += 1
            return
        ground = matrix.ground("slice")
        victim = self._random.choice(["enclave", *ground.deployment.parties])
        job = Job(
            deployment=ground.deployment,
            folder=self._folder / f"slice-{number}",
            sockets=self._folder,
            points=[ground.course.draw_time(self._random, victim)],
            accelerator=serving.accelerator,
        )
        ended = job.run()
        if fault := ended.fault or what_differs(job, ground.adapters):
            raise RuntimeError(f"job {number} was lost: {fault}")
        self.jobs["slice identical" if ended.hit else "slice not hit"] += 1
        shutil.rmtree(job.folder)

    def _sample(self, serving: Serving, now: float) -> None:
        values: dict[str, float] = {}
        for name, process in serving.processes.items():
            values |= process_gauges(name, process.pid)
        values["temporary files"] = files_under(self._homes) + Forked.left
        values["shared memory"] = shared_memory(self._shared)
        reap(own={process.pid for process in serving.processes.values()})  # all others have been waited for
        values["processes"] = descendants(os.getpid())
        self.samples.add(now, values)
        save(self.samples, self._folder / "samples.json")

    def result(self, fault: str) -> dict[str, Any]:
        """What the command prints."""
        try:
            growth = self.samples.growth()
        except ValueError as error:
            growth, fault = {}, fault or str(error)
        return {
            "hours": (time.monotonic() - self._began) / 3600,
            "samples": len(self.samples.times_s),
            "actions": dict(self.actions),
            "jobs": dict(self.jobs),
            "growth": {name: asdict(each) for name, each in growth.items()},
            "leaks": [name for name, each in growth.items() if each.leaks],
            "fault": fault,
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="new; where everything is written, samples.json too")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="cloister-soak-"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours
    adopt_orphans()
    import_everything()
    soak, fault = Soak(folder, options.seed), ""
    try:
        soak.run(options.hours * 3600)
    except RuntimeError as error:
        fault = str(error)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the time until then", file=sys.stderr)
    result = soak.result(fault)
    print(json.dumps(result) if options.json else _table(result))
    return 1 if result["leaks"] or fault else 0


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['hours']:.2f} hours, {result['samples']} samples; jobs {result['jobs']}; {result['actions']}"]
    lines += ["| what | first | last | per hour | bound |", "|---|---|---|---|---|"]
    for name, each in result["growth"].items():
        bound = each["bound"]
        cells = [name, f"{each['first']:.1f}", f"{each['last']:.1f}", f"{each['per_hour']:+.2f}"]
        lines.append(f"| {' | '.join(cells)} | {bound['per_hour']:g} {bound['unit']} |")
    return "\n".join([*lines, *(f"LEAK: {name}" for name in result["leaks"]), *filter(None, [result["fault"]])])


if __name__ == "__main__":
    sys.exit(main())
