"""`cloister sign`: a party approves a job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.options import AsJson, JobFile, KeyFile, PartyName, ShowProgress
from cloister.cli.output import emit, show_on_stderr
from cloister.cli.progress import open_progress
from cloister.errors import UsageError
from cloister.jobfile import load_job
from cloister.report.model import Output

EXIT_NOT_SIGNED = 1


def sign(
    job: JobFile,
    party: PartyName,
    key: KeyFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="File to write; must be new. Default: NAME.approval.json."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Approve a job as one party.

    Shows what everybody agrees to: the fingerprints of all keys, to be compared by voice or on paper, who gets the
    result, who may query it, and which programs the enclave may run. Asks, and writes the approval to a file for
    `cloister join --approval`.

    \b
    Examples:
      cloister sign job.toml --party north --key north.key
      cloister sign job.toml --party north --key north.key --out approvals/north.json --yes
    """
    loaded = load_job(job)
    loaded.require_public_keys()
    loaded.party(party)
    from cloister.crypto.keys import PartyKey
    from cloister.methods.sign import open_to_sign, sign_job, summarise

    signing = PartyKey.load(key)
    with open_progress(progress) as reporter:
        opened = open_to_sign(loaded, party, signing, progress=reporter)
    if not yes and not _confirmed(summarise(opened, party)):
        raise typer.Exit(EXIT_NOT_SIGNED)
    emit(sign_job(opened, party, signing, out or Path(f"{party}.approval.json")), as_json)


def _confirmed(summary: Output) -> bool:
    """Show what it is about and ask. Raises: UsageError where nobody can answer."""
    show_on_stderr(summary)
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to confirm", hint="read what is shown, then pass --yes")
    return typer.confirm("Do you approve this job?", err=True)


COMMANDS = (sign,)
