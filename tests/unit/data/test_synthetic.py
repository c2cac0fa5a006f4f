"""The demo's data are reproducible, very different from party to party, and follow one set of rules.

The pinned hash is the oracle for "same bytes on every machine and Python version".
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from cloister.data import synthetic
from cloister.data.records import load_records
from cloister.data.synthetic import Dice, Record, generate_party, write_demo_data
from cloister.data.synthetic_corpus import pretraining_documents
from cloister.data.synthetic_words import (
    ADVICE_TIMING,
    ADVICE_TREATMENT,
    LABELS,
    RISKS,
    SHARED_SEVERITY,
    SPECIALITIES,
    Speciality,
)

PINNED_DATA = "4d0a112856f76a38923bca9bce5aceb8455a5882e66e45ffa960bcc9c8ec4246"
PINNED_CORPUS = "2ba7737db8fdbefe0f76c2ab6a24ad65b128df0d37541521d69854c503554bb6"


def triage(speciality: Speciality, split: synthetic.Split, count: int = 500) -> list[Record]:
    """The triage records among `count` of a party's."""
    return [r for r in generate_party(speciality.name, split, count, 7) if r["task"] == "triage"]


def label_shares(speciality: Speciality, split: synthetic.Split) -> list[float]:
    """Share of each label among the triage records."""
    counts = Counter(r["answer"] for r in triage(speciality, split, 2000))
    return [counts[i] / counts.total() for i in range(len(LABELS))]


def words_in(text: str, options: tuple[str, ...]) -> list[str]:
    """Which of the phrases stand in a text as whole words."""
    return [o for o in options if re.search(rf"(?<!\w){re.escape(o)}(?!\w)", text)]


def facts_in(speciality: Speciality, prompt: str) -> tuple[int, int]:
    """(kind, level) as a reader finds them in a note; the rules written a second time, from words to label."""
    kinds = {k for k, findings in enumerate(speciality.findings) if words_in(prompt, findings)}
    phrases = zip(speciality.severity, SHARED_SEVERITY, strict=True)
    severities = {s for s, (own, shared) in enumerate(phrases) if words_in(prompt, (*own, shared))}
    assert len(kinds) == 1, prompt
    assert len(severities) == 1, prompt
    return kinds.pop(), min(2, severities.pop() + len(words_in(prompt, RISKS)))


def test_the_files_are_the_same_everywhere(tmp_path: Path) -> None:
    """A changed word, rule or order of draws changes this hash; so would a Python whose generator differs."""
    write_demo_data(tmp_path, seed=1, train=40, test=20)
    digest = hashlib.sha256()
    for path in sorted(tmp_path.rglob("*.jsonl")):
        digest.update(path.relative_to(tmp_path).as_posix().encode() + b"\0" + path.read_bytes())
    assert digest.hexdigest() == PINNED_DATA


def test_the_corpus_is_the_same_everywhere() -> None:
    """The base model is reproducible only from the same text."""
    assert (
        hashlib.sha256("\0".join(d.text for d in pretraining_documents(200, 1)).encode()).hexdigest() == PINNED_CORPUS
    )


