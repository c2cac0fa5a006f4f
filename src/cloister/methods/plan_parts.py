"""What the plans of both methods consist of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cloister.crypto.keys import fingerprint
from cloister.job import Job
from cloister.report.model import Party, Records, Truncated
from cloister.report.plan import MaskingPlan, RolePlan

_BENCHMARK_S = 0.3


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """The part of a plan that depends on the job's method, see `PlanReport`."""

    trainable: int
    steps: int
    parties: list[Party]
    roles: list[RolePlan]
    timing: dict[str, float]
    masking: MaskingPlan | None = None
    warnings: list[str] = field(default_factory=list)


def describe_party(job: Job, name: str, records: Records, truncated: Truncated) -> Party:
    """A party's line of a plan."""
    key = next(p.public_key for p in job.party if p.name == name)
    return Party(
        name=name,
        public_key_fingerprint=fingerprint(bytes.fromhex(key)) if key else "",
        records=records,
        truncated=truncated,
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch has so many threads in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_time(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some repetitions on one thread: an average would measure what else runs here."""
    best = math.inf
    with threads(1):
        work()  # the first time it also tests what the processor offers
        end = time.perf_counter() + _BENCHMARK_S
        while best == math.inf or time.perf_counter() < end:
            started = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - started)
    return best
