"""What a role does, seen from outside: files that appear, grow, change their name or vanish, and lines of its log.

Linux tells through inotify, so that a file which lives for a millisecond is seen too.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from dataclasses import dataclass
from pathlib import Path

from cloister.progress import parse_line

_MODIFY, _CLOSE_WRITE, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x8, 0x80, 0x100, 0x200
_MASK = _MODIFY | _CLOSE_WRITE | _MOVED_TO | _CREATE | _DELETE
_VERBS = {_MODIFY: "grows", _CLOSE_WRITE: "closed", _MOVED_TO: "named", _CREATE: "made", _DELETE: "gone"}
_IS_FOLDER = 0x40000000
_HEAD = struct.Struct("iIII")


@dataclass(frozen=True)
class Seen:
    """One thing that a role did: what = "VERB PATH" of a file in its folder, or "says TASK" of its log."""

    role: str
    what: str


class Watch:
    """Folders of roles (`add`) and their logs (`add_log`)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._folders: dict[int, tuple[str, Path, Path]] = {}
        self._logs: dict[Path, tuple[str, int]] = {}
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def add(self, role: str, root: Path, folder: Path | None = None) -> None:
        """Watch a folder and those in it."""
        folder = folder or root
        folder.mkdir(parents=True, exist_ok=True)
        number = self._libc.inotify_add_watch(self._fd, bytes(folder), _MASK)
        if number < 0:
            raise OSError(ctypes.get_errno(), f"inotify_add_watch {folder}")
        self._folders[number] = role, root, folder
        for path in folder.iterdir():
            if path.is_dir():
                self.add(role, root, path)

    def add_log(self, role: str, path: Path) -> None:
        """Read the lines that a role writes from now on."""
        path.touch()
        self._logs[path] = role, 0
        number = self._libc.inotify_add_watch(self._fd, bytes(path), _MODIFY)
        self._folders[number] = "", path, path

    def news(self, timeout_s: float) -> list[Seen]:
        """What has happened since the last call, as soon as there is anything, or after the time."""
        if not self._poll.poll(timeout_s * 1000):
            return []
        found: list[Seen] = []
        content = os.read(self._fd, 1 << 16)
        while content:
            number, mask, _, length = _HEAD.unpack_from(content)
            name = content[_HEAD.size : _HEAD.size + length].rstrip(b"\0").decode()
            content = content[_HEAD.size + length :]
            if number in self._folders:
                found += self._one(number, mask, name)
        return found

    def _one(self, number: int, mask: int, name: str) -> list[Seen]:
        role, root, folder = self._folders[number]
        if not role:
            return self._lines(folder)
        path = folder / name
        if mask & _IS_FOLDER:
            if path.is_dir():
                self.add(role, root, path)
            return [Seen(role, f"made {path.relative_to(root)}/")]
        relative = path.relative_to(root)
        return [Seen(role, f"{verb} {relative}") for bit, verb in _VERBS.items() if mask & bit]

    def _lines(self, path: Path) -> list[Seen]:
        role, offset = self._logs[path]
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        end = content.rfind(b"\n") + 1
        self._logs[path] = role, offset + end
        events = [parse_line(line) for line in content[:end].decode(errors="replace").splitlines()]
        return [Seen(role, f"says {event.task}") for event in events if event is not None]

    def close(self) -> None:
        os.close(self._fd)
