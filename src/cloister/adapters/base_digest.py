"""Which base an adapter was trained beside: a digest of weights, so that another base is refused instead of misled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_BLOCK_VALUES = 1 << 24
"""Values hashed at a time, so that hashing needs little memory of its own."""


def base_digest(weights: Iterable[Tensor]) -> bytes:
    """SHA-256 of shapes and values of some matrices. Values are rounded to bfloat16, so that it does not depend on
    whether a base was loaded as float32 or bfloat16."""
    digest = hashlib.sha256()
    for weight_MK in weights:
        digest.update(str(tuple(weight_MK.shape)).encode())
        rows = max(1, _BLOCK_VALUES // weight_MK.shape[1])
        for block in torch.split(weight_MK.detach(), rows):
            digest.update(block.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.digest()


def is_plain(weight: Tensor) -> bool:
    """Whether a weight holds floating-point numbers themselves. Some quantised weights are tensors that only say so."""
    return type(weight) in (Tensor, nn.Parameter, DTensor) and weight.is_floating_point() and weight.element_size() > 1
