"""Settings for all tests: one thread, so that sums have one order; no progress bars, no hub."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.fixture(autouse=True)
def _one_quiet_thread() -> None:
    """Only where torch is imported already: tests without models do not pay for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes a line of figures, which the session prints at its end: also of a test that passes."""
    return lambda line: record_property("measured", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = [(report.nodeid, line) for report in reports for name, line in report.user_properties if name == "measured"]
    if lines:
        terminalreporter.section("measured")
    for nodeid, line in lines:
        terminalreporter.line(f"{nodeid.rpartition('/')[2]}: {line}")
