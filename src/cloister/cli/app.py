"""The command tree and its entry point: every way out of a command has its exit code here.

0 ok   1 failed   2 bad usage or job file   3 verification refused   4 peer or network   130 interrupted
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

import cloister
from cloister.cli import accelerator, attest, bench, pads, prepare, roles, runs, sign, use
from cloister.cli.failure import EXIT_INTERRUPTED, report_crash, report_failure, report_interrupt, report_usage
from cloister.errors import CapacityError, CloisterError, UsageError
from cloister.private import keep_private

# Models and tokenizers come from folders, never from a hub; their libraries' own bars and notices are not ours to show.
_QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PLACE = (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS)
"""A path in a command that leads nowhere: a file where a folder is needed, or a place that is not ours."""

_ROLES = {"demo", "run", "enclave", "join", "baseline", "accelerator", "pads", "generate"}
"""Commands whose files are for this user alone; what others write (a job file, an exported model) is to be shown."""

app = typer.Typer(
    name="cloister",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for group in (roles, accelerator, pads, runs, use, prepare, sign):
    for command in group.COMMANDS:
        app.command()(command)
app.add_typer(attest.app)
app.add_typer(bench.app)
app.command(hidden=True)(roles.baseline)  # a child process of `run`


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cloister {cloister.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def cloister_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune one language model on the private data of several organisations.

    Every command takes --json: the result, or {"error": ...}, is then the only thing on stdout.

    \b
    Examples:
      cloister demo
      cloister init job.toml
      cloister run job.toml --out runs/one
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def entry() -> NoReturn:
    """The program `cloister`: `main`, and leaving with its code."""
    keep_private(files=not _ROLES.isdisjoint(sys.argv[1:2]))
    code = main()
    if code == EXIT_INTERRUPTED:
        # Some interrupts mark the interpreter, which would then end by the signal and not with this code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors are reported here and nowhere else."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own lines on stderr say nothing that our errors do not
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given, "--json" in given)
    except KeyboardInterrupt:  # while a failure was being reported
        report_interrupt("--json" in given)
        return EXIT_INTERRUPTED


def _run(given: list[str], as_json: bool) -> int:
    os.environ.update(_QUIET)
    try:
        code = app(given, prog_name="cloister", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except CloisterError as error:
        return report_failure(error, as_json)
    except typer.Abort:
        code = EXIT_INTERRUPTED
    except typer.TyperException as error:
        return report_usage(error, as_json)
    except BrokenPipeError:
        return _leave_quietly()
    except MemoryError:
        return report_failure(
            CapacityError("memory is exhausted", hint="`cloister plan` says what a role needs"), as_json
        )
    except OSError as error:
        if error.errno in _WRONG_PLACE and error.filename:
            hint = "name a folder that can be written to"
            return report_failure(UsageError(f"{error.strerror}", where=str(error.filename), hint=hint), as_json)
        if error.errno not in _DISK_FULL:
            return report_crash(error, given, as_json)
        full = CapacityError("the disk is full", where=str(error.filename or ""), hint="make room and start again")
        return report_failure(full, as_json)
    except Exception as error:  # noqa: BLE001  # the one place where anything unforeseen ends
        return report_crash(error, given, as_json)
    if code == EXIT_INTERRUPTED:
        report_interrupt(as_json)
    return int(code or 0)


def _leave_quietly() -> int:
    """Whoever read our output has gone. Python flushes stdout once more at exit, so it needs a place to go to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
