"""Split inference, the party's half: text in, former layers here, latter layers in the enclave, text out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
from transformers import PreTrainedTokenizerBase

from cloister.crypto.encoding import Fields
from cloister.errors import CapacityError, ProtocolError
from cloister.model.cut import Former
from cloister.party.client import Requests


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated text."""

    text: str
    token_ids: list[int]
    finish: Literal["end", "length", "quota"]
    seconds: float


def generate(
    session: Requests,
    former: Former,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Answer a prompt greedily. The enclave sees activations only; it returns token ids, never hidden states.

    Raises:
        VerificationError: the job does not allow this party to query.
        CapacityError: the prompt does not fit the model's context, or the quota was used up before the first token.
        ProtocolError: the enclave's reply is malformed.
    """
    started = time.monotonic()
    query = Fields(session.request("query.open", {}), "query").blob("id", size=16)
    ids = tokenizer(prompt)["input_ids"]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # appended by some tokenizers
        ids.pop()
    cache, position = former.new_cache(), 0
    produced: list[int] = []
    finish: Literal["end", "length", "quota"] = "length"
    fresh = ids
    try:
        while len(produced) < max_new_tokens:
            span = torch.arange(position, position + len(fresh), device=former.device)
            given = torch.tensor(fresh, device=former.device)
            activation_TD = former(given, span, None, cache).cpu().contiguous()
            position += len(fresh)
            blob = bytes(safetensors.torch.save({"activation": activation_TD}))
            try:
                reply = Fields(session.request("query.step", {"id": query, "activation": blob}), "query reply")
            except CapacityError:
                if not produced:
                    raise
                finish = "quota"
                break
            token = _first_token(reply)
            if token == tokenizer.eos_token_id:
                finish = "end"
                break
            produced.append(token)
            fresh = [token]
            on_text(tokenizer.decode(produced, skip_special_tokens=True))
    finally:
        session.request("query.close", {"id": query})
    text = tokenizer.decode(produced, skip_special_tokens=True).strip()
    return Answer(text=text, token_ids=produced, finish=finish, seconds=time.monotonic() - started)


def _first_token(reply: Fields) -> int:
    tokens = reply.items("tokens", max_items=64)
    if not tokens or not isinstance(tokens[0], int) or isinstance(tokens[0], bool) or tokens[0] < 0:
        raise ProtocolError("the enclave's reply holds no token", where="query")
    return tokens[0]
