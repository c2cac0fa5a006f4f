"""The documents keep up with the code: links, commands, options, job keys, error codes, tests that back a claim."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic_core import PydanticUndefined

from cloister.cli import app
from cloister.job import Job
from cloister.jobfile.resolve import is_local

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "cloister"
_SKIPPED = {".venv", ".pytest_cache", "build", "dist", "demo-run", "runs"}
DOCUMENTS = sorted(p for p in ROOT.rglob("*.md") if not _SKIPPED & set(p.relative_to(ROOT).parts))
_GROUP: Any = typer.main.get_command(app)


def commands_of(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:  # Any: click's commands
    """(name, command) of everything that can be typed; a group's own commands as "group command"."""
    for name, command in group.commands.items():
        if not command.hidden:
            inner = getattr(command, "commands", None)
            yield from commands_of(command, f"{before}{name} ") if inner else [(before + name, command)]


COMMANDS: dict[str, Any] = dict(commands_of(_GROUP))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in t]
    assert [t for t in targets if t and not (path.parent / t).exists()] == []


def test_there_are_documents_and_links_to_check() -> None:
    assert {"README.md", "threat-model.md", "0001-ciphertext-commitment.md"} <= {path.name for path in DOCUMENTS}
    assert "](docs/threat-model.md)" in text("README.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cited_tests_exist(path: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text(encoding="utf-8")):
        assert re.search(rf"^def {name}\(", text(file), re.MULTILINE), f"{file}::{name}"


# Commands -------------------------------------------------------------------------------------------------------------


def test_every_command_has_its_section_and_no_other_has() -> None:
    assert re.findall(r"^## cloister (\w+(?: \w+)?)$", text("docs/cli.md"), re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_its_section(command: str) -> None:
    section = text("docs/cli.md").split(f"## cloister {command}\n")[1].split("\n## ")[0]
    options = {o for p in COMMANDS[command].params if not getattr(p, "hidden", False) for o in p.opts if o[:2] == "--"}
    missing = {o for o in options - {"--json"} if not re.search(rf"`[^`]*{o}\b", section)}
    assert missing == set()


# The job file ---------------------------------------------------------------------------------------------------------


def documented_keys() -> Iterator[tuple[str, str, str, str]]:
    """(section, key, default, scope) of every row of docs/job-file.md."""
    for section, body in re.findall(r"^## \[+(\w+)\]+\n(.*?)(?=^## )", text("docs/job-file.md"), re.M | re.S):
        for key, default, scope in re.findall(r"^\| `(\w+)` \|.*?\| `([^|]*)` \| (\w+) \|", body, re.MULTILINE):
            yield section, key, default, scope


def existing_keys() -> Iterator[tuple[str, str, str, str]]:
    for section, field in Job.model_fields.items():
        model = next(iter(get_args(field.annotation)), field.annotation)
        for key, entry in model.model_fields.items():  # type: ignore[union-attr]  # every section is a model
            default = entry.get_default()
            shown = (
                "required"
                if default in (..., PydanticUndefined)
                else "unset"
                if default is None
                else json.dumps(default)
            )
            yield section, key, shown, "local" if is_local(entry) else "shared"


def test_every_key_of_a_job_is_described_with_its_default_and_scope() -> None:
    assert list(documented_keys()) == list(existing_keys())


# Errors ---------------------------------------------------------------------------------------------------------------


def error_codes() -> set[str]:
    """Codes of the error classes and of every VerificationError raised in the package."""
    codes = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and re.search(r"Error$", node.name):
                codes |= {_code_of(statement) for statement in node.body}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "VerificationError":
                first = node.args[0]
                codes.add(str(first.value) if isinstance(first, ast.Constant) else "")
    return codes - {""}


def _code_of(statement: ast.stmt) -> str:
    target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
    value = getattr(statement, "value", None)
    return str(value.value) if getattr(target, "id", "") == "code" and isinstance(value, ast.Constant) else ""


def test_every_error_code_is_described_and_nothing_else() -> None:
    codes = error_codes()
    assert {"usage", "failed", "interrupted", "binding", "manifest-bundles"} <= codes
    described = {
        code
        for cell in re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \|", text("docs/errors.md"), re.MULTILINE)
        for code in re.findall(r"`([a-z-]+)`", cell)
    }
    assert described == codes


def test_every_folder_of_the_package_is_in_the_readmes_tree() -> None:
    tree = text("README.md").partition("## What lies where")[2].partition("\n## ")[0]
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert {f for f in folders if f"      {f}/" not in tree} == set()


def test_a_decision_fits_one_page() -> None:
    decisions = sorted((ROOT / "docs" / "adr").glob("0*.md"))
    assert decisions
    assert [path.name for path in decisions if len(path.read_text(encoding="utf-8").split()) > 450] == []


def test_every_decision_is_listed() -> None:
    index = text("docs/adr/README.md")
    assert [p.name for p in (ROOT / "docs" / "adr").glob("0*.md") if f"({p.name})" not in index] == []
