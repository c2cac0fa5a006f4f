"""Every way out of a command: exit code, what stands on stdout and what on stderr."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import cloister
from cloister.cli import main
from cloister.cli.app import app as the_app
from cloister.cli.template import choices, job_template
from cloister.errors import (
    AdapterError,
    CapacityError,
    CloisterError,
    DataError,
    JobError,
    ModelError,
    ProtocolError,
    RunError,
    TransportError,
    UsageError,
    VerificationError,
)
from cloister.job import KEYS_OF_KIND, AdapterSection, Job
from cloister.jobfile import load_job
from cloister.report.outputs import DoctorReport, ErrorReport


def names_of(app: typer.Typer, before: str = "") -> list[str]:
    own = [
        before + str(command.name or command.callback.__name__)
        for command in app.registered_commands
        if command.callback and not command.hidden
    ]
    groups = [group.typer_instance for group in app.registered_groups if group.typer_instance]
    return own + [name for group in groups for name in names_of(group, f"{group.info.name} ")]


COMMANDS = names_of(the_app)


WAITING = """
import sys
from cloister.cli import main, use
read = use._read_prompt
def announced():
    print("ready", flush=True)
    return read()
use._read_prompt = announced
sys.exit(main())
"""
"""A command that says when it waits for its prompt on stdin."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Cloister = Callable[..., Result]


