"""Round numbers for the ticks of an axis, in the unit that its largest value reads best in."""

from __future__ import annotations

import math


def ticks(maximum: float, unit: float, count: int = 5) -> list[tuple[float, str]]:
    """Tick positions from 0 to `maximum` in steps of 1, 2 or 5 x 10^k units, with their labels in that unit.

    `maximum` and the positions are in base units; `unit` is the size of one labelled unit in them.
    """
    if maximum <= 0:
        return [(0.0, "0")]
    step = nice_step(maximum / unit, count)
    decimals = max(0, -math.floor(math.log10(step)))
    steps = math.floor(maximum / unit / step * (1 + 1e-12))
    return [(i * step * unit, f"{i * step:.{decimals}f}") for i in range(steps + 1)]


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 x 10^k that divides `span` into at most `count` steps."""
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(m * magnitude for m in (1.0, 2.0, 5.0, 10.0) if m * magnitude >= raw * (1 - 1e-12))
