"""Frozen weights as integers, and the fixed-point range that their products leave to activations.

    W ~ diag(scale) (part_0 + 256 part_1)        parts int8; one part for 8-bit weights, two for 16-bit ones

A product of a part with integers of at most `amplitude` in size cannot leave the signed 32-bit range: so the ring
Z_2^32, in which masks live, loses nothing (guaranteed, not probable).

Shapes: M outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cloister.errors import ModelError

MIN_AMPLITUDE = 1 << 7
"""Eight bits with the sign; with fewer, activations drown in rounding."""
MAX_AMPLITUDE = 1 << 20
"""float32 counts integers of this size exactly, with room for rounding; `freivalds` relies on it too."""
_LIMIT = (1 << 31) - 1

Direction = Literal["forward", "backward"]


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A frozen weight matrix as integers."""

    parts: tuple[Tensor, ...]
    """int8 [M, K] each, least significant first."""
    scale_M: Tensor
    """float32 [M]; a weight is its row's scale times its integer."""
    amplitude_forward: int
    """Largest size of an integer activation x in x W^T."""
    amplitude_backward: int
    """Largest size of an integer gradient g in g W."""

    def dequantised(self) -> Tensor:
        """float32 [M, K]: what the integers stand for."""
        whole = sum(part.to(torch.int32) << (8 * i) for i, part in enumerate(self.parts))
        return torch.as_tensor(whole) * self.scale_M[:, None]


def quantise(weight_MK: Tensor, *, bits: Literal[8, 16], where: str) -> Quantised:
    """Round each row to `bits` bits, with the scale that uses them fully.

    Args:
        weight_MK: any floating dtype. where: the layer's name, for errors.

    Raises:
        ModelError: a weight is not finite, or the rows' norms leave activations fewer than eight bits.
    """
    weight = weight_MK.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError("a weight is not a finite number", where=where)
    # With 16 bits the top is 127 * 256 + 127, so that both parts fit into int8.
    top = 127 if bits == 8 else 127 * 256 + 127
    scale = weight.abs().amax(dim=1) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    integers = torch.round(weight / scale[:, None]).clamp(-top, top).to(torch.int32)
    parts = _split(integers, bits)
    forward, backward = (_amplitude(parts, axis, where) for axis in (1, 0))
    return Quantised(parts=parts, scale_M=scale, amplitude_forward=forward, amplitude_backward=backward)


def _split(integers: Tensor, bits: int) -> tuple[Tensor, ...]:
    if bits == 8:
        return (integers.to(torch.int8),)
    low = ((integers + 128) & 255) - 128
    return low.to(torch.int8), ((integers - low) >> 8).to(torch.int8)


def _amplitude(parts: tuple[Tensor, ...], axis: int, where: str) -> int:
    """The largest factor whose products with every row (axis 1) or column (axis 0) stay below 2^31."""
    norm = max(int(part.to(torch.int32).abs().sum(dim=axis).max()) for part in parts)
    amplitude = min(_LIMIT // max(norm, 1), MAX_AMPLITUDE)
    if amplitude < MIN_AMPLITUDE:
        raise ModelError(
            f"its weights' absolute sum of {norm} leaves activations fewer than 8 bits in 32-bit integers",
            where=where,
            hint="this layer is too wide for method 'slice'",
        )
    return amplitude
