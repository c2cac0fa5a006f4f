"""How a command that succeeds says so: one JSON object on stdout, or something to read."""

from __future__ import annotations

import sys

from rich.console import Console

from cloister.cli import bench_tables  # noqa: F401  # its views register themselves with `render`
from cloister.cli.tables import render
from cloister.report.model import Output


def emit(output: Output, as_json: bool) -> None:
    """Print a result. With `--json` it is the only thing on stdout."""
    if as_json:
        sys.stdout.write(output.to_json())
        return
    # Redirected output keeps its columns: a table is not squeezed into 80 characters that nobody sees.
    width = None if sys.stdout.isatty() else 140
    console = Console(file=sys.stdout, highlight=False, width=width)
    console.print(render(output, console.width))


def show_on_stderr(output: Output) -> None:
    """Show something to the person at the terminal that is not the command's result."""
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140)
    console.print(render(output, console.width))


def note(text: str) -> None:
    """Say something to the person at the terminal, on stderr, where it never mixes with a result."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
