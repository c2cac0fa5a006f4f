"""`cloister evaluate`: the numbers of the scores files, of whoever holds them."""

from __future__ import annotations

import pytest

from cloister.cli import main
from cloister.errors import DataError
from cloister.evaluation.rows import results_rows
from cloister.methods.evaluate import evaluate_run
from cloister.report.outputs import EvaluateReport
from tests.unit.methods.finished import SYSTEMS, Finished


def test_a_run_shows_all_its_systems_parties_and_tasks(finished: Finished) -> None:
    report = evaluate_run(finished.out)
    assert report.job_id == finished.report().job_id
    assert report.results == [row for system, scores in SYSTEMS.items() for row in results_rows(system, scores)]
    shown = {(row.system, row.party, row.task) for row in report.results}
    everyone, tasks = ("north", "south", "all"), ("answer", "choose", "all")
    assert shown == {(s, p, t) for s in ("base", "cloister") for p in everyone for t in tasks}
    for row in report.results:
        assert row.bits_per_byte_ci is not None
        assert row.bits_per_byte_ci[0] <= row.bits_per_byte <= row.bits_per_byte_ci[1]


def test_bits_per_byte_are_those_of_the_files(finished: Finished) -> None:
    rows = {(r.system, r.party, r.task): r for r in evaluate_run(finished.out).results}
    north, south = SYSTEMS["cloister"]["north"], SYSTEMS["cloister"]["south"]
    assert rows["cloister", "north", "all"].bits_per_byte == pytest.approx(north.bits.sum() / 80)
    assert rows["cloister", "all", "answer"].bits_per_byte == pytest.approx(
        (north.bits[:4].sum() + south.bits[:4].sum()) / 80
    )
    assert rows["cloister", "north", "choose"].accuracy == 0.75
    assert rows["cloister", "north", "answer"].accuracy is None


def test_a_partys_folder_shows_its_own_test_set_alone(finished: Finished) -> None:
    report = evaluate_run(finished.north)
    assert {row.party for row in report.results} == {"north"}
    assert {row.system for row in report.results} == {"base", "cloister"}
    assert "north alone" in report.warnings[0]


def test_scores_that_one_party_lacks_are_an_error_not_a_smaller_pool(finished: Finished) -> None:
    (finished.out / "parties" / "south" / "scores" / "base.jsonl").unlink()
    with pytest.raises(DataError, match="cannot read"):
        evaluate_run(finished.out)


@pytest.mark.parametrize("line", ["{}", '{"id": "a", "task": "t", "bits": NaN, "response_bytes": 1, "correct": 1}'])
def test_malformed_scores_name_their_line(finished: Finished, line: str) -> None:
    path = finished.out / "parties" / "south" / "scores" / "base.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError) as caught:
        evaluate_run(finished.out)
    assert caught.value.where == f"{path}:9"


def test_both_outputs(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (finished.out, finished.north):
        assert main(["evaluate", str(folder), "--json"]) == 0
        assert EvaluateReport.model_validate_json(capsys.readouterr().out) == evaluate_run(folder)
        assert main(["evaluate", str(folder)]) == 0
        assert "cloister" in capsys.readouterr().out
    assert main(["evaluate", str(finished.folder)]) == 2
