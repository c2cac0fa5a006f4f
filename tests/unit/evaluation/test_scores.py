"""Scores from packed trees are those of the stock model on each text alone; every text is accounted for once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.data.packing import Pack, pack_documents
from cloister.data.records import Record
from cloister.data.tokens import Encoder, Example
from cloister.errors import DataError, ProtocolError
from cloister.evaluation.scores import Scores, score
from cloister.job import DataSection
from cloister.model import attention
from cloister.model.cut import Former, Latter, Whole
from cloister.training.loop import PackList
from tests.unit.data.tiny_tokenizers import tiny_tokenizer
from tests.unit.model.tiny import CONFIGS

KIND = "bos"
WORDS = ["fever", "cough", "rash", "5 mg", "yes", "no", "日本", "ACE inhibitor", "the heart", "é"]


def _records(count: int = 12) -> list[Record]:
    """With choices, without, with a response that is none of them, and with a question of its own."""
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(1, most + 1))))

    records = []
    for number in range(count):
        choices = tuple(dict.fromkeys(words(3) for _ in range(5))) if number % 3 else ()
        answer = int(rng.integers(len(choices))) if choices else None
        response = choices[answer] if answer is not None and number % 4 else words(6)
        question = "Which one?" if number % 3 == 2 else None
        records.append(
            Record(
                id=f"r{number}", task=f"t{number % 2}", prompt=words(8) + "?", response=response, choices=choices,
                answer=answer, question=question if choices else None,
            )
        )  # fmt: skip
    return records


def _wide(name: str) -> Any:
    """A tiny model whose vocabulary holds the tokenizer's tokens."""
    attention.install()
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), "vocab_size": len(tiny_tokenizer(KIND))})
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6.0)
    return model.eval().requires_grad_(False)


def _prepared(records: list[Record], *, choices: bool = True) -> tuple[list[Pack], list[Example]]:
    encoder = Encoder(tokenizer=tiny_tokenizer(KIND), settings=DataSection(), max_tokens=100)
    documents, examples = encoder.scoring(records, choices=choices)
    assert encoder.truncated.prompts == encoder.truncated.responses == 0
    return pack_documents(documents, 100, 0), examples


def _naive_bits(model: Any, prompt: str, text: str) -> float:
    """Bits of `text` after `prompt`, by the stock model on one plain sequence."""
    tokenizer = tiny_tokenizer(KIND)
    encoded = tokenizer(f"{prompt} {text}", return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"])
    log_probability = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    scored = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
    return -sum(float(log_probability[i - 1, ids[i]]) for i in scored) / math.log(2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral"])
def test_trees_score_as_each_text_alone(name: str) -> None:
    records, model = _records(), _wide(name)
    packs, examples = _prepared(records)
    assert max(len(p.group_role_G) for p in packs) > 2
    scores = score(Whole(_wide(name)), PackList(packs), examples, where="a")
    for index, record in enumerate(records):
        assert isinstance(record.prompt, str)
        assert scores.bits[index] == pytest.approx(_naive_bits(model, record.prompt, record.response), abs=1e-4)
        question = record.question or record.prompt
        per_byte = [_naive_bits(model, question, c) / len(c.encode()) for c in record.choices]
        expected = int(int(np.argmin(per_byte)) == record.answer) if record.choices else -1
        assert scores.correct[index] == expected
    assert scores.example_id == [r.id for r in records]
    assert scores.task == [r.task for r in records]
    assert scores.response_bytes.tolist() == [len(r.response.encode()) for r in records]
    assert set(scores.correct.tolist()) == {-1, 0, 1}


def test_the_latter_half_scores_as_the_whole_model() -> None:
    packs, examples = _prepared(_records())
    former, latter = Former(_wide("llama"), 2), Latter(_wide("llama"), 2)
    active = [p.with_activations(former(p.given, p.layout.position_T, p.layout)) for p in packs]
    whole = score(Whole(_wide("llama")), PackList(packs), examples, where="a")
    split = score(latter, PackList(active), examples, where="a")
    assert np.array_equal(split.bits, whole.bits)
    assert np.array_equal(split.correct, whole.correct)


def test_without_choices_the_bits_are_the_same_and_nothing_is_correct() -> None:
    whole = Whole(_wide("llama"))
    with_choices, without = (
        score(whole, PackList(packs), examples, where="a")
        for packs, examples in (_prepared(_records(), choices=c) for c in (True, False))
    )
    np.testing.assert_allclose(without.bits, with_choices.bits, atol=1e-4)
    assert set(without.correct.tolist()) == {-1}


def test_progress_is_told_in_tokens() -> None:
    packs, examples = _prepared(_records())
    told: list[int] = []
    score(Whole(_wide("llama")), PackList(packs), examples, where="a", on_pack=told.append)
    assert told == [len(p) for p in packs]


class TestAccounting:
    """A party that sends other groups than its table of examples asks for is refused."""

    def _refused(self, packs: list[Pack], examples: list[Example], message: str) -> None:
        with pytest.raises(ProtocolError, match=message) as refused:
            score(Whole(_wide("llama")), PackList(packs), examples, where="party a")
        assert refused.value.where == "party a"

    def test_a_missing_pack(self) -> None:
        packs, examples = _prepared(_records())
        self._refused(packs[1:], examples, "is not accounted for by any pack")

    def test_a_pack_sent_twice(self) -> None:
        packs, examples = _prepared(_records())
        self._refused([*packs, packs[0]], examples, "is scored twice")

    def test_a_group_twice_in_one_pack(self) -> None:
        packs, examples = _prepared(_records())
        pack = packs[0]
        role = pack.group_role_G.clone()
        example = pack.group_example_G.clone()
        role[1], example[1] = role[0], example[0]
        self._refused([replace(pack, group_role_G=role, group_example_G=example), *packs[1:]], examples, "twice")

    def test_a_choice_that_is_missing(self) -> None:
        packs, examples = _prepared(_records())
        more = [replace(e, choice_bytes=(*e.choice_bytes, 3)) if e.choice_bytes else e for e in examples]
        self._refused(packs, more, "is not accounted for")

    def test_an_example_that_nobody_asked_for(self) -> None:
        packs, examples = _prepared(_records())
        pack = replace(packs[-1], group_example_G=packs[-1].group_example_G + 1000)
        self._refused([*packs, pack], examples, "is unknown")

    def test_a_role_that_nobody_asked_for(self) -> None:
        packs, examples = _prepared(_records())
        pack = replace(packs[-1], group_role_G=packs[-1].group_role_G + 1000)
        self._refused([*packs, pack], examples, "is unknown")


FLOATS = st.floats(0, 1e6, allow_nan=False)
ROWS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        FLOATS,
        st.integers(1, 2**31 - 1),
        st.sampled_from([-1, 0, 1]),
    ),
    max_size=8,
)


