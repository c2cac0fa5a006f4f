"""Method `slice` without masks and processes: frozen weights as integers, multiplied in this process.

What masks hide they leave bit for bit as it is (tests/unit/masking, tests/integration/test_slice.py), so that this is
the arithmetic of `slice`, for less work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cloister.job import Job
from cloister.jobfile import find_model
from cloister.masking.linear import Reply
from cloister.masking.model import build_masked_model
from cloister.masking.pads import InsecureNoPads
from cloister.masking.product import modular_product
from cloister.masking.quantise import Direction
from cloister.masking.skeleton import plan_groups
from cloister.masking.weights import GroupPlan
from cloister.model.cut import Whole


class InProcess:
    """An accelerator of one's own: it takes the weights, [M, K] int8 for each group and part, and multiplies."""

    name = "this process"

    def __init__(self) -> None:
        self._weights: dict[str, list[Tensor]] = {}

    def begin(self, weights_id: bytes, plans: Sequence[GroupPlan], parts: int) -> bool:
        shapes = {plan.name: (plan.outputs, plan.inputs) for plan in plans}
        self._weights = {n: [torch.zeros(s, dtype=torch.int8) for _ in range(parts)] for n, s in shapes.items()}
        return False

    def load(self, group: str, part: int, first_row: int, block_MK: Tensor) -> None:
        self._weights[group][part][first_row : first_row + len(block_MK)] = block_MK

    def complete(self) -> None:
        """All rows are here."""

    def submit(self, group: str, direction: Direction, z_TK: Tensor) -> Reply:
        parts = self._weights[group]
        return lambda: [modular_product(z_TK, part.T if direction == "forward" else part) for part in parts]


def integer_half(folder: Path, job: Job) -> Whole:
    """The model of `folder` with integer products instead of its linear layers."""
    accelerator = InProcess()
    masked = build_masked_model(
        folder,
        find_model(folder, where="[model] path").digests(),
        dtype=job.model.dtype,
        bits=job.masking.bits,
        rows=job.training.max_tokens,
        sinks=[accelerator],
        accelerator=accelerator,
        pads=InsecureNoPads(plan_groups(folder), parts=job.masking.bits // 8),
    )
    return Whole(masked.model)
