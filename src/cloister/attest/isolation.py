"""Isolated Python: nothing outside the measured installation decides what an enclave's process runs.

Evidence of a TEE names the image, not what a started Python reads besides it: environment variables such as
PYTHONPATH, packages of the user, modules in the current folder, files of a model hub. Whoever may write one of these
would run other code under the evidence of this one. The check is against a wrong start; an altered program, which could
leave it out, has another measurement.
"""

from __future__ import annotations

import sys

import huggingface_hub

from cloister.attest.policy import SIMULATED
from cloister.errors import UsageError

_MAY_RUN_OPEN = frozenset({SIMULATED, "tpm"})
"""Evidence that hides nothing from the operator anyway, for trials and tests."""


def isolation_faults() -> list[str]:
    """What keeps this process from being isolated; empty if it is.

    Source: Python's documentation of `-I`, which is -E (environment), -P (no unsafe path) and -s (user packages).
    """
    checks = {
        "it reads environment variables (PYTHONPATH and others)": sys.flags.ignore_environment,
        "it looks for modules in the folder where it was started": sys.flags.safe_path,
        "it takes packages of the user who started it": sys.flags.no_user_site,
        "it may ask a model hub for files (HF_HUB_OFFLINE is not 1)": huggingface_hub.is_offline_mode(),
    }
    return [fault for fault, is_closed in checks.items() if not is_closed]


def require_isolated(kind: str) -> None:
    """Refuse to run under evidence of a real TEE unless this Python is isolated.

    Args:
        kind: type of the evidence. "tpm" and "simulated" may run in any Python.
    Raises: UsageError.
    """
    faults = [] if kind in _MAY_RUN_OPEN else isolation_faults()
    if faults:
        raise UsageError(
            f"this Python is not isolated, so {kind} evidence would not say what it runs: {'; '.join(faults)}",
            where="enclave",
            hint="start it as `HF_HUB_OFFLINE=1 python3 -I -m cloister ...`, as the units in deploy/ do",
        )


def interpreter_flags() -> list[str]:
    """Flags for starting another Python that is as isolated as this one."""
    closed = sys.flags.ignore_environment and sys.flags.safe_path and sys.flags.no_user_site
    return ["-I"] if closed else []
