"""A weight as quantising libraries make them: it says that it holds floating-point numbers, and computes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Quantised(Tensor):
    """Of torchao's kind: what is stored stands in a tensor within."""

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor) -> Quantised:
        made = Tensor._make_wrapper_subclass(cls, stored.shape, dtype=torch.bfloat16, device=stored.device)
        made.stored = stored
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].stored)
        raise NotImplementedError(f"{operator} of quantised numbers")

    @classmethod
    def parameter(cls, *shape: int) -> nn.Parameter:
        """A frozen weight."""
        return nn.Parameter(cls(torch.zeros(shape, dtype=torch.int8)), requires_grad=False)
