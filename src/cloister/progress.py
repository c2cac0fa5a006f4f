"""Progress of long work, reported without knowing who watches.

The work calls `progress.task(...)` and `advance`. A terminal draws bars (`cli/progress.py`), a child process writes one
JSON line per event to stderr, and its parent reads these lines back with `relay`. Events hold names and counts only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol, TextIO

_MARK = '{"progress":'
_INTERVAL_S = 0.2
"""Fewest seconds between two lines of one task: five a second are enough for an eye and cost nothing."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """State of one task. `total` is None while unknown; a task is over when `ended` is true."""

    task: str
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    note: str = ""
    ended: bool = False


class Progress(Protocol):
    """Somebody who wants to know how far a task is."""

    def report(self, event: Event) -> None:
        """Take the newest state of a task; later states replace earlier ones."""


class Silent:
    """Nobody watches."""

    def report(self, event: Event) -> None:
        """Drop the event."""


class Task:
    """One piece of work with a count. Made by `task`."""

    def __init__(self, progress: Progress, event: Event) -> None:
        self._progress = progress
        self._event = event

    def advance(self, amount: float = 1.0, *, note: str | None = None) -> None:
        """Count `amount` units as done; `note` (a loss, a file name) replaces the one shown."""
        self.set(self._event.done + amount, note=note)

    def set(self, done: float, *, total: float | None = None, note: str | None = None) -> None:
        """Say how many units are done in all."""
        changed = {"done": done, "total": self._event.total if total is None else total}
        self._event = Event(**{**asdict(self._event), **changed, **({} if note is None else {"note": note})})
        self._progress.report(self._event)

    def end(self) -> None:
        """Say that no more will come."""
        self._event = Event(**{**asdict(self._event), "ended": True})
        self._progress.report(self._event)


@contextmanager
def task(progress: Progress, name: str, *, total: float | None = None, unit: str = "") -> Iterator[Task]:
    """Announce a task, count in it, and end it however it is left."""
    running = Task(progress, Event(task=name, total=total, unit=unit))
    running.set(0.0)
    try:
        yield running
    finally:
        running.end()


class JsonLines:
    """Writes events as JSON lines, at most five a second per task; first and last events always."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._last: dict[str, float] = {}

    def report(self, event: Event) -> None:
        """Write the event unless one of the same task went out a moment ago."""
        now = self._clock()
        if not event.ended and now - self._last.get(event.task, -math.inf) < _INTERVAL_S:
            return
        self._last[event.task] = now
        self._stream.write(json.dumps({"progress": asdict(event)}, separators=(",", ":")) + "\n")
        self._stream.flush()


def parse_line(line: str) -> Event | None:
    """The event that `JsonLines` wrote on this line, or None for any other text."""
    if not line.startswith(_MARK):
        return None
    try:
        event = Event(**json.loads(line)["progress"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = (event.done, event.total or 0.0)
    texts = (event.task, event.unit, event.note)
    sound = all(isinstance(n, int | float) for n in numbers) and all(isinstance(t, str) for t in texts)
    return event if sound else None


def relay(lines: Iterable[str], progress: Progress, *, who: str, other: Callable[[str], None]) -> None:
    """Pass a child's events on under the name `who: task`, and every other line to `other` (a log).

    Args:
        lines: the child's stderr, line by line, until it ends. Its content is not trusted beyond being text.
    """
    for line in lines:
        event = parse_line(line)
        if event is None:
            other(line)
        else:
            progress.report(Event(**{**asdict(event), "task": f"{who}: {event.task}"}))
