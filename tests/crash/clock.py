"""A wall clock that a trial can set for one role, as an operator or a time server would. Monotonic clocks go on.

It stands in for `time.time`, and must do so before anything of Cloister is imported: clocks are default arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_real = time.time
_offset_file: list[Path] = []


def _time() -> float:
    """Seconds since 1970, as this role's machine has it."""
    try:
        return _real() + float(_offset_file[-1].read_text() or 0.0) if _offset_file else _real()
    except FileNotFoundError:
        return _real()


def install() -> None:
    """Once, before Cloister is imported."""
    time.time = _time


def follow(path: Path) -> Callable[[], None]:
    """In a role: its clock differs from the machine's by the seconds in a file."""
    return lambda: _offset_file.append(path)
