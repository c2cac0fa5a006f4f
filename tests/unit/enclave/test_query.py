"""The enclave's half of split inference: right tokens for those who may ask, and stories of those who ask too much."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedModel

from cloister.crypto.encoding import Fields
from cloister.enclave.query import IDLE_S, MAX_OPEN_QUERIES, QueryService
from cloister.errors import CapacityError, ProtocolError, VerificationError
from cloister.job import InferenceSection
from cloister.model.cut import Former, Latter
from tests.unit.model.tiny import CONFIGS, tiny_model

CUT, WIDTH, CONTEXT = 2, 32, 128
TOP_K = {"returns": "top-k", "top_k": 3}


class Asking:
    """A query service for the parties north and south, and its requests as a session makes them."""

    def __init__(self, name: str = "llama", dtype: torch.dtype = torch.float32, **rules: Any) -> None:
        self.now = 0.0
        latter = Latter(tiny_model(name, dtype), CUT)
        section = InferenceSection(**rules)
        self.service = QueryService(latter, section, ["north", "south"], clock=lambda: self.now)

    def request(self, party: str, method: str, **body: Any) -> dict[str, Any]:
        return self.service(party, f"query.{method}", Fields(body, "request"))

    def open(self, party: str = "north") -> bytes:
        name = self.request(party, "open")["id"]
        assert isinstance(name, bytes)
        return name

    def step(self, query: bytes, activation_TD: torch.Tensor, party: str = "north") -> dict[str, Any]:
        return self.request(party, "step", id=query, activation=blob(activation_TD))


def blob(activation_TD: torch.Tensor) -> bytes:
    return bytes(safetensors.torch.save({"activation": activation_TD}))


def some(tokens: int = 3, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The next tokens by the whole model without any cache, the slow and obvious way."""
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_both_caches_together_give_the_whole_models_greedy_text(name: str) -> None:
    asking, former = Asking(name), Former(tiny_model(name), CUT)
    prompt, count = [5, 9, 31, 7, 7, 60, 12], 6
    query, cache, position, fresh, produced = asking.open(), former.new_cache(), 0, prompt, []
    for _ in range(count):
        span = torch.arange(position, position + len(fresh))
        activation_TD = former(torch.tensor(fresh), span, None, cache)
        position += len(fresh)
        fresh = asking.step(query, activation_TD)["tokens"]
        produced += fresh
    assert produced == greedy(tiny_model(name), prompt, count)


def test_a_token_is_all_that_is_returned_unless_the_job_says_more() -> None:
    asking = Asking()
    reply = asking.step(asking.open(), some())
    assert set(reply) == {"tokens", "logprobs"}
    assert (len(reply["tokens"]), reply["logprobs"]) == (1, [])


def test_top_k_is_that_of_the_whole_model() -> None:
    asking, former, ids = Asking(**TOP_K), Former(tiny_model("llama"), CUT), [5, 9, 31]
    reply = asking.step(asking.open(), former(torch.tensor(ids), torch.arange(3), None))
    expected = torch.log_softmax(tiny_model("llama")(torch.tensor([ids])).logits[0, -1], -1).topk(3)
    assert reply["tokens"] == expected.indices.tolist()
    assert torch.allclose(torch.tensor(reply["logprobs"]), expected.values, atol=1e-5)


