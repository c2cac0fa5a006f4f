"""The study: does protection cost accuracy, and what are SPF, cut, rank and activation format worth?

  python -m experiments                      the whole study on the five medical sets, into docs/results.md
  python -m experiments --quick              the same systems in ten minutes on two cores: one seed, no tuned rates
  python -m experiments --model PATH         any Hugging Face causal language model in place of the job's
  python -m experiments --job JOB.toml       any job of method split with five parties whose files are JSON lines

Results are kept by job id under --out, so that an interrupted study goes on where it stopped. Every job file lies there
too: those of systems split and slice are what `cloister run` takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cloister.agreement.job import count_layers, find_cut
from cloister.cli.progress import open_progress
from cloister.errors import CloisterError, UsageError
from cloister.job import Job
from cloister.jobfile import find_model, load_job
from cloister.methods.host import usable_cpus
from cloister.progress import Progress, task
from experiments.page import replace_section
from experiments.report import Results, write_report
from experiments.run import Study
from experiments.shira import takes
from experiments.silos import prepare_files
from experiments.study import MAIN, MAIN_SILOS, RATES, Budget, ablations

FULL = Budget(steps=80, batch_tokens=2048, rounds=4, seeds=(1, 2, 3), examples=100, tuned=True, rates=RATES)
QUICK = Budget(steps=12, batch_tokens=2048, rounds=2, seeds=(1,), examples=6, tuned=False, rates=RATES)
_VALIDATION = 0.01
"""Share of the records that rates are tuned on; nothing else looks at them."""
_PAGE = Path("docs/results.md")


def main(arguments: list[str] | None = None) -> int:
    """Run the study; 0 when it is finished, an error's code otherwise."""
    chosen = _parse(arguments)
    budget = QUICK if chosen.quick else FULL
    out = (chosen.out or Path("runs/experiments-quick" if chosen.quick else "runs/experiments")).resolve()
    try:
        with open_progress("auto") as progress:
            base, layers, cut = read_job(chosen.job, chosen.model)
            with task(progress, "test records"):
                base = prepare_files(base, out / "data", examples=budget.examples)
            results = study(base, budget, out, layers, cut, chosen.workers, progress, ablate=not chosen.quick)
            with task(progress, "statistics and figures"):
                text = write_report(results, out if chosen.quick or chosen.no_docs else _PAGE.parent)
        (out / "results.md").write_text(text, encoding="utf-8")
        if not (chosen.quick or chosen.no_docs):
            replace_section(_PAGE, text)
    except CloisterError as exc:
        sys.stderr.write(f"error: {exc}\n" + (f"  {exc.hint}\n" if exc.hint else ""))
        return exc.exit_code
    sys.stdout.write(f"{text}\nwritten to {out / 'results.md'}\n")
    return 0


def study(
    base: Job, budget: Budget, out: Path, layers: int, cut: int, workers: int, progress: Progress, *, ablate: bool
) -> Results:
    """Train and score everything: one seed of the main table first, then ablations, then the other seeds."""
    model_type = json.loads((Path(base.model.path) / "config.json").read_text(encoding="utf-8"))["model_type"]
    tables = ablations(cut, layers, shira=takes(model_type)) if ablate else {}
    first, *others = budget.seeds
    with Study(base, budget, out, workers=workers, progress=progress) as running:
        running.tune([*MAIN, *(arm for arms in tables.values() for arm in arms)])
        done = running.run(MAIN, [first], f"main table, seed {first}")
        ablated = {title: running.run(arms, [first], title) for title, arms in tables.items()}
        for seed in others:
            for name, found in running.run(MAIN, [seed], f"main table, seed {seed}").items():
                done[name] += found
        return Results(
            base=base, budget=budget, cut=cut, main=done, tables=tables, ablated=ablated, rates=running.rates
        )


def read_job(path: Path, model: Path | None) -> tuple[Job, int, int]:
    """The base job with absolute paths, the number of its model's layers and of former ones.

    Raises:
        CloisterError: the job, the model or a data file is wrong.
    """
    loaded = load_job(path)
    job = loaded.job
    if job.job.method != "split" or len(job.party) != MAIN_SILOS:
        message = f"the study needs a job of method split with {MAIN_SILOS} parties"
        raise UsageError(message, where=str(path), hint="see examples/medical/job.toml")
    folder = model.resolve() if model else loaded.local_path(job.model.path)
    files = find_model(folder, where="--model" if model else loaded.where("model", "path"))
    parties = [
        p.model_copy(update={part: str(loaded.data_file(p.name, part)) for part in ("train", "test")})
        for p in job.party
    ]
    changes = {
        "party": parties,
        "model": job.model.model_copy(update={"path": str(folder)}),
        "data": job.data.model_copy(update={"validation": _VALIDATION}),
    }
    return job.model_copy(update=changes), count_layers(files), find_cut(loaded, files)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", type=Path, default=Path("examples/medical/job.toml"), help="default: %(default)s")
    parser.add_argument("--model", type=Path, help="folder of a causal language model; default: the job's")
    parser.add_argument("--out", type=Path, help="default: runs/experiments, or runs/experiments-quick")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours; writes under --out only")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/results.md as it is")
    parser.add_argument("--workers", type=int, default=usable_cpus(), help="trainings at once; default: %(default)s")
    chosen = parser.parse_args(arguments)
    if chosen.workers < 1:
        parser.error("--workers must be at least 1")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
