"""Kill every role at seeded points, fill disks, set clocks, cut files: the job must end with the same adapter.

    python -m tests.crash [--trials 100] [--seed 1] [--json]

Each seed is one point at which a role is killed; every fourth trial is of method `slice`. One more trial for every
five of these is of another kind: a party that stays away past the deadline, an enclave that dies between the last
countersignature and telling of it, a full or read-only disk, a clock that jumps, a file that lost its end. Runs can
be put together: `--append FILE` adds the trials to those in a file.
"""

from __future__ import annotations

import tests.crash.clock  # isort: skip

tests.crash.clock.install()  # before anything else takes `time.time`

import argparse  # noqa: E402
import functools  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, get_args  # noqa: E402

from tests.crash.forking import import_everything  # noqa: E402
from tests.crash.matrix import Matrix, Result  # noqa: E402
from tests.crash.trouble import Kind, can_mount  # noqa: E402

_OTHERS = ("away", "half-written", "run folder", "untold", *get_args(Kind))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100, help="how many seeds")
    parser.add_argument("--seed", type=int, default=1, help="of the first trial; the next has the next number")
    kinds = ("split", "slice", "others", *_OTHERS)
    parser.add_argument("--only", choices=kinds, nargs="+", default=[], help="of each seed a trial of these kinds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after this time")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add to the trials in this file")
    parser.add_argument("--folder", type=Path, help="where trials are run; those that were lost stay there")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="cloister-crash-matrix-"))
    began = time.monotonic()
    import_everything()
    kept = options.append
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
    with Matrix(folder) as matrix:
        for trial in _trials(matrix, options.seed, options.trials, options.only):
            if time.monotonic() - began > options.seconds:
                break
            result = trial()
            rows.append(_row(result))
            print(_line(result), file=sys.stderr, flush=True)
            if kept is not None:
                kept.write_text(json.dumps(rows))
    summary = summarise(rows)
    print(json.dumps(summary) if options.json else _table(summary))
    return 1 if summary["lost"] else 0


def _trials(matrix: Matrix, seed: int, count: int, only: list[str]) -> Iterator[Callable[[], Result]]:
    others = itertools.cycle(_OTHERS)
    for number in range(seed, seed + count):
        usual = ["slice" if number % 4 == 0 else "split", *(["others"] if number % 5 == 0 else [])]
        for kind in only or usual:
            chosen = next(others) if kind == "others" else kind
            if chosen.endswith("disk") and not can_mount():
                print(f"skipped: {chosen}: only root on Linux can mount a disk of its own", file=sys.stderr)
            else:
                yield functools.partial(_trial, matrix, chosen, number)


def _trial(matrix: Matrix, kind: str, seed: int) -> Result:
    if kind == "split" or kind == "slice":
        return matrix.kill(kind, seed)
    return _other(matrix, kind, seed)


def _other(matrix: Matrix, kind: str, seed: int) -> Result:
    if kind == "away":
        return matrix.away(seed)
    if kind == "half-written":
        return matrix.half_written(seed)
    if kind == "run folder":
        return matrix.run_folder(seed)
    if kind == "untold":
        return matrix.untold(seed)
    return matrix.trouble(kind, seed)  # type: ignore[arg-type]  # one of the others


def _row(result: Result) -> dict[str, Any]:
    return {**asdict(result), "hit": [{"victim": p.victim, "phase": p.phase, "point": str(p)} for p in result.hit]}


def _line(result: Result) -> str:
    points = "; ".join(map(str, result.hit)) or "no point"
    codes = f" [{', '.join(result.codes)}]" if result.codes else ""
    fault = f": {result.fault}" if result.fault else ""
    return f"{result.kind} {result.seed}: {result.outcome} in {result.seconds:.1f} s: {points}{codes}{fault}"


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by outcome, by kind of trial and by role and phase; the seeds of what was lost."""
    outcomes = Counter(row["outcome"] for row in rows)
    kinds: dict[str, Counter[str]] = {}
    points: Counter[str] = Counter()
    for row in rows:
        kind = "half-written" if row["kind"].startswith("half-written") else row["kind"]
        kinds.setdefault(kind, Counter())[row["outcome"]] += 1
        if kind.startswith("kill"):
            points.update(f"{_role(p['victim'])} {p['phase']}" for p in row["hit"])
    return {
        "trials": len(rows),
        "identical": outcomes["identical"],
        "resumed": outcomes["resumed"],
        "lost": outcomes["lost"],
        "kills": sum(points.values()),
        "restarts": sum(row["restarts"] for row in rows),
        "kinds": {kind: dict(counts) for kind, counts in sorted(kinds.items())},
        "points": dict(sorted(points.items())),
        "lost_trials": [f"{row['kind']} {row['seed']}: {row['fault']}" for row in rows if row["outcome"] == "lost"],
    }


def _role(victim: str) -> str:
    return "enclave" if victim == "enclave" else "accelerator" if victim.endswith("-accelerator") else "party"


def _table(summary: dict[str, Any]) -> str:
    lines = [f"{name}: {summary[name]}" for name in ("trials", "identical", "resumed", "lost", "kills", "restarts")]
    lines += [f"  {kind}: {counts}" for kind, counts in summary["kinds"].items()]
    lines += [f"  killed, {point}: {count}" for point, count in summary["points"].items()]
    return "\n".join([*lines, *summary["lost_trials"]])


if __name__ == "__main__":
    sys.exit(main())
