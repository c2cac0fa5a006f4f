"""Seeded generator of the demo's clinical records: invented patients, five very different parties.

Every record is made from `Facts`. Its kind (of the finding) and level (severity, plus one for an added risk) decide
the triage label, and together with speciality and age group the advice. The parties share these rules; vocabulary,
layout and the labels that are common differ (`synthetic_words`). So a party alone sees too little of the rare labels,
and what it lacks stands in the records of the others.

The same seed gives the same bytes on every machine and Python version: only `random.Random.random`, whose sequence
Python promises to keep, is used, and nothing depends on hash order.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from cloister.data.synthetic_words import (
    ADVICE_TIMING,
    ADVICE_TREATMENT,
    ADVICE_WHO,
    AGE_GROUPS,
    CALL_DAYS,
    CALL_LINES,
    COURSES,
    DURATIONS,
    LABELS,
    LEVELS,
    NEUTRALS,
    RISKS,
    SHARED_SEVERITY,
    SPECIALITIES,
    Speciality,
)

Split = Literal["train", "test"]
Record = dict[str, str | int | list[str]]
Item = TypeVar("Item")

COMMON_SHARE = {"train": 0.92, "test": 0.60}
"""Share of a party's records that carry one of its common labels; the rest is spread over the other labels."""
TRIAGE_SHARE = (3, 5)
"""Three of every five records are triage, two are advice."""
OWN_SEVERITY_SHARE = 0.65
"""How often a party words severity in its own way and not in the shared one."""
YEARS = ((1, 15), (16, 69), (70, 95))
"""Ages of the three age groups, both ends included."""


class Dice:
    """Random choices that stay the same for a seed, whatever the Python version."""

    def __init__(self, *seed: object) -> None:
        digest = hashlib.sha256("/".join(map(str, seed)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big"))  # noqa: S311 - demo text, not a secret

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        return int(self._random.random() * n)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random.random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], n: int) -> list[Item]:
        """Distinct items in random order, n of them."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(n)]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, drawn in proportion to the weights."""
        left = self._random.random() * sum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return len(weights) - 1  # rounding only


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is true of one invented patient, and the words chosen for it."""

    kind: int
    severity: int
    risk: str | None
    age_group: int
    age: int
    sex: str
    finding: str
    site: str
    severity_words: str
    duration: str
    course: str
    background: str
    observation: str

    @property
    def level(self) -> int:
        """Severity, one higher where a risk is added, at most 2."""
        return min(self.severity + (self.risk is not None), LEVELS - 1)

    @property
    def label(self) -> int:
        """Index of the triage label that the rules give."""
        return self.kind * LEVELS + self.level


def draw_facts(dice: Dice, speciality: Speciality, label: int) -> Facts:
    """Invent a patient of this speciality for whom the rules give this label."""
    kind, level = divmod(label, LEVELS)
    severity, risky = _severity_and_risk(dice, level)
    risk = dice.pick(RISKS) if risky else None
    history = [*dice.some(NEUTRALS, 1), risk] if risk else dice.some(NEUTRALS, 2)
    own = dice.chance(OWN_SEVERITY_SHARE)
    age_group = dice.weighted(speciality.ages)
    first, last = YEARS[age_group]
    return Facts(
        kind=kind,
        severity=severity,
        risk=risk,
        age_group=age_group,
        age=first + dice.below(last - first + 1),
        sex=dice.pick(("man", "woman") if AGE_GROUPS[age_group] != "child" else ("boy", "girl")),
        finding=dice.pick(speciality.findings[kind]),
        site=dice.pick(speciality.sites),
        severity_words=dice.pick(speciality.severity[severity]) if own else SHARED_SEVERITY[severity],
        duration=dice.pick(DURATIONS),
        course=dice.pick(COURSES),
        background=" and ".join(dice.some(history, len(history))),
        observation=dice.pick(speciality.observations),
    )


def _severity_and_risk(dice: Dice, level: int) -> tuple[int, bool]:
    """A severity, and whether a risk is added, that together make this level."""
    ways = (((0, False),), ((1, False), (0, True)), ((2, False), (1, True), (2, True)))[level]
    return ways[dice.weighted((0.88, 0.09, 0.03)[: len(ways)])]


def write_note(dice: Dice, speciality: Speciality, facts: Facts) -> str:
    """The note on this patient in the speciality's own layout."""
    return dice.pick(speciality.notes).format(
        age=facts.age,
        sex=facts.sex,
        finding=facts.finding,
        site=facts.site,
        severity=facts.severity_words,
        duration=facts.duration,
        course=facts.course,
        background=facts.background,
        observation=facts.observation,
    )


