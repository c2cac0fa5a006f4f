"""Freivalds' check: was a product computed right? In a small share of the product's own time.

For secret vectors s the accelerator's decoded product y of x must satisfy y s = x (W^T s). The entries of s are uniform
in [0, 2^16). A wrong y passes one vector with probability at most 2^-16: with all entries but one fixed, at most one
value of the last solves the equation, also modulo 2^64, since an error is below 2^33 and so s e < 2^49. Three vectors
give 2^-48. In Z_2^32 itself half of the errors of 2^31 would pass: the check is on decoded integers.

Sums are exact: float64 adds integers below 2^53 without error, so factors are cut into halves first. With activations
of at most 2^20 (`quantise`), K and M up to 2^17 keep every sum below it.

Shapes: T tokens, K inputs, M outputs, V vectors.
"""

from __future__ import annotations

import secrets

import numpy as np
import torch
from torch import Tensor

VECTORS = 3
_LOW_BITS = 16
_MAX_INNER = 1 << 17


class FreivaldsCheck:
    """Secret vectors for one weight matrix, and W^T s. They are retired once a check has failed."""

    def __init__(self, weight_KM: Tensor) -> None:
        """weight_KM: int8, streamed in once; it is not kept."""
        if max(weight_KM.shape) > _MAX_INNER:
            raise ValueError(f"a dimension above {_MAX_INNER} could lose bits")
        outputs = weight_KM.shape[1]
        drawn = np.frombuffer(secrets.token_bytes(2 * VECTORS * outputs), dtype="<u2").astype(np.int64)
        s_MV = torch.from_numpy(drawn).view(outputs, VECTORS)
        self._s_MV = s_MV.double()
        # |W s| <= 2^7 2^16 M: exact in float64.
        ws_KV = (weight_KM.double() @ self._s_MV).to(torch.int64)
        low = ws_KV & ((1 << _LOW_BITS) - 1)
        self._ws_low_KV, self._ws_high_KV = low.double(), ((ws_KV - low) >> _LOW_BITS).double()

    def wrong_rows(self, x_TK: Tensor, product_TM: Tensor) -> Tensor:
        """Which tokens' products are wrong.

        Args:
            x_TK: int32, at most 2^20 in size. product_TM: int32, decoded.

        Returns:
            bool [T]; a wrong row is missed with probability at most 2^-48.
        """
        low = product_TM & 0xFFFF
        high = (product_TM - low) >> 16
        found = (high.double() @ self._s_MV).to(torch.int64) * (1 << 16) + (low.double() @ self._s_MV).to(torch.int64)
        x = x_TK.double()
        right = (x @ self._ws_high_KV).to(torch.int64) * (1 << _LOW_BITS) + (x @ self._ws_low_KV).to(torch.int64)
        return (found != right).any(dim=1)
