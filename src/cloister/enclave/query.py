"""Split inference: a party runs the former layers, the enclave the latter ones, each with its own cache.

    query.open   {}                                   -> {id}
    query.step   {id, activation: bytes}              -> {tokens: [ids], logprobs: [..]}   likeliest next tokens
    query.close  {id}                                 -> {}

What a query returns is the job's `[inference]`: the likeliest token, or the top k with their log-probabilities.
Activations and hidden states are never returned. Every party has a quota of new tokens and few open queries.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import DynamicCache

from cloister.crypto.encoding import Fields
from cloister.errors import CapacityError, ProtocolError, VerificationError
from cloister.job import InferenceSection
from cloister.model.cut import Latter

MAX_OPEN_QUERIES = 4
"""Per party: each holds a key-value cache."""
IDLE_S = 60.0
"""A query that nobody has continued for this long makes room for a new one of its party: whoever lost the connection
could not close it."""


@dataclass
class _Query:
    party: str
    cache: DynamicCache
    used_at: float
    length: int = 0


class QueryService:
    """Answers queries one at a time. `latter` must be in evaluation mode and not be trained meanwhile."""

    def __init__(
        self,
        latter: Latter,
        rules: InferenceSection,
        parties: list[str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._latter = latter
        self._rules = rules
        allowed = parties if rules.allow == "all" else [] if rules.allow == "none" else rules.allow
        self._quota = dict.fromkeys(allowed, rules.quota_tokens)
        self._queries: dict[bytes, _Query] = {}
        self._clock = clock
        self._lock = threading.Lock()
        self._methods: dict[str, Callable[[str, Fields], dict[str, Any]]] = {
            "query.open": self._open,
            "query.step": self._step,
            "query.close": self._close,
        }

    def __call__(self, party: str, method: str, fields: Fields) -> dict[str, Any]:
        """Answer one request.

        Raises:
            VerificationError: the job does not allow this party to query.
            CapacityError: its quota, its number of open queries or the model's context is exhausted.
            ProtocolError: the request is malformed.
        """
        if party not in self._quota:
            raise VerificationError("inference", "the job does not allow this party to query the model", where=party)
        if method not in self._methods:
            raise ProtocolError(f"there is no request {method!r}", where=party)
        with self._lock:
            return self._methods[method](party, fields)

    def _open(self, party: str, fields: Fields) -> dict[str, Any]:
        fields.end()
        own = [name for name, query in self._queries.items() if query.party == party]
        if len(own) >= MAX_OPEN_QUERIES:
            longest_idle = min(own, key=lambda name: self._queries[name].used_at)
            if self._clock() - self._queries[longest_idle].used_at < IDLE_S:
                hint = f"wait for one to end; one that stands still for {IDLE_S:g} s is dropped"
                raise CapacityError(f"{MAX_OPEN_QUERIES} queries are open", where=party, hint=hint)
            del self._queries[longest_idle]
        name = secrets.token_bytes(16)
        self._queries[name] = _Query(party, self._latter.new_cache(), self._clock())
        return {"id": name}

    def _close(self, party: str, fields: Fields) -> dict[str, Any]:
        name = fields.blob("id", size=16)
        fields.end()
        self._find(party, name)
        del self._queries[name]
        return {}

    def _step(self, party: str, fields: Fields) -> dict[str, Any]:
        query = self._find(party, fields.blob("id", size=16))
        activation_TD = self._activation(fields.blob("activation", max_size=256 << 20), party)
        fields.end()
        if self._quota[party] < 1:
            raise CapacityError("the party's quota of new tokens is used up", where=party)
        limit = getattr(self._latter.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and query.length + len(activation_TD) > limit:
            raise CapacityError(f"the text is longer than the model's context of {limit} tokens", where=party)
        self._quota[party] -= 1
        position_T = torch.arange(query.length, query.length + len(activation_TD), device=self._latter.device)
        with torch.no_grad():
            hidden_TD = self._latter.hidden(activation_TD.to(self._latter.device), position_T, None, query.cache)
            logits_V = self._latter.logits(hidden_TD[-1:])[0].float()
        query.length += len(activation_TD)
        query.used_at = self._clock()
        if not bool(torch.isfinite(logits_V).all()):
            raise ProtocolError("these activations give logits that are not finite", where=party)
        count = 1 if self._rules.returns == "token" else self._rules.top_k
        top = torch.log_softmax(logits_V, -1).topk(count)
        logprobs = top.values.tolist() if self._rules.returns == "top-k" else []
        return {"tokens": top.indices.tolist(), "logprobs": logprobs}

    def _find(self, party: str, name: bytes) -> _Query:
        query = self._queries.get(name)
        if query is None or query.party != party:
            raise ProtocolError("there is no such query", where=party)
        return query

    def _activation(self, blob: bytes, party: str) -> torch.Tensor:
        try:
            tensors = safetensors.torch.load(blob)
        except (SafetensorError, ValueError, RuntimeError) as exc:
            raise ProtocolError("the activations are not a safetensors blob", where=party) from exc
        activation = tensors.get("activation")
        width = self._latter.config.get_text_config().hidden_size
        if activation is None or activation.dim() != 2 or activation.shape[1] != width or len(activation) < 1:
            raise ProtocolError(f"activations must have the shape (tokens, {width})", where=party)
        if activation.dtype != self._latter.model.dtype or not bool(torch.isfinite(activation).all()):
            raise ProtocolError("activations must be finite and of the model's dtype", where=party)
        return activation
