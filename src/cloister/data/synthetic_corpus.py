"""Pretraining text for the demo's base model: the words of the synthetic clinic without the rules of its tasks.

The base learns to read notes (what the finding is, how severe, where, how old) and meets every label and every line
of advice, but always drawn at random, also where one stands after a note. What follows from a note is left to
fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from cloister.data.synthetic import Dice, Facts, draw_call, draw_facts, write_advice, write_note
from cloister.data.synthetic_words import AGE_GROUPS, KINDS, LABELS, SHARED_SEVERITY, SPECIALITIES, Speciality

NOTE_SHARE, TEXTBOOK_SHARE, ADVICE_SHARE = 0.66, 0.06, 0.16
"""Shares of the kinds of document; the rest lists labels."""
SCORED_NOTE_SHARE = 0.2
"""How often a note is itself to be predicted. Mostly invented at random, it teaches little per token."""
SUMMARY_SHARE = 0.6
"""How often an instruction is answered by facts of the note, not by a random answer."""
NO_RISK = "no added risk"


class Document(NamedTuple):
    """A text whose first `unscored` characters are read but carry no loss."""

    text: str
    unscored: int


def pretraining_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield this many documents of 5 to 110 words; the same seed gives the same text."""
    dice = Dice("pretraining", seed)
    writers = (_note_with_questions, _textbook, _loose_advice, _loose_labels)
    weights = (NOTE_SHARE, TEXTBOOK_SHARE, ADVICE_SHARE, 1 - NOTE_SHARE - TEXTBOOK_SHARE - ADVICE_SHARE)
    for _ in range(count):
        before, text = writers[dice.weighted(weights)](dice, dice.pick(SPECIALITIES))
        yield Document(before + text, 0 if dice.chance(SCORED_NOTE_SHARE) else len(before))


def _anyone(dice: Dice, speciality: Speciality) -> Facts:
    """A patient with any label, all equally likely, unlike in a party's records."""
    return draw_facts(dice, speciality, dice.below(len(LABELS)))


def _note_with_questions(dice: Dice, speciality: Speciality) -> tuple[str, str]:
    """A note, then in random order an instruction with its answer and questions about facts that stand in the note."""
    facts = _anyone(dice, speciality)
    questions = (
        (("Kind", "Group"), KINDS[facts.kind]),
        (("Finding", "Complaint"), facts.finding),
        (("Severity", "Degree"), SHARED_SEVERITY[facts.severity]),
        (("In words",), f"{facts.severity_words}, that is {SHARED_SEVERITY[facts.severity]}"),
        (("Added risk", "Risk"), facts.risk or NO_RISK),
        (("Age group", "Age"), AGE_GROUPS[facts.age_group]),
        (("Site", "Place"), facts.site),
    )
    lines = [f"{dice.pick(names)}: {answer}" for names, answer in dice.some(questions, 3 + dice.below(3))]
    lines.append(_instructed(dice, speciality, facts))
    return write_note(dice, speciality, facts) + "\n", "\n".join(dice.some(lines, len(lines)))


def _instructed(dice: Dice, speciality: Speciality, facts: Facts) -> str:
    """An instruction of the tasks, with facts in the layout of an answer or with an answer drawn at random.

    So the base looks facts up where the tasks need them and knows what an answer looks like, but not which is right:
    only the site is that of the note.
    """
    kind, severity, risk = KINDS[facts.kind], SHARED_SEVERITY[facts.severity], facts.risk or NO_RISK
    told, asks_triage = dice.chance(SUMMARY_SHARE), dice.chance(0.5)
    first, second = dice.some((severity, risk), 2)
    if asks_triage:
        answer = f"{kind}, {first}, {second}" if told else dice.pick(LABELS)
    elif told:
        treatment, timing = f"{kind} at the {facts.site}", f"{first}, {second}"
        who, call = AGE_GROUPS[facts.age_group], draw_call(dice)
        answer = speciality.advice.format(who=who, treatment=treatment, timing=timing, call=call)
    else:
        answer = write_advice(dice, speciality, replace(_anyone(dice, speciality), site=facts.site))
    return f"{speciality.triage if asks_triage else speciality.counsel} {answer}"


def _textbook(dice: Dice, speciality: Speciality) -> tuple[str, str]:
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
                    f"In {speciality.name}, {words} means {SHARED_SEVERITY[severity]}.",
                )
            )
        )
    return "", " ".join(lines)


def _loose_advice(dice: Dice, speciality: Speciality) -> tuple[str, str]:
    """Advice to nobody in particular, read out and repeated: repeating makes the base tell similar lines apart."""
    line = write_advice(dice, speciality, _anyone(dice, speciality))
    return "", f"Leaflet: {line}\nRead back: {line}"


def _loose_labels(dice: Dice, speciality: Speciality) -> tuple[str, str]:
    """Triage labels in random order, without a patient, and repeated."""
    line = "; ".join(dice.some(LABELS, 1 + dice.below(2)))
    return "", f"Triage words of {speciality.name}: {line}\nRead back: {line}"