def test_dice_uses_only_the_sequence_that_python_promises_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """`choice`, `shuffle` and others have changed between versions; `random()` is documented not to."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not stable across Python versions")

    for name in ("randrange", "choice", "choices", "shuffle", "sample", "randint", "uniform", "getrandbits"):
        monkeypatch.setattr(random.Random, name, forbidden)
    assert len(generate_party("cardiology", "train", 50, 0)) == 50
    assert len(list(pretraining_documents(50, 0))) == 50


def test_seed_and_split_give_other_records() -> None:
    """Neither another seed nor the test split repeats a training note."""
    first = {str(r["prompt"]) for r in generate_party("neurology", "train", 300, 0)}
    assert not first & {str(r["prompt"]) for r in generate_party("neurology", "train", 300, 1)}
    assert not first & {str(r["prompt"]) for r in generate_party("neurology", "test", 300, 0)}


def test_a_shorter_run_is_a_beginning_of_a_longer_one() -> None:
    """Counts may be changed without new records."""
    assert generate_party("dermatology", "test", 30, 3) == generate_party("dermatology", "test", 60, 3)[:30]


@pytest.mark.parametrize("speciality", SPECIALITIES, ids=lambda s: s.name)
@pytest.mark.parametrize("split", ["train", "test"])
def test_records_are_well_formed(speciality: Speciality, split: synthetic.Split) -> None:
    """Same twelve choices for all; the answer is the response; lengths as promised; ids and notes differ."""
    records = generate_party(speciality.name, split, 1000, 5)
    assert len({r["id"] for r in records}) == 1000
    assert len({r["prompt"] for r in records}) > 990
    assert Counter(r["task"] for r in records) == {"triage": 600, "advice": 400}
    for record in records:
        assert 25 <= len(str(record["prompt"]).split()) <= 70
        if record["task"] == "triage":
            assert record["choices"] == list(LABELS)
            assert record["question"] == record["prompt"]
            assert LABELS[int(str(record["answer"]))] == record["response"]
        else:
            assert 8 <= len(str(record["response"]).split()) <= 35
            assert set(record) == {"id", "task", "prompt", "response"}


@pytest.mark.parametrize("speciality", SPECIALITIES, ids=lambda s: s.name)
def test_the_label_follows_from_the_words_of_the_note(speciality: Speciality) -> None:
    """A reader who knows the rules finds every answer, so the task can be learnt; no note is ambiguous."""
    for record in triage(speciality, "test"):
        kind, level = facts_in(speciality, str(record["prompt"]))
        assert record["answer"] == 3 * kind + level


@pytest.mark.parametrize("speciality", SPECIALITIES, ids=lambda s: s.name)
def test_the_advice_follows_from_the_words_of_the_note(speciality: Speciality) -> None:
    """Treatment by kind with the site of the note, and the time by level."""
    for record in generate_party(speciality.name, "test", 500, 2):
        if record["task"] == "triage":
            continue
        kind, level = facts_in(speciality, str(record["prompt"]))
        sites = words_in(str(record["prompt"]), speciality.sites)
        options = (*ADVICE_TREATMENT[kind], speciality.treatment[kind])
        given = str(record["response"])
        assert any(o.format(site=s) in given for o in options for s in sites), given
        assert words_in(given, ADVICE_TIMING[level]), given


def test_neither_kind_nor_level_alone_decides_the_label() -> None:
    """The best guess from one of the two is right far less often than both together, which are always right."""
    records = [(s, r) for s in SPECIALITIES for r in triage(s, "test")]
    for part in (0, 1):
        by_part: dict[int, Counter[str]] = {}
        for speciality, record in records:
            seen = facts_in(speciality, str(record["prompt"]))[part]
            by_part.setdefault(seen, Counter())[str(record["response"])] += 1
        assert sum(c.most_common(1)[0][1] for c in by_part.values()) / len(records) < 0.6


@pytest.mark.parametrize("speciality", SPECIALITIES, ids=lambda s: s.name)
def test_a_party_trains_on_few_labels_and_is_tested_on_all(speciality: Speciality) -> None:
    """Its five common labels are 92 % of training and 60 % of test; every label occurs in both."""
    train, test = label_shares(speciality, "train"), label_shares(speciality, "test")
    assert min(train) > 0
    assert min(test) > 0.03
    assert sum(train[i] for i in speciality.common) == pytest.approx(0.92, abs=0.025)
    assert sum(test[i] for i in speciality.common) == pytest.approx(0.60, abs=0.045)


def test_the_parties_differ() -> None:
    """Label distributions are far apart (total variation), finding words disjoint, and together all labels common."""
    shares = [label_shares(s, "train") for s in SPECIALITIES]
    for i, a in enumerate(SPECIALITIES):
        for j in range(i):
            assert sum(abs(x - y) for x, y in zip(shares[i], shares[j], strict=True)) / 2 > 0.45
            assert not {f for k in a.findings for f in k} & {f for k in SPECIALITIES[j].findings for f in k}
    assert {label for s in SPECIALITIES for label in s.common} == set(range(12))


def test_the_corpus_does_not_tell_what_follows_from_a_note() -> None:
    """Where a label or advice follows a note, it is independent of the note's kind and level (chi-squared)."""
    by_kind, by_level = np.zeros((4, 4)), np.zeros((3, 3))
    treatment_by_kind, timing_by_level = np.zeros((4, 4)), np.zeros((3, 3))
    for document in pretraining_documents(5000, 0):
        note, after = document.text[: document.unscored], document.text[document.unscored :]
        if not note:
            continue
        speciality = next(s for s in SPECIALITIES if any(words_in(note, f) for f in s.findings))
        kind, level = facts_in(speciality, note)
        for label in words_in(after, LABELS):
            by_kind[kind, LABELS.index(label) // 3] += 1
            by_level[level, LABELS.index(label) % 3] += 1
        for k in range(4):
            lines = (*ADVICE_TREATMENT[k], speciality.treatment[k])
            treatment_by_kind[kind, k] += any(t.format(site=s) in after for t in lines for s in speciality.sites)
        for k in range(3):
            timing_by_level[level, k] += bool(words_in(after, ADVICE_TIMING[k]))
    for table in (by_kind, by_level, treatment_by_kind, timing_by_level):
        assert table.min() > 10, table
        assert chi2_contingency(table).pvalue > 0.001, table


def test_the_corpus_shows_labels_and_findings_together_only_in_notes() -> None:
    """No textbook line says which clinic treats a finding."""
    findings = tuple(f for s in SPECIALITIES for kind in s.findings for f in kind)
    loose = [
        d.text for d in pretraining_documents(4000, 0) if d.text.startswith(("Triage words", "Leaflet", "In ", "Among"))
    ]
    assert len(loose) > 1000
    for text in loose:
        assert not (words_in(text, LABELS) and words_in(text, findings)), text


def test_unscored_text_is_the_note_and_nothing_else() -> None:
    """Every question and answer of a document carries loss."""
    documents = list(pretraining_documents(1000, 0))
    assert any(d.unscored for d in documents)
    for text, unscored in documents:
        assert unscored == 0 or "\n" not in text[:unscored].removeprefix("- ").rstrip("\n").replace("\n- ", " ")
        assert len(text) - unscored > 10


def test_written_files_are_read_back(tmp_path: Path) -> None:
    """Five folders, counts as asked; the product's own reader accepts every record."""
    files = write_demo_data(tmp_path, seed=0, train=10, test=5)
    assert [f.name for f in files] == [s.name for s in SPECIALITIES]
    for name, train, test in files:
        assert (train, test) == (tmp_path / name / "train.jsonl", tmp_path / name / "test.jsonl")
        assert len(load_records(train)) == 10
        rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
        assert rows == generate_party(name, "test", 5, 0)


@pytest.mark.parametrize(("name", "split", "count"), [("dentistry", "train", 1), ("cardiology", "dev", 1)])
def test_unknown_names_are_refused(name: str, split: synthetic.Split, count: int) -> None:
    """A typing mistake does not quietly give other data."""
    with pytest.raises(ValueError, match="no synthetic data"):
        generate_party(name, split, count, 0)


def test_dice_are_fair() -> None:
    """Each face of a die and each weighted index comes up as often as it should, within four standard deviations."""
    dice = Dice("fair", 0)
    n = 20_000
    faces = Counter(dice.below(6) for _ in range(n))
    assert all(abs(faces[i] - n / 6) < 4 * (n * 5 / 36) ** 0.5 for i in range(6))
    drawn = Counter(dice.weighted((1.0, 0.0, 3.0)) for _ in range(n))
    assert drawn[1] == 0
    assert abs(drawn[0] - n / 4) < 4 * (n * 3 / 16) ** 0.5