def write_advice(dice: Dice, speciality: Speciality, facts: Facts) -> str:
    """A short answer for this patient: who is spoken to, what to do, when to come back, when we call."""
    treatment = dice.pick((*ADVICE_TREATMENT[facts.kind], speciality.treatment[facts.kind])).format(site=facts.site)
    who = dice.pick(ADVICE_WHO[facts.age_group])
    timing = dice.pick(ADVICE_TIMING[facts.level])
    return speciality.advice.format(who=who, treatment=treatment, timing=timing, call=draw_call(dice))


def draw_call(dice: Dice) -> str:
    """Day, time and line of a telephone call: about 13 bits that nothing in a note tells."""
    day, hour, minute = dice.pick(CALL_DAYS), 8 + dice.below(10), 10 * dice.below(6)
    return f"{day} {hour}:{minute:02}, line {1 + dice.below(CALL_LINES)}"


def generate_party(speciality: str, split: Split, count: int, seed: int) -> list[Record]:
    """Make one party's records.

    Args:
        speciality: name of one of `SPECIALITIES`.
        split: "train" (mostly common labels) or "test" (all labels); the two are drawn independently.
        count: number of records.
        seed: the same seed gives the same records.

    Returns:
        Rows with id, task, prompt and response; task "triage" has question, choices and answer (an index) as well.

    Raises:
        ValueError: unknown speciality or split, or a negative count.
    """
    by_name = {s.name: s for s in SPECIALITIES}
    if speciality not in by_name or split not in COMMON_SHARE or count < 0:
        raise ValueError(f"no synthetic data for speciality {speciality!r}, split {split!r}, count {count}")
    dice = Dice("records", speciality, split, seed)
    return [_record(dice, by_name[speciality], split, index) for index in range(count)]


def _record(dice: Dice, speciality: Speciality, split: Split, index: int) -> Record:
    facts = draw_facts(dice, speciality, dice.weighted(label_weights(speciality, split)))
    note = write_note(dice, speciality, facts)
    identity = f"{speciality.name}-{split}-{index:04d}"
    if index % TRIAGE_SHARE[1] >= TRIAGE_SHARE[0]:
        response = write_advice(dice, speciality, facts)
        return {"id": identity, "task": "advice", "prompt": f"{note}\n{speciality.counsel}", "response": response}
    prompt = f"{note}\n{speciality.triage}"
    return {
        "id": identity,
        "task": "triage",
        "prompt": prompt,
        "response": LABELS[facts.label],
        "question": prompt,
        "choices": list(LABELS),
        "answer": facts.label,
    }


def label_weights(speciality: Speciality, split: Split) -> list[float]:
    """Probability of each label in this party's split."""
    common, rare = len(speciality.common), len(LABELS) - len(speciality.common)
    share = COMMON_SHARE[split]
    return [share / common if i in speciality.common else (1 - share) / rare for i in range(len(LABELS))]


class PartyFiles(NamedTuple):
    """Where one party's demo records were written."""

    name: str
    train: Path
    test: Path


def write_demo_data(folder: Path, seed: int, train: int = 200, test: int = 60) -> list[PartyFiles]:
    """Write FOLDER/SPECIALITY/{train,test}.jsonl for every speciality and return the paths, in party order."""
    files = []
    for speciality in SPECIALITIES:
        home = folder / speciality.name
        home.mkdir(parents=True, exist_ok=True)
        paths = PartyFiles(speciality.name, home / "train.jsonl", home / "test.jsonl")
        _write_jsonl(paths.train, generate_party(speciality.name, "train", train, seed))
        _write_jsonl(paths.test, generate_party(speciality.name, "test", test, seed))
        files.append(paths)
    return files


def _write_jsonl(path: Path, records: list[Record]) -> None:
    """Write one JSON object per line; bytes, so that no platform changes the line ends."""
    path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
