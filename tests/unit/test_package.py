"""What is not in the package: tests, and above all the test CAs that can vouch for anything."""

from __future__ import annotations

import ast
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, tests and all: built from a copy, so that nothing is written here."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("src", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.safetensors")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-c", _BUILD, tree / "dist"], cwd=tree, check=True, capture_output=True)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_no_tests_and_no_test_ca(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        inside = {
            hashlib.sha256(archive.read(name)).hexdigest(): name for name in names if archive.getinfo(name).file_size
        }
        assert "cloister/attest/verify.py" in names
        assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"cloister"}
        assert [name for name in names if "attest_ca" in name or Path(name).name.startswith("test_")] == []
        (top_level,) = [name for name in names if name.endswith("top_level.txt")]
        assert archive.read(top_level).decode().split() == ["cloister"]
    ours = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in (ROOT / "tests").rglob("*.py")}
    assert (ROOT / "tests" / "attest_ca" / "snp_ca.py") in ours.values()
    assert [inside[digest] for digest in inside.keys() & ours.keys()] == []


def test_no_module_of_the_package_imports_tests() -> None:
    wrong = []
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [(path.name, name) for name in names if name.split(".")[0] in ("tests", "conftest", "pytest")]
        wrong += [(path.name, "attest_ca")] if "attest_ca" in text else []
    assert wrong == []


def test_an_installed_package_cannot_import_a_test_ca(tmp_path: Path) -> None:
    """In an interpreter that sees what is installed, and not this folder."""
    code = "import cloister.attest.verify\ntry:\n    import tests.attest_ca\nexcept ImportError:\n    print('none')"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "none\n"
