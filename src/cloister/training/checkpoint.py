"""Everything that decides how training goes on, as bytes: with it a run continues to the same last bit.

Nothing in it depends on how many processes trained, and there are no generators: dropout is drawn anew for each pack.

One safetensors blob, never a pickle:

    weights.NAME, best.NAME    the adapter now, and at its best validation loss (absent before the first)
    first.NAME, second.NAME, updates.NAME    AdamW's moments and update count of each parameter
    counts (3)                 steps done, tokens seen, best step; int64
    best (1)                   best validation loss; float64
    curve (steps, 5)           step, tokens, loss, gradient norm, validation loss or NaN; float64
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cloister.errors import RunError

_COLUMNS = 5


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the curves. `train_loss` is the mean over the step's targets, in nats."""

    step: int
    tokens: int
    train_loss: float
    grad_norm: float
    validation_bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of training after `step` optimiser steps. Tensors are on the CPU."""

    step: int
    tokens: int
    curve: Sequence[Point]
    best: float
    best_step: int
    weights: Mapping[str, Tensor]
    best_weights: Mapping[str, Tensor] | None
    moments: Mapping[str, Mapping[str, Tensor]]
    """AdamW's state by parameter name: `step`, `exp_avg`, `exp_avg_sq`."""

    def to_bytes(self) -> bytes:
        tensors = {
            "counts": torch.tensor([self.step, self.tokens, self.best_step], dtype=torch.int64),
            "best": torch.tensor([self.best], dtype=torch.float64),
            "curve": torch.tensor([_row(p) for p in self.curve], dtype=torch.float64).reshape(-1, _COLUMNS),
        }
        tensors |= {f"weights.{name}": value for name, value in self.weights.items()}
        tensors |= {f"best.{name}": value for name, value in (self.best_weights or {}).items()}
        for name, state in self.moments.items():
            tensors |= {f"{prefix}.{name}": state[key] for prefix, key in _MOMENTS.items()}
        # Tensors that share memory cannot be written, and one may be in two places.
        return bytes(safetensors.torch.save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}))

    @classmethod
    def from_bytes(cls, content: bytes) -> Checkpoint:
        """Read what `to_bytes` wrote; whoever opened the seal knows that it was this program.

        Raises:
            RunError: it is something else.
        """
        try:
            tensors = safetensors.torch.load(content)
            step, tokens, best_step = (int(n) for n in tensors["counts"])
            best_weights = _under("best", tensors)
            return cls(
                step=step,
                tokens=tokens,
                curve=[_point(row) for row in tensors["curve"].tolist()],
                best=float(tensors["best"]),
                best_step=best_step,
                weights=_under("weights", tensors),
                best_weights=best_weights or None,
                moments={
                    name: {key: tensors[f"{prefix}.{name}"] for prefix, key in _MOMENTS.items()}
                    for name in _under("first", tensors)
                },
            )
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as exc:
            raise RunError("a checkpoint does not hold the state of a training", where="checkpoint") from exc


_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq", "updates": "step"}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}


def _row(point: Point) -> list[float]:
    bits = math.nan if point.validation_bits_per_byte is None else point.validation_bits_per_byte
    return [point.step, point.tokens, point.train_loss, point.grad_norm, bits]


def _point(row: list[float]) -> Point:
    step, tokens, loss, norm, bits = row
    return Point(
        step=int(step),
        tokens=int(tokens),
        train_loss=loss,
        grad_norm=norm,
        validation_bits_per_byte=None if math.isnan(bits) else bits,
    )
