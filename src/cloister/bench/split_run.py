"""Method `split` itself, as `cloister run` does it: an enclave and its parties as processes, timed by their progress.

What counts: the enclave's own preparation up to loading its layers, then everything from the first party's first work
to the end of training: reading, former layers, sealing, attested sessions, upload, training, with all that goes on
between. What does not: starting Python and importing libraries, scoring test sets, the receipt and the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cloister.bench.memory import PeakMemory
from cloister.errors import RunError
from cloister.jobfile import LoadedJob
from cloister.methods.local import run_job
from cloister.progress import Event, Progress
from cloister.report.bench import BenchMeasured, BenchPoint
from cloister.report.model import CurvePoint, RunReport

_READY, _TRAINING = "enclave: waiting for parties", "enclave: training"


class Timeline:
    """Passes progress on and notes when tasks began and ended. A task is called "WHO: WHAT"."""

    def __init__(self, progress: Progress, now: Callable[[], float] = time.monotonic) -> None:
        self._progress, self._now = progress, now
        self.begun: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def report(self, event: Event) -> None:
        """Note the event and pass it on."""
        self.begun.setdefault(event.task, self._now())
        if event.ended:
            self.ended[event.task] = self._now()
        self._progress.report(event)

    def spans(self, parties: Sequence[str]) -> list[tuple[float, float]]:
        """When the clock that this module's docstring describes runs.

        Raises:
            RunError: a role never said that it works.
        """
        first = self._first("enclave")
        entered = min(self._first(party) for party in parties)
        return [(first, max(first, min(self.begun[_READY], entered))), (entered, self.ended[_TRAINING])]

    def _first(self, who: str) -> float:
        times = [when for task, when in self.begun.items() if task.startswith(f"{who}: ")]
        if not times or _TRAINING not in self.ended or _READY not in self.begun:
            raise RunError("the run did not say when its parts began and ended", where=who)
        return min(times)


def run_split(loaded: LoadedJob, out: Path, *, command: str, progress: Progress) -> BenchMeasured:
    """Run a job once. Raises: CloisterError: the first role that failed."""
    timeline, begun = Timeline(progress), time.monotonic()
    with PeakMemory(role_of) as peak:
        report = run_job(loaded, out, serve=False, command=command, progress=timeline, samples=0)
    spans = timeline.spans([party.name for party in loaded.job.party])
    seconds = sum(end - begin for begin, end in spans)
    train_s = min(seconds, report.training.tokens / report.training.tokens_per_s)
    return BenchMeasured(
        seconds=seconds,
        setup_s=seconds - train_s,
        train_s=train_s,
        cpu_s=sum(peak.processor_seconds(begin, end) for begin, end in spans),
        start_s=timeline.ended[_TRAINING] - begun - seconds,
        tokens=report.training.tokens,
        steps=report.training.steps,
        peak_rss_mib=peak.mib,
        wire_bytes=report.wire.total.bytes_up + report.wire.total.bytes_down,
        phases=report.timing,
        how=f"{len(report.parties)} parties, a SIMULATED enclave, {loaded.job.transport.activation_dtype} activations",
        curve=curve_of(report, setup_s=seconds - train_s, train_s=train_s),
    )


def curve_of(report: RunReport, *, setup_s: float, train_s: float) -> list[BenchPoint]:
    """The enclave's curve; it notes no times, so that each point has its share of the tokens of all training time."""
    points: list[CurvePoint] = report.curves["cloister"]
    total = max(point.tokens for point in points)
    return [
        BenchPoint(
            step=point.step,
            tokens=point.tokens,
            seconds=setup_s + train_s * point.tokens / total,
            train_loss=point.train_loss,
            held_out=point.validation_bits_per_byte,
        )
        for point in points
    ]


def role_of(arguments: Sequence[str]) -> str | None:
    """ "enclave" or "party", from a command line of `methods.processes.Role`."""
    command = list(arguments)
    if "cloister" not in command:
        return None
    name = command[command.index("cloister") + 1]
    return {"enclave": "enclave", "join": "party"}.get(name)
