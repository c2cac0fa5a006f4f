"""Fuzz one target or all of them, one after the other.

    python -m tests.fuzz [TARGET ...] [--seconds 600] [--folder DIR]

With atheris (libFuzzer), new branches of Cloister's own modules guide what is tried next; the corpus stays in the
folder and is taken up again. Without it Hypothesis changes the seeds, unguided. An input that makes a parser raise
anything but the errors it may raise is written to `DIR/TARGET/findings`, once for each place in the code; the exit code
is then 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HANG_S = 60
MEMORY_MIB = 4096


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run did."""

    executions: int
    seconds: float
    edges: tuple[int, int] | None
    """Branches that the seeds reach, and that the run reached; None without atheris."""
    findings: int
    corpus: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child(options.targets[0], options.seconds, options.folder)
    from tests.fuzz.targets import TARGETS

    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {min(unknown)}; there are {', '.join(TARGETS)}")
    print("| target | seconds | executions | executions/s | branches: seeds, end | corpus | findings |")
    print("|---|---|---|---|---|---|---|", flush=True)
    findings = 0
    for name in options.targets or TARGETS:
        outcome = _run(name, options.seconds, options.folder / name)
        findings += outcome.findings
        rate, edges = outcome.executions / max(outcome.seconds, 1e-9), outcome.edges
        cells = [name, f"{outcome.seconds:.0f}", f"{outcome.executions:,}", f"{rate:,.0f}"]
        cells += [
            "unguided" if edges is None else f"{edges[0]}, {edges[1]}",
            str(outcome.corpus),
            str(outcome.findings),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 1 if findings else 0


def _run(name: str, seconds: int, folder: Path) -> Outcome:
    """Fuzz in a process of its own, so that a crash or a hang is a finding and not the end."""
    (folder / "findings").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz", name, "--child", "--seconds", str(seconds), "--folder", str(folder)]
    start = time.monotonic()
    log = folder / "log"
    with log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    elapsed, text = time.monotonic() - start, log.read_text(errors="replace")
    executions = _number(r"stat::number_of_executed_units:\s+(\d+)", text) or _number(r"executions: (\d+)", text)
    elapsed = _number(r"Done \d+ runs in (\d+) second", text) or elapsed
    covered = [int(n) for n in re.findall(r"\bcov: (\d+)", text)]
    findings = len({path.stem for path in (folder / "findings").iterdir()})
    return Outcome(
        executions=executions,
        seconds=elapsed,
        edges=(covered[0], covered[-1]) if covered else None,
        findings=findings or int(code != 0),
        corpus=len(list((folder / "corpus").iterdir())) if (folder / "corpus").is_dir() else 0,
    )


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


# In the process that fuzzes -------------------------------------------------------------------------------------------


class Findings:
    """Keeps what must not have happened, once for each place, and lets the run go on."""

    def __init__(self, try_once: Callable[[bytes], object], folder: Path) -> None:
        self._try_once, self._folder = try_once, folder
        self._places: set[tuple[str, str, int]] = set()
        self.executions = 0

    def __call__(self, data: bytes) -> None:
        self.executions += 1
        try:
            self._try_once(data)
        except Exception as exc:  # noqa: BLE001  # this is what we look for
            frame = traceback.extract_tb(exc.__traceback__)[-1]
            place = (type(exc).__name__, frame.filename, frame.lineno or 0)
            if place in self._places:
                return
            self._places.add(place)
            name = hashlib.sha256(data).hexdigest()[:16]
            (self._folder / f"{name}.bin").write_bytes(data)
            report = "".join(traceback.format_exception(exc))
            (self._folder / f"{name}.txt").write_text(report)
            print(report, file=sys.stderr, flush=True)


def _child(name: str, seconds: int, folder: Path) -> int:
    if importlib.util.find_spec("atheris") is None:
        return _with_hypothesis(name, seconds, folder)
    import atheris

    with atheris.instrument_imports(include=["cloister"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    for part in ("corpus", "seeds", "findings"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / "seeds" / str(number)).write_bytes(seed)
    flags = [f"-max_total_time={seconds}", f"-max_len={target.max_bytes}", f"-timeout={HANG_S}"]
    flags += [
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={folder}/findings/",
        "-print_final_stats=1",
        "-len_control=0",
    ]
    atheris.Setup(
        [name, *flags, str(folder / "corpus"), str(folder / "seeds")], Findings(target.try_once, folder / "findings")
    )
    atheris.Fuzz()  # ends the process
    return 0


def _with_hypothesis(name: str, seconds: int, folder: Path) -> int:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.fuzz.mutate import inputs
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    (folder / "findings").mkdir(parents=True, exist_ok=True)
    run, end, number = Findings(target.try_once, folder / "findings"), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        quiet = settings(
            max_examples=1000, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        seed(number)(quiet(given(inputs(target.seeds(), target.max_bytes))(run.__call__)))()
    print(f"executions: {run.executions}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
