"""Split inference, the party's half: text in, former layers here, latter layers in the enclave, text out."""

from __future__ import annotations

import math
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
    ids = prompt_ids(tokenizer, prompt)
    context = getattr(former.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if len(ids) >= context:
        raise CapacityError(f"the prompt has {len(ids)} tokens, the model's context {context}", hint="shorten it")
    query = Fields(session.request("query.open", {}), "query").blob("id", size=16)
    cache, position = former.new_cache(), 0
    produced: list[int] = []
    finish: Literal["end", "length", "quota"] = "length"
    fresh = ids
    try:
        while len(produced) < max_new_tokens and position + len(fresh) <= context:
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
            on_text(_text(tokenizer, produced))
    finally:
        session.request("query.close", {"id": query})
    text = _text(tokenizer, produced).strip()
    return Answer(text=text, token_ids=produced, finish=finish, seconds=time.monotonic() - started)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, to be continued: without the end-of-text token that some tokenizers append."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _first_token(reply: Fields) -> int:
    tokens = reply.items("tokens", max_items=64)
    if not tokens or not isinstance(tokens[0], int) or isinstance(tokens[0], bool) or tokens[0] < 0:
        raise ProtocolError("the enclave's reply holds no token", where="query")
    return tokens[0]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
