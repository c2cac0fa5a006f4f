"""What may happen to a role's machine besides the role's death: a disk that fills up or fails, a clock that jumps."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

Kind = Literal["full disk", "read-only disk", "clock"]
_DISK_BYTES = 16 << 20
_MS_RDONLY, _MS_REMOUNT, _MNT_DETACH = 1, 32, 2


class Trouble(Protocol):
    """Trouble of one role."""

    def begin(self) -> bool:
        """Whether it has begun; if not it is to be tried again."""

    def end(self) -> None:
        """All is well again."""

    def remove(self) -> None:
        """Leave nothing behind."""


class Disk:
    """A file system of its own under a role's folder, which can fill up or become read-only."""

    def __init__(self, folder: Path, kind: Kind, left_bytes: int) -> None:
        """left_bytes: room that stays when the disk fills up, so that a file is cut in its middle."""
        self._folder, self._kind, self._left = folder, kind, left_bytes
        self._filler = folder / "filler"
        self._libc = ctypes.CDLL(None, use_errno=True)
        folder.mkdir(parents=True)
        if self._mount(0) != 0:
            raise PermissionError(ctypes.get_errno(), "cannot mount a tmpfs")

    def begin(self) -> bool:
        if self._kind == "read-only disk":
            return self._mount(_MS_REMOUNT | _MS_RDONLY) == 0  # refused while a file is open for writing
        with self._filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 20)):
                pass
        os.truncate(self._filler, max(0, self._filler.stat().st_size - self._left))
        return True

    def end(self) -> None:
        if self._kind == "read-only disk":
            self._mount(_MS_REMOUNT)
        self._filler.unlink(missing_ok=True)

    def remove(self) -> None:
        self._libc.umount2(bytes(self._folder), _MNT_DETACH)

    def _mount(self, flags: int) -> int:
        options = f"size={_DISK_BYTES}".encode()
        return int(self._libc.mount(b"tmpfs", bytes(self._folder), b"tmpfs", flags, options))


class Jump:
    """A role's wall clock is wrong by so many seconds."""

    def __init__(self, offset_file: Path, seconds: float) -> None:
        self._file, self._seconds = offset_file, seconds

    def begin(self) -> bool:
        part = self._file.with_suffix(".part")
        part.write_text(str(self._seconds))
        part.replace(self._file)
        return True

    def end(self) -> None:
        self._file.unlink(missing_ok=True)

    def remove(self) -> None:
        self.end()


def can_mount() -> bool:
    """Whether disks of one's own can be had here."""
    return sys.platform == "linux" and os.geteuid() == 0
