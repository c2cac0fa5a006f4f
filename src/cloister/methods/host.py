"""The machine that a report was made on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import psutil

from cloister.report.model import Host


def describe_host() -> Host:
    """Platform, processors this process may use, memory, and the versions that decide about results."""
    return Host(
        platform=platform.platform(),
        cpus=usable_cpus(),
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        peft=version("peft"),
    )


def usable_cpus() -> int:
    """Processors that the scheduler grants this process; macOS and Windows tell only those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
