"""One base model for all tests of this folder, and fresh finished runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.methods.finished import Finished, base_model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("methods") / "base")


@pytest.fixture
def finished(tmp_path: Path, base_folder: Path) -> Finished:
    return Finished(tmp_path, base_folder)
