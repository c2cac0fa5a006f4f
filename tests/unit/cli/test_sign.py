"""Approving a job: what is shown before, what is signed, and what `join` takes for an approval."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloister.agreement import APPROVAL_LABEL, approval_message
from cloister.agreement.approval import Approval
from cloister.cli import main
from cloister.crypto.keys import PartyKey, fingerprint, verify_signature
from cloister.errors import UsageError, VerificationError
from cloister.report.outputs import ErrorReport, SignReport
from tests.integration.tiny_job import PARTIES, write_job, write_model

KEYS = {name: PartyKey.generate() for name in PARTIES}
REGISTER = "ab" * 48
POLICY = f"""
[policy]
accept = ["tdx"]
[[measurement]]
label = "cloister 0.1"
type = "tdx"
registers = {{ mr_td = "{REGISTER}" }}
"""
ANY = '[policy]\naccept = ["tdx"]\nmeasurements = "any"\n'

Cloister = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Path:
    return make(tmp_path, model)


def make(folder: Path, model: Path, policy: str = POLICY, **changes: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "policy.toml").write_text(policy)
    for name, key in KEYS.items():
        if not (folder / f"{name}.key").exists():
            key.save(folder / f"{name}.key")
    changes = {"model": {"path": str(model)}, "enclave": {"policy": "policy.toml"}, **changes}
    return write_job(folder, changes, keys={name: {"public_key": key.public.hex()} for name, key in KEYS.items()})


@pytest.fixture
def cloister(capfd: pytest.CaptureFixture[str]) -> Cloister:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def sign(job: Path, *more: str | Path, party: str = "north", key: str = "north") -> tuple[str | Path, ...]:
    return ("sign", job, "--party", party, "--key", job.parent / f"{key}.key", *more)


def join(job: Path, approval: Path) -> tuple[str | Path, ...]:
    call = ("join", job, "--party", "north", "--key", job.parent / "north.key", "--enclave", "127.0.0.1:1")
    return (*call, "--out", job.parent / "out", "--approval", approval, "--json")


def error_of(result: tuple[int, str, str]) -> tuple[int, str]:
    return result[0], ErrorReport.model_validate_json(result[1]).error.code


def test_an_approval_says_what_it_is_for_and_signs_the_jobs_id(cloister: Cloister, job: Path) -> None:
    out = job.parent / "north.json"
    code, shown, err = cloister(*sign(job, "--yes", "--out", out, "--json"))
    assert (code, err) == (0, "")
    report = SignReport.model_validate_json(shown)
    assert {p.party: p.public_key_fingerprint for p in report.parties} == {
        name: fingerprint(key.public) for name, key in KEYS.items()
    }
    assert (report.recipients, report.inference["allow"], report.accepts) == (["north"], "all", ["tdx"])
    assert [(m.label, dict(m.registers)) for m in report.measurements] == [("cloister 0.1", {"mr_td": REGISTER})]
    content = json.loads(out.read_bytes())
    message = approval_message(report.job_id)
    verify_signature(KEYS["north"].public, APPROVAL_LABEL, message, bytes.fromhex(content["signature"]))
    assert cloister(*sign(job, "--yes", "--out", out))[0] == 2  # an approval is never overwritten


def test_people_see_fingerprints_recipients_rules_and_programs(
    cloister: Cloister, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job.parent)
    code, out, _ = cloister(*sign(job, "--yes"))
    assert code == 0
    for text in (
        *(fingerprint(key.public) for key in KEYS.values()),
        "cloister 0.1",
        REGISTER[:40],
        "may query",
        "north",
    ):
        assert text in out
    assert (job.parent / "north.approval.json").is_file()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1)])
def test_it_asks(cloister: Cloister, job: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: answer == "y\n")
    out = job.parent / "approval.json"
    found, _, err = cloister(*sign(job, "--out", out))
    assert (found, out.exists()) == (code, code == 0)
    assert "fingerprints" in err


def test_without_anybody_to_ask_nothing_is_signed(
    cloister: Cloister, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert error_of(cloister(*sign(job, "--out", job.parent / "a.json", "--json"))) == (2, "usage")
    assert not (job.parent / "a.json").exists()


def test_another_partys_key_signs_nothing(cloister: Cloister, job: Path) -> None:
    assert error_of(cloister(*sign(job, "--yes", "--json", key="south"))) == (2, "usage")
    assert error_of(cloister(*sign(job, "--yes", "--json", party="east"))) == (2, "usage")


def test_join_takes_only_its_own_approval_of_this_very_job(cloister: Cloister, tmp_path: Path, model: Path) -> None:
    job, other = make(tmp_path / "one", model), make(tmp_path / "two", model, release={"to": ["south"]})
    for each, party in ((job, "north"), (job, "south"), (other, "north")):
        out = each.parent / f"{party}.json"
        assert cloister(*sign(each, "--yes", "--out", out, party=party, key=party))[0] == 0
    assert error_of(cloister(*join(job, other.parent / "north.json"))) == (3, "approval")  # re-signed recipients
    assert error_of(cloister(*join(job, job.parent / "south.json"))) == (3, "approval")
    forged = json.loads((job.parent / "north.json").read_text()) | {"signature": "00" * 64}
    (job.parent / "forged.json").write_text(json.dumps(forged))
    assert error_of(cloister(*join(job, job.parent / "forged.json"))) == (3, "signature")
    assert not (job.parent / "out" / "bundles").exists()  # refused before any data were read


def test_join_refuses_a_policy_that_takes_any_program(cloister: Cloister, tmp_path: Path, model: Path) -> None:
    job = make(tmp_path / "any", model, policy=ANY)
    call = ("join", job, "--party", "north", "--key", job.parent / "north.key", "--enclave", "enclave.example:7443")
    code, out, _ = cloister(*call, "--out", job.parent / "out", "--json")
    error = ErrorReport.model_validate_json(out).error
    assert (code, error.code, error.where) == (2, "job", "policy.measurements")
    assert "[[measurement]]" in error.hint


def test_an_approval_survives_its_file(tmp_path: Path) -> None:
    made = Approval.sign("ab" * 32, "north", KEYS["north"])
    (tmp_path / "a").write_bytes(made.to_bytes())
    read = Approval.load(tmp_path / "a")
    assert read == made
    read.check(job_id="ab" * 32, party="north", public_key=KEYS["north"].public)
    with pytest.raises(VerificationError):
        read.check(job_id="ab" * 32, party="north", public_key=KEYS["south"].public)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 4000,
        b'{"version": 1}',
        b'{"version": 1, "job_id": 1, "party": 1, "public_key"',
    ],
)
def test_things_that_are_no_approval(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UsageError, match="no approval"):
        Approval.load(tmp_path / "a")
    with pytest.raises(UsageError, match="cannot read"):
        Approval.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"signature": "00"}, {"public_key": "zz"}, {"public_key": 7}, {"more": 1}]
)
def test_an_approval_of_another_form(tmp_path: Path, change: dict[str, object]) -> None:
    content = json.loads(Approval.sign("ab" * 32, "north", KEYS["north"]).to_bytes()) | change
    (tmp_path / "a").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="no approval"):
        Approval.load(tmp_path / "a")
