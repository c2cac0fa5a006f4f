"""How a command that fails says so: a readable block on stderr, or one JSON object on stdout."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.text import Text

import cloister
from cloister.errors import CloisterError, UsageError
from cloister.jobfile.load import JobFaultsError

EXIT_INTERRUPTED = 130


def report_failure(error: CloisterError, as_json: bool) -> int:
    """Report an error of our own tree and return its exit code."""
    if as_json:
        _print_json(error)
    else:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        others = error.others if isinstance(error, JobFaultsError) else ()
        for each in (error, *others):
            console.print(_block(each))
    return error.exit_code


def report_usage(error: typer.TyperException, as_json: bool) -> int:
    """Report that a command was called wrongly."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "cloister"
    format_message = getattr(error, "format_message", error.__str__)
    message = str(format_message()).rstrip(".")
    return report_failure(UsageError(message, where=command, hint=f"see `{command} --help`"), as_json)


def report_interrupt(as_json: bool) -> None:
    """Say that the user stopped the command."""
    if as_json:
        _print_json(_InterruptedError("interrupted"))
    else:
        Console(stderr=True).print("interrupted", style="yellow")


def report_crash(error: Exception, arguments: Sequence[str], as_json: bool) -> int:
    """Report a fault of the program itself: one line, and the path of a file with the traceback."""
    path = _write_crash(error, arguments)
    message = f"unexpected {type(error).__name__}"
    failure = CloisterError(message, where=path, hint="this is a fault of Cloister; that file says more, for a report")
    return report_failure(failure, as_json)


class _InterruptedError(CloisterError):
    code = "interrupted"
    exit_code = EXIT_INTERRUPTED


def _block(error: CloisterError) -> Text:
    text = Text.assemble(("error: ", "bold red"), error.message)
    for label, value in (("where", error.where), ("hint", error.hint)):
        if value:
            text.append(f"\n  {label + ':':7}", style="dim").append(value)
    return text


def _print_json(error: CloisterError) -> None:
    sys.stdout.write(json.dumps(error.to_json()) + "\n")
    sys.stdout.flush()


def _write_crash(error: Exception, arguments: Sequence[str]) -> str:
    """Write version, command name and traceback, readable by the owner alone; returns the path.

    Arguments are left out but for the command's name: a prompt is one of them. Frames are written without the
    values of their variables.
    """
    command = next((word for word in arguments if not word.startswith("-")), "")
    lines = [
        f"cloister {cloister.__version__}, Python {platform.python_version()}, {platform.platform()}\n",
        f"command: {command}\n\n",
        *traceback.format_exception(error),
    ]
    handle, path = tempfile.mkstemp(prefix="cloister-crash-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.writelines(lines)
    return path
