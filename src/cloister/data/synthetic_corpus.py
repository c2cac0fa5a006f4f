"""Pretraining text for the demo's base model: the words of the synthetic clinic without the rules of its tasks.

The base learns to read notes (what the finding is, how severe, where, how old) and meets every label and every line
of advice, but always drawn at random and never beside a note. What follows from a note is left to fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloister.data.synthetic import Dice, Facts, draw_facts, write_advice, write_note
from cloister.data.synthetic_words import AGE_GROUPS, KINDS, LABELS, SHARED_SEVERITY, SPECIALITIES, Speciality

NOTE_SHARE, TEXTBOOK_SHARE, ADVICE_SHARE = 0.76, 0.08, 0.10
"""Shares of the kinds of document; the rest lists labels."""


def pretraining_documents(count: int, seed: int) -> Iterator[str]:
    """Yield this many documents of 5 to 110 words; the same seed gives the same text."""
    dice = Dice("pretraining", seed)
    writers = (_note_with_questions, _textbook, _loose_advice, _loose_labels)
    weights = (NOTE_SHARE, TEXTBOOK_SHARE, ADVICE_SHARE, 1 - NOTE_SHARE - TEXTBOOK_SHARE - ADVICE_SHARE)
    for _ in range(count):
        yield writers[dice.weighted(weights)](dice, dice.pick(SPECIALITIES))


def _anyone(dice: Dice, speciality: Speciality) -> Facts:
    """A patient with any label, all equally likely, unlike in a party's records."""
    return draw_facts(dice, speciality, dice.below(len(LABELS)))


def _note_with_questions(dice: Dice, speciality: Speciality) -> str:
    """A note, then questions about facts that stand in it."""
    facts = _anyone(dice, speciality)
    answers = [
        ("Kind", KINDS[facts.kind]),
        ("Kind of finding", f"{KINDS[facts.kind]}, {facts.finding}"),
        ("Severity", SHARED_SEVERITY[facts.severity][0]),
        ("Added risk", facts.risk or "none"),
        ("Age group", AGE_GROUPS[facts.age_group]),
        ("Site", facts.site),
        ("Course", facts.course),
    ]
    asked = "\n".join(f"{name}: {answer}" for name, answer in dice.some(answers, 3 + dice.below(3)))
    return f"{write_note(dice, speciality, facts)}\n{asked}"


def _textbook(dice: Dice, speciality: Speciality) -> str:
    """Sentences that say which kind a finding is and how severity is worded."""
    lines = []
    for _ in range(3):
        kind, severity = dice.below(len(KINDS)), dice.below(len(SHARED_SEVERITY))
        words = dice.pick(speciality.severity[severity])
        lines.append(
            dice.pick(
                (
                    f"In {speciality.name}, {dice.pick(speciality.findings[kind])} is a {KINDS[kind]} finding.",
                    f"Among {KINDS[kind]} findings of {speciality.name} is {dice.pick(speciality.findings[kind])}.",
                    f"In {speciality.name}, {words} means {dice.pick(SHARED_SEVERITY[severity])}.",
                )
            )
        )
    return " ".join(lines)


def _loose_advice(dice: Dice, speciality: Speciality) -> str:
    """Advice to nobody in particular, from a leaflet rack."""
    lines = [write_advice(dice, dice.pick(SPECIALITIES), _anyone(dice, speciality)) for _ in range(1 + dice.below(3))]
    return "Leaflet: " + " ".join(lines)


def _loose_labels(dice: Dice, speciality: Speciality) -> str:
    """A list of triage labels in random order, without a patient."""
    return f"Triage words of {speciality.name}: " + "; ".join(dice.some(LABELS, 4 + dice.below(5))) + "."
