"""What a user of SPF chooses. Stands in `adapter_config.json` of every saved adapter."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from peft import PeftConfig
from torch import Tensor

from cloister.adapters.registry import TunerType
from cloister.adapters.settings import as_list, as_number, is_count, not_layers, not_names, not_one_of, refuse
from cloister.job import Criterion, Unit


@dataclass
class SPFConfig(PeftConfig):
    """SPF's settings, by PEFT's names where PEFT has one.

    Raises:
        AdapterError: a value is of another type or outside its range, or two do not fit together.
    """

    ratio: float = field(default=0.5)
    """Share of units, in (0, 1], whose rows are trained in each of q, k, v and each input projection of the MLP."""
    criterion: Criterion = field(default="l1")
    """How units are ranked: by l1 or l2 norm of their weights, l1 norm of their gradients, or at random."""
    unit: Unit = field(default="head")
    """What is chosen in q, k and v: whole heads, or single rows. In the MLP it is always single rows."""
    tie_groups: bool = field(default=False)
    """Whether a key/value head and the query heads that use it are chosen together, by the sum of their scores."""
    target_modules: list[str] | str | None = field(default=None)
    """Modules whose rows are trained: names, or "all-linear"; None takes q, k, v and the MLP's input projections."""
    r: int = field(default=8)
    """Rank of LoRA."""
    lora_alpha: float = field(default=16.0)
    lora_dropout: float = field(default=0.0)
    lora_target_modules: list[str] | str | None = field(default=None)
    """Modules that get LoRA: names, or "all-linear"; [] for none; None takes the attention output projection."""
    layers_to_transform: list[int] | None = field(default=None)
    """Numbers of the decoder layers; None takes all."""
    layers_pattern: str | None = field(default=None)
    """Name of the list of decoder layers, such as "layers"; None takes the first list in a module's name."""
    seed: int = field(default=0)
    """Decides what criterion "random" chooses."""
    gradient_norms: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """For criterion "grad": norms of each module's rows by `cloister.adapters.gradient_norms`. Never saved."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = TunerType.SPF
        self.layers_to_transform = as_list(self.layers_to_transform)  # type: ignore[assignment]  # checked next
        self._check()

    def _check(self) -> None:
        faults = {
            "ratio": not 0.0 < as_number(self.ratio) <= 1.0 and f"must lie in (0, 1], got {self.ratio!r}",
            "criterion": not_one_of(self.criterion, get_args(Criterion)),
            "unit": not_one_of(self.unit, get_args(Unit)),
            "tie_groups": (not isinstance(self.tie_groups, bool) and f"must be true or false, got {self.tie_groups!r}")
            or (self.tie_groups and self.unit == "row" and 'ties heads, but unit is "row"'),
            "r": not is_count(self.r)
            and f"must be at least 1, got {self.r!r}; lora_target_modules = [] leaves LoRA out",
            "lora_alpha": not 0.0 < as_number(self.lora_alpha) < math.inf
            and f"must be positive, got {self.lora_alpha!r}",
            "lora_dropout": not 0.0 <= as_number(self.lora_dropout) < 1.0
            and f"must lie in [0, 1), got {self.lora_dropout!r}",
            "target_modules": not_names(self.target_modules)
            or (self.target_modules == [] and "is empty, so no rows would be trained"),
            "lora_target_modules": not_names(self.lora_target_modules),
            "layers_to_transform": not_layers(self.layers_to_transform),
            "layers_pattern": self.layers_pattern is not None
            and not (isinstance(self.layers_pattern, str) and self.layers_pattern.isidentifier())
            and f"must be the name of a list of layers, got {self.layers_pattern!r}",
            "seed": not is_count(self.seed, 0) and f"must be a whole number of at least 0, got {self.seed!r}",
        }
        refuse("SPFConfig", faults)

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """All that is saved: not the gradients' norms, which an adapter has no use for once its rows are chosen."""
        saved = copy.copy(self)
        saved.gradient_norms = None
        content = dataclasses.asdict(saved)
        del content["gradient_norms"]
        return content
