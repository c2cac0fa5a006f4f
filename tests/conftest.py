"""Settings for all tests: one thread, so that sums have one order; no progress bars, no hub."""

from __future__ import annotations

import os
import sys

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.fixture(autouse=True)
def _one_quiet_thread() -> None:
    """Only where torch is imported already: tests without models do not pay for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
