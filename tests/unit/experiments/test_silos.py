"""Test sets are sampled once, and more silos hold the same records as five."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiments.silos import Row, classification_only, prepare_files, sample, split_silos

from cloister.errors import DataError
from cloister.job import Job


def rows(path: str | None) -> list[Row]:
    return [json.loads(line) for line in Path(path or "").read_text().splitlines()]


def test_choices_are_kept_where_they_are_labels() -> None:
    labels = [{"id": i, "task": "label", "choices": ["b", "a"] if i else ["a", "b"], "answer": 0} for i in range(3)]
    exam = [{"id": i, "task": "exam", "choices": [f"x{i}", "y"], "answer": 0, "question": "?"} for i in range(3)]
    assert classification_only([*labels, *exam]) == [*labels, *({"id": i, "task": "exam"} for i in range(3))]


def test_a_sample_has_so_many_of_each_task_in_file_order_and_is_always_the_same() -> None:
    given = [{"id": i, "task": "ab"[i % 2]} for i in range(40)]
    found = sample(given, 5)
    assert [row["task"] for row in found].count("a") == [row["task"] for row in found].count("b") == 5
    assert [row["id"] for row in found] == sorted(row["id"] for row in found)
    assert found == sample(given, 5)
    assert sample(given, 99) == given


def test_silos_share_out_every_record_once(base: Job, tmp_path: Path) -> None:
    base = prepare_files(base, tmp_path / "files", examples=2)
    for party in base.party:
        path = Path(party.train or "")
        marked = [row | {"silo": f"s{i % 3}"} for i, row in enumerate(rows(party.train))]
        path.write_text("".join(json.dumps(row) + "\n" for row in marked))
    split = split_silos(base, tmp_path / "silos", 20)
    assert len(split.party) == 20
    for party in base.party:
        mine = [p for p in split.party if p.name.startswith(f"{party.name}.")]
        for part in ("train", "test"):
            found = [row for p in mine for row in rows(getattr(p, part))]
            assert sorted(r["id"] for r in found) == sorted(r["id"] for r in rows(getattr(party, part)))
        silos = [sorted({row["silo"] for row in rows(p.train)}) for p in mine]
        assert sum(map(len, silos)) <= 3 + 3, "a silo lies in one party or in two neighbours"


def test_bad_silos_are_refused(base: Job, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no multiple of the 5 sets"):
        split_silos(base, tmp_path, 7)
    with pytest.raises(DataError, match="too few rows"):
        split_silos(base, tmp_path, 100)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no json\n")
    bad = base.model_copy(update={"party": [base.party[0].model_copy(update={"test": str(broken)})]})
    with pytest.raises(DataError, match="JSON lines"):
        prepare_files(bad, tmp_path, examples=1)
