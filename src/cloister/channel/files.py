"""File descriptors: a flood of connections must leave some to whoever writes checkpoints."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace

import psutil

from cloister.channel.limits import SPARE_FILES, Limits

_log = logging.getLogger(__name__)


def make_room_for_files(limits: Limits) -> Limits:
    """Raise this process's own limit on open files as far as the system allows; take fewer connections where that is
    not enough."""
    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # psutil has it on Linux, where enclaves run
        return limits
    wanted = limits.max_connections + SPARE_FILES
    soft, hard = _open_files(process)
    if soft < wanted:
        with suppress(OSError, ValueError):
            process.rlimit(psutil.RLIMIT_NOFILE, (min(wanted, hard), hard))
        soft, _ = _open_files(process)
    if soft >= wanted:
        return limits
    allowed = max(1, soft - SPARE_FILES)
    _log.warning("open files are limited to %d: at most %d connections are taken", soft, allowed)
    return replace(limits, max_connections=allowed)


def _open_files(process: psutil.Process) -> tuple[int, int]:
    """(soft, hard) limit; no limit is a very high one."""
    soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    return (soft if soft >= 0 else 1 << 31, hard if hard >= 0 else 1 << 31)
