"""Frozen linear layers whose weights lie in memory as this processor's matrix products read them.

torch multiplies on the CPU with weights as they are stored, and arranges them anew for every product, forward and
backward. Frozen weights never change, so that need be done but once. The arithmetic is the same, float32 throughout;
the order of sums is another.

Legend: T = tokens, D = inputs, F = outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

LEAST_WEIGHTS = 1 << 18
"""Smaller matrices stay as they are: they lie in the cache, and arranging them costs next to nothing."""
_LOOKED_AT = 64
"""Rows in which a change of the weight is looked for."""
_ROWS = 512
"""Rows of the products for which weights are arranged; others are possible."""


def repack(model: PreTrainedModel, wanted: bool = True) -> PreTrainedModel:
    """`model` with repacked layers in place of its large linear ones; names and weights stay the same.

    Weights are copied when a layer is first used, once for each direction. Only float32 on the CPU gains by it; models
    in another dtype or elsewhere, and machines whose torch cannot do it, get the model back as it is.

    Args:
        wanted: [enclave] repack; False: nothing is done.
    """
    if not wanted or not pays(model.dtype, model.device.type):
        return model
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= LEAST_WEIGHTS:
                setattr(parent, name, RepackedLinear(child))
    return model


def pays(dtype: torch.dtype, device: str) -> bool:
    """Whether models in this dtype on this kind of device gain by it."""
    return device == "cpu" and dtype == torch.float32 and works()


def unpack(model: PreTrainedModel) -> None:
    """Undo `repack`, adapters or not; the copies are given up."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, RepackedLinear):
                setattr(parent, name, child.plain())


class RepackedLinear(nn.Linear):
    """As the layer that it is made of, whose parameters it has, while they are frozen."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__(frozen.in_features, frozen.out_features, bias=frozen.bias is not None, device="meta")
        self.weight, self.bias = frozen.weight, frozen.bias
        self._copies = _Copies()

    def forward(self, input: Tensor) -> Tensor:  # the name in nn.Linear
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return super().forward(input)
        return _Product.apply(input, self)  # type: ignore[no-any-return,no-untyped-call]

    def plain(self) -> nn.Linear:
        """An ordinary layer with its parameters."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    def multiply(self, input_TD: Tensor) -> Tensor:
        return _multiply(input_TD, self._copies.forward(self.weight), self.bias)

    def multiply_back(self, gradient_TF: Tensor) -> Tensor:
        return _multiply(gradient_TF, self._copies.backward(self.weight), None)


class _Copies:
    """Of one weight, made when they are needed, and again when the weight has been changed in place.

    PEFT merges an adapter through `weight.data`, of which torch keeps no count: values of rows all over it are
    compared. That finds a merge; whoever changes a few values in this way must `unpack` first.
    """

    def __init__(self) -> None:
        self._made: dict[bool, tuple[int, Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: object) -> _Copies:
        return _Copies()

    def __reduce__(self) -> tuple[type[_Copies], tuple[()]]:
        return _Copies, ()

    def forward(self, weight_FD: Tensor) -> Tensor:
        return self._of(weight_FD, transposed=False)

    def backward(self, weight_FD: Tensor) -> Tensor:
        return self._of(weight_FD, transposed=True)

    def _of(self, weight_FD: Tensor, *, transposed: bool) -> Tensor:
        weight_FD = weight_FD.detach()
        looked_at = weight_FD[:: max(1, len(weight_FD) // _LOOKED_AT), 0]
        made = self._made.get(transposed)
        if made is None or made[0] != weight_FD._version or not torch.equal(made[1], looked_at):
            arranged = _arrange(weight_FD.t().contiguous() if transposed else weight_FD.contiguous())
            made = self._made[transposed] = weight_FD._version, looked_at.clone(), arranged
        return made[2]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TD: Tensor, layer: RepackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(input_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TF: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.multiply_back(gradient_TF), None


@functools.cache
def works() -> bool:
    """Whether this torch arranges weights and multiplies with them rightly; these are operators of its compiler."""
    generator = torch.Generator().manual_seed(0)
    weight_FD, bias_F = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    for rows in (1, 3, 600):
        wide = torch.randn(rows, 2 * 96, generator=generator)
        try:
            forward = _multiply(wide[:, 96:160], _arrange(weight_FD), bias_F)
            backward = _multiply(wide[:, 96:], _arrange(weight_FD.t().contiguous()), None)
        except (AttributeError, RuntimeError):  # not built with oneDNN, or another version of it
            return False
        expected = linear(wide[:, 96:160], weight_FD, bias_F), linear(wide[:, 96:], weight_FD.t())
        if not all(map(_close, (forward, backward), expected)):
            return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def _arrange(weight_FD: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_FD, _ROWS)  # type: ignore[no-any-return]


def _multiply(input: Tensor, arranged: Tensor, bias_F: Tensor | None) -> Tensor:
    """`input` (..., D) times what `_arrange` gave of (F, D): (..., F)."""
    width = input.shape[-1]
    # Strides of a dimension of 1 are arbitrary, and oneDNN believes them.
    input_TD = input.reshape(-1, width).contiguous()
    input_TD = input_TD.as_strided(input_TD.shape, (width, 1))
    product_TF: Tensor = torch.ops.mkldnn._linear_pointwise(input_TD, arranged, bias_F, "none", [], "")
    return product_TF.reshape(*input.shape[:-1], product_TF.shape[-1])
