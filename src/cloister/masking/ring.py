"""Activations as fixed-point integers, and the one-time pad over them, in the ring Z_2^32.

int32 tensors stand for elements of the ring: addition and subtraction wrap around. Additive noise on floats would not
be a one-time pad; a uniformly random element of a ring is, whatever the value that it hides.

Shapes: T tokens, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cloister.errors import RunError


def encode(x_TK: Tensor, amplitude: int, *, where: str) -> tuple[Tensor, Tensor]:
    """Fixed point with a scale per token.

    Args:
        x_TK: floating point, secret. amplitude: largest size of an integer that may result.

    Returns:
        int32 [T, K], and float32 [T, 1]: x is about the integer times the scale. Both secret.

    Raises:
        RunError: a value is not finite.
    """
    x = x_TK.float()
    largest_T1 = x.abs().amax(dim=1, keepdim=True)
    if not bool(torch.isfinite(largest_T1).all()):
        raise RunError(
            "an activation or gradient is not a finite number", where=where, hint="lower [training] learning_rate"
        )
    scale_T1 = torch.where(largest_T1 > 0, largest_T1 / amplitude, torch.ones_like(largest_T1))
    integers = torch.round(x / scale_T1).clamp_(-amplitude, amplitude)
    return integers.to(torch.int32), scale_T1


def blind(integers_TK: Tensor, pad_TK: Tensor) -> Tensor:
    """Add a pad of the same shape, modulo 2^32. The result is uniformly random if the pad is."""
    return integers_TK + pad_TK


def unblind(product_TM: Tensor, pad_product_TM: Tensor) -> Tensor:
    """Take the pad's own product away, modulo 2^32. Exact if the true product fits 32 bits (`quantise`)."""
    return product_TM - pad_product_TM
