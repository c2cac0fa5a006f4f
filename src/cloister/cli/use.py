"""`export` and `generate`: the commands that use a tuned model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.options import (
    AsJson,
    InsecureNotConfidential,
    InsecureSimulated,
    PartyName,
    ResultsFolder,
    ShowProgress,
    results_folder,
)
from cloister.cli.output import emit
from cloister.cli.progress import open_progress
from cloister.errors import UsageError
from cloister.jobfile import load_job
from cloister.report.outputs import GenerateReport


def export(
    run: ResultsFolder,
    to: Annotated[
        Path, typer.Option("--to", metavar="FOLDER", help="Folder to write; must be new or empty.", show_default=False)
    ],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter merged into it.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="FOLDER", help="With --merge: the base model, if DIR does not name it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the adapter, or the merged model.

    The adapter becomes a PEFT folder; merged into the base, the whole model becomes a Hugging Face folder. The
    job's [release] must name somebody: an adapter that never left the enclave cannot be exported. Everything is
    checked against the run's receipt first.

    \b
    Examples:
      cloister export runs/one --to adapter
      cloister export runs/one --to tuned-model --merge
      cloister export north-folder --to tuned-model --merge --model models/base
    """
    folder = results_folder(run)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(
            "the target is not an empty folder", where=str(to), hint="name a new one; nothing is overwritten"
        )
    from cloister.methods.export import export_run

    emit(export_run(folder, to, merge=merge, model=model), as_json)


def generate(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="JOB.toml|DIR",
            help="The job file, with --enclave and --key; or a run folder of this machine.",
            show_default=False,
        ),
    ],
    party: PartyName,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="May be repeated. Without it, stdin is one prompt."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 128,
    enclave: Annotated[
        str | None, typer.Option("--enclave", metavar="HOST:PORT", help="Address of the enclave.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="The party's private key.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts as they are, without the job's template.")] = False,
    insecure_simulated: InsecureSimulated = False,
    insecure_not_confidential: InsecureNotConfidential = False,
    as_json: AsJson = False,
    progress: ShowProgress = "auto",
) -> None:
    """Answer prompts with the tuned model.

    Former layers run here, latter layers in the enclave: the tuned model stays where it was trained. Answers are
    greedy. Prompts are put into the job's [data] template.

    \b
    Examples:
      cloister generate job.toml --party north --enclave enclave.example.org:7443 --key north.key < prompt.txt
      cloister generate runs/one --party north --prompt "Question: ..."
    """
    if target.is_dir() and (enclave or key):
        raise UsageError(
            "--enclave and --key go with a job file, not with a run folder",
            where=str(target),
            hint="give JOB.toml to ask an enclave on another machine; leave the options out for a run of this machine",
        )
    if not target.is_dir() and (enclave is None or key is None):
        nothing = "" if target.exists() else "; there is nothing at this path"
        raise UsageError(
            "a job file needs --enclave and --key",
            where=str(target),
            hint=f"or give the folder of a run of this machine{nothing}",
        )
    prompts = prompt or [_read_prompt()]
    with open_progress(progress) as reporter:
        report: GenerateReport
        if enclave is None or key is None:
            from cloister.methods.generate import generate_local

            report = generate_local(target, party, prompts, max_new_tokens=max_new_tokens, raw=raw, progress=reporter)
        else:
            from cloister.crypto.keys import PartyKey
            from cloister.party.ask import generate_remote

            loaded = load_job(target)
            loaded.require_public_keys()
            loaded.party(party)
            report = generate_remote(
                loaded,
                party,
                PartyKey.load(key),
                prompts,
                enclave=enclave,
                max_new_tokens=max_new_tokens,
                insecure_simulated=insecure_simulated,
                insecure_not_confidential=insecure_not_confidential,
                raw=raw,
                progress=reporter,
            )
    emit(report, as_json)


COMMANDS = (export, generate)


def _read_prompt() -> str:
    text = sys.stdin.read().rstrip("\n")
    if not text:
        raise UsageError("there is no prompt", hint="give --prompt TEXT or write it to stdin")
    return text
