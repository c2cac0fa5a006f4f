"""Peak memory of the processes that a benchmark starts, by role."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import psutil

_INTERVAL_S = 0.25
"""Between two looks. Linux keeps the peak itself, so that only growth in a process's last quarter second is missed;
elsewhere a short peak between two looks is."""

NameRole = Callable[[Sequence[str]], str | None]
"""From a process's command line to its role; None: not counted."""


class PeakMemory:
    """Watches all descendants of this process while the block runs. `mib` is by role, the largest process of each."""

    def __init__(self, name_role: NameRole) -> None:
        self.mib: dict[str, float] = {}
        self._name_role = name_role
        self._roles: dict[int, str | None] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(_INTERVAL_S):
            for child in me.children(recursive=True):
                try:
                    self._look(child)
                except (psutil.Error, OSError):  # it has just ended
                    continue

    def _look(self, child: psutil.Process) -> None:
        if child.pid not in self._roles:
            arguments = child.cmdline()
            if not arguments:
                return
            self._roles[child.pid] = self._name_role(arguments)
        role = self._roles[child.pid]
        if role is not None:
            self.mib[role] = max(self.mib.get(role, 0.0), peak_bytes(child) / 2**20)


def peak_bytes(process: psutil.Process) -> int:
    """The most resident memory of a process so far; where the system does not say, what it has now.

    Raises:
        OSError, psutil.Error: it has ended.
    """
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return int(process.memory_info().rss)
