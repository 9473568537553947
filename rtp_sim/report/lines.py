"""A line per strategy over what a sweep varies, with the places marked where one overtakes another.

Between two points of the grid the GPU time per token goes in a straight line; rates and step times follow from it, and
that is what is drawn, so the marked crossings lie on the curves whatever the axis and its scale. Points that do not
fit into memory are hollow, and the way to them is dashed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from rtp_sim.report.axis import ticks
from rtp_sim.report.format import format_bytes, format_count, format_seconds, size_unit, time_unit
from rtp_sim.report.palette import LINES
from rtp_sim.report.svg import WIDTH, colour, frame, line, text
from rtp_sim.sweep.axes import Axis
from rtp_sim.sweep.crossings import Crossing
from rtp_sim.sweep.evaluate import Row
from rtp_sim.sweep.table import gpu_seconds_per_token

LEFT, RIGHT, TOP, BOTTOM = 92, 150, 16, 356
STEPS = 24
"""Pieces of a curve between two points."""
LOGARITHMIC_FROM = 7.9
"""An axis whose largest value is so many times its smallest is logarithmic."""
LABEL_GAP = 15


@dataclass(frozen=True, slots=True)
class Measure:
    """What is drawn: of (GPU time per token, tokens of a GPU per step, memory) as they are at a point or between two.
    `unit` gives size and name of the unit for values up to a maximum."""

    title: str
    value: Callable[[float, float, float], float]
    text: Callable[[float], str]
    unit: Callable[[float], tuple[float, str]]


def _count_unit(value: float) -> tuple[float, str]:
    return next(((size, name) for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if value >= size), (1.0, ""))


MEASURES = (
    Measure("tokens/s per GPU", lambda cost_s, tokens, memory: 1 / cost_s, format_count, _count_unit),
    Measure("step time", lambda cost_s, tokens, memory: cost_s * tokens, format_seconds, time_unit),
    Measure("peak memory", lambda cost_s, tokens, memory: memory, format_bytes, size_unit),
)

Numbers = tuple[float, float, float]


def numbers_of(row: Row) -> Numbers | None:
    """(GPU time per token, tokens of a GPU per step, peak memory) of a point; None without metrics. Where tokens are
    not known the step counts as one."""
    cost_s = gpu_seconds_per_token(row)
    if cost_s is None:
        return None
    return cost_s, row["metrics"]["step_time_s"] / cost_s, float(row["metrics"]["peak_memory_bytes"])


def line_chart(axis: Axis, x: Sequence[float], lines: Mapping[str, Sequence[Row]], measure: Measure,
               found: Sequence[Crossing]) -> str:  # fmt: skip
    """The chart as SVG. `x` are the places of the points along the axis, ascending; for words 0, 1, 2 ..."""
    plot = _Plot(axis, x, lines, measure)
    parts = plot.grid()
    for number, (name, rows) in enumerate(lines.items()):
        parts += plot.line(name, rows, LINES[number % len(LINES)])
    # Memory says nothing about who is faster.
    for crossing in found if measure.title != "peak memory" else ():
        parts += plot.crossing(crossing, lines)
    label = f"{measure.title} over {axis.name}, {len(lines)} strategies, {len(found)} crossings"
    return frame("lines", label, BOTTOM + 46, parts)


class _Plot:
    """Scales, and what is drawn in them."""

    def __init__(self, axis: Axis, x: Sequence[float], lines: Mapping[str, Sequence[Row]], measure: Measure) -> None:
        self.axis, self.x, self.measure = axis, x, measure
        low, high = x[0], x[-1]
        self.logarithmic = axis.is_numeric and low > 0 and high / low >= LOGARITHMIC_FROM
        self.low, self.span = self._along(low), self._along(high) - self._along(low)
        values = [self.value(n) for rows in lines.values() for row in rows if (n := numbers_of(row))]
        self.most = max(values, default=1.0) * 1.04
        self.label_y = _spread(
            {name: self.y(self.value(n)) for name, rows in lines.items() if (n := _last(rows)) is not None}
        )

    def _along(self, x: float) -> float:
        return math.log(x) if self.logarithmic else x

    def at(self, x: float) -> float:
        """Where a place of the axis is drawn."""
        width = WIDTH - LEFT - RIGHT
        return LEFT + (self._along(x) - self.low) / self.span * width if self.span else LEFT + width / 2

    def y(self, value: float) -> float:
        """Where a value is drawn."""
        return BOTTOM - value / self.most * (BOTTOM - TOP)

    def value(self, numbers: Numbers) -> float:
        """What is drawn of a point."""
        return self.measure.value(*numbers)

    def grid(self) -> list[str]:
        """Lines and labels of both axes; along the axis at the points."""
        size, unit = self.measure.unit(self.most)
        parts = []
        for value, label in ticks(self.most, size):
            parts += [line("grid", LEFT, self.y(value), WIDTH - RIGHT, self.y(value))]
            parts.append(text("tick", LEFT - 8, self.y(value) + 4, label, "end"))
        for x, label in zip(self.x, _labels(self.axis), strict=True):
            parts.append(line("grid", self.at(x), TOP, self.at(x), BOTTOM + 4))
            parts.append(text("tick", self.at(x), BOTTOM + 18, label, "middle"))
        unit_text = f" ({unit})" if unit else ""
        scale = "logarithmic" if self.logarithmic else ""
        told = ", ".join(word for word in (self.axis.unit, scale) if word)
        along = f"{self.axis.name} ({told})" if told else self.axis.name
        parts.append(text("axis", (LEFT + WIDTH - RIGHT) / 2, BOTTOM + 38, along, "middle"))
        middle = (TOP + BOTTOM) / 2
        upwards = text("axis", 20, middle, self.measure.title + unit_text, "middle")
        parts.append(f'<g transform="rotate(-90 20 {middle})">{upwards}</g>')
        return parts

    def line(self, name: str, rows: Sequence[Row], role: str) -> list[str]:
        """One strategy: its curve piece by piece, its points, its name at the end."""
        parts = []
        for i in range(len(rows) - 1) if self.axis.is_numeric else ():
            ends = numbers_of(rows[i]), numbers_of(rows[i + 1])
            if ends[0] is not None and ends[1] is not None:
                fits = rows[i]["metrics"]["fits"] and rows[i + 1]["metrics"]["fits"]
                path = self.curve(self.x[i], ends[0], self.x[i + 1], ends[1])
                css = "line" if fits else "line beyond"
                parts.append(f'<path class="{css}" d="{path}" stroke="{colour(role)}"/>')
        for x, row in zip(self.x, rows, strict=True):
            if (n := numbers_of(row)) is not None:
                parts.append(self.point(name, x, row, n, role))
        if name in self.label_y:
            y = self.label_y[name]
            parts.append(
                f'<circle class="swatch-dot" cx="{WIDTH - RIGHT + 14}" cy="{y:.1f}" r="4" fill="{colour(role)}"/>'
            )
            parts.append(text("label", WIDTH - RIGHT + 24, y + 4, name))
        return parts

    def curve(self, x0: float, first: Numbers, x1: float, second: Numbers) -> str:
        """From point to point."""
        places = []
        for k in range(STEPS + 1):
            t = k / STEPS
            x, numbers = x0 + (x1 - x0) * t, between(first, second, t)
            places.append(f"{self.at(x):.1f} {self.y(self.value(numbers)):.1f}")
        return "M" + "L".join(places)

    def point(self, name: str, x: float, row: Row, n: Numbers, role: str) -> str:
        """A point of the grid; hollow if it does not fit."""
        m = row["metrics"]
        place = _labels(self.axis)[list(self.x).index(x)] + (f" {self.axis.unit}" if self.axis.unit else "")
        told = f"{name}, {m['layout']}, {self.axis.name} {place}: {self.measure.text(self.value(n))}"
        fits = "" if m["fits"] else f", does not fit ({format_bytes(m['peak_memory_bytes'])})"
        css, paint = ("point", "fill") if m["fits"] else ("hollow", "stroke")
        where = f'cx="{self.at(x):.1f}" cy="{self.y(self.value(n)):.1f}" r="3.6"'
        return f'<circle class="{css}" {where} {paint}="{colour(role)}"><title>{escape(told + fits)}</title></circle>'

    def crossing(self, c: Crossing, lines: Mapping[str, Sequence[Row]]) -> list[str]:
        """A ring where two lines meet; a firm one where the lead changes."""
        rows, i = lines[c.winner], _piece(self.x, c.at)
        ends = numbers_of(rows[i]), numbers_of(rows[i + 1])
        if ends[0] is None or ends[1] is None:
            return []
        numbers = between(ends[0], ends[1], (c.at - self.x[i]) / (self.x[i + 1] - self.x[i]))
        y = self.y(self.value((c.value, *numbers[1:])))
        told = f"above {c.at:.4g} {self.axis.unit} {c.winner} beats {c.loser}".replace("  ", " ")
        css, radius = ("crossing leads", 8) if c.leads else ("crossing", 6)
        title = f"<title>{escape(told)}</title>"
        return [f'<circle class="{css}" cx="{self.at(c.at):.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>']


def between(first: Numbers, second: Numbers, t: float) -> Numbers:
    """A share `t` of the way, each number in a straight line."""
    a, b, c = (low + (high - low) * t for low, high in zip(first, second, strict=True))
    return a, b, c


def _piece(x: Sequence[float], at: float) -> int:
    return next(i for i in range(len(x) - 1) if x[i] <= at <= x[i + 1])


def _labels(axis: Axis) -> list[str]:
    """The values without the axis's unit, ascending where they are numbers."""
    if not axis.is_numeric:
        return [value.text for value in axis.values]
    return [f"{number:g}" for number in sorted(v.number for v in axis.values if v.number is not None)]


def _last(rows: Sequence[Row]) -> Numbers | None:
    return next((n for row in reversed(rows) if (n := numbers_of(row)) is not None), None)


def _spread(wanted: Mapping[str, float]) -> dict[str, float]:
    """Labels moved down so that none covers another."""
    placed: dict[str, float] = {}
    lowest = -math.inf
    for name, y in sorted(wanted.items(), key=lambda item: item[1]):
        lowest = placed[name] = max(y, lowest + LABEL_GAP)
    return placed
