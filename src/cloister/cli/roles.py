"""`demo`, `run`, `enclave` and `join`: the commands that start the processes of a job."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cloister.cli.options import (
    AsJson,
    EnclaveAddress,
    InsecureNotConfidential,
    InsecureSimulated,
    JobFile,
    KeyFile,
    OutFolder,
    PartyName,
    Serve,
    ShowProgress,
)
from cloister.cli.output import emit, note, show_on_stderr
from cloister.cli.progress import open_progress
from cloister.errors import UsageError
from cloister.jobfile import LoadedJob, load_job
from cloister.methods.plan_processes import crowding
from cloister.methods.processes import end_with_parent


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder to write.")] = Path("demo-run"),
    method: Annotated[
        Literal["split", "slice"],
        typer.Option(
            "--method",
            help="split: one enclave trains on all parties' activations. slice: each party's enclave trains, with an"
            " untrusted accelerator, in rounds.",
        ),
    ] = "split",
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Run a whole job on bundled synthetic data.

    One enclave and five parties, each its own process on this machine, with slice also two accelerators. Prints the
    table of results and writes report.html. All enclaves are SIMULATED and protect nothing.

    \b
    Examples:
      cloister demo
      cloister demo --out runs/demo --json
      cloister demo --method slice --out runs/slice
    """
    from cloister.methods.demo import run_demo

    with open_progress(progress) as reporter:
        report = run_demo(out, command=_command_line(), progress=reporter, method=method)
    emit(report, as_json)
    _say_where(out, as_json)


def run(
    job: JobFile,
    out: OutFolder,
    serve: Serve = False,
    insecure_not_confidential: InsecureNotConfidential = False,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Run a job with all its roles on this machine.

    Compares it with the baselines that the job names and writes report.html and report.json. The enclave is
    SIMULATED and protects nothing, unless the job names an attester. A run that was interrupted continues when
    started again.

    \b
    Examples:
      cloister run job.toml --out runs/one
      cloister run examples/medical/job.toml --out runs/medical --json
    """
    loaded = load_job(job)
    _warn_of_crowding(loaded)
    from cloister.methods.local import run_job

    with open_progress(progress) as reporter:
        report = run_job(
            loaded,
            out,
            serve=serve,
            insecure_not_confidential=insecure_not_confidential,
            command=_command_line(),
            progress=reporter,
            on_report=lambda report: emit(report, as_json),
        )
    if not serve:
        emit(report, as_json)
    _say_where(out, as_json)


def enclave(
    job: JobFile,
    out: OutFolder,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", metavar="HOST:PORT", help="Where to listen, instead of [enclave] listen; port 0: any."
        ),
    ] = None,
    insecure_simulated: InsecureSimulated = False,
    insecure_not_confidential: InsecureNotConfidential = False,
    serve: Serve = False,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Run the enclave of a job.

    Collects the parties' sealed bundles, trains, scores, and releases what the job says.

    \b
    Examples:
      cloister enclave job.toml --listen 0.0.0.0:7443 --out runs/one
      cloister enclave job.toml --listen 127.0.0.1:7443 --out runs/test --insecure-simulated
    """
    loaded = load_job(job)
    loaded.require_public_keys()
    _warn_of_crowding(loaded)
    if serve:
        loaded.require_queries()
    end_with_parent()
    from cloister.enclave.server import serve_job

    with open_progress(progress) as reporter:
        report = serve_job(
            loaded,
            out,
            listen=listen or loaded.job.enclave.listen,
            insecure_simulated=insecure_simulated,
            insecure_not_confidential=insecure_not_confidential,
            serve=serve,
            progress=reporter,
        )
    emit(report, as_json)


def join(
    job: JobFile,
    party: PartyName,
    enclave: EnclaveAddress,
    key: KeyFile,
    out: OutFolder,
    insecure_simulated: InsecureSimulated = False,
    insecure_not_confidential: InsecureNotConfidential = False,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Answer this many own test prompts with the tuned model.")
    ] = 0,
    approval: Annotated[
        Path | None,
        typer.Option("--approval", metavar="FILE", help="Your approval of the job, by `cloister sign`."),
    ] = None,
    accept_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--accept-checkpoint", metavar="HASH", help="Let the enclave go back to this older checkpoint; is noted."
        ),
    ] = None,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Take part in a job as one party.

    Shows what the party approves, seals the data, verifies the enclave, sends them and collects the results.
    Continues after an interruption.

    \b
    Examples:
      cloister join job.toml --party north --enclave enclave.example.org:7443 --key north.key --out runs/north
      cloister join job.toml --party north --enclave HOST:7443 --key north.key --out runs/north --approval north.json
    """
    loaded = load_job(job)
    loaded.require_public_keys()
    loaded.party(party)
    from cloister.crypto.keys import PartyKey

    signing = PartyKey.load(key)
    end_with_parent()
    from cloister.methods.sign import summarise
    from cloister.methods.take_part import join_job
    from cloister.party.taking_part import Entering

    entering = Entering(
        loaded=loaded,
        party=party,
        key=signing,
        key_file=key,
        out=out,
        enclave=enclave,
        insecure_simulated=insecure_simulated,
        insecure_not_confidential=insecure_not_confidential,
        approval=approval,
        accept_checkpoint=_hash(accept_checkpoint),
        on_open=lambda opened: None if as_json else show_on_stderr(summarise(opened, party)),
    )
    with open_progress(progress) as reporter:
        report = join_job(entering, progress=reporter, samples=samples)
    emit(report, as_json)


def baseline(
    job: JobFile,
    kind: Annotated[Literal["central", "local"], typer.Argument(help="All data in one place, or each party alone.")],
    out: OutFolder,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Train what a run is compared with; started by `cloister run`, which holds everybody's data.

    \b
    Examples:
      cloister baseline runs/one/job.toml central --out runs/one/baselines
    """
    loaded = load_job(job)
    end_with_parent()
    from cloister.methods.baselines import baseline_job

    with open_progress(progress) as reporter:
        baseline_job(loaded, kind, out, progress=reporter)


COMMANDS = (demo, run, enclave, join)


def _warn_of_crowding(loaded: LoadedJob) -> None:
    """Say it where the enclave has more processes than this machine has processors for."""
    for warning in crowding(loaded.job.enclave):
        note(warning)


def _hash(text: str | None) -> bytes | None:
    """A checkpoint's hash as a refusal prints it."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise UsageError("is not a hash of 64 hexadecimal digits", where="--accept-checkpoint")
    return bytes.fromhex(text)


def _command_line() -> str:
    """The command as typed, for the report."""
    return shlex.join(["cloister", *sys.argv[1:]])


def _say_where(out: Path, as_json: bool) -> None:
    if not as_json:
        note(f"report: {out / 'report.html'}")
