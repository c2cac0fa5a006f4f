"""Small helpers for drawing inline SVG: elements as escaped markup, linear scales, round ticks.

Colours and type come from the page's style sheet by class, so that a drawing follows light, dark and print alike, and
text stays text. Coordinates are rounded, so that the same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

Shape = Literal["ring", "cross", "triangle", "diamond", "disc"]
_SIZE = 5.0
"""Half the height of a marker."""


def element(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element; `class_` is written `class`, underscores become hyphens, text and values are escaped."""
    written = join(Markup(' {}="{}"').format(_attribute(key), number(value)) for key, value in attributes.items())
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, join(children))


def join(children: Iterable[str]) -> Markup:
    """Children one after the other; plain strings are escaped."""
    return Markup("").join(children)


def number(value: str | float) -> str:
    """A coordinate with at most two decimals."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> Markup:
    """A line of text."""
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, rx: float = 0) -> Markup:
    """A rectangle."""
    return element("rect", x=x, y=y, width=max(0.0, width), height=height, rx=rx, class_=class_)


def drawing(width: float, height: float, title: str, *children: str) -> Markup:
    """A whole picture with a title for those who cannot see it; it scales to the width of its column."""
    return element(
        "svg",
        element("title", title),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=title,
    )


def marker(shape: Shape, x: float, y: float, class_: str) -> Markup:
    """A marker that can be told from the others without colour."""
    size = _SIZE
    if shape in ("ring", "disc"):
        return element("circle", cx=x, cy=y, r=size, class_=f"{shape} {class_}")
    if shape == "cross":
        arms = f"M{number(x - size)} {number(y - size)}l{number(2 * size)} {number(2 * size)}"
        arms += f"M{number(x - size)} {number(y + size)}l{number(2 * size)} {number(-2 * size)}"
        return element("path", d=arms, class_=f"cross {class_}")
    corners = {
        "triangle": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    }[shape]
    points = " ".join(f"{number(x + size * dx)},{number(y + size * dy)}" for dx, dy in corners)
    return element("polygon", points=points, class_=f"{shape} {class_}")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear map from values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """About `count` round values inside the range."""
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def scale(values: Iterable[float], start: float, end: float, *, zero: bool = False) -> Scale:
    """A scale that holds all values with a little air; from zero where asked."""
    listed = list(values) or [0.0, 1.0]
    low, high = min(listed), max(listed)
    air = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low=0.0 if zero else low - air, high=high + air, start=start, end=end)


def tick_label(value: float) -> str:
    """A tick value without trailing zeros."""
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * (1 - 1e-9))


def _attribute(key: str) -> str:
    return key if key in ("viewBox",) else key.rstrip("_").replace("_", "-")
