"""Loss falls on the response and on nothing else; a tree of choices is each of its paths alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister.data.records import Record
from cloister.data.tokens import RESPONSE, Document, Encoder, Truncation
from cloister.errors import DataError, ModelError
from cloister.job import DataSection
from tests.unit.data.tiny_tokenizers import KINDS, tiny_tokenizer

TEMPLATE = "### Input:\n{prompt}\n### Response:\n{response}"


def _encoder(kind: str, max_tokens: int = 512, **data: Any) -> Encoder:
    return Encoder(tokenizer=tiny_tokenizer(kind), settings=DataSection(**data), max_tokens=max_tokens)


def _record(prompt: Any = "Is it flu?", response: str = "Yes, it is.", **rest: Any) -> Record:
    return Record(**{"id": "r", "task": "t", "prompt": prompt, "response": response, **rest})


CHOICES = ("yes", "no", "maybe, a cough", "the heart")


def _chosen(response: str = "no", **rest: Any) -> Record:
    return _record(response=response, **{"choices": CHOICES, "answer": 1, **rest})


Path = tuple[list[int], list[tuple[int, int]]]
"""Token ids of one root + branch, and (index of the predictor in it, id) of its targets."""


def _walk(document: Document) -> list[Path]:
    """The paths of a document, one per group; positions along each are 0, 1, 2, ..."""
    paths = []
    for group in range(len(document.groups)):
        on_path = np.flatnonzero((document.branch_T == 0) | (document.branch_T == group + 1))
        assert document.position_T[on_path].tolist() == list(range(len(on_path)))
        place = {int(index): k for k, index in enumerate(on_path)}
        mine = document.target_group_N == group
        pairs = zip(document.target_pos_N[mine], document.target_id_N[mine], strict=True)
        paths.append((document.id_T[on_path].tolist(), [(place[int(p)], int(i)) for p, i in pairs]))
    return paths


def _text(kind: str, path: Path) -> str:
    return str(tiny_tokenizer(kind).decode([i for _, i in path[1]]))


@pytest.mark.parametrize("response", ["Yes, it is.", "5 mg täglich, 日本 🩺", "a  b\n\n c", "?!"])
@pytest.mark.parametrize("template", [None, TEMPLATE, "{prompt}\n\n{response}"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_are_the_response_and_in_training_the_end(kind: str, template: str | None, response: str) -> None:
    encoder, record = _encoder(kind, template=template), _record(response=response)
    (trained,) = _walk(encoder.training([record])[0])
    assert _text(kind, trained).lstrip() == response + "</s>"
    (document,), (example,) = encoder.scoring([record], choices=False)
    assert _text(kind, _walk(document)[0]).lstrip() == response
    assert example.response_bytes == len(response.encode())
    assert example.response_role == RESPONSE
    assert document.groups == ((0, RESPONSE),)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_comes_first_as_the_tokenizer_alone_gives_it(kind: str) -> None:
    encoder = _encoder(kind)
    (ids, targets), *_ = _walk(encoder.training([_record()])[0])
    alone = tiny_tokenizer(kind)("Is it flu? Yes, it is.")["input_ids"]
    eos = tiny_tokenizer(kind).eos_token_id
    assert ids == (alone if alone[-1] == eos else [*alone, eos])
    assert [i for _, i in targets] == ids[targets[0][0] + 1 :]


def test_text_after_the_response_in_a_template_is_trained_not_scored_and_nothing_is_added() -> None:
    encoder = _encoder("bos", template="{prompt} -> {response}\n###\n")
    (trained,) = _walk(encoder.training([_record()])[0])
    assert _text("bos", trained) == " Yes, it is.\n###\n"
    documents, _ = encoder.scoring([_record()], choices=False)
    assert _text("bos", _walk(documents[0])[0]) == " Yes, it is."


class TestChat:
    PROMPT = (("system", "Be brief."), ("user", "Is it flu?"))
    ROOT = "<|system|>\nBe brief.<|end|>\n<|user|>\nIs it flu?<|end|>\n<|assistant|>\n"

    def test_the_targets_are_the_reply_and_its_end_marker(self) -> None:
        encoder = _encoder("chat")
        (trained,) = _walk(encoder.training([_record(self.PROMPT)])[0])
        assert tiny_tokenizer("chat").decode(trained[0]) == self.ROOT + "Yes, it is.<|end|>\n"
        assert _text("chat", trained).lstrip() == "Yes, it is.<|end|>\n"
        documents, _ = encoder.scoring([_record(self.PROMPT)], choices=False)
        assert _text("chat", _walk(documents[0])[0]).lstrip() == "Yes, it is."

    def test_a_reply_that_stands_in_the_template_itself_is_found_where_it_belongs(self) -> None:
        (trained,) = _walk(_encoder("chat").training([_record(self.PROMPT, response="assistant")])[0])
        assert _text("chat", trained).lstrip() == "assistant<|end|>\n"

    def test_messages_and_texts_mix_in_one_file(self) -> None:
        """A text gets its begin-of-text token and its end whether or not the record before it is a conversation."""
        encoder, chat, text = _encoder("chat"), _record(self.PROMPT), _record()
        for records in ([chat, text], [text, chat]):
            together = [d.id_T.tolist() for d in encoder.training(records)]
            assert together == [encoder.training([r])[0].id_T.tolist() for r in records]
        bos, eos = tiny_tokenizer("chat").bos_token_id, tiny_tokenizer("chat").eos_token_id
        ids = encoder.training([chat, text])[1].id_T
        assert (ids[0], ids[-1]) == (bos, eos)

    def test_the_question_of_a_conversation_is_asked_by_the_user(self) -> None:
        record = _chosen(prompt=self.PROMPT, response="no", question="Which one?")
        documents, (example,) = _encoder("chat").scoring([record], choices=True)
        texts = [tiny_tokenizer("chat").decode(p[0]) for d in documents for p in _walk(d)]
        assert texts == [self.ROOT + "no", *(f"<|user|>\nWhich one?<|end|>\n<|assistant|>\n{c}" for c in CHOICES)]
        assert example.response_role == RESPONSE

    def test_a_template_that_trims_is_followed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = tiny_tokenizer("chat")
        template = str(tokenizer.chat_template).replace("m.content", "m.content | trim")
        monkeypatch.setattr(tokenizer, "chat_template", template)
        (trained,) = _walk(_encoder("chat").training([_record(self.PROMPT, response="  no \n")])[0])
        assert tokenizer.decode(trained[0]) == self.ROOT + "no<|end|>\n"

    def test_a_template_without_an_end_marker_gets_the_end_of_text_and_no_second_begin(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer = tiny_tokenizer("chat")
        template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        template += "{% if add_generation_prompt %}assistant: {% endif %}"
        monkeypatch.setattr(tokenizer, "chat_template", template)
        (trained,) = _walk(_encoder("chat").training([_record((("user", "Hi?"),))])[0])
        assert tokenizer.decode(trained[0]) == "<s>user: Hi?assistant: Yes, it is.</s>"

    @pytest.mark.parametrize(
        "template",
        ["{{ messages[-1].content }}", "{% for m in messages %}{{ m.content | upper }}|{% endfor %}", "nothing"],
    )
    def test_a_template_that_is_not_prompt_then_reply_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, template: str
    ) -> None:
        monkeypatch.setattr(tiny_tokenizer("chat"), "chat_template", template)
        with pytest.raises(ModelError, match="prompt followed by the reply") as refused:
            _encoder("chat").training([_record(self.PROMPT)])
        assert refused.value.where == "record r"

    def test_a_template_that_refuses_the_messages_is_a_data_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        template = "{{ raise_exception('roles must alternate') }}"
        monkeypatch.setattr(tiny_tokenizer("chat"), "chat_template", template)
        with pytest.raises(DataError, match="roles must alternate") as refused:
            _encoder("chat").training([_record(self.PROMPT)])
        assert refused.value.where == "record r"

    def test_messages_without_a_template_are_refused(self) -> None:
        with pytest.raises(ModelError, match="no chat template") as refused:
            _encoder("bos").training([_record(self.PROMPT)])
        assert refused.value.where == "record r"


class TestTruncation:
    LONG = " ".join(f"fever {i}" for i in range(100))

    @pytest.mark.parametrize("kind", ["plain", "bos", "metaspace"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_long_prompt_loses_one_side_only(self, side: str, kind: str) -> None:
        encoder = _encoder(kind, max_tokens=40, truncation=side)
        (document,) = encoder.training([_record(self.LONG)])
        (path,) = _walk(document)
        assert len(document) == 40
        assert _text(kind, path).lstrip() == "Yes, it is.</s>"
        tokenizer = tiny_tokenizer(kind)
        kept = path[0][: path[1][0][0] + 1]
        if kind != "plain":
            assert kept.pop(0) == tokenizer.bos_token_id
        whole = tokenizer(self.LONG, add_special_tokens=False)["input_ids"]
        assert kept == (whole[-len(kept) :] if side == "left" else whole[: len(kept)])
        assert encoder.truncated == Truncation(prompts=1, responses=0)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_what_a_template_puts_around_the_prompt_stays(self, side: str) -> None:
        encoder = _encoder("bos", max_tokens=50, truncation=side, template=TEMPLATE)
        (document,) = encoder.training([_record(self.LONG)])
        text = tiny_tokenizer("bos").decode(document.id_T)
        assert text.startswith("<s>### Input:\n")
        assert text.endswith("\n### Response:\nYes, it is.</s>")
        assert len(document) == 50

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_long_response_leaves_a_quarter_to_the_prompt(self, kind: str, side: str) -> None:
        encoder = _encoder(kind, max_tokens=40, truncation=side)
        (document,) = encoder.training([_record(self.LONG, response=self.LONG)])
        (path,) = _walk(document)
        assert len(document) == 40
        assert len(path[1]) == 30
        assert self.LONG.startswith(_text(kind, path).lstrip())
        assert encoder.truncated == Truncation(prompts=1, responses=1)
        _, (example,) = encoder.scoring([_record(self.LONG, response=self.LONG)], choices=False)
        assert example.response_bytes == len(_text(kind, path).lstrip().encode())

    def test_a_long_response_after_a_short_prompt_keeps_the_prompt(self) -> None:
        encoder = _encoder("bos", max_tokens=40)
        (document,) = encoder.training([_record("Why?", response=self.LONG)])
        assert len(document) == 40
        assert tiny_tokenizer("bos").decode(document.id_T).startswith("<s>Why? fever 0")
        assert encoder.truncated == Truncation(prompts=0, responses=1)

    def test_what_just_fits_is_whole(self) -> None:
        record = _record(self.LONG)
        size = len(_encoder("bos").training([record])[0])
        for max_tokens, prompts in ((1000, 0), (size, 0), (size - 1, 1)):
            encoder = _encoder("bos", max_tokens=max_tokens)
            encoder.training([record])
            assert encoder.truncated == Truncation(prompts=prompts)

    def test_each_record_is_counted_once_with_all_its_choices(self) -> None:
        encoder = _encoder("bos", max_tokens=40)
        choices = (self.LONG, self.LONG + " rash", "no")
        encoder.scoring([_chosen(self.LONG, prompt=self.LONG, choices=choices), _record()], choices=True)
        assert encoder.truncated == Truncation(prompts=1, responses=1)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_all_choices_follow_the_same_rest_of_the_prompt(self, side: str, kind: str) -> None:
        encoder = _encoder(kind, max_tokens=60, truncation=side)
        documents, _ = encoder.scoring([_chosen(prompt=self.LONG)], choices=True)
        roots = {tuple(p[0][: p[1][0][0] + 1]) for d in documents for p in _walk(d)}
        assert len(roots) == 1
        assert all(len(d) <= 60 for d in documents)


class TestTrees:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("template", [None, TEMPLATE])
    def test_each_path_is_what_it_is_alone(self, template: str | None, kind: str) -> None:
        encoder = _encoder(kind, template=template)
        (document,), (example,) = encoder.scoring([_chosen()], choices=True)
        alone = [encoder.scoring([_record(response=c)], choices=False)[0][0] for c in CHOICES]
        assert _walk(document) == [_walk(a)[0] for a in alone]
        assert document.groups == tuple((0, k) for k in range(4))
        assert (example.response_role, example.answer) == (1, 1)
        assert example.choice_bytes == tuple(len(c.encode()) for c in CHOICES)
        assert example.response_bytes == 2

    def test_the_prompt_is_run_once(self) -> None:
        (document,), _ = _encoder("bos").scoring([_chosen()], choices=True)
        alone, _ = _encoder("bos").scoring([_record(response=c) for c in CHOICES], choices=False)
        assert len(document) == sum(map(len, alone)) - 3 * int((document.branch_T == 0).sum())
        assert int((document.branch_T == 0).sum()) == len(tiny_tokenizer("bos")("Is it flu?")["input_ids"])

    def test_a_response_that_is_no_choice_is_a_branch_of_its_own(self) -> None:
        (document,), (example,) = _encoder("bos").scoring([_chosen("yes, it is flu")], choices=True)
        assert document.groups == ((0, RESPONSE), (0, 0), (0, 1), (0, 2), (0, 3))
        assert example.response_role == RESPONSE
        assert _text("bos", _walk(document)[0]).lstrip() == "yes, it is flu"

    def test_a_question_of_its_own_is_a_tree_of_its_own(self) -> None:
        documents, (example,) = _encoder("bos").scoring([_chosen(question="Which drug?")], choices=True)
        assert [d.groups for d in documents] == [((0, RESPONSE),), tuple((0, k) for k in range(4))]
        texts = [tiny_tokenizer("bos").decode(p[0]) for d in documents for p in _walk(d)]
        assert texts == ["<s>Is it flu? no", *(f"<s>Which drug? {c}" for c in CHOICES)]
        assert example.response_role == RESPONSE

    def test_without_choices_only_the_response_is_scored(self) -> None:
        (document,), (example,) = _encoder("bos").scoring([_chosen()], choices=False)
        assert document.groups == ((0, RESPONSE),)
        assert (example.choice_bytes, example.answer) == ((), -1)

    def test_choices_that_do_not_fit_one_tree_are_split(self) -> None:
        choices = tuple(f"{c} {'the liver ' * 5}" for c in "abcdefg")
        whole, _ = _encoder("bos", max_tokens=4096).scoring([_chosen(choices=choices)], choices=True)
        split, _ = _encoder("bos", max_tokens=60).scoring([_chosen(choices=choices)], choices=True)
        assert len(whole) == 1
        assert len(split) > 1
        assert all(len(d) <= 60 for d in split)
        assert [p for d in split for p in _walk(d)] == _walk(whole[0])
        assert [g for d in split for g in d.groups] == list(whole[0].groups)


def test_a_response_without_a_token_is_refused_with_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import normalizers

    inner = tiny_tokenizer("plain").backend_tokenizer
    inner.normalizer = normalizers.Replace("¤", "")
    try:
        with pytest.raises(DataError, match="no token of its own") as refused:
            _encoder("plain").training([_record(response="¤")])
    finally:
        inner.normalizer = normalizers.Sequence([])
    assert refused.value.where == "record r"


WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁") | st.sampled_from(" \n\t"), max_size=30
)
PIECE = st.one_of(WORDS, st.sampled_from(["fever ", " 5 mg", "yes", "?", "\n\n", "### ", "日本", "🩺"]))
TEXTS = st.lists(PIECE, min_size=1, max_size=12).map("".join).filter(lambda t: bool(t.strip()))


@settings(max_examples=60, deadline=None)
@example(kind="trimmed", prompt="0", response="0 ", template=None)
@given(kind=st.sampled_from(KINDS), prompt=TEXTS, response=TEXTS, template=st.sampled_from([None, TEMPLATE]))
def test_targets_are_exactly_the_tokens_that_hold_response_text(
    kind: str, prompt: str, response: str, template: str | None
) -> None:
    """By the offsets: beside the response only white space between it and the prompt is predicted."""
    encoder = _encoder(kind, max_tokens=4096, template=template)
    ((ids, targets),) = _walk(encoder.scoring([_record(prompt, response)], choices=False)[0][0])
    head = (template or "{prompt} {response}").replace("{response}", "").replace("{prompt}", prompt)
    encoded = tiny_tokenizer(kind)(head + response, return_offsets_mapping=True)
    assert ids == encoded["input_ids"][: len(ids)]
    predicted = {k + 1 for k, _ in targets}
    assert all(ids[k + 1] == token for k, token in targets)
    for index, (start, end) in enumerate(encoded["offset_mapping"]):
        if end > len(head):
            assert index in predicted
        elif index in predicted:
            assert start >= len(head.rstrip())
            assert end > 0


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    texts=st.lists(st.tuples(TEXTS, TEXTS, st.lists(TEXTS, max_size=4), st.none() | TEXTS), min_size=1, max_size=4),
    max_tokens=st.integers(8, 120),
    side=st.sampled_from(["left", "right"]),
    template=st.sampled_from([None, TEMPLATE]),
)
def test_whatever_the_texts_every_document_is_sound(
    kind: str, texts: list[Any], max_tokens: int, side: str, template: str | None
) -> None:
    """Fits; positions run; each target is the token after its predictor on its own path; each group is there once."""
    records = [
        _record(
            prompt, response, id=str(i), choices=tuple(options) if len(options) > 1 else (),
            answer=0 if len(options) > 1 else None, question=question if len(options) > 1 else None,
        )
        for i, (prompt, response, options, question) in enumerate(texts)
    ]  # fmt: skip
    encoder = _encoder(kind, max_tokens=max_tokens, truncation=side, template=template)
    documents, examples = encoder.scoring(records, choices=True)
    for document in [*documents, *encoder.training(records)]:
        assert len(document) <= max_tokens
        for ids, targets in _walk(document):
            assert targets
            assert all(ids[k + 1] == token for k, token in targets)
            assert [k for k, _ in targets] == list(range(targets[0][0], len(ids) - 1))
            if kind in ("bos", "bos-eos", "metaspace", "chat"):
                assert ids[0] == tiny_tokenizer(kind).bos_token_id
    groups = [g for d in documents for g in d.groups]
    expected = {(i, role) for i, e in enumerate(examples) for role in {e.response_role, *range(len(e.choice_bytes))}}
    assert len(groups) == len(set(groups))
    assert set(groups) == expected
    assert all(e.response_bytes > 0 and all(e.choice_bytes) for e in examples)
    assert encoder.truncated.prompts <= 2 * len(records)
