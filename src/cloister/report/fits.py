"""How the trained adapter fits each party's training data, in method `split`: who stands out, in numbers and words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cloister.report import svg
from cloister.report.model import PartyFit
from cloister.report.pieces import shortened

THRESHOLD = 3.5
"""z beyond which a value stands out. Source: Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993), 3.4."""
_LEFT, _PITCH, _WIDTH = 130.0, 24.0, 500.0


def read_fits(declared: Mapping[str, Any]) -> list[PartyFit]:  # Any: JSON
    """What an enclave declares; none with method `slice`, whose rounds say it."""
    return [PartyFit.model_validate_json(json.dumps(row)) for row in declared.get("fits", [])]


def stands_out(z: float | None) -> bool:
    """Much higher than the others; a low loss hurts nobody."""
    return z is not None and z > THRESHOLD


def warnings(fits: Sequence[PartyFit]) -> list[str]:
    """A sentence for each value that stands out."""
    said = []
    for fit in fits:
        if stands_out(fit.loss_z):
            said.append(f"{fit.party}: its training loss stands out: {_against(fit.train_loss, fit.loss_z)}")
        if stands_out(fit.gradient_z):
            said.append(f"{fit.party}: its gradient stands out: {_against(fit.gradient_norm, fit.gradient_z)}")
    return said


def headline(fits: Sequence[PartyFit]) -> str:
    """The section's first sentence."""
    if fits[0].loss_z is None:
        return "With fewer than three parties nobody can be told to stand out."
    names = list(dict.fromkeys(f.party for f in fits if stands_out(f.loss_z) or stands_out(f.gradient_z)))
    return f"{', '.join(names)} {'stands' if len(names) == 1 else 'stand'} out." if names else "Nobody stands out."


def loss_chart(fits: Sequence[PartyFit]) -> Markup:
    """Each party's training loss as a bar."""
    return _bars(fits, lambda f: f.train_loss, lambda f: f.loss_z, "Training loss, by party")


def gradient_chart(fits: Sequence[PartyFit]) -> Markup:
    """Each party's gradient norm as a bar."""
    return _bars(fits, lambda f: f.gradient_norm, lambda f: f.gradient_z, "Norm of the gradient, by party")


def _bars(
    fits: Sequence[PartyFit], value: Callable[[PartyFit], float], z: Callable[[PartyFit], float | None], title: str
) -> Markup:
    axis = svg.Scale(low=0.0, high=max(map(value, fits)) or 1.0, start=_LEFT, end=_WIDTH - 120)
    parts = []
    for index, fit in enumerate(fits):
        y, score, out = index * _PITCH, z(fit), stands_out(z(fit))
        shown = f"{value(fit):.3g}" + ("" if score is None else f"  z {score:+.1f}".replace("-", "\u2212"))
        parts.append(svg.text(_LEFT - 8, y + 16, shortened(fit.party, 18), "label", "end"))
        class_ = "bar out" if out else "bar"
        parts.append(svg.rect(_LEFT, y + 4, max(1.0, axis(value(fit)) - _LEFT), _PITCH - 8, class_, 2))
        parts.append(svg.text(axis(value(fit)) + 7, y + 16, shown, "tick out" if out else "tick"))
    return svg.drawing(_WIDTH, len(fits) * _PITCH + 2, title, *parts)


def _against(value: float, z: float | None) -> str:
    return f"{value:.3g}, {z:.1f} robust standard deviations above the parties' median"
