"""Running the cells of a study: several at a time, each once, and on from where an interrupted run stopped."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from cloister.errors import RunError
from cloister.job import Job
from cloister.jobfile import render_job
from cloister.progress import Progress, Task, task
from experiments.cells import Cell, Outcome, Store, data_sha256
from experiments.rates import find_rate
from experiments.silos import split_silos
from experiments.study import FOR_RATES, MAIN, MAIN_SILOS, Arm, Budget, make_cell
from experiments.systems import run_cell


@dataclass(frozen=True, kw_only=True)
class Done:
    """A cell with its result."""

    cell: Cell
    job_id: str
    outcome: Outcome | None
    """None: training diverged."""


def work(cell: Cell, folder: Path) -> Done:
    """Take a cell's result from the store, or make it. Runs in a process of its own with one thread."""
    resolved = cell.resolve(folder)
    store, data = Store(folder / "results"), data_sha256(cell.job)
    outcome = store.read(cell, resolved.job_id, data)
    if outcome is None:
        jobs = folder / "jobs"
        jobs.mkdir(exist_ok=True)
        (jobs / f"{resolved.job_id[:32]}.toml").write_text(render_job(cell.job), encoding="utf-8")
        try:
            outcome = run_cell(cell, resolved.cut)
        except RunError:
            if cell.judged == "test":
                raise
            return Done(cell=cell, job_id=resolved.job_id, outcome=None)
        store.write(cell, resolved.job_id, data, outcome)
    return Done(cell=cell, job_id=resolved.job_id, outcome=outcome)


def start() -> None:
    """Of a worker: cells side by side make more of the processors than threads of one cell."""
    torch.set_num_threads(1)


class Study:
    """Cells by arm and seed, over one base job.

    Args:
        base: of method split, over the files of five parties.
        folder: results, data files and job files lie here.
        workers: cells worked on at once, one thread each.
    """

    def __init__(self, base: Job, budget: Budget, folder: Path, *, workers: int, progress: Progress) -> None:
        self.base, self.budget, self.folder = base, budget, folder
        self._progress, self._jobs = progress, {MAIN_SILOS: base}
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start)
        self.rates: dict[str, dict[float, float]] = {}
        """What was tried for an arm, bits per byte by rate, the best first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def tune(self, arms: Iterable[Arm]) -> None:
        """Find the rates that these arms need."""
        arms = [arm for arm in arms if arm.system != "base"]
        known = {arm.name: arm for arm in (*MAIN, *FOR_RATES, *arms)}
        wanted = dict.fromkeys(arm.rate_of or arm.name for arm in arms)
        if not self.budget.tuned:
            self.rates = {name: {self._first_rate(known[name]): math.nan} for name in wanted}
            return
        with (
            task(self._progress, "learning rates", unit="trainings") as running,
            ThreadPoolExecutor(len(wanted)) as pool,
        ):
            found = pool.map(lambda name: self._tune(known[name], running), wanted)
            self.rates = dict(zip(wanted, found, strict=True))

    def _tune(self, arm: Arm, running: Task) -> dict[float, float]:
        def judge(rates: list[float]) -> Mapping[float, float]:
            make = partial(make_cell, arm, self.base, self.budget, seed=self.budget.seeds[0], tuning=True)
            futures = {rate: self._submit(make(rate=rate)) for rate in rates}
            found = {}
            for rate, future in futures.items():
                outcome = future.result().outcome
                found[rate] = math.inf if outcome is None else outcome.bits_per_byte()
                running.advance(note=f"{arm.name} at {rate:g}")
            return found

        return find_rate(self._first_rate(arm), judge)

    def _first_rate(self, arm: Arm) -> float:
        return self.budget.rates[str(arm.adapter["kind"])]

    def rate(self, arm: Arm) -> float:
        """The arm's learning rate; any for the base model, which is not trained."""
        return 1.0 if arm.system == "base" else next(iter(self.rates[arm.rate_of or arm.name]))

    def run(self, arms: Sequence[Arm], seeds: Sequence[int], title: str) -> dict[str, list[Done]]:
        """Every arm's cells, one for each seed; the base model has no seed."""
        wanted = [(arm, seed) for seed in seeds for arm in arms if arm.system != "base" or seed == seeds[0]]
        cells = [make_cell(arm, self._job(arm.silos), self.budget, seed=s, rate=self.rate(arm)) for arm, s in wanted]
        futures = [self._submit(cell) for cell in cells]
        found: dict[str, list[Done]] = {arm.name: [] for arm in arms}
        with task(self._progress, title, total=len(cells), unit="trainings") as running:
            for (arm, seed), future in zip(wanted, futures, strict=True):
                found[arm.name].append(future.result())
                running.advance(note=f"{arm.name}, seed {seed}")
        return found

    def _submit(self, cell: Cell) -> Future[Done]:
        return self._pool.submit(work, cell, self.folder)

    def _job(self, silos: int) -> Job:
        if silos not in self._jobs:
            self._jobs[silos] = split_silos(self.base, self.folder / "data", silos)
        return self._jobs[silos]
