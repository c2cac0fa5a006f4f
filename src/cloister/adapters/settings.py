"""Settings of a PEFT configuration, whose types nobody has checked before: what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cloister.errors import AdapterError


def refuse(where: str, faults: Mapping[str, str | bool]) -> None:
    """
    Raises:
        AdapterError: something is wrong with one of the settings.
    """
    for name, fault in faults.items():
        if fault:
            raise AdapterError(f"{name} {fault}", where=where)


def as_number(value: object) -> float:
    """The value, or NaN, which lies in no range, if it is no number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def is_count(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def not_one_of(value: object, allowed: tuple[str, ...]) -> str | bool:
    """The fault of a word that is not allowed."""
    return value not in allowed and f"must be one of {', '.join(allowed)}, got {value!r}"


def not_names(value: object) -> str | bool:
    """The fault of a choice of modules that is neither None, a name nor names."""
    fits = isinstance(value, str) or (isinstance(value, list | tuple | set) and all(isinstance(n, str) for n in value))
    return value is not None and not fits and f"must be names of modules, got {value!r}"


def not_layers(value: object) -> str | bool:
    """The fault of a choice of layers that is neither None nor a list of different numbers of layers."""
    layers = value if isinstance(value, list) else []
    fits = len(layers) > 0 and all(is_count(layer, 0) for layer in layers) and len(set(layers)) == len(layers)
    return value is not None and not fits and f"must be numbers of layers, or None for all, got {value!r}"


def as_list(layers: object) -> object:
    """Layers given as another kind of collection as a list, which can be saved; all else as it is."""
    return list(layers) if isinstance(layers, tuple | set | range) else layers
