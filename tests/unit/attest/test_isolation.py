"""An enclave's Python is isolated wherever evidence of a TEE speaks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cloister.attest.isolation import interpreter_flags, isolation_faults, require_isolated
from cloister.attest.verify import VERIFIERS
from cloister.errors import UsageError

ASK = "from cloister.attest.isolation import isolation_faults; print('; '.join(isolation_faults()))"


def faults(*flags: str, **variables: str) -> str:
    """What a fresh interpreter says of itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    command = [sys.executable, *flags, "-c", ASK]
    run = subprocess.run(command, env=environment | variables, check=True, capture_output=True, text=True)
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("flags", "missing"),
    [((), ("environment", "folder", "user")), (("-E", "-P"), ("user",)), (("-s", "-P"), ("environment",)),
     (("-E", "-s"), ("folder",))],
    ids=["nothing", "user packages", "environment", "current folder"],
)  # fmt: skip
def test_every_hole_is_named(flags: tuple[str, ...], missing: tuple[str, ...]) -> None:
    said = faults(*flags, HF_HUB_OFFLINE="1")
    assert [word for word in ("environment", "folder", "user") if word in said] == list(missing)


def test_an_isolated_and_offline_python_has_none() -> None:
    assert faults("-I", HF_HUB_OFFLINE="1") == ""
    assert "model hub" in faults("-I")


def test_the_faults_are_those_of_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with flags as another one may have them; the tests above have real ones."""
    names = ("ignore_environment", "safe_path", "no_user_site")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    for closed in [(), *((name,) for name in names), names]:
        flags = SimpleNamespace(**{name: name in closed for name in names})
        monkeypatch.setattr("cloister.attest.isolation.sys", SimpleNamespace(flags=flags))
        assert len(isolation_faults()) == len(names) - len(closed)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    assert ["model hub" in fault for fault in isolation_faults()] == [True]


def test_isolation_is_more_than_a_claim(tmp_path: Path) -> None:
    """What `isolation_faults` reads off the interpreter: a module in PYTHONPATH does not run under -I, else it does."""
    (tmp_path / "cbor2.py").write_text("print('another program')\n")
    for flags, expected in (((), "another program\n"), (("-I",), "")):
        command = [sys.executable, *flags, "-c", "import cbor2"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert run.stdout == expected


def test_evidence_of_a_tee_wants_it_and_other_evidence_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.attest.isolation.isolation_faults", lambda: ["it is open"])
    refused = {kind for kind in VERIFIERS if not _may_run(kind)}
    assert refused == {"azure-vtpm", "nitro", "sev-snp", "sgx", "tdx"}
    with pytest.raises(UsageError, match="it is open") as error:
        require_isolated("tdx")
    assert error.value.where == "enclave"
    assert "-I -m cloister" in error.value.hint
    monkeypatch.setattr("cloister.attest.isolation.isolation_faults", list)
    require_isolated("tdx")


def _may_run(kind: str) -> bool:
    try:
        require_isolated(kind)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((1, 1, 1), ["-I"]), ((0, 1, 1), []), ((1, 0, 1), []), ((1, 1, 0), [])],
)
def test_what_is_started_is_as_isolated_as_the_enclave(
    flags: tuple[int, int, int], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = dict(zip(("ignore_environment", "safe_path", "no_user_site"), flags, strict=True))
    monkeypatch.setattr("cloister.attest.isolation.sys", SimpleNamespace(flags=SimpleNamespace(**closed)))
    assert interpreter_flags() == expected
