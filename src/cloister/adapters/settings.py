"""Settings of a PEFT configuration, whose types nobody has checked before: what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

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
    return value if isinstance(value, int | float) else math.nan


def is_count(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least `least`."""
    return isinstance(value, int) and value >= least


def not_one_of(value: object, allowed: tuple[str, ...]) -> str | bool:
    """The fault of a word that is not allowed."""
    return value not in allowed and f"must be one of {', '.join(allowed)}, got {value!r}"


def not_layers(value: object) -> str | bool:
    """The fault of a choice of layers that is neither None nor numbers of layers."""
    fits = isinstance(value, Collection) and len(value) > 0 and all(is_count(layer, 0) for layer in value)
    return value is not None and not fits and f"must be numbers of layers, or None for all, got {value!r}"