def _scores(rows: list[Any]) -> Scores:
    ids, tasks, bits, sizes, correct = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return Scores(
        example_id=list(ids),
        task=list(tasks),
        bits=np.array(bits, dtype=np.float64),
        response_bytes=np.array(sizes, dtype=np.int64),
        correct=np.array(correct, dtype=np.int8),
    )


def _equal(a: Scores, b: Scores) -> bool:
    columns = ("bits", "response_bytes", "correct")
    arrays = [(getattr(a, n), getattr(b, n)) for n in columns]
    return (
        (a.example_id, a.task) == (b.example_id, b.task)
        and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays)
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
def test_lines_come_back_as_they_were(rows: list[Any]) -> None:
    scores = _scores(rows)
    text = scores.to_json_lines()
    assert _equal(Scores.from_json_lines(text), scores)
    assert text.count("\n") == len(rows)
    assert [json.loads(line)["id"] for line in text.split("\n")[:-1]] == scores.example_id


TEXT_BITS = '{"id": "a", "task": "t", "bits": "x", "response_bytes": 1, "correct": 1}'


@pytest.mark.parametrize("line", ["", "no", "[]", "3", "null", '{"id": "a"}', TEXT_BITS])
def test_a_line_that_is_no_score_is_refused_with_its_place(line: str) -> None:
    good = _scores([("a", "t", 1.0, 2, 1)]).to_json_lines()
    with pytest.raises(DataError) as refused:
        Scores.from_json_lines(good + line + "\n", "scores.jsonl")
    assert refused.value.where == "scores.jsonl:2"


def test_take_and_bits_per_byte() -> None:
    scores = _scores([("a", "t", 1.0, 2, 1), ("b", "u", 5.0, 10, 0), ("c", "t", 6.0, 4, -1)])
    taken = scores.take([2, 0, 2])
    assert _equal(taken, _scores([("c", "t", 6.0, 4, -1), ("a", "t", 1.0, 2, 1), ("c", "t", 6.0, 4, -1)]))
    assert _equal(scores.take(np.array([1])), _scores([("b", "u", 5.0, 10, 0)]))
    assert _equal(scores.take([]), _scores([]))
    assert scores.bits_per_byte() == 12.0 / 16
    assert len(scores) == 3
