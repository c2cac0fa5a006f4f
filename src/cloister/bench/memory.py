"""Peak memory and processor time of the processes that a benchmark starts, by role."""

from __future__ import annotations

import threading
import time
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
        self._used: dict[int, list[tuple[float, float]]] = {}  # by process: (time.monotonic(), processor seconds)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def processor_seconds(self, begin: float, end: float) -> float:
        """Of all counted processes between two times of `time.monotonic`, to a quarter of a second each."""
        return sum(_at(used, end) - _at(used, begin) for used in self._used.values())

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
            times = child.cpu_times()
            self._used.setdefault(child.pid, []).append((time.monotonic(), times.user + times.system))


def _at(used: Sequence[tuple[float, float]], when: float) -> float:
    """Processor time at the last look before `when`; 0 before the first."""
    return max((seconds for looked, seconds in used if looked <= when), default=0.0)


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