def test_queries_do_not_mix() -> None:
    """Two parties ask in turns; each gets what it gets alone."""

    def alone(asking: Asking, party: str, seed: int) -> list[Any]:
        given = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
        query = asking.open(party)
        return [asking.step(query, given[i : i + 1], party) for i in range(4)]

    expected = [alone(Asking(**TOP_K), party, seed) for seed, party in enumerate(("north", "south"))]
    asking = Asking(**TOP_K)
    given = [torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    parties = ("north", "south")
    queries = [asking.open(party) for party in parties]
    mixed: list[list[Any]] = [[], []]
    for i in range(4):
        for p in (0, 1):
            mixed[p].append(asking.step(queries[p], given[p][i : i + 1], parties[p]))
    assert mixed == expected


@pytest.mark.parametrize(("allow", "refused"), [("none", ["north", "south"]), (["south"], ["north"]), ("all", [])])
def test_only_those_may_ask_whom_the_job_names(allow: Any, refused: list[str]) -> None:
    asking = Asking(allow=allow)
    for party in ("north", "south", "stranger"):
        if party in refused or party == "stranger":
            with pytest.raises(VerificationError) as caught:
                asking.open(party)
            assert caught.value.code == "inference"
        else:
            assert len(asking.open(party)) == 16


@pytest.mark.parametrize("method", ["step", "close"])
def test_a_stolen_or_guessed_id_opens_nothing(method: str) -> None:
    asking = Asking()
    query = asking.open("north")
    body = {"activation": blob(some())} if method == "step" else {}
    for party, name in (("south", query), ("north", bytes(16))):
        with pytest.raises(ProtocolError, match="no such query"):
            asking.request(party, method, id=name, **body)
    assert asking.step(query, some())["tokens"], "the owner's query is untouched"
    asking.request("north", "close", id=query)
    with pytest.raises(ProtocolError, match="no such query"):
        asking.step(query, some())


def not_finite(value: float) -> torch.Tensor:
    activation_TD = some()
    activation_TD[1, 4] = value
    return activation_TD


BAD = {
    "too narrow": blob(some(width=WIDTH - 1)),
    "no tokens": blob(some(0)),
    "three dimensions": blob(some()[None]),
    "another dtype": blob(some().double()),
    "integers": blob(torch.ones(2, WIDTH, dtype=torch.int64)),
    "NaN": blob(not_finite(float("nan"))),
    "infinity": blob(not_finite(float("inf"))),
    "another name": bytes(safetensors.torch.save({"hidden": some()})),
    "not safetensors": b"\x80\x04K\x01.",
    "a header that lies": (1 << 60).to_bytes(8, "little") + b"{}",
    "nothing": b"",
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_malformed_activations_are_refused_and_cost_no_quota(case: str) -> None:
    asking = Asking(quota_tokens=1)
    query = asking.open()
    with pytest.raises(ProtocolError):
        asking.request("north", "step", id=query, activation=BAD[case])
    assert asking.step(query, some())["tokens"]


def test_logits_that_are_not_finite_are_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(**TOP_K)
    query = asking.open()
    monkeypatch.setattr(Latter, "logits", lambda self, hidden_ND: torch.full((1, 97), float("nan")))
    with pytest.raises(ProtocolError, match="not finite"):
        asking.step(query, some())


def test_unknown_requests_and_fields_are_refused() -> None:
    asking = Asking()
    query = asking.open()
    for method, body in (
        ("peek", {"id": query}),
        ("open", {"as": "south"}),
        ("close", {"id": query, "x": 1}),
        ("close", {"id": query.hex()}),
        ("step", {"id": query}),
        ("step", {"id": query, "activation": blob(some()), "hidden": True}),
    ):
        with pytest.raises(ProtocolError):
            asking.request("north", method, **body)


def test_the_context_is_a_limit_over_all_steps_of_a_query() -> None:
    asking = Asking()
    with pytest.raises(CapacityError, match="context of 128"):
        asking.step(asking.open(), some(CONTEXT + 1))
    query = asking.open()
    asking.step(query, some(CONTEXT - 1))
    asking.step(query, some(1))
    with pytest.raises(CapacityError, match="context"):
        asking.step(query, some(1))


def test_a_quota_is_over_all_queries_of_one_party_alone() -> None:
    asking = Asking(quota_tokens=3)
    first, second = asking.open(), asking.open()
    for query in (first, second, first):
        asking.step(query, some(1))
    for query in (second, asking.open()):
        with pytest.raises(CapacityError, match="quota"):
            asking.step(query, some(1))
    assert asking.step(asking.open("south"), some(1), "south")["tokens"]


def test_nobody_asks_where_the_quota_is_zero() -> None:
    asking = Asking(quota_tokens=0)
    with pytest.raises(CapacityError, match="quota"):
        asking.step(asking.open(), some(1))


def test_open_queries_are_few_for_each_party() -> None:
    asking = Asking()
    queries = [asking.open() for _ in range(MAX_OPEN_QUERIES)]
    with pytest.raises(CapacityError, match="queries are open"):
        asking.open()
    assert asking.open("south"), "another party's places are its own"
    asking.request("north", "close", id=queries[1])
    assert asking.open()


def test_a_lost_connection_does_not_lock_a_party_out_and_a_busy_query_is_never_dropped() -> None:
    asking = Asking()
    lost, busy, *_ = [asking.open() for _ in range(MAX_OPEN_QUERIES)]
    asking.now = IDLE_S - 1
    asking.step(busy, some(1))
    with pytest.raises(CapacityError):
        asking.open()
    asking.now = IDLE_S
    asking.open()
    with pytest.raises(ProtocolError, match="no such query"):
        asking.step(lost, some(1))
    assert asking.step(busy, some(1))["tokens"]


def test_no_error_repeats_what_was_asked() -> None:
    """Errors travel back and may be logged: they hold no activations and no ids."""
    asking = Asking()
    query = asking.open()
    messages = []
    for payload in BAD.values():
        with pytest.raises(ProtocolError) as caught:
            asking.request("north", "step", id=query, activation=payload)
        messages.append(f"{caught.value} {caught.value.hint}")
    assert not any(query.hex() in message or len(message) > 200 for message in messages)
