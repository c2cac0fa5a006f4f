"""The pipe between the processes that an enclave starts and its own: what they say, and that they end when it ends.

They write lines of JSON, each in one piece; the enclave's own process has the only reading end. When that is closed,
in whatever way the enclave ended, they end at once.

    {"ready": RANK}            a process has its keys and is about to meet the others
    {"rank", "error": {...}}   an error of ours, before the process ends
    {"ended": {RANK: CODE}}    from torchrun: exit codes, negative for a signal
"""

from __future__ import annotations

import json
import os
import select
import shutil
import threading
from pathlib import Path
from typing import Any

from cloister.errors import CloisterError

MAX_LINE_BYTES = select.PIPE_BUF
"""What a pipe takes in one piece, so that lines of several processes are never mixed."""
_MAX_TEXTS = (500, 200, 90)
"""Characters of each text of an error, the first that lets it fit: one may take twelve bytes of JSON."""


def take_stdout() -> int:
    """A descriptor of the pipe of one's own: whatever else a library prints goes to the log."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return pipe


def end_with_reader(pipe: int, folder: Path) -> None:
    """End this process, and leave nothing behind in the private folder, when nobody reads the pipe any more."""

    def watch() -> None:
        poll = select.poll()
        poll.register(pipe, 0)  # POLLERR and POLLHUP are always reported
        poll.poll()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def say(pipe: int, said: dict[str, Any]) -> None:
    """Write one line.

    Raises: ValueError if it is too long.
    """
    line = json.dumps(said).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line has {len(line)} bytes, a pipe takes {MAX_LINE_BYTES} in one piece")
    os.write(pipe, line)


def describe(error: CloisterError) -> dict[str, str]:
    """An error as it is said; long texts are cut. It holds no secret, as no error of ours does."""
    texts = {"message": error.message, "where": error.where, "hint": error.hint}
    for length in _MAX_TEXTS:
        found = {"class": type(error).__name__, "code": error.code} | {k: v[:length] for k, v in texts.items()}
        if len(json.dumps(found)) < MAX_LINE_BYTES - 100:
            break
    return found
