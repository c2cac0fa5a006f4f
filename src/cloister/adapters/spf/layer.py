"""A linear module with trainable rows, with LoRA, or with both.

Legend: M = outputs (rows), K = inputs, S = chosen rows, r = LoRA rank.

Saved under the module's name, for each adapter:

    spf_rows       (S, K)   the chosen rows' values now, in the base's type or float32
    spf_index      (S)      their numbers, ascending; int64
    spf_base       (32)     SHA-256 of the base's weight; uint8. Rows of one base mean nothing in another
    spf_lora_A     (r, K)   LoRA's matrices
    spf_lora_B     (M, r)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from cloister.adapters.base_digest import base_digest, is_plain
from cloister.adapters.spf.product import Rows, row_product, with_rows
from cloister.errors import AdapterError


class SPFLayer(nn.Module, BaseTunerLayer):
    """Wraps a `nn.Linear` or Conv1D, whose weight it changes only while merged."""

    adapter_layer_names = ("spf_rows", "spf_lora_A", "spf_lora_B")
    other_param_names = ("spf_index", "spf_base", "spf_lora_dropout", "spf_scaling", "_begun", "_assigned")

    def __init__(self, base_layer: nn.Module) -> None:
        """
        Raises:
            AdapterError: the module's weight cannot be trained by rows, such as a quantised one.
        """
        super().__init__()
        self.base_layer = base_layer
        self.transposed = type(base_layer).__name__ == "Conv1D"
        weight_of(base_layer, "SPF")
        self.spf_rows = nn.ParameterDict()
        self.spf_index = _Checked(self._assign_index)
        self.spf_base = _Checked(self._assign_base)
        self.spf_lora_A = nn.ModuleDict()
        self.spf_lora_B = nn.ModuleDict()
        self.spf_lora_dropout = nn.ModuleDict()
        self.spf_scaling: dict[str, float] = {}
        self._before_merge: dict[str, Tensor] = {}
        self._unchosen: set[str] = set()
        self._begun: dict[str, nn.Parameter] = {}
        """Rows as they were made or last found whole: those still in place have not been assigned."""
        self._assigned: dict[str, set[str]] = {}
        """What else has been assigned since, of each adapter."""
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []

    @property
    def weight_MK(self) -> Tensor:
        """The base's weight with outputs as rows, a view."""
        return rows_of(self.base_layer)

    def add_rows(self, name: str, index_S: Tensor, *, chosen: bool = True) -> None:
        """Make some rows trainable in an adapter; they begin with the base's values.

        Args:
            index_S: int64, ascending.
            chosen: False for a placeholder, until a saved adapter is loaded that knows its rows.
        """
        if not chosen:
            self._unchosen.add(name)
        device = self.weight_MK.device
        self.spf_index[name] = index_S.to(device)
        digest = base_digest([self.weight_MK])
        self.spf_base[name] = torch.tensor(list(digest), dtype=torch.uint8, device=device)
        self.spf_rows[name] = nn.Parameter(self.weight_MK.index_select(0, self.spf_index[name]).contiguous())
        self._begun[name] = self.spf_rows[name]
        self._assigned.pop(name, None)

    def add_lora(self, name: str, lora_rank: int, alpha: float, dropout: float) -> None:
        """Add LoRA to an adapter, as PEFT begins it: A random by Kaiming's rule, B zero."""
        (outputs, inputs), like = self.weight_MK.shape, {"device": self.weight_MK.device, "dtype": self.weight_MK.dtype}
        lora_a = nn.Linear(inputs, lora_rank, bias=False, **like)
        lora_b = nn.Linear(lora_rank, outputs, bias=False, **like)
        nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(lora_b.weight)
        self.spf_lora_A[name], self.spf_lora_B[name] = lora_a, lora_b
        self.spf_lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.spf_scaling[name] = alpha / lora_rank

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the base layer, with the active adapters' rows in place of its own, and their LoRA added."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            out: Tensor = self.base_layer(x, *args, **kwargs)
            return out
        out = self._with_rows(x, *args, **kwargs)
        for name in self._active(self.spf_lora_A):
            lora_a, lora_b = self.spf_lora_A[name], self.spf_lora_B[name]
            lora_x = self._cast_input_dtype(x, weight_of(lora_a, "LoRA").dtype)
            delta = lora_b(lora_a(self.spf_lora_dropout[name](lora_x)))
            out = out + (delta * self.spf_scaling[name]).to(out.dtype)
        return out

    def _with_rows(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        chosen = self._chosen(self.active_adapters)
        if not chosen:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        weight, bias = weight_of(self.base_layer, "SPF"), self.base_layer.bias
        bias_M = bias if isinstance(bias, Tensor) else None
        x = self._cast_input_dtype(x, weight.dtype)
        return row_product(x, weight, bias_M, chosen, transposed=self.transposed)

    def _chosen(self, names: list[str]) -> list[Rows]:
        names = [name for name in names if name in self.spf_rows]
        if not self._unchosen.isdisjoint(names):
            raise AdapterError(
                'criterion "grad" ranks by gradients, and there are none',
                where="SPF criterion",
                hint="make them by cloister.adapters.gradient_norms and pass them as gradient_norms",
            )
        for name in names:
            if assigned := self._assigned.get(name):
                unchanged = self.spf_rows[name] is self._begun[name]
                _require_all(assigned if unchanged else assigned | {"spf_rows"})
                self._begun[name] = self.spf_rows[name]  # the ones before are not to be kept in memory
                del self._assigned[name]
        return [(self.spf_rows[name], self.spf_index[name]) for name in names]

    def _active(self, among: nn.ModuleDict) -> list[str]:
        return [name for name in self.active_adapters if name in among]

    # Merging ----------------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base's weight.

        Raises:
            AdapterError: the base has been quantised since; or, with `safe_merge`, a value would not be finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        weight = weight_of(self.base_layer, "merging")
        if self.merged:  # all at once, since what an adapter changes is told from the untouched base
            names = [*self.merged_adapters, *names]
            self.unmerge()
        merged = with_rows(weight, self._chosen(names), transposed=self.transposed)
        for name in (name for name in names if name in self.spf_lora_A):  # adding zeros would turn -0.0 into 0.0
            delta_MK = self.get_delta_weight(name, rows=False).to(merged.dtype)
            merged += delta_MK.t() if self.transposed else delta_MK
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise AdapterError("merging would put infinite or undefined values into the base", where="safe_merge")
        for name in names:
            if name in self.spf_rows:
                self._before_merge[name] = self.weight_MK.index_select(0, self.spf_index[name])
        weight.data = merged
        self.merged_adapters = list(names)

    def unmerge(self) -> None:
        """Take all merged adapters out again: chosen rows to the bit, LoRA up to rounding."""
        weight_MK = self.weight_MK
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.spf_lora_A:
                weight_MK -= self.get_delta_weight(name, rows=False).to(weight_MK.dtype)
            if name in self._before_merge:
                weight_MK.index_copy_(0, self.spf_index[name], self._before_merge.pop(name))

    def get_delta_weight(self, name: str, *, rows: bool = True) -> Tensor:
        """An adapter's difference from the untouched base, (M, K); PEFT's name for it."""
        delta_MK = torch.zeros_like(self.weight_MK, dtype=torch.float32)
        if rows and name in self.spf_rows:
            index_S = self.spf_index[name]
            base_SK = self._before_merge.get(name, self.weight_MK.index_select(0, index_S))
            delta_MK.index_copy_(0, index_S, self.spf_rows[name].detach().float() - base_SK.float())
        if name in self.spf_lora_A:
            b_Mr, a_rK = (rows_of(part[name]) for part in (self.spf_lora_B, self.spf_lora_A))
            delta_MK += (b_Mr.float() @ a_rK.float()) * self.spf_scaling[name]
        return delta_MK

    # Loading ----------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Refuse rows of another base, or that do not fit, before anything is taken."""
        try:
            for name in self.spf_index:
                keys = {part: f"{prefix}{part}.{name}" for part in ("spf_rows", "spf_index", "spf_base")}
                self._check(name, {part: state_dict[key] for part, key in keys.items() if key in state_dict})
        except AdapterError as exc:
            exc.where = prefix.removesuffix(".").removeprefix("base_model.model.")
            raise
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check(self, name: str, saved: Mapping[str, Tensor]) -> None:
        if not saved:
            return
        _require_all(saved)
        self._check_base(name, saved["spf_base"])
        self._check_index(name, saved["spf_index"])

    def _assign_base(self, name: str, digest: Tensor) -> None:
        self._check_base(name, digest)
        self._assigned.setdefault(name, set()).add("spf_base")

    def _assign_index(self, name: str, index_S: Tensor) -> None:
        self._check_index(name, index_S)
        self._assigned.setdefault(name, set()).add("spf_index")

    def _check_base(self, name: str, digest: Tensor) -> None:
        if not torch.equal(digest.cpu(), self.spf_base[name].cpu()):
            raise AdapterError(
                "the adapter was trained on another base model: its rows belong to another weight",
                hint="load it into the base model, unchanged and not merged, that it was trained on",
            )

    def _check_index(self, name: str, index_S: Tensor) -> None:
        if not _is_choice(index_S, like=self.spf_index[name], rows=len(self.weight_MK)):
            raise AdapterError(
                "the adapter's rows do not fit this module",
                hint="its files were altered, or its configuration is another adapter's",
            )
        self._unchosen.discard(name)

    def __repr__(self) -> str:
        return "spf." + super().__repr__()


class _Checked(BufferDict):
    """Buffers that are checked before others replace them, since transformers loads an adapter by assignment, tensor by
    tensor; whether all have come is then known when they are used."""

    def __init__(self, check: Callable[[str, Tensor], None]) -> None:
        super().__init__(persistent=True)
        self._check = check

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_buffers", ()):
            self._check(name, value)
        super().__setattr__(name, value)


def _require_all(parts: Collection[str]) -> None:
    missing = [part for part in ("spf_rows", "spf_index", "spf_base") if part not in parts]
    if missing:
        raise AdapterError(
            f"the saved adapter has no {missing[0]}: rows, their numbers and their base's digest belong together",
            hint="load the adapter's file as it was saved, with all its tensors",
        )


def weight_of(module: nn.Module, what: str) -> Tensor:
    """The weight of a plain linear layer: (M, K), or (K, M) of Conv1D.

    Raises:
        AdapterError: it is something else, or its weight is quantised.
    """
    weight = getattr(module, "weight", None)
    if _is_linear(module) and isinstance(weight, Tensor) and is_plain(weight):
        return weight
    kind = f"{weight.dtype} {type(weight).__name__} " if isinstance(weight, Tensor) else ""
    kind = kind.removeprefix("torch.").removesuffix("Parameter ")
    raise AdapterError(
        f"{what} needs plain weights of floating-point numbers; a {type(module).__name__} has {kind}weights",
        hint="load the base model without quantisation",
    )


def rows_of(module: nn.Module) -> Tensor:
    """The weight of a plain linear layer with its outputs as rows, (M, K): a view without gradient.

    Raises:
        AdapterError: see `weight_of`.
    """
    weight = weight_of(module, "SPF").detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_choice(index_S: Tensor, *, like: Tensor, rows: int) -> bool:
    """Whether these are as many different row numbers as wanted, ascending."""
    if index_S.shape != like.shape or index_S.dtype != like.dtype:
        return False
    inside = bool((index_S >= 0).all()) and bool((index_S < rows).all())
    return inside and bool((index_S.diff() > 0).all())
