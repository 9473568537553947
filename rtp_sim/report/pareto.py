"""Plans as points: step time against memory or cost, with the front of those that no other beats in everything.

Points of the front are joined by steps: right of and above a point everything is beaten by it in these two numbers. A
plan may be on the front for a third number alone and lie above the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rtp_sim.report.axis import nice_step
from rtp_sim.report.svg import WIDTH, dot, frame, key, line, text

TOP, BOTTOM, LEFT, RIGHT = 22, 330, 90, WIDTH - 150
FRONT, BEATEN = "compute", "workspace"
NAMES = {FRONT: "on the front", BEATEN: "beaten"}
Place = Callable[[float], float]
"""From a value to where it is drawn."""


@dataclass(frozen=True, slots=True)
class Point:
    """A plan: where it lies, what is written at it ("" for nothing), what its tooltip says, whether it is on the
    front."""

    x: float
    y: float
    label: str
    tip: str
    front: bool


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis counts: its title, the size of a printed unit in base units, and a limit with its words."""

    title: str
    unit: float
    limit: float | None = None
    limit_text: str = ""


def pareto_chart(name: str, points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The chart as HTML; `name` is what it is called to those who do not see it."""
    place_x = _scale([p.x for p in points], LEFT, RIGHT)
    place_y = _scale([p.y for p in points] + ([y.limit] if y.limit is not None else []), BOTTOM, TOP)
    parts = _grid([p.x for p in points], x, place_x, [p.y for p in points], y, place_y)
    parts += _steps([p for p in points if p.front], place_x, place_y)
    if y.limit is not None:
        at = place_y(y.limit)
        parts += [line("limit", LEFT, at, RIGHT, at), text("limit-text", RIGHT, at - 5, y.limit_text, "end")]
    # Front and shown plans last, above the others.
    for p in sorted(points, key=lambda p: (p.front, p.label != "")):
        px, py = place_x(p.x), place_y(p.y)
        parts.append(dot("point", px, py, 5.5 if p.front else 4.0, FRONT if p.front else BEATEN, p.tip))
    parts += _labels(points, place_x, place_y)
    roles = [role for role, wanted in ((FRONT, True), (BEATEN, False)) if any(p.front == wanted for p in points)]
    said = f"{name}: {len(points)} plans, {sum(p.front for p in points)} on the front"
    return key(roles, NAMES) + frame("pareto", said, BOTTOM + 46, parts)


def _scale(values: Sequence[float], start: float, end: float) -> Place:
    """Where a value is drawn: the range of the values with some air, from 0 where that is near."""
    low, high = min(values), max(values)
    low = 0.0 if low < 0.4 * high or low == high else low - 0.08 * (high - low)
    high = high + 0.06 * (high - low) if high > low else low + 1
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _grid(xs: Sequence[float], x: Axis, place_x: Place, ys: Sequence[float], y: Axis, place_y: Place) -> list[str]:
    parts = []
    for value, label in _ticks(xs, x.unit, place_x, LEFT, RIGHT):
        at = place_x(value)
        parts += [line("grid", at, TOP, at, BOTTOM), text("tick", at, BOTTOM + 16, label, "middle")]
    limits = [y.limit] if y.limit is not None else []
    for value, label in _ticks([*ys, *limits], y.unit, place_y, TOP, BOTTOM):
        at = place_y(value)
        parts += [line("grid", LEFT, at, RIGHT, at), text("tick", LEFT - 8, at + 4, label, "end")]
    parts.append(text("axis", (LEFT + RIGHT) / 2, BOTTOM + 36, x.title, "middle"))
    return [*parts, text("axis", 8, TOP - 10, y.title)]


def _ticks(values: Sequence[float], unit: float, place: Place, start: float, end: float) -> list[tuple[float, str]]:
    """Round values whose place is within the plot."""
    low, high = min(values), max(values)
    span = (high if low < 0.4 * high or low == high else high - low) / unit
    if span <= 0:
        return []
    step = nice_step(span, 6)
    decimals = max(0, -math.floor(math.log10(step)))
    found = [k * step for k in range(math.floor(low / unit / step) - 8, math.ceil(high / unit / step) + 8)]
    return [(v * unit, f"{v:.{decimals}f}") for v in found if v >= 0 and start <= place(v * unit) <= end]


def _steps(front: Sequence[Point], place_x: Place, place_y: Place) -> list[str]:
    """The line along the points that no other beats in these two numbers."""
    corners: list[Point] = []
    for p in sorted(front, key=lambda p: (p.x, p.y)):
        if not corners or p.y < corners[-1].y:
            corners.append(p)
    parts = []
    for a, b in pairwise(corners):
        parts.append(line("diagonal", place_x(a.x), place_y(a.y), place_x(b.x), place_y(a.y)))
        parts.append(line("diagonal", place_x(b.x), place_y(a.y), place_x(b.x), place_y(b.y)))
    return parts


def _labels(points: Sequence[Point], place_x: Place, place_y: Place) -> list[str]:
    """Labels beside their points; those that would lie on another are joined to it."""
    found: list[tuple[float, float, list[str]]] = []
    for p in points:
        if not p.label:
            continue
        px, py = place_x(p.x), place_y(p.y)
        near = next((f for f in found if abs(f[0] - px) < 34 and abs(f[1] - py) < 13), None)
        if near is not None:
            near[2].append(p.label)
        else:
            found.append((px, py, [p.label]))
    return [text("total", px + 9, py - 6, ", ".join(labels)) for px, py, labels in found]
