"""A whole run with real processes: what it leaves behind, and what it leaves nowhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cloister.agreement.receipt import verify_receipt
from cloister.attest.policy import AppraisalPolicy
from cloister.cli.app import main
from cloister.evaluation.scores import Scores
from cloister.report.model import RunReport
from tests.integration.conftest import FinishedRun
from tests.integration.search import files_under, holding, left_elsewhere, misplaced, text_forms
from tests.integration.tiny_job import PARTIES, finish

pytestmark = pytest.mark.integration

ENCLAVE_TASKS = {
    "attester": r"|the simulation, which protects nothing",
    "hashing the model": "",
    "loading latter layers": "",
    "waiting for parties": r"((north|south) \((approval|data keys|share of the sealing key|[a-z, ]+ bundle)\)(, )?)*",
    "training": r"",
    "scoring test sets": "",
    "handing out results": "",
}
"""All that an enclave's operator is told: tasks, and what a note beside one may say."""


def others(run: FinishedRun, party: str) -> list[Path]:
    """Every file of the run that is not in this party's folder, with output and temporary files of all processes."""
    found = [p for p in files_under(run.out) if run.out / "parties" / party not in p.parents]
    return [*found, *files_under(run.command)]


def test_what_a_run_leaves(finished_run: FinishedRun) -> None:
    out = finished_run.out
    for name in ("report.json", "report.html", "receipt.json", "metrics.jsonl", "job.toml", "policy.toml"):
        assert (out / name).stat().st_size > 0, name
    assert (out / "report.json").read_text() == finished_run.report.to_json()
    assert finished_run.report.attestation.hardware is False
    assert {row.system for row in finished_run.report.results} == {"base", "cloister"}
    assert not list(out.rglob("*.part"))
    for party in PARTIES:
        folder = out / "parties" / party
        assert (folder / "adapter").exists() == (party == "north")
        assert (folder / "party.key").stat().st_mode & 0o077 == 0
        for kind in ("train", "validation", "test"):
            arrived = out / "enclave" / "bundles" / f"{party}.{kind}.bundle"
            assert arrived.read_bytes() == (folder / "bundles" / f"{kind}.bundle").read_bytes()


def test_the_receipt_holds(finished_run: FinishedRun) -> None:
    out, report = finished_run.out, finished_run.report
    policy = AppraisalPolicy.load(out / "policy.toml")
    for path in (out / "receipt.json", *(out / "parties" / party / "receipt.json" for party in PARTIES)):
        verdict = verify_receipt(
            path.read_bytes(), policy=policy, adapter_sha256=report.adapter_sha256, allow_simulated=True
        )
        assert verdict.passed, verdict.checks
        assert verdict.signers == sorted(PARTIES)
        assert verdict.body["job_id"] == report.job_id
        rows = [row.model_dump(mode="json") for row in report.results]
        assert all(metric in rows for metric in verdict.body["metrics"])


def test_stdout_is_one_object_and_stderr_only_progress(finished_run: FinishedRun) -> None:
    RunReport.model_validate_json((finished_run.command / "stdout").read_text())
    lines = (finished_run.command / "stderr").read_text().splitlines()
    assert lines
    assert [line for line in lines if not line.startswith('{"progress":')] == []


def test_a_finished_run_is_not_run_again(finished_run: FinishedRun, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in files_under(finished_run.out) if path.name != "job.toml"}
    # As a process: it writes down the job's id again, and this one's umask would let others read it.
    again = finish("run", finished_run.job, "--out", finished_run.out, "--json", folder=tmp_path)
    assert again.process.returncode == 0, again.stderr
    assert RunReport.model_validate_json(again.stdout) == finished_run.report
    after = {path: path.stat().st_mtime_ns for path in files_under(finished_run.out) if path.name != "job.toml"}
    assert {p for p in before if before[p] != after.get(p)} <= {finished_run.out / "job_id"}


def test_the_folder_of_another_job(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = finished_run.job.read_text().replace("seed = 1", "seed = 2")
    text = text.replace('"model"', json.dumps(str(finished_run.job.parent / "model")))
    text = text.replace('"data/', f'"{finished_run.job.parent}/data/')
    (tmp_path / "job.toml").write_text(text)
    before = {path: path.read_bytes() for path in files_under(finished_run.out)}
    assert main(["run", str(tmp_path / "job.toml"), "--out", str(finished_run.out), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "usage"
    assert "another job" in error["message"]
    assert {path: path.read_bytes() for path in files_under(finished_run.out)} == before


# Leaks ----------------------------------------------------------------------------------------------------------------


def test_a_partys_text_is_nowhere_else(finished_run: FinishedRun) -> None:
    """Training text in no file but the party's own data, test text in none but those of the party."""
    files = [*files_under(finished_run.out), *files_under(finished_run.command)]
    foreign = others(finished_run, "north")
    assert len(foreign) > 20
    for part, paths in {"train": files, "test": foreign}.items():
        canary = finished_run.canaries[part]
        assert holding([finished_run.job.parent / "data" / f"north-{part}.jsonl"], canary.encode()) != []
        assert holding(paths, *text_forms(canary)) == []


def test_nothing_in_temporary_folders(finished_run: FinishedRun) -> None:
    assert list((finished_run.command / "tmp").iterdir()) == []
    since, session = finished_run.job.stat().st_mtime, finished_run.job.parents[1]
    shared = left_elsewhere(since, besides=session)
    assert holding(shared, *(form for text in finished_run.canaries.values() for form in text_forms(text))) == []
    assert misplaced(shared, finished_run.secrets()) == []


def test_scores_of_single_examples_stay_with_their_party(finished_run: FinishedRun) -> None:
    for party in PARTIES:
        for system in ("base", "cloister"):
            path = finished_run.out / "parties" / party / "scores" / f"{system}.jsonl"
            scores = Scores.from_json_lines(path.read_text())
            assert scores.example_id == [f"{party}-test-{i}" for i in range(6)]
            for bits in scores.bits:
                assert holding(others(finished_run, party), repr(float(bits)).encode()) == []
        assert holding(others(finished_run, party), f"{party}-test-".encode()) == []


def test_secret_keys_stay_with_their_party(finished_run: FinishedRun) -> None:
    owned = finished_run.secrets()
    assert len(owned) == len(PARTIES) * 4
    assert misplaced([*files_under(finished_run.out), *files_under(finished_run.command)], owned) == []


def test_the_operator_reads_phases_counts_and_sizes_only(finished_run: FinishedRun) -> None:
    for log in (finished_run.out / "logs").iterdir():
        assert log.read_text() == "", log
    events = [json.loads(line)["progress"] for line in (finished_run.command / "stderr").read_text().splitlines()]
    tasks = {event["task"].removeprefix("enclave: ") for event in events if event["task"].startswith("enclave: ")}
    assert tasks == set(ENCLAVE_TASKS)
    for event in events:
        if event["task"].startswith("enclave: "):
            assert re.fullmatch(ENCLAVE_TASKS[event["task"].removeprefix("enclave: ")], event["note"]), event
