"""The command line: thin Typer commands over the library. Importing it is cheap, so that `--help` is quick."""

from cloister.cli.app import app, entry, main

__all__ = ["app", "entry", "main"]