@pytest.fixture
def cloister_command(capfd: pytest.CaptureFixture[str]) -> Cloister:
    def call(*arguments: str | Path) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `cloister init` fail."""

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cloister.cli.prepare.note", failing)


def test_importing_the_command_line_loads_no_torch() -> None:
    code = (
        "import sys, cloister, cloister.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_commands_are_those_of_the_design() -> None:
    assert COMMANDS == [
        "demo", "run", "enclave", "join", "accelerator", "pads", "plan", "verify", "evaluate", "compare", "export",
        "generate", "doctor", "init", "keygen", "sign", "attest collect", "attest show", "attest verify",
        "attest fetch", "attest enrol", "attest measure", "bench slice",
        "bench split",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(cloister_command: Cloister, command: str) -> None:
    shown = cloister_command(*command.split(), "--help")
    assert shown.code == 0
    _, _, examples = shown.out.partition("Examples:\n")
    lines = [line.strip() for line in examples.split("\n\n")[0].splitlines()]
    assert lines
    assert all(line.startswith(f"cloister {command}") for line in lines), lines
    options = shown.out.partition("Options:")[2]
    for line in lines:
        assert all(word in options for word in line.split() if word.startswith("--")), line


def test_version_and_no_command(cloister_command: Cloister) -> None:
    assert cloister_command("--version") == Result(0, f"cloister {cloister.__version__}\n", "")
    alone = cloister_command()
    assert alone.code == 0
    assert "Commands:" in alone.out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("m"), 2),
        (JobError("m"), 2),
        (DataError("m"), 2),
        (ModelError("m"), 2),
        (AdapterError("m"), 2),
        (CapacityError("m"), 1),
        (RunError("m"), 1),
        (VerificationError("signature", "m"), 3),
        (ProtocolError("m"), 4),
        (TransportError("m"), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_exit_codes(
    cloister_command: Cloister, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: CloisterError, code: int
) -> None:
    fail_with(monkeypatch, error)
    assert cloister_command("init", tmp_path / "job.toml").code == code


def test_an_error_is_a_readable_block(
    cloister_command: Cloister, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_with(monkeypatch, DataError("is [not] JSON", where="a.jsonl:7", hint="mend the line"))
    result = cloister_command("init", tmp_path / "job.toml")
    assert result == Result(2, "", "error: is [not] JSON\n  where: a.jsonl:7\n  hint:  mend the line\n")


def test_all_faults_of_a_job_file_are_shown(cloister_command: Cloister, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(job_template().replace("rank = 8", "rnak = 8").replace("seed = 0", "seed = -1"))
    result = cloister_command("plan", path)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("error: ") == 2
    assert "must be greater than or equal to 0, got -1" in result.err
    assert "did you mean 'rank'?" in result.err


JSON_FAILURES: list[tuple[Sequence[str], int, str]] = [
    (["plan", "absent.toml", "--json"], 2, "job"),
    (["run", "absent.toml", "--out", "x", "--json"], 2, "job"),
    (["run", "--json"], 2, "usage"),
    (["nonsense", "--json"], 2, "usage"),
    (["--json"], 2, "usage"),
    (["init", "--json", "--unknown"], 2, "usage"),
    (["generate", "job.toml", "--party", "a", "--json"], 2, "usage"),
    (["compare", "absent-a", "absent-b", "--json"], 2, "usage"),
]


@pytest.mark.parametrize(("arguments", "code", "name"), JSON_FAILURES, ids=[" ".join(f[0]) for f in JSON_FAILURES])
def test_with_json_a_failure_is_one_object_and_nothing_else(
    cloister_command: Cloister,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: Sequence[str],
    code: int,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cloister_command(*arguments)
    assert result.code == code
    error = ErrorReport.model_validate_json(result.out).error
    assert error.code == name
    assert error.message
    assert error.hint
    assert result.err == ""


def test_interruption(cloister_command: Cloister, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert cloister_command("init", tmp_path / "job.toml") == Result(130, "", "interrupted\n")
    monkeypatch.setattr("cloister.cli.prepare.emit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    result = cloister_command("init", tmp_path / "other.toml", "--json")
    assert result.code == 130
    assert json.loads(result.out)["error"]["code"] == "interrupted"


def test_a_full_disk_and_exhausted_memory_are_named(
    cloister_command: Cloister, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_with(monkeypatch, OSError(28, "No space left on device", "bundle"))
    full = cloister_command("init", tmp_path / "a.toml")
    assert (full.code, full.err.splitlines()[:2]) == (1, ["error: the disk is full", "  where: bundle"])
    fail_with(monkeypatch, NotADirectoryError(20, "Not a directory", "a.toml/b"))
    wrong = cloister_command("init", tmp_path / "c.toml")
    assert (wrong.code, wrong.err.splitlines()[:2]) == (2, ["error: Not a directory", "  where: a.toml/b"])
    fail_with(monkeypatch, MemoryError())
    assert "memory is exhausted" in cloister_command("init", tmp_path / "b.toml").err


def test_an_unforeseen_error_leaves_a_private_crash_file_without_arguments(
    cloister_command: Cloister, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("of ours"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = cloister_command("init", tmp_path / "secret-name.toml")
    assert result.code == 1
    assert "Traceback" not in result.err
    (crash,) = tmp_path.glob("cloister-crash-*.txt")
    assert str(crash) in result.err
    text = crash.read_text()
    assert "ZeroDivisionError: of ours" in text
    assert "command: init\n" in text
    assert "secret-name" not in text
    if os.name == "posix":
        assert crash.stat().st_mode & 0o077 == 0


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m cloister --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_module_and_the_script_return_exit_codes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cloister", "plan", "absent.toml", "--json"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "")
    assert json.loads(done.stdout)["error"]["where"] == "absent.toml"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_a_waiting_process_with_130() -> None:
    command = [sys.executable, "-c", WAITING, "generate", "job.toml", "--party", "a", "--enclave", "h:1", "--key", "k"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


# --- init, keygen, doctor ---------------------------------------------------------------------------------------------


def test_init_writes_a_job_that_loads_and_overwrites_nothing(cloister_command: Cloister, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    assert cloister_command("init", path).code == 0
    job = load_job(path).job
    assert [party.name for party in job.party] == ["north", "south"]
    path.write_text("mine")
    refused = cloister_command("init", path)
    assert refused.code == 2
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("adapter", "method"), choices(), ids=" ".join)
def test_init_writes_a_job_for_each_adapter_and_method(
    cloister_command: Cloister, tmp_path: Path, adapter: str, method: str
) -> None:
    path = tmp_path / "job.toml"
    assert cloister_command("init", path, "--adapter", adapter, "--method", method).code == 0
    job = load_job(path).job
    assert (job.adapter.kind, job.job.method) == (adapter, method)
    text = path.read_text()
    left_out = {key for key in KEYS_OF_KIND[adapter] if not re.search(rf"^(# )?{key} = ", text, re.MULTILINE)}
    assert left_out == set(), "every key that the kind has is shown"
    assert job.adapter == AdapterSection(kind=job.adapter.kind), "keys stand at their defaults"


def test_init_refuses_spf_with_slice(cloister_command: Cloister, tmp_path: Path) -> None:
    refused = cloister_command("init", tmp_path / "job.toml", "--adapter", "spf", "--method", "slice")
    assert refused.code == 2
    assert "changes rows of the base's own weights" in refused.err
    assert not (tmp_path / "job.toml").exists()


def test_the_templates_show_every_section() -> None:
    sections = [set(tomllib.loads(job_template("lora", method))) for method in ("split", "slice")]
    assert sections[0] | sections[1] == set(Job.model_fields)


def test_keygen_prints_the_public_key_of_a_private_file(cloister_command: Cloister, tmp_path: Path) -> None:
    from cloister.crypto.keys import PartyKey, fingerprint

    path = tmp_path / "north.key"
    shown = cloister_command("keygen", path, "--json")
    assert shown.code == 0
    report = json.loads(shown.out)
    key = PartyKey.load(path)
    assert report["public_key"] == key.public.hex()
    assert report["fingerprint"] == fingerprint(key.public)
    assert "PRIVATE" not in shown.out
    before = path.read_bytes()
    assert cloister_command("keygen", path).code == 2
    assert path.read_bytes() == before


def test_doctor_reports_every_check(cloister_command: Cloister) -> None:
    shown = cloister_command("doctor", "--json")
    report = DoctorReport.model_validate_json(shown.out)
    assert {"python", "packages", "torch", "memory", "disk", "network"} <= {check.name for check in report.checks}
    assert shown.code == (0 if report.ok else 1)
    assert all(check.hint for check in report.checks if check.status != "ok")


def test_doctor_fails_without_a_package_or_loopback(
    cloister_command: Cloister, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("forbidden")

    monkeypatch.setattr("cloister.cli.doctor._required", lambda: ["no-such-package-of-ours"])
    monkeypatch.setattr("socket.create_server", refuse)
    result = cloister_command("doctor", "--json")
    failed = {check.name for check in DoctorReport.model_validate_json(result.out).checks if check.status == "fail"}
    assert (result.code, failed) == (1, {"packages", "network"})


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_refuses_options_that_do_not_fit_its_target(cloister_command: Cloister, tmp_path: Path) -> None:
    folder = cloister_command("generate", tmp_path, "--party", "a", "--enclave", "h:1", "--prompt", "x")
    assert (folder.code, "go with a job file" in folder.err) == (2, True)
    job = cloister_command("generate", tmp_path / "job.toml", "--party", "a", "--prompt", "x")
    assert (job.code, "needs --enclave and --key" in job.err) == (2, True)


def test_export_refuses_a_folder_with_something_in_it(cloister_command: Cloister, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    refused = cloister_command("export", tmp_path, "--to", tmp_path)
    assert (refused.code, "not an empty folder" in refused.err) == (2, True)
