"""Progress on stderr: bars for a person, JSON lines for a parent process, nothing into a pipe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from cloister.cli.options import ProgressMode
from cloister.progress import Event, JsonLines, Progress, Silent


class Bars:
    """Draws one bar per task. Events may come from several threads, as when each child process has a reader."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def report(self, event: Event) -> None:
        """Draw the newest state of a task; a task that ends without a total is shown as complete."""
        with self._lock:
            if event.task not in self._tasks:
                self._tasks[event.task] = self._bars.add_task(event.task, total=event.total, note="")
            task = self._tasks[event.task]
            total = event.total if event.total is not None or not event.ended else max(event.done, 1.0)
            done = total if event.ended and event.total is None else event.done
            self._bars.update(task, completed=done, total=total, note=f"{event.unit} {event.note}".strip())
            if event.ended:
                self._bars.stop_task(task)


@contextmanager
def open_progress(mode: ProgressMode, *, console: Console | None = None) -> Iterator[Progress]:
    """The progress reporter of a command.

    Args:
        mode: "auto" draws bars on a terminal and is silent elsewhere.
    """
    console = console or Console(stderr=True)
    if mode == "json":
        yield JsonLines(sys.stderr)
    elif mode == "bars" or (mode == "auto" and console.is_terminal):
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            TimeElapsedColumn(),
        )
        with RichProgress(*columns, console=console) as bars:
            yield Bars(bars)
    else:
        yield Silent()
