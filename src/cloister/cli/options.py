"""Options that several commands share, so that a name means the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cloister.errors import UsageError

ProgressMode = Literal["auto", "bars", "json", "off"]

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.", show_default=False)]
RunFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A run folder, as `cloister run` writes it.", show_default=False)
]
ResultsFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A run folder, or the folder that a party joined with.", show_default=False),
]
OutFolder = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Run folder to write or to continue.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else on stdout.")]
PartyName = Annotated[str, typer.Option("--party", metavar="NAME", help="Which party this is.", show_default=False)]
EnclaveAddress = Annotated[
    str, typer.Option("--enclave", metavar="HOST:PORT", help="Address of the enclave.", show_default=False)
]
KeyFile = Annotated[
    Path,
    typer.Option("--key", metavar="FILE", help="The party's private key, by `cloister keygen`.", show_default=False),
]
InsecureSimulated = Annotated[
    bool,
    typer.Option(
        "--insecure-simulated",
        help="Accept a simulated enclave, which protects NOTHING: its operator can read all data. For tests only.",
    ),
]
InsecureNotConfidential = Annotated[
    bool,
    typer.Option(
        "--insecure-not-confidential",
        help="Accept an enclave that says what runs in it but hides nothing, such as a TPM's: its operator can read"
        " all data. For tests only.",
    ),
]
Serve = Annotated[
    bool, typer.Option("--serve", help="After training, keep the enclave running and answer queries until Ctrl-C.")
]
ShowProgress = Annotated[
    ProgressMode,
    typer.Option("--progress", envvar="CLOISTER_PROGRESS", hidden=True, help="json is for a parent process."),
]


def results_folder(folder: Path) -> Path:
    """The folder of a run that has ended, or of one party that joined to the end.

    Raises:
        UsageError: see `finished_run`.
    """
    return folder if (folder / "join.json").is_file() else finished_run(folder)


def finished_run(folder: Path) -> Path:
    """The folder of a run that has ended.

    Raises:
        UsageError: it is not a run folder, or its run has not ended yet.
    """
    if (folder / "report.json").is_file():
        return folder
    if not folder.is_dir():
        raise UsageError("there is no such run folder", where=str(folder), hint="`cloister run --out DIR` writes one")
    hint = "start the same command again to continue a run that was interrupted"
    raise UsageError("the folder holds no finished run: report.json is missing", where=str(folder), hint=hint)
