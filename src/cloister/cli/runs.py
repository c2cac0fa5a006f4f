"""`plan`, `verify`, `evaluate` and `compare`: the commands that look at a job or at finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.options import (
    AsJson,
    InsecureSimulated,
    JobFile,
    ResultsFolder,
    ShowProgress,
    finished_run,
    results_folder,
)
from cloister.cli.output import emit
from cloister.cli.progress import open_progress
from cloister.jobfile import load_job

EXIT_NOT_VERIFIED = 3


def plan(job: JobFile, as_json: AsJson = False, progress: ShowProgress = "auto") -> None:
    """Say what a job needs, without running it.

    Memory, disk, bytes on the wire and time for each role. Reads the data and the model's sizes, measures this
    machine for a moment, and starts nothing.

    \b
    Examples:
      cloister plan job.toml
      cloister plan job.toml --json
    """
    loaded = load_job(job)
    from cloister.methods.plan import plan_job

    with open_progress(progress) as reporter:
        report = plan_job(loaded, progress=reporter)
    emit(report, as_json)


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="DIR_OR_RECEIPT", help="A run folder or its receipt.json.", show_default=False)
    ],
    policy: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="Your own appraisal policy.", show_default=False)
    ] = None,
    insecure_simulated: InsecureSimulated = False,
    as_json: AsJson = False,
) -> None:
    """Check a run's receipt, off-line.

    Checks evidence, signatures, manifest, adapter and report in numbered steps. Exit code 0 means: an enclave that
    your policy accepts made exactly this. Without a policy of your own, only the integrity of the files is checked,
    and the exit code is 3, as it is when a step fails.

    \b
    Examples:
      cloister verify runs/one --policy policy.toml
      cloister verify demo-run --insecure-simulated
    """
    from cloister.methods.verify import verify_run

    report = verify_run(path, policy=policy, insecure_simulated=insecure_simulated)
    emit(report, as_json)
    if report.verdict != "verified":
        raise typer.Exit(EXIT_NOT_VERIFIED)


def evaluate(run: ResultsFolder, as_json: AsJson = False) -> None:
    """Print the scores of a run, with intervals.

    All systems that the run compared, per party and task, with 95 % intervals. A party's folder holds the scores of
    its own test set.

    \b
    Examples:
      cloister evaluate runs/one
    """
    folder = results_folder(run)
    from cloister.methods.evaluate import evaluate_run

    emit(evaluate_run(folder), as_json)


def compare(
    a: Annotated[Path, typer.Argument(metavar="DIR_A", help="A run folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="DIR_B", help="The run folder to compare it with.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare two runs on the same examples.

    Differences with 95 % intervals, by paired bootstrap, and Holm-corrected p-values.

    \b
    Examples:
      cloister compare runs/rank-8 runs/rank-16
    """
    folders = finished_run(a), finished_run(b)
    from cloister.evaluation import compare as comparison

    first, second = (comparison.load_run(folder) for folder in folders)
    emit(comparison.compare(first, second), as_json)


COMMANDS = (plan, verify, evaluate, compare)
