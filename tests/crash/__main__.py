"""Kill every role at seeded points, fill disks, set clocks, cut files: the job must end with the same adapter.

    python -m tests.crash [--trials 100] [--seed 1] [--role enclave|party|accelerator] [--json]

Each seed is one point at which a role is killed; every fourth trial is of method `slice`. One more trial for every
five of these is of another kind: a party that stays away past the deadline, an enclave that dies between the last
countersignature and telling of it, a full or read-only disk, a clock that jumps, a file that lost its end. With
`--role` each seed is a point of that role, and there are no trials of other kinds. A trial in which what its points
waited for did not come, three times where a role is killed, is told as `not hit` and not counted as a trial. Runs can
be put together: `--append FILE` adds the trials to those in a file.
"""

from __future__ import annotations

import tests.crash.clock  # isort: skip

if __name__ == "__main__":
    tests.crash.clock.install()  # before anything else takes `time.time`

import argparse
import functools
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from tests.crash.forking import import_everything
from tests.crash.matrix import CELLS, ROLES, Matrix, Result, cells
from tests.crash.trouble import Kind, can_mount

_COUNTS = ("trials", "identical", "resumed", "lost", "not_hit", "kills", "restarts")
_OTHERS = ("away", "half-written", "run folder", "untold", *get_args(Kind))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100, help="how many seeds")
    parser.add_argument("--seed", type=int, default=1, help="of the first trial; the next has the next number")
    kinds = ("split", "slice", "others", *_OTHERS)
    parser.add_argument("--only", choices=kinds, nargs="+", default=[], help="of each seed a trial of these kinds")
    help_role = "kill this role only, and let nothing else happen; may be repeated (default: all roles)"
    parser.add_argument("--role", choices=ROLES, action="append", default=[], help=help_role)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after this time")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add to the trials in this file")
    parser.add_argument("--folder", type=Path, help="where trials are run; those that were lost stay there")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    if options.role and not all(kind in CELLS and cells(kind, options.role) for kind in options.only):
        parser.error(f"no --role {' or '.join(options.role)} is killed in trials of --only {' '.join(options.only)}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="cloister-crash-matrix-"))
    began = time.monotonic()
    import_everything()
    kept = options.append
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
    with Matrix(folder) as matrix:
        for trial in trials(matrix, options.seed, options.trials, options.only, options.role):
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


def trials(
    matrix: Matrix, seed: int, count: int, only: Collection[str], roles: Collection[str]
) -> Iterator[Callable[[], Result]]:
    """`only`, `roles`: empty for all."""
    others = itertools.cycle(_OTHERS)
    for number in range(seed, seed + count):
        method = "slice" if number % 4 == 0 or not cells("split", roles or ROLES) else "split"
        usual = [method, *(["others"] if number % 5 == 0 and not roles else [])]
        for kind in only or usual:
            chosen = next(others) if kind == "others" else kind
            if chosen.endswith("disk") and not can_mount():
                print(f"skipped: {chosen}: only root on Linux can mount a disk of its own", file=sys.stderr)
            else:
                yield functools.partial(_trial, matrix, chosen, number, roles or ROLES)


def _trial(matrix: Matrix, kind: str, seed: int, roles: Collection[str]) -> Result:
    if kind == "split" or kind == "slice":
        return matrix.kill(kind, seed, roles)
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
    """Counts by outcome, by kind of trial and by role and phase; the seeds of what was lost.

    `trials` is the sum of identical, resumed and lost: what was not hit stands beside it.
    """
    outcomes = Counter(row["outcome"] for row in rows)
    kinds: dict[str, Counter[str]] = {}
    points: Counter[str] = Counter()
    for row in rows:
        kind = "half-written" if row["kind"].startswith("half-written") else row["kind"]
        kinds.setdefault(kind, Counter())[row["outcome"]] += 1
        if kind.startswith("kill"):
            points.update(f"{_role(p['victim'])} {p['phase']}" for p in row["hit"])
    return {
        "trials": len(rows) - outcomes["not hit"],
        "identical": outcomes["identical"],
        "resumed": outcomes["resumed"],
        "lost": outcomes["lost"],
        "not_hit": outcomes["not hit"],
        "kills": sum(points.values()),
        "restarts": sum(row["restarts"] for row in rows),
        "kinds": {kind: dict(counts) for kind, counts in sorted(kinds.items())},
        "points": dict(sorted(points.items())),
        "lost_trials": [f"{row['kind']} {row['seed']}: {row['fault']}" for row in rows if row["outcome"] == "lost"],
    }


def _role(victim: str) -> str:
    return "enclave" if victim == "enclave" else "accelerator" if victim.endswith("-accelerator") else "party"


def _table(summary: dict[str, Any]) -> str:
    lines = [f"{name}: {summary[name]}" for name in _COUNTS]
    lines += [f"  {kind}: {counts}" for kind, counts in summary["kinds"].items()]
    lines += [f"  killed, {point}: {count}" for point, count in summary["points"].items()]
    return "\n".join([*lines, *summary["lost_trials"]])


if __name__ == "__main__":
    sys.exit(main())
