"""Where a role is killed: when it has been seen to do something, at a file operation of its own, or at some time."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.crash.forking import Prepare
from tests.crash.watch import Seen

PHASES = ("start", "seal", "handshake", "upload", "agree", "mid-step", "checkpoint", "release", "receipt")
_ENCLAVE = (
    ("checkpoint", r"\w+ checkpoints/"),
    ("upload", r"\w+ bundles/|says waiting for parties"),
    ("mid-step", r"says (training|rounds|scoring)"),
    ("release", r"says handing out"),
    ("receipt", r"\w+ enclave.json"),
    ("start", r".*"),
)
_PARTY = (
    ("handshake", r"named bundles/counts.json|\w+ commitment.salt|says waiting for the others"),
    ("seal", r"\w+ bundles/|says (reading|loading|former|preparing|first)"),
    ("upload", r"says sending"),
    ("checkpoint", r"\w+ manifest.memory"),
    ("agree", r"\w+ manifest.cbor"),
    ("mid-step", r"says (training|round|validating|scoring)"),
    ("release", r"\w+ (adapter|scores)"),
    ("receipt", r"\w+ (receipt|declared|join|samples|results)|says sample"),
    ("start", r".*"),
)


_SEEN_AT_PARTIES = ("handshake", "agree", "release", "receipt")


def phase_of(role: str, what: str) -> str:
    """The phase of the job in which a role does this."""
    table = _ENCLAVE if role == "enclave" else _PARTY
    return next(phase for phase, pattern in table if re.match(pattern, what))


@dataclass(frozen=True, kw_only=True)
class Point:
    """Kill `victim`. Exactly one of the three kinds is set."""

    victim: str
    phase: str
    seen: Seen | None = None
    """When this was seen for the `count`-th time, and `later_s` have passed."""
    operation: int | str | None = None
    """At its file operation of this number, counted from 0, or at the first that is this "VERB PATH"."""
    after: bool = False
    """Once that operation is done, not before it; of opening a file to write, that is when it has become empty."""
    time_s: float | None = None
    """So long after the job's start."""
    count: int = 1
    later_s: float = 0.0

    def __str__(self) -> str:
        if self.seen is not None:
            where = f"{self.count}. {self.seen.role} {self.seen.what!r} + {self.later_s * 1000:.1f} ms"
        elif self.operation is not None:
            where = f"{'after' if self.after else 'before'} file operation {self.operation}"
        else:
            where = f"{self.time_s:.3f} s"
        return f"{self.victim}: {self.phase}: {where}"


@dataclass(frozen=True, kw_only=True)
class Course:
    """What an undisturbed run did: the ground from which points are drawn."""

    seen: Sequence[Seen]
    operations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By role, "VERB PATH" of each file operation."""
    seconds: float

    def draw(self, random: Random, victim: str, phase: str) -> Point | None:
        """A point of this phase, or None where the role has none."""
        kinds: list[Callable[[Random, str, str], Point | None]] = [self._draw_seen, self._draw_operation]
        random.shuffle(kinds)
        return kinds[0](random, victim, phase) or kinds[1](random, victim, phase)

    def draw_time(self, random: Random, victim: str) -> Point:
        return Point(victim=victim, phase="any time", time_s=random.uniform(0.0, self.seconds))

    def _draw_seen(self, random: Random, victim: str, phase: str) -> Point | None:
        counts: Counter[Seen] = Counter()
        fitting: list[tuple[Seen, int]] = []
        for seen in self.seen:
            counts[seen] += 1
            # Some of what the server does shows in the parties' folders, an accelerator's work at its party.
            shown = seen.role == victim or (victim == "enclave" and phase in _SEEN_AT_PARTIES)
            shown = shown or victim == f"{seen.role}-accelerator"
            if shown and phase_of(seen.role, seen.what) == phase:
                fitting.append((seen, counts[seen]))
        if not fitting:
            return None
        seen, count = random.choice(fitting)
        later = random.choice([0.0, random.uniform(0.0, 0.003), random.uniform(0.0, 0.03)])
        return Point(victim=victim, phase=phase, seen=seen, count=count, later_s=later)

    def _draw_operation(self, random: Random, victim: str, phase: str) -> Point | None:
        numbers = [i for i, what in enumerate(self.operations.get(victim, ())) if phase_of(victim, what) == phase]
        if not numbers:
            return None
        return Point(victim=victim, phase=phase, operation=random.choice(numbers), after=random.random() < 0.5)


# In the role's process ------------------------------------------------------------------------------------------------


def record_operations(root: Path, record: Path) -> Prepare:
    """Write "VERB PATH" of each file operation under `root` to a file."""

    def prepare() -> None:
        fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        _hook(root, lambda number, verb, path, do: os.write(fd, f"{verb} {path.relative_to(root)}\n".encode()))

    return prepare


def die_at_operation(root: Path, at: int | str, *, after: bool) -> Prepare:
    """Kill this process at one of its file operations, see `Point`."""

    def act(number: int, verb: str, path: Path, do: Callable[[], object]) -> None:
        if at in (number, f"{verb} {path.relative_to(root)}"):
            if after:
                do()
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: _hook(root, act)


def _hook(root: Path, act: Callable[[int, str, Path, Callable[[], object]], object]) -> None:
    """Call `act` before each operation that changes a file under `root`."""
    count, inside = 0, False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, inside
        if inside or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
            return
        found = _operation(event, arguments)
        if found is None or not found[1].is_relative_to(root):
            return
        inside = True
        try:
            act(count, *found)
        finally:
            inside = False
        count += 1

    sys.addaudithook(hook)


def _operation(event: str, arguments: tuple[Any, ...]) -> tuple[str, Path, Callable[[], object]] | None:
    """(verb, path, how to do it) of an audit event."""
    if isinstance(arguments[0], int):
        return None
    path = Path(os.fsdecode(arguments[0])).absolute()
    if event == "open":
        flags = arguments[2] or 0
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return None
        return "grows", path, lambda: os.close(os.open(path, flags & ~os.O_EXCL, 0o600))
    if event == "os.rename":
        target = Path(os.fsdecode(arguments[1])).absolute()
        return "named", target, lambda: path.rename(target)
    if event == "os.remove":
        return "gone", path, path.unlink
    if event == "os.mkdir":
        return "made", path, path.mkdir
    return "grows", path, lambda: os.truncate(path, arguments[1])
