"""Rows and paired comparisons against hand-made numbers, and everything that does not pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cloister.errors import DataError
from cloister.evaluation import statistics
from cloister.evaluation.compare import (
    compare,
    compare_scores,
    compare_systems,
    compare_with_foreign,
    load_run,
    pair,
    scores_path,
)
from cloister.evaluation.rows import cross_rows, results_rows
from cloister.evaluation.scores import Scores
from cloister.report.model import RunReport
from tests.unit.report.fake import run_report


def make(
    n: int, *, rate: float = 1.2, right: float = 0.5, seed: int = 0, tasks: tuple[str, ...] = ("a", "b")
) -> Scores:
    """n examples; the first task has no choices when there are several."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    size = shared.integers(5, 200, n)
    task = [tasks[i % len(tasks)] for i in range(n)]
    correct = (rng.random(n) < right).astype(np.int8)
    if len(tasks) > 1:
        correct[[t == tasks[0] for t in task]] = -1
    return Scores(
        example_id=[f"e{i}" for i in range(n)],
        task=task,
        bits=size * rate * rng.gamma(50, 1 / 50, n),
        response_bytes=size.astype(np.int64),
        correct=correct,
    )


def test_rows_cover_parties_tasks_and_pools() -> None:
    scores = {"x": make(40), "y": make(60, rate=2.0, seed=1)}
    rows = {(r.party, r.task): r for r in results_rows("cloister", scores)}
    assert list(rows) == [(p, t) for p in ("x", "y", "all") for t in ("a", "b", "all")]
    assert [rows["all", t].examples for t in ("a", "b", "all")] == [50, 50, 100]
    assert rows["all", "a"].accuracy is None
    assert rows["all", "a"].accuracy_ci is None


def test_pooled_rows_are_ratios_of_sums() -> None:
    x, y = make(40), make(60, rate=2.0, seed=1)
    pooled = next(r for r in results_rows("base", {"x": x, "y": y}) if (r.party, r.task) == ("all", "all"))
    assert pooled.bits_per_byte == pytest.approx(
        (x.bits.sum() + y.bits.sum()) / (x.response_bytes.sum() + y.response_bytes.sum())
    )
    judged = np.concatenate([s.correct[s.correct >= 0] for s in (x, y)])
    assert pooled.accuracy == pytest.approx(judged.mean())
    assert pooled.bits_per_byte_ci is not None
    assert pooled.bits_per_byte_ci[0] < pooled.bits_per_byte < pooled.bits_per_byte_ci[1]


def test_a_single_task_is_both_its_own_row_and_the_pool() -> None:
    rows = results_rows("base", {"x": make(20, tasks=("only",))})
    assert [(r.party, r.task) for r in rows] == [("x", "only"), ("x", "all"), ("all", "only"), ("all", "all")]
    assert len({r.bits_per_byte for r in rows}) == 1


def test_local_rows_name_their_owner_and_pools_name_nobody() -> None:
    rows = results_rows("local", {"x": make(20), "y": make(20)})
    assert {(r.party, r.trained_on) for r in rows} == {("x", "x"), ("y", "y"), ("all", None)}


def test_cross_rows_leave_out_home_and_pool_the_rest() -> None:
    scores = {p: make(20, seed=i) for i, p in enumerate("xyz")}
    rows = cross_rows({"x": scores, "y": scores, "z": scores})
    assert all(r.party != r.trained_on for r in rows)
    others = next(r for r in rows if (r.trained_on, r.party) == ("x", "others"))
    bits = sum(scores[p].bits.sum() for p in "yz")
    assert others.bits_per_byte == pytest.approx(bits / sum(scores[p].response_bytes.sum() for p in "yz"))
    assert cross_rows({"x": {"x": scores["x"]}}) == []


def test_pairing_ignores_file_order() -> None:
    a = make(30)
    shuffled = make(30, seed=3).take(np.random.default_rng(0).permutation(30))
    paired = pair(a, shuffled, where="here")
    assert paired.b.example_id == a.example_id
    assert np.array_equal(paired.b.bits, make(30, seed=3).bits)


def test_examples_that_do_not_pair_are_named() -> None:
    with pytest.raises(DataError, match=r"5 examples .*'e25', 'e26', 'e27', \.\.\.") as caught:
        pair(make(30), make(30).take(range(25)), where="party x")
    assert caught.value.where == "party x"


@pytest.mark.parametrize("field", ["task", "response_bytes", "correct"])
def test_examples_that_differ_between_runs_are_named(field: str) -> None:
    a, b = make(6), make(6)
    if field == "task":
        b.task[2] = "other"
    elif field == "response_bytes":
        b.response_bytes[2] += 1
    else:
        b.correct[2] = 0
    with pytest.raises(DataError, match=r"1 examples have another .*'e2'"):
        pair(a, b, where="here")


