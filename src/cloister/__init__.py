"""Cloister: fine-tune one language model on the private data of several organisations, inside attested enclaves.

Importing this package is cheap: torch and transformers are loaded by the modules that need them.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cloister")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
