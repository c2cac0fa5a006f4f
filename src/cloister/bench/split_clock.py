"""The clock of a system that trains in one process, and what it writes down after each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from peft import PeftModel

from cloister.data.prepare import PartyData
from cloister.evaluation.scores import score
from cloister.model.cut import Whole
from cloister.progress import Task
from cloister.report.bench import BenchMeasured, BenchPoint
from cloister.training.loop import PackList, evaluation_steps


class Clock:
    """Seconds since it was made, without those in which it was stopped; and this process's processor time likewise."""

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, used: Callable[[], float] = time.process_time
    ) -> None:
        self._now, self._begun, self._used, self._used_before = now, now(), used, used()

    @property
    def seconds(self) -> float:
        return self._now() - self._begun

    @property
    def cpu_s(self) -> float:
        return self._used() - self._used_before

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time in this block does not count."""
        before, used = self._now(), self._used()
        try:
            yield
        finally:
            self._begun += self._now() - before
            self._used_before += self._used() - used


class Logbook:
    """Points of a curve; the held-out loss where it is due, with the clock stopped.

    Args:
        due: after which steps (1-based) the held-out loss is measured, if `held_out` is given.
    """

    def __init__(self, clock: Clock, due: set[int], held_out: Callable[[], float] | None, running: Task) -> None:
        self.clock, self.curve, self._due, self._held_out, self._running = (
            clock,
            list[BenchPoint](),
            due,
            held_out,
            running,
        )
        self.setup_s = 0.0

    def begin(self) -> None:
        """Everything before the first step is done."""
        self.setup_s = self.clock.seconds

    def step(self, number: int, num_steps: int, tokens: int, loss: float) -> None:
        """A step, or a round, is done."""
        seconds, held_out = self.clock.seconds, None
        if number in self._due and self._held_out is not None:
            with self.clock.stopped():
                held_out = self._held_out()
        point = BenchPoint(step=number, tokens=tokens, seconds=seconds, train_loss=loss, held_out=held_out)
        self.curve.append(point)
        self._running.set(number, total=num_steps, note=f"loss {loss:.3f}")

    def close(self, *, steps: int, wire_bytes: int, how: str) -> BenchMeasured:
        """The adapter is at hand."""
        seconds = self.clock.seconds
        return BenchMeasured(
            seconds=seconds,
            setup_s=self.setup_s,
            train_s=seconds - self.setup_s,
            start_s=0.0,
            cpu_s=self.clock.cpu_s,
            tokens=self.curve[-1].tokens,
            steps=steps,
            peak_rss_mib={},
            wire_bytes=wire_bytes,
            how=how,
            curve=self.curve,
        )


def held_out_loss(whole: Whole, adapted: PeftModel, data: Mapping[str, PartyData]) -> Callable[[], float] | None:
    """Bits per byte of all silos' validation responses, or None where the job keeps no records for it."""
    parts = {name: own.parts["validation"] for name, own in data.items() if "validation" in own.parts}
    if not parts:
        return None

    def measure() -> float:
        adapted.eval()
        scores = [score(whole, PackList(part.packs), part.examples, where=name) for name, part in parts.items()]
        return float(sum(s.bits.sum() for s in scores) / sum(s.response_bytes.sum() for s in scores))

    return measure


def due_steps(num_steps: int, evaluations: int) -> set[int]:
    """After which steps to measure: evenly, the last time at the end."""
    return evaluation_steps(num_steps, min(evaluations, num_steps))