def test_doubled_ids_are_refused() -> None:
    with pytest.raises(DataError, match="twice"):
        pair(make(4).take([0, 1, 1]), make(4).take([0, 1, 2]), where="here")


def test_parties_that_do_not_pair_are_named() -> None:
    with pytest.raises(DataError, match="scores of: y"):
        compare_scores({"x": make(5)}, {"x": make(5), "y": make(5)}, names=("a", "b"), where="here")


def test_holm_runs_over_the_parties_and_not_over_the_pool() -> None:
    a = {p: make(50, rate=1.15, seed=i) for i, p in enumerate("xyz")}
    b = {p: make(50, rate=1.2, seed=i + 10) for i, p in enumerate("xyz")}
    rows = [r for r in compare_scores(a, b, names=("a", "b"), where="here") if r.metric == "bits_per_byte"]
    by_party = {r.party: r for r in rows}
    assert [by_party[p].p_holm for p in "xyz"] == pytest.approx(statistics.holm([by_party[p].p for p in "xyz"]))
    assert by_party["all"].p_holm == by_party["all"].p
    assert by_party["all"].examples == 150


def test_accuracy_rows_count_only_examples_with_choices() -> None:
    a, b = {"x": make(60, right=0.9)}, {"x": make(60, right=0.3, seed=4)}
    row = next(r for r in compare_scores(a, b, names=("a", "b"), where="here") if r.metric == "accuracy")
    assert row.examples == 30
    assert row.delta > 0
    assert row.p < 0.05
    without = {"x": make(10).take(range(0, 10, 2))}
    assert {r.metric for r in compare_scores(without, without, names=("a", "b"), where="here")} == {"bits_per_byte"}


def test_systems_are_compared_with_cloister() -> None:
    good, bad = {"x": make(80, rate=1.0)}, {"x": make(80, rate=1.3)}
    rows = compare_systems({"base": bad, "cloister": good})
    assert {(r.a, r.b) for r in rows} == {("cloister", "base")}
    assert all(r.delta < 0 and r.p_holm < 0.01 for r in rows if r.metric == "bits_per_byte")


def test_foreign_comparison_uses_the_other_parties_examples_only() -> None:
    cloister = {"x": make(40, rate=1.0), "y": make(40, rate=1.0), "z": make(40, rate=1.0)}
    # Home scores are absurdly good: were they counted, the local model would win.
    local = {t: {p: make(40, rate=0.01 if p == t else 1.2, seed=2) for p in "xyz"} for t in "xyz"}
    rows = [r for r in compare_with_foreign(cloister, local) if r.metric == "bits_per_byte"]
    assert [r.trained_on for r in rows] == ["x", "y", "z"]
    assert all(r.party == "others" and r.examples == 80 and r.delta < 0 for r in rows)


def write_run(folder: Path, report: RunReport, scores: Scores) -> None:
    folder.mkdir()
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    for party in report.parties:
        path = scores_path(folder, party.name, "cloister")
        path.parent.mkdir(parents=True)
        path.write_text(scores.to_json_lines(), encoding="utf-8")


def test_two_run_folders_are_compared_from_disk(tmp_path: Path) -> None:
    report = run_report(names=("x", "y"))
    write_run(tmp_path / "a", report, make(40, rate=1.0))
    write_run(tmp_path / "b", report.model_copy(update={"model": "other"}), make(40, rate=1.1))
    found = compare(load_run(tmp_path / "a"), load_run(tmp_path / "b"))
    pooled = next(r for r in found.comparisons if (r.party, r.metric) == ("all", "bits_per_byte"))
    assert pooled.delta == pytest.approx(make(40, rate=1.0).bits_per_byte() - make(40, rate=1.1).bits_per_byte())
    assert found.a.path.endswith("a")
    assert [w for w in found.warnings if "base models differ" in w]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no scores"),
        (b'{"id": "e", "task": "t", "bits": NaN, "response_bytes": 3, "correct": 1}\n', "possible"),
        (b'{"id": "e", "task": "t", "bits": 1.0, "response_bytes": 0, "correct": 1}\n', "possible"),
        (b'{"id": "e"}\n', "line of scores"),
        (b"\xff", "UTF-8"),
        (None, "cannot read"),
    ],
    ids=["empty", "nan", "no bytes", "keys", "encoding", "missing"],
)
def test_bad_score_files_are_refused(tmp_path: Path, text: bytes | None, message: str) -> None:
    folder = tmp_path / "run"
    write_run(folder, run_report(names=("x",)), make(3))
    path = scores_path(folder, "x", "cloister")
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        load_run(folder)
    assert caught.value.where.startswith(str(path))
