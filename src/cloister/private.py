"""What a process of ours does first, so that nothing of its memory or files is left to other users of the machine.

Against whoever has root on the machine this protects nothing; that is what a TEE is for.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_DUMPABLE = 4  # Linux, linux/prctl.h
_OWNER_ONLY = 0o077


def keep_private(*, files: bool) -> None:
    """No core dumps, no reading of this process's memory by others, not even by other processes of the same user.

    Both are needed: the limit alone does not hold where the system pipes core dumps into a program, and children that
    are other programs inherit the limit only.

    Args:
        files: what this process and its children write is for this user alone, too.

    A system that refuses is reported on stderr.
    """
    if files:
        os.umask(_OWNER_ONLY)
    if sys.platform != "linux":
        return
    import psutil

    try:
        psutil.Process().rlimit(psutil.RLIMIT_CORE, (0, 0))
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    except OSError as exc:
        sys.stderr.write(f"warning: core dumps cannot be turned off: {os.strerror(exc.errno or 0)}\n")
