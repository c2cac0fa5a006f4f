"""A workload so small that every system trains on it in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloister.bench.shape import Shape
from cloister.bench.split_data import Budget, Workload, random_workload
from cloister.report.bench import BenchMeasured, BenchPoint

SHAPE = Shape(hidden=64, layers=3, vocabulary=300, tokens=512, rank=4)
BUDGET = Budget(tokens=2500, epochs=2.0, batch_tokens=1024, max_tokens=512)


def small_workload(folder: Path) -> Workload:
    return random_workload(SHAPE, BUDGET, dtype="float32", folder=folder)


def measured(seconds: float, train_s: float, tokens: int = 1000, **more: Any) -> BenchMeasured:
    """One run of which only this much matters."""
    fields: dict[str, Any] = {
        "seconds": seconds,
        "setup_s": seconds - train_s,
        "train_s": train_s,
        "start_s": 0.0,
        "cpu_s": 2 * train_s,
        "tokens": tokens,
        "steps": 1,
        "peak_rss_mib": {},
        "wire_bytes": 0,
        "how": "",
        "curve": [],
    }
    return BenchMeasured(**{**fields, **more})


def point(seconds: float, held_out: float | None, step: int = 1) -> BenchPoint:
    return BenchPoint(step=step, tokens=100 * step, seconds=seconds, train_loss=1.0, held_out=held_out)
