"""What `cloister plan` says beforehand, over what `cloister bench split` then measures, for three shapes and cuts.

python benchmarks/plan.py [--tokens 6144] [--runs 1] [--shape 768x12x32000/6 ...]

A shape is HIDDENxLAYERSxVOCABULARY/CUT.

Ratios of 1 are exact. "seconds" is everything to the end of training; bytes are those of parties' bundles and all else
that is sent; memory is the largest process of a role. Nothing else may run meanwhile. Ends with 1 where the whole time,
memory or bytes are more than a quarter off.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from cloister.bench.shape import Shape
from cloister.bench.split import Asked, bench_split
from cloister.bench.split_data import Budget, random_workload
from cloister.methods.plan import plan_job
from cloister.progress import Silent
from cloister.report.bench import BenchSplitRow
from cloister.report.plan import PlanReport

SHAPES = ["768x12x32000/6", "512x8x8000/6", "256x16x4000/4"]
AIMED = ("seconds", "party, MiB", "enclave, MiB", "wire, MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6144, help="of all silos, once")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="HIDDENxLAYERSxVOCABULARY/CUT", type=shape)
    asked = parser.parse_args()
    found, off = {}, []
    for text in asked.shape:
        print(text, file=sys.stderr)
        found[text] = compare(*shape_and_cut(text), asked.tokens, asked.runs)
        ratios = found[text]["planned / measured"]
        off += [f"{text}: {name} {ratios[name]}" for name in AIMED if not 0.75 <= ratios[name] <= 1.25]
    print(json.dumps(found, indent=1))
    sys.exit("\n".join(off) or None)


def shape(text: str) -> str:
    shape_and_cut(text)  # argparse reports its ValueError
    return text


def shape_and_cut(text: str) -> tuple[Shape, int]:
    sizes, _, cut = text.partition("/")
    hidden, layers, vocabulary = map(int, sizes.split("x"))
    return Shape(hidden=hidden, layers=layers, vocabulary=vocabulary), int(cut)


def compare(shape: Shape, cut: int, tokens: int, runs: int) -> dict[str, dict[str, float]]:
    """Planned, measured, and their ratios."""
    with tempfile.TemporaryDirectory(prefix="cloister-") as folder:
        workload = random_workload(shape, Budget(tokens=tokens), dtype="float32", folder=Path(folder))
        planned = of_plan(plan_job(workload.with_cut(cut), progress=Silent()))
        asked = Asked(peers=[], cuts=[cut], runs=runs)
        report = bench_split(workload, asked, command=shlex.join(sys.argv), progress=Silent())
    measured = of_row(report.rows[0])
    ratios = {name: round(planned[name] / measured[name], 2) for name in measured}
    return {"planned": planned, "measured": measured, "planned / measured": ratios}


def of_plan(report: PlanReport) -> dict[str, float]:
    memory = {r: max(role.memory_bytes for role in report.roles if role.role == r) for r in ("party", "enclave")}
    enclave = report.roles[-1]
    before = report.timing["preparing"] + report.timing["former layers"]
    return figures(
        before, report.timing["training"], memory["party"], memory["enclave"], enclave.bytes_up + enclave.bytes_down
    )


def of_row(row: BenchSplitRow) -> dict[str, float]:
    memory = {role: mib * 2**20 for role, mib in row.peak_rss_mib.items()}
    return figures(row.seconds - row.train_s, row.train_s, memory["party"], memory["enclave"], row.wire_bytes)


def figures(before: float, training: float, party: float, enclave: float, wire: float) -> dict[str, float]:
    return {
        "seconds": round(before + training, 2),
        "before training, s": round(before, 2),
        "training, s": round(training, 2),
        "party, MiB": round(party / 2**20),
        "enclave, MiB": round(enclave / 2**20),
        "wire, MB": round(wire / 1e6, 2),
    }


if __name__ == "__main__":
    main()
