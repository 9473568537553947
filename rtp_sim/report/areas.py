"""Memory of one rank over the step: areas stacked by category, drawn as the step function it is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rtp_sim.report.axis import ticks
from rtp_sim.report.format import format_bytes, format_seconds, size_unit, time_unit
from rtp_sim.report.palette import in_stack_order
from rtp_sim.report.svg import WIDTH, area, frame, key, line, text

if TYPE_CHECKING:
    from rtp_sim.engine.memory import MemoryProfile

HEIGHT = 330
LEFT = 64
RIGHT = WIDTH - 16
TOP = 34
BOTTOM = HEIGHT - 42
MAX_POINTS = 1500
NS_PER_S = 1e9

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stack:
    """Points of the chart. `upper_bytes` holds for each category ever used the bytes of it and all before it;
    `left_out` counts the points not drawn."""

    time_ns: Ints
    categories: tuple[str, ...]
    upper_bytes: tuple[Ints, ...]
    left_out: int


def stacked(profile: MemoryProfile, max_points: int = MAX_POINTS) -> Stack:
    """The profile as a stack. Of more than `max_points` points, the highest of each of as many runs stays."""
    time_ns = np.asarray(profile.time_ns, dtype=np.int64)
    used = (category for category, values in profile.bytes_by_category.items() if np.any(values))
    categories = tuple(in_stack_order(used))
    values = np.zeros((len(categories), time_ns.size), dtype=np.int64)
    for row, category in zip(values, categories, strict=True):
        row[:] = profile.bytes_by_category[category]
    points = time_ns.size
    if points > max_points:
        total = values.sum(axis=0)
        edges = [points * i // max_points for i in range(max_points + 1)]
        keep = [a + int(np.argmax(total[a:b])) for a, b in pairwise(edges)]
        time_ns, values = time_ns[keep], values[:, keep]
    return Stack(time_ns, categories, tuple(np.cumsum(values, axis=0)), points - int(time_ns.size))


def memory_areas(name: str, profile: MemoryProfile, end_ns: int, device_memory_bytes: int | None) -> str:
    """The chart, as HTML. The device's line is drawn where it lies within twice the peak; beyond, it would
    flatten everything and is told in words."""
    stack = stacked(profile)
    end = max(end_ns, int(stack.time_ns[-1]) if stack.time_ns.size else 0, 1)
    has_line = device_memory_bytes is not None and device_memory_bytes <= 2 * profile.peak_bytes
    limit = device_memory_bytes if has_line else None
    maximum = 1.08 * max(profile.peak_bytes, limit or 0, 1)
    x_of, y_of = (RIGHT - LEFT) / end, (BOTTOM - TOP) / maximum
    parts = _axes(end, maximum, x_of, y_of)
    x = LEFT + np.append(stack.time_ns, end) * x_of
    lower: Ints = np.zeros_like(stack.time_ns)
    peaks = {c: f"{c} {format_bytes(profile.by_category_at_peak.get(c, 0))}" for c in stack.categories}
    for category, upper in zip(stack.categories, stack.upper_bytes, strict=True):
        path = _band(x.tolist(), (BOTTOM - lower * y_of).tolist(), (BOTTOM - upper * y_of).tolist())
        parts.append(area("area", path, category, f"{peaks[category]} at the peak"))
        lower = upper
    parts += _peak_mark(profile, x_of, y_of)
    if limit is not None:
        y = BOTTOM - limit * y_of
        caption = f"device memory {format_bytes(limit)}"
        parts += [line("limit", LEFT, y, RIGHT, y), text("limit-text", RIGHT, y - 5, caption, "end")]
    label = f"Memory over time, {name}: peak {format_bytes(profile.peak_bytes)}"
    return (
        key(stack.categories, peaks) + frame("areas", label, HEIGHT, parts) + _notes(stack, limit, device_memory_bytes)
    )


def _notes(stack: Stack, limit: int | None, device_memory_bytes: int | None) -> str:
    notes = ["The key gives each category at the peak."]
    if stack.left_out:
        shown = stack.time_ns.size
        notes.append(f"Thinned: {shown} of {shown + stack.left_out} points, the highest of each run.")
    if device_memory_bytes is not None and limit is None:
        notes.append(f"The device has {format_bytes(device_memory_bytes)}, beyond this scale.")
    return f'<p class="note">{" ".join(notes)}</p>'


def _band(edges: list[float], lower: list[float], upper: list[float]) -> str:
    """The closed outline between two step functions that hold between consecutive edges."""
    if not lower:
        return ""
    runs = list(pairwise(edges))
    there = [f"{a:.1f},{y:.1f} {b:.1f},{y:.1f}" for (a, b), y in zip(runs, upper, strict=True)]
    back = [f"{b:.1f},{y:.1f} {a:.1f},{y:.1f}" for (a, b), y in zip(runs, lower, strict=True)]
    return "M" + " ".join(there + back[::-1]) + "Z"


def _axes(end_ns: int, maximum: float, x_of: float, y_of: float) -> list[str]:
    unit_s, time_name = time_unit(end_ns / NS_PER_S)
    unit_bytes, size_name = size_unit(maximum)
    parts = [text("axis", 8, 14, f"memory ({size_name})")]
    parts.append(text("axis", (LEFT + RIGHT) / 2, BOTTOM + 36, f"time ({time_name})", "middle"))
    for position, label in ticks(end_ns, unit_s * NS_PER_S, 8):
        parts.append(text("tick", LEFT + position * x_of, BOTTOM + 16, label, "middle"))
    for position, label in ticks(maximum, unit_bytes):
        y = BOTTOM - position * y_of
        parts += [line("grid", LEFT, y, RIGHT, y), text("tick", LEFT - 8, y + 4, label, "end")]
    return parts


def _peak_mark(profile: MemoryProfile, x_of: float, y_of: float) -> list[str]:
    x, y = LEFT + profile.peak_time_ns * x_of, BOTTOM - profile.peak_bytes * y_of
    is_left = x < WIDTH / 2
    caption = f"peak {format_bytes(profile.peak_bytes)} at {format_seconds(profile.peak_time_ns / NS_PER_S)}"
    mark = f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    return [
        mark,
        text("peak-text", x + (7 if is_left else -7), y - 6, caption, "start" if is_left else "end"),
    ]
