"""`cloister bench split`: method `split` beside what a user would do without it, on one machine, one after the other.

Each system runs in processes of its own with all processors, in turn, `runs` times; figures are medians. With records
held out, seconds count to the same held-out loss: all systems' curves are compared at the worst of their ends, or at
one that was asked for. Method `split` measures that loss in a further run that is not timed: training is the same.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from cloister.bench.memory import PeakMemory
from cloister.bench.split_data import Workload, party_data
from cloister.bench.split_peers import PEERS, Peer, silos_of
from cloister.bench.split_run import run_split
from cloister.methods.host import describe_host, usable_cpus
from cloister.methods.processes import Role, Roles
from cloister.progress import Event, Progress, task
from cloister.report.bench import BenchMeasured, BenchPoint, BenchSplitReport, BenchSplitRow

SYSTEMS = (*PEERS, "split")
CLOCK = (
    "from models and records on disk (in the system's cache) to the trained adapter: loading the model, reading and"
    " packing records, training, its first step included; with split also the parties' passes, sealing, sessions and"
    " upload. Not counted: starting Python and importing libraries (start_s), measuring the held-out loss, scoring"
    " test sets. No system saves checkpoints"
)
Key = tuple[str, int | None]
"""System and cut."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure. Empty `cuts`: method split is left out."""

    peers: Sequence[Peer]
    cuts: Sequence[int]
    runs: int = 1
    rounds: int = 3
    evaluations: int = 6
    target_loss: float | None = None
    """Held-out bits per byte; None: the worst final one."""


def bench_split(workload: Workload, asked: Asked, *, command: str, progress: Progress) -> BenchSplitReport:
    """Measure.

    Raises:
        UsageError: a cut does not fit the model, or a silo has too little for so many rounds.
        CloisterError: what stopped a system.
    """
    jobs = {cut: workload.with_cut(cut) for cut in asked.cuts}
    if "fedavg" in asked.peers:  # that rounds fit is said before anything is measured
        silos_of(party_data(workload.loaded), workload.loaded.job, asked.rounds)
    keys: list[Key] = [*((peer, None) for peer in asked.peers), *(("split", cut) for cut in jobs)]
    found: dict[Key, list[BenchMeasured]] = {key: [] for key in keys}
    has_held_out = workload.loaded.job.data.validation > 0
    with ExitStack() as ends:
        scratch = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="cloister-")))
        total = asked.runs * len(keys) + (len(jobs) if has_held_out else 0)
        running = ends.enter_context(task(progress, "systems", total=total))
        for number, (system, cut) in itertools.product(range(asked.runs), keys):
            folder = scratch / f"{number}-{system}-{cut}"
            folder.mkdir()
            if cut is None:
                measured = _peer(system, workload, asked, folder, progress)
            else:
                measured = run_split(jobs[cut], folder, command=command, progress=progress)
            found[system, cut].append(measured)
            running.advance(note=_in_words(system, cut, measured))
        for cut in jobs if has_held_out else ():
            curve = _held_out_curve(workload, cut, asked, scratch / f"curve-{cut}", progress)
            found["split", cut] = [with_held_out(one, curve) for one in found["split", cut]]
            running.advance()
    target = target_of(found, asked.target_loss)
    rows = [row_of(key, runs, workload.shape, target) for key, runs in found.items()]
    return BenchSplitReport(
        command=command,
        shape=workload.shape,
        parameters=workload.parameters,
        layers=workload.layers,
        dtype=workload.loaded.job.model.dtype,
        workload=workload.figures(asked.rounds),
        target_share=workload.target_share,
        target_loss=target,
        clock=CLOCK,
        rows=rows,
        ratios=ratios(rows, workload.layers),
        host=describe_host(),
    )


def _in_words(system: str, cut: int | None, measured: BenchMeasured) -> str:
    name = system if cut is None else f"{system} {cut}"
    before, training = f"{measured.setup_s:.1f} s before training", f"{measured.tokens / measured.train_s:.0f} tokens/s"
    return f"{name}: {measured.seconds:.1f} s, {before}, {training}"


def _peer(peer: str, workload: Workload, asked: Asked, folder: Path, progress: Progress) -> BenchMeasured:
    """One run of a peer in its own process."""
    path, started = folder / "measured.json", _FirstEvent(progress)
    arguments = ["bench", "peer", peer, str(workload.loaded.path), "--out", str(path), "--rounds", str(asked.rounds)]
    arguments += ["--evaluations", str(asked.evaluations)]
    begun = time.monotonic()
    name = "silo" if peer == "fedavg" else "trainer"
    with PeakMemory(lambda command: name if "peer" in command else None) as peak, Roles() as roles:
        role = Role(peer, arguments, log=folder / "log", threads=usable_cpus(), progress=started)
        roles.wait([roles.add(role)])
    measured = BenchMeasured.read(path)
    start_s = (started.when or begun) - begun
    return measured.model_copy(update={"peak_rss_mib": peak.mib, "start_s": start_s})


