"""Negative log-likelihood of targets without a logits tensor for all of them at once.

Legend: T = tokens, N = targets, D = model dimension, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from cloister.data.packing import Pack
from cloister.model.cut import Whole

# 16 M logits are 64 MiB in fp32: more would be the largest tensor of a step for vocabularies of 100,000 and more.
MAX_LOGITS = 1 << 24


def target_nll(half: Whole, pack: Pack, max_logits: int = MAX_LOGITS) -> Tensor:
    """Nats of each target, (N) in fp32. Logits are computed for targets only, `max_logits` at a time."""
    hidden_ND = half.hidden(pack.given, pack.layout.position_T, pack.wanted)[pack.wanted_N]
    rows = max(1, max_logits // half.config.get_text_config().vocab_size)
    if len(hidden_ND) <= rows:
        return _nll(half, hidden_ND, pack.target_id_N)
    parts = zip(torch.split(hidden_ND, rows), torch.split(pack.target_id_N, rows), strict=True)
    # Each part's logits are computed again in the backward pass instead of being kept.
    return torch.cat([_recomputed(half, hidden, target) for hidden, target in parts])


def _nll(half: Whole, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    return cross_entropy(half.logits(hidden_ND).float(), target_N, reduction="none")


def _recomputed(half: Whole, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _nll(half, hidden_ND, target_N)
    result = checkpoint(_nll, half, hidden_ND, target_N, use_reentrant=False)
    if not isinstance(result, Tensor):
        raise TypeError("checkpoint returned no tensor")
    return result
