"""Split inference, the party's half: text in, former layers here, latter layers in the enclave, text out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from jinja2 import TemplateError
from transformers import DynamicCache, PreTrainedTokenizerBase

from cloister.crypto.encoding import Fields
from cloister.errors import CapacityError, CloisterError, DataError, ProtocolError, UsageError
from cloister.job import DataSection
from cloister.model.cut import Former
from cloister.party.follower import Requests

_MAX_CHOICES = 64
"""Most tokens that one reply may offer; a job's `top_k` has the same limit."""

Choices = list[tuple[int, float]]
"""(token id, natural log-probability), the likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated text."""

    text: str
    token_ids: list[int]
    alternatives: list[Choices]
    """For each token the likeliest ones, itself first; empty where the job returns the token alone."""
    finish: Literal["end", "length", "quota"]
    seconds: float


def generate(
    session: Requests,
    former: Former,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    stops: frozenset[int],
    max_new_tokens: int,
    on_token: Callable[[], object] = lambda: None,
) -> Answer:
    """Answer a prompt greedily. The enclave sees activations only; it returns token ids, never hidden states.

    The ids are those that the merged model's greedy decoding gives, up to the token that ends the text.

    Args:
        prompt: as the model is to see it, see `as_trained`.
        stops: tokens that end the text, see `stop_ids`.

    Raises:
        VerificationError: the job does not allow this party to query.
        CapacityError: the prompt does not fit the model's context, or the quota was used up before the first token.
        ProtocolError: the enclave's reply is malformed.
    """
    started = time.monotonic()
    ids = prompt_ids(tokenizer, prompt)
    context = getattr(former.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if not ids:
        raise UsageError("the prompt is empty")
    if len(ids) >= context:
        raise CapacityError(f"the prompt has {len(ids)} tokens, the model's context {context}", hint="shorten it")
    query = Fields(session.request("query.open", {}), "query").blob("id", size=16)
    cache, position, fresh = former.new_cache(), 0, ids
    produced: list[int] = []
    alternatives: list[Choices] = []
    finish: Literal["end", "length", "quota"] = "length"
    try:
        while len(produced) < max_new_tokens and position + len(fresh) <= context:
            try:
                token, choices = _next_token(session, query, former, cache, position, fresh)
            except CapacityError:
                if not produced:
                    raise
                finish = "quota"
                break
            if token in stops:
                finish = "end"
                break
            position += len(fresh)
            fresh = [token]
            produced.append(token)
            alternatives += [choices] if choices else []
            on_token()
    finally:
        # Whatever ended the answer is what counts, not that a lost session cannot be told; the enclave drops the query.
        with suppress(CloisterError):
            session.request("query.close", {"id": query})
    return Answer(
        text=str(tokenizer.decode(produced, skip_special_tokens=True)).strip(),
        token_ids=produced,
        alternatives=alternatives,
        finish=finish,
        seconds=time.monotonic() - started,
    )


def _next_token(
    session: Requests, query: bytes, former: Former, cache: DynamicCache, position: int, fresh: list[int]
) -> tuple[int, Choices]:
    span = torch.arange(position, position + len(fresh), device=former.device)
    activation_TD = former(torch.tensor(fresh, device=former.device), span, None, cache).cpu().contiguous()
    if not bool(torch.isfinite(activation_TD).all()):
        raise DataError("the former layers gave activations that are not finite", where="query")
    blob = bytes(safetensors.torch.save({"activation": activation_TD}))
    return _read_reply(Fields(session.request("query.step", {"id": query, "activation": blob}), "query reply"))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, to be continued: without the end-of-text token that some tokenizers append."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def as_trained(data: DataSection, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the model saw prompts in training: in the job's template, or in the chat template for messages.

    Spaces at the end are left out, since tokenizers join a space to the word behind it, which is the answer's first.

    Raises:
        DataError: the tokenizer's chat template refuses the prompt.
    """
    if data.format == "messages":
        # The template writes the begin-of-text token itself, and the tokenizer would write it again.
        bos = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
        try:
            message = [{"role": "user", "content": prompt}]
            text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError) as exc:
            raise DataError(f"the chat template refuses the prompt: {exc}", where="prompt") from exc
        adds_bos = bos and prompt_ids(tokenizer, "x")[0] == tokenizer.bos_token_id
        return text.removeprefix(bos) if adds_bos else text
    before, _, _ = (data.template or "{prompt} {response}").partition("{response}")
    return before.replace("{prompt}", prompt).rstrip(" ")


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation_config.json.

    Raises:
        DataError: that file is malformed.
    """
    path = folder / "generation_config.json"
    listed: object = None
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as exc:
            raise DataError("is not a JSON object", where=str(path)) from exc
    found = listed if isinstance(listed, list) else [listed, tokenizer.eos_token_id]
    return frozenset(token for token in (*found, tokenizer.eos_token_id) if type(token) is int)


def _read_reply(reply: Fields) -> tuple[int, Choices]:
    """The likeliest token; and, where the job returns them, the likeliest tokens with their log-probabilities."""
    tokens = reply.items("tokens", max_items=_MAX_CHOICES)
    logprobs = reply.items("logprobs", max_items=_MAX_CHOICES)
    if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise ProtocolError("the enclave's reply holds no token", where="query")
    if logprobs and (len(logprobs) != len(tokens) or not all(type(p) is float and math.isfinite(p) for p in logprobs)):
        raise ProtocolError("the enclave's log-probabilities do not fit its tokens", where="query")
    return tokens[0], [(token, float(value)) for token, value in zip(tokens, logprobs, strict=False)]