class _FirstEvent:
    """Notes when a process first said something: its imports are done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.when: float | None = None

    def report(self, event: Event) -> None:
        if self.when is None:
            self.when = time.monotonic()
        self._progress.report(event)


def _held_out_curve(workload: Workload, cut: int, asked: Asked, folder: Path, progress: Progress) -> list[BenchPoint]:
    """The curve of a further run, in which the enclave measures the held-out loss."""
    again = replace(workload, loaded=workload.with_cut(cut)).changed("training", evaluations=asked.evaluations)
    folder.mkdir()
    return run_split(again, folder, command="", progress=progress).curve


def with_held_out(measured: BenchMeasured, curve: Sequence[BenchPoint]) -> BenchMeasured:
    """A timed run's curve with the held-out losses of another run of the same training."""
    losses = {point.step: point.held_out for point in curve}
    points = [point.model_copy(update={"held_out": losses.get(point.step)}) for point in measured.curve]
    return measured.model_copy(update={"curve": points})


def final_loss(curve: Sequence[BenchPoint]) -> float | None:
    """The last held-out loss that was measured."""
    return next((point.held_out for point in reversed(curve) if point.held_out is not None), None)


def target_of(found: Mapping[Key, Sequence[BenchMeasured]], asked: float | None) -> float | None:
    """The held-out loss to which seconds are counted: as asked, or the worst end of all; None where none is known."""
    ends = [final_loss(runs[0].curve) for runs in found.values()]
    known = [loss for loss in ends if loss is not None]
    if len(known) < len(ends):
        return None
    return asked if asked is not None else max(known)


def seconds_to(measured: BenchMeasured, target: float | None) -> float | None:
    """When the held-out loss was first at the target, between two measurements by a straight line; None: never.

    Without a target: the whole token budget.
    """
    if target is None:
        return measured.seconds
    before: tuple[float, float] | None = None
    for point in measured.curve:
        if point.held_out is None:
            continue
        if point.held_out <= target:
            if before is None:
                return point.seconds
            seconds, loss = before
            return seconds + (point.seconds - seconds) * (loss - target) / (loss - point.held_out)
        before = point.seconds, point.held_out
    return None


def row_of(key: Key, runs: Sequence[BenchMeasured], shape: str, target: float | None) -> BenchSplitRow:
    """Medians of a system's runs."""
    reached = [seconds_to(run, target) for run in runs]
    times = [run.seconds for run in runs]
    roles = dict.fromkeys(role for run in runs for role in run.peak_rss_mib)
    return BenchSplitRow(
        system=key[0],  # type: ignore[arg-type]  # one of SYSTEMS
        shape=shape,
        cut=key[1],
        seconds_to_loss=None if None in reached else median(value for value in reached if value is not None),
        seconds=median(times),
        seconds_range=(min(times), max(times)),
        setup_s=median(run.setup_s for run in runs),
        train_s=median(run.train_s for run in runs),
        start_s=median(run.start_s for run in runs),
        cpu_s=median(run.cpu_s for run in runs),
        tokens_per_s=median(run.tokens / run.train_s for run in runs),
        peak_rss_mib={role: max(run.peak_rss_mib.get(role, 0.0) for run in runs) for role in roles},
        wire_bytes=runs[0].wire_bytes,
        tokens=runs[0].tokens,
        steps=runs[0].steps,
        runs=len(runs),
        final_loss=final_loss(runs[0].curve),
        phases=runs[0].phases,
        how=runs[0].how,
        curve=list(runs[0].curve),
    )


def ratios(rows: Sequence[BenchSplitRow], layers: int) -> dict[str, float]:
    """See `BenchSplitReport.ratios`."""
    peers = {row.system: row for row in rows if row.cut is None}
    found: dict[str, float] = {}
    for row in (row for row in rows if row.cut is not None):
        for name, peer in peers.items():
            if row.seconds_to_loss and peer.seconds_to_loss:
                found[f"{name}_over_split_{row.cut}"] = peer.seconds_to_loss / row.seconds_to_loss
            found[f"cpu_{name}_over_split_{row.cut}"] = peer.cpu_s / row.cpu_s
        for name in ("trainer", "central"):
            if name in peers:
                found[f"step_split_{row.cut}_over_{name}"] = row.tokens_per_s / peers[name].tokens_per_s
        found[f"bound_{row.cut}"] = layers / (layers - (row.cut or 0))
    return found
