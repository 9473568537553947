"""Predicted against measured duration of every op: a point each, both axes logarithmic, with the diagonal.

Points above the diagonal were predicted too slow, below too fast; lines beside it mark twice and half. Points that
would lie on one another are drawn once, larger, and the tooltip tells of the one with the largest error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rtp_sim.metrics import op_kind
from rtp_sim.report.format import format_seconds
from rtp_sim.report.svg import WIDTH, dot, frame, key, line, text
from rtp_sim.schedule.ir import Compute
from rtp_sim.validation.diff import OpDiff

TOP, BOTTOM = 12, 470
LEFT = (WIDTH - (BOTTOM - TOP)) / 2
RIGHT = LEFT + BOTTOM - TOP
"""The plot is square, so that the diagonal is one."""
CELL = 3.0


def duration_scatter(ops: Sequence[OpDiff]) -> str:
    """The chart as HTML. Ops that take no time on a side have no place on a logarithmic axis; they are counted."""
    shown = [op for op in ops if op.predicted_ns > 0 and op.measured_ns > 0]
    left_out = len(ops) - len(shown)
    note = f" {left_out} of {len(ops)} ops take no time on one side and are not shown." if left_out else ""
    durations = [ns for op in shown for ns in (op.predicted_ns, op.measured_ns)]
    low = math.floor(math.log10(min(durations, default=1)))
    high = max(low + 1, math.ceil(math.log10(max(durations, default=10))))
    parts = axes(low, high, lambda ns: format_seconds(ns / 1e9))
    for members in _cells(shown, low, high):
        worst = max(members, key=lambda op: abs(op.error_ns))
        radius = 2.6 + 0.9 * math.log2(len(members))
        parts.append(dot("point", *_place(worst, low, high), min(radius, 9.0), _role(worst), _tip(worst, len(members))))
    roles = [role for role in ("compute", "communication") if any(_role(op) == role for op in shown)]
    label = f"Predicted against measured duration of {len(shown)} ops"
    return key(roles, {}) + frame("scatter", label, BOTTOM + 46, parts) + f'<p class="note">{label}.{note}</p>'


def axes(low: int, high: int, label_of: Callable[[float], str]) -> list[str]:
    """Grid, diagonal and labels of a square plot from 10^low to 10^high, labelled by `label_of` a value."""
    parts = []
    for decade in range(low, high + 1):
        at = (decade - low) / (high - low) * (BOTTOM - TOP)
        label = label_of(10.0**decade).replace(".00", "").replace(".0", "")
        parts += [line("grid", LEFT + at, TOP, LEFT + at, BOTTOM), line("grid", LEFT, BOTTOM - at, RIGHT, BOTTOM - at)]
        parts += [text("tick", LEFT + at, BOTTOM + 16, label, "middle"), text("tick", LEFT - 8, BOTTOM - at + 4, label, "end")]  # fmt: skip  # noqa: E501
    parts.append(line("diagonal", LEFT, BOTTOM, RIGHT, TOP))
    twice = math.log10(2) / (high - low) * (BOTTOM - TOP)
    parts.append(line("grid", LEFT, BOTTOM - twice, RIGHT - twice, TOP))
    parts.append(line("grid", LEFT + twice, BOTTOM, RIGHT, TOP + twice))
    parts.append(text("axis", (LEFT + RIGHT) / 2, BOTTOM + 36, "measured", "middle"))
    parts.append(text("axis", LEFT - 70, (TOP + BOTTOM) / 2, "predicted", "end"))
    return parts


def place(measured: float, predicted: float, low: int, high: int) -> tuple[float, float]:
    """Where a pair of values is drawn."""
    per_decade = (BOTTOM - TOP) / (high - low)
    x = LEFT + (math.log10(measured) - low) * per_decade
    return x, BOTTOM - (math.log10(predicted) - low) * per_decade


def _place(op: OpDiff, low: int, high: int) -> tuple[float, float]:
    return place(op.measured_ns, op.predicted_ns, low, high)


def _cells(ops: Sequence[OpDiff], low: int, high: int) -> list[list[OpDiff]]:
    """The ops by where they would be drawn."""
    cells: dict[tuple[str, int, int], list[OpDiff]] = {}
    for op in ops:
        x, y = _place(op, low, high)
        cells.setdefault((_role(op), round(x / CELL), round(y / CELL)), []).append(op)
    return list(cells.values())


def _role(op: OpDiff) -> str:
    return "compute" if isinstance(op.op.action, Compute) else "communication"


def _tip(op: OpDiff, count: int) -> str:
    times = f"predicted {format_seconds(op.predicted_ns / 1e9)}, measured {format_seconds(op.measured_ns / 1e9)}"
    others = f" (and {count - 1} more here)" if count > 1 else ""
    return f"rank {op.rank}, {op.op.name}, {op_kind(op.op)}: {times}{others}"
