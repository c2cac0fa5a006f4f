"""What could leak, measured from outside, and how fast it grows."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What may grow by how much.

    A leak grows steadily, so both must be exceeded: the slope of the line through all samples after the warm-up, and
    the difference between its ends. Caches that fill up and arenas that fragment grow at first and then stop.
    """

    per_hour: float
    in_all: float
    unit: str


BOUNDS: Mapping[str, Bound] = {
    "enclave memory": Bound(per_hour=16.0, in_all=12.0, unit="MiB"),
    "enclave descriptors": Bound(per_hour=4.0, in_all=4.0, unit="descriptors"),
    "enclave threads": Bound(per_hour=4.0, in_all=4.0, unit="threads"),
    "accelerator memory": Bound(per_hour=16.0, in_all=12.0, unit="MiB"),
    "accelerator descriptors": Bound(per_hour=4.0, in_all=4.0, unit="descriptors"),
    "accelerator threads": Bound(per_hour=4.0, in_all=4.0, unit="threads"),
    "temporary files": Bound(per_hour=4.0, in_all=4.0, unit="files"),
    "shared memory": Bound(per_hour=2.0, in_all=2.0, unit="files"),
    "processes": Bound(per_hour=2.0, in_all=2.0, unit="processes"),
}
_PR_SET_CHILD_SUBREAPER = 36
WARM_UP = 0.25
"""Share of the samples, from the beginning, that do not count."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One gauge over the whole run."""

    first: float
    last: float
    per_hour: float
    in_all: float
    """Of the line, from the end of the warm-up to the end."""
    bound: Bound

    @property
    def leaks(self) -> bool:
        return self.per_hour > self.bound.per_hour and self.in_all > self.bound.in_all


@dataclass
class Samples:
    """All gauges at all times."""

    times_s: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, now_s: float, values: Mapping[str, float]) -> None:
        self.times_s.append(now_s)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def growth(self) -> dict[str, Growth]:
        """By gauge. Raises: ValueError: there are fewer than 8 samples."""
        if len(self.times_s) < 8:
            raise ValueError(f"{len(self.times_s)} samples show nothing")
        begin = int(len(self.times_s) * WARM_UP)
        return {name: _growth(self.times_s[begin:], v[begin:], BOUNDS[name]) for name, v in self.values.items()}


def _growth(times_s: Sequence[float], values: Sequence[float], bound: Bound) -> Growth:
    slope_per_s = slope(times_s, values)
    in_all = slope_per_s * (times_s[-1] - times_s[0])
    return Growth(first=values[0], last=values[-1], per_hour=3600 * slope_per_s, in_all=in_all, bound=bound)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the least-squares line."""
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0


def process_gauges(name: str, pid: int) -> dict[str, float]:
    """Memory (private, resident), descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        f"{name} memory": int(fields["RssAnon"].split()[0]) / 1024,
        f"{name} descriptors": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        f"{name} threads": int(fields["Threads"]),
    }


def files_under(folders: Sequence[Path]) -> int:
    """How many files and folders lie there."""
    return sum(1 for folder in folders for _ in folder.rglob("*"))


def shared_memory(before: frozenset[str]) -> int:
    """Entries of /dev/shm that were not there at the start and are not another user's."""
    found = [e for e in os.scandir("/dev/shm") if e.name not in before]  # noqa: S108  # looked at only
    return sum(1 for entry in found if entry.stat(follow_symlinks=False).st_uid == os.geteuid())


def adopt_orphans() -> None:
    """Linux: what a killed role leaves running becomes this process's child, not that of process 1, and is counted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap(*, own: Collection[int]) -> None:
    """Let adopted children go that have ended; not `own`, whose exit codes somebody waits for."""
    for child in _children().get(os.getpid(), []):
        if child not in own:
            with suppress(ChildProcessError):  # it is gone already
                os.waitpid(child, os.WNOHANG)


def descendants(pid: int) -> int:
    """Processes under this one, zombies too."""
    children = _children()
    found, left = 0, [pid]
    while left:
        under = children.get(left.pop(), [])
        found += len(under)
        left += under
    return found


def _children() -> dict[int, list[int]]:
    """Of every process now, by its parent."""
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            found.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    return found


def save(samples: Samples, path: Path) -> None:
    """All samples, for a plot."""
    path.write_text(json.dumps({"times_s": samples.times_s, "values": samples.values, "written": time.time()}))
