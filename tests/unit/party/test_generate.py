"""The party's half of split inference: what it sends, what it believes, and how an answer ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister.crypto.encoding import Fields
from cloister.enclave.query import QueryService
from cloister.errors import CapacityError, DataError, ProtocolError, TransportError, UsageError
from cloister.job import DataSection, InferenceSection
from cloister.model.cut import Former, Latter
from cloister.party.generate import Answer, as_trained, generate, prompt_ids, stop_ids
from tests.unit.data.tiny_tokenizers import tiny_tokenizer
from tests.unit.model.tiny import CONFIGS, tiny_model

Reply = dict[str, Any]


class Wire:
    """A session in memory with a real query service; `alter` may change a reply or break the connection."""

    def __init__(self, alter: Callable[[str, Reply], Reply] = lambda method, reply: reply, **rules: Any) -> None:
        self.service = QueryService(Latter(model(), 2), InferenceSection(**rules), ["north"])
        self.alter = alter
        self.methods: list[str] = []
        self.lost = False

    def request(self, method: str, body: Reply) -> Reply:
        if self.lost:
            raise UsageError("the session is closed")
        self.methods.append(method)
        return self.alter(method, self.service("north", method, Fields(body, "request")))


def model() -> Any:
    config = CONFIGS["llama"].vocab_size
    try:
        CONFIGS["llama"].vocab_size = len(tiny_tokenizer("bos"))
        return tiny_model("llama")
    finally:
        CONFIGS["llama"].vocab_size = config


def ask(wire: Wire, prompt: str = "yes no maybe", *, stops: frozenset[int] = frozenset(), tokens: int = 6) -> Answer:
    former = Former(model(), 2)
    return generate(wire, former, tiny_tokenizer("bos"), prompt, stops=stops, max_new_tokens=tokens)


def test_an_answer_is_the_whole_models_greedy_text_and_the_query_is_closed() -> None:
    wire, ids = Wire(), prompt_ids(tiny_tokenizer("bos"), "yes no maybe")
    with torch.no_grad():
        expected = model().generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :]
    answer = ask(wire)
    assert (answer.token_ids, answer.finish, answer.alternatives) == (expected.tolist(), "length", [])
    assert wire.methods == ["query.open", *["query.step"] * 6, "query.close"]


def test_an_answer_ends_before_a_token_that_ends_texts() -> None:
    free = ask(Wire()).token_ids
    stop = free[3]
    answer = ask(Wire(), stops=frozenset({stop}))
    assert (answer.token_ids, answer.finish) == (free[: free.index(stop)], "end")


def test_an_answer_that_meets_the_quota_is_kept_and_none_is_an_error() -> None:
    wire = Wire(quota_tokens=2)
    answer = ask(wire)
    assert (len(answer.token_ids), answer.finish) == (2, "quota")
    with pytest.raises(CapacityError, match="quota"):
        ask(wire)
    assert wire.methods[-1] == "query.close"


def test_an_answer_ends_with_the_context_and_a_prompt_must_leave_room() -> None:
    long = "yes no " * 40
    room = 128 - len(prompt_ids(tiny_tokenizer("bos"), long))
    answer = ask(Wire(), long, tokens=500)
    assert (len(answer.token_ids), answer.finish) == (room + 1, "length")
    with pytest.raises(CapacityError, match="context 128"):
        ask(Wire(), "yes no " * 100)


def test_a_lost_connection_is_reported_as_such() -> None:
    """Closing the query then fails too, which must not hide the cause."""

    def cut(method: str, reply: Reply) -> Reply:
        if method == "query.step":
            wire.lost = True
            raise TransportError("the connection was cut")
        return reply

    wire = Wire(cut)
    with pytest.raises(TransportError, match="cut"):
        ask(wire)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"tokens": [], "logprobs": []},
        {"tokens": ["1"], "logprobs": []},
        {"tokens": [-1], "logprobs": []},
        {"tokens": [True], "logprobs": []},
        {"tokens": [1] * 65, "logprobs": []},
        {"tokens": [1, 2], "logprobs": [0.0]},
        {"tokens": [1], "logprobs": [float("nan")]},
        {"tokens": [1], "logprobs": ["0"]},
    ],
    ids=str,
)
def test_a_malformed_reply_is_refused(reply: Reply) -> None:
    with pytest.raises(ProtocolError):
        ask(Wire(lambda method, sound: reply if method == "query.step" else sound))


def test_an_empty_prompt_is_refused_before_anything_is_asked() -> None:
    wire, former = Wire(), Former(model(), 2)
    with pytest.raises(UsageError, match="empty"):
        generate(wire, former, tiny_tokenizer("plain"), "", stops=frozenset(), max_new_tokens=1)
    assert wire.methods == []


def test_prompts_are_put_into_the_template_of_the_training() -> None:
    plain = tiny_tokenizer("plain")
    assert as_trained(DataSection(), plain, "What?") == "What?"
    template = DataSection(template="### Input:\n{prompt}\n### Response:\n{response} END")
    assert as_trained(template, plain, "What?") == "### Input:\nWhat?\n### Response:\n"
    assert as_trained(DataSection(template="{prompt} => {response}"), plain, "{response}") == "{response} =>"


def test_messages_go_through_the_chat_template_with_one_begin_of_text() -> None:
    chat = tiny_tokenizer("chat")
    text = as_trained(DataSection(format="messages"), chat, "What?")
    assert text == "<|user|>\nWhat?<|end|>\n<|assistant|>\n"
    assert prompt_ids(chat, text).count(chat.bos_token_id) == 1
    with pytest.raises(DataError, match="chat template"):
        as_trained(DataSection(format="messages"), tiny_tokenizer("plain"), "What?")


def test_stop_tokens_are_those_of_tokenizer_and_generation_config(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("bos")
    own = tokenizer.eos_token_id
    assert stop_ids(tmp_path, tokenizer) == {own}
    for listed, expected in ((7, {7, own}), ([7, 8], {7, 8, own}), (None, {own})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert stop_ids(tmp_path, tokenizer) == expected
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(DataError):
        stop_ids(tmp_path, tokenizer)
