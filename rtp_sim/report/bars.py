"""Horizontal stacked bars, one per strategy: the step's time by what it goes to, peak memory by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtp_sim.metrics import StepMetrics
from rtp_sim.report.axis import ticks
from rtp_sim.report.format import digits, format_bytes, format_seconds, size_unit, time_unit
from rtp_sim.report.palette import in_stack_order
from rtp_sim.report.svg import WIDTH, box, frame, ink, key, line, text

LEFT = 190
RIGHT = 120
HEIGHT = 24
PITCH = 40
PAIR_PITCH = HEIGHT + 2
CHARACTER_WIDTH = 7.2
NAMES = {"communication": "exposed communication"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its labels, its (role, value) segments, and the text at its end. A bar that is `paired` lies close
    below the one before it and shares its label."""

    label: str
    detail: str
    segments: tuple[tuple[str, float], ...]
    end_text: str
    paired: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """What a chart measures: base units per printed unit, the axis label, role names, maybe a limit."""

    unit: float
    axis_label: str
    names: Mapping[str, str]
    limit: float | None = None
    limit_text: str = ""


def time_bars(rows: Sequence[StepMetrics]) -> str:
    """Step time of each strategy, split into compute, exposed communication and bubble."""
    bars = [
        Bar(
            m.strategy,
            m.layout,
            _time_segments(m),
            format_seconds(m.step_time_s),
        )
        for m in rows
    ]
    unit_s, unit = time_unit(max((m.step_time_s for m in rows), default=0.0))
    return chart("Step time by strategy", bars, Scale(unit_s, f"step time ({unit})", NAMES))


def _time_segments(m: StepMetrics) -> tuple[tuple[str, float], ...]:
    split = (m.compute_time_s, m.exposed_communication_s, m.bubble_s)
    return tuple(zip(("compute", "communication", "bubble"), split, strict=True))


def memory_bars(rows: Sequence[StepMetrics], device_memory_bytes: int | None) -> str:
    """Peak memory of each strategy by category, against the line of what the device has."""
    bars = [
        Bar(
            m.strategy,
            m.layout,
            tuple((c, float(m.memory_by_category[c])) for c in in_stack_order(m.memory_by_category)),
            format_bytes(m.peak_memory_bytes) + ("" if m.fits else " ✗"),
        )
        for m in rows
    ]
    unit_bytes, unit = size_unit(max([m.peak_memory_bytes for m in rows] + [device_memory_bytes or 0]))
    label = f"peak memory per rank ({unit})"
    limit_text = "" if device_memory_bytes is None else f"device memory {format_bytes(device_memory_bytes)}"
    return chart("Peak memory by strategy", bars, Scale(unit_bytes, label, {}, device_memory_bytes, limit_text))


def chart(title: str, bars: Sequence[Bar], scale: Scale) -> str:
    """The chart with its key, as HTML."""
    top = 26 if scale.limit is not None else 8
    pitches = [PAIR_PITCH if bar.paired else PITCH for bar in bars]
    bottom = top + sum(pitches)
    maximum = max([sum(v for _, v in bar.segments) for bar in bars] + [scale.limit or 0.0])
    per_unit = (WIDTH - LEFT - RIGHT) / maximum if maximum > 0 else 0.0
    parts = []
    for position, label in ticks(maximum, scale.unit):
        x = LEFT + position * per_unit
        parts += [line("grid", x, top, x, bottom), text("tick", x, bottom + 16, label, "middle")]
    parts.append(text("axis", (LEFT + WIDTH - RIGHT) / 2, bottom + 36, scale.axis_label, "middle"))
    lower = float(top)
    for bar, pitch in zip(bars, pitches, strict=True):
        lower += pitch
        parts += _bar(bar, per_unit, lower - HEIGHT - (PITCH - HEIGHT) / 2, scale)
    if scale.limit is not None:
        x = LEFT + scale.limit * per_unit
        parts.append(line("limit", x, top - 6, x, bottom))
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(text("limit-text", x, top - 11, scale.limit_text, anchor))
    described = "; ".join(f"{bar.label} {bar.detail}: {bar.end_text}" for bar in bars)
    shown = {role for bar in bars for role, value in bar.segments if value > 0}
    roles = [role for role in dict.fromkeys(role for bar in bars for role, _ in bar.segments) if role in shown]
    return key(roles, scale.names) + frame("bars", f"{title}. {described}", bottom + 44, parts)


def _bar(bar: Bar, per_unit: float, y: float, scale: Scale) -> list[str]:
    middle = y + HEIGHT / 2 + 4
    parts = []
    if not bar.paired:
        parts.append(text("label", LEFT - 10, middle - (6 if bar.detail else 0), bar.label, "end"))
    if bar.detail:
        parts.append(text("detail", LEFT - 10, middle + 8, bar.detail, "end"))
    x, total = float(LEFT), sum(value for _, value in bar.segments)
    for role, value in bar.segments:
        if value <= 0:
            continue
        width, number = value * per_unit, digits(value / scale.unit)
        tip = f"{bar.label}, {scale.names.get(role, role)}: {number} ({100 * value / total:.1f} %)"
        parts.append(box("segment" if width > 4 else "sliver", x, y, width, HEIGHT, role, tip))
        if width > len(number) * CHARACTER_WIDTH + 8:
            parts.append(text(f"value {ink(role)}", x + width / 2, middle, number, "middle"))
        x += width
    # The text moves behind the line of the limit where the two would meet.
    limit_x = LEFT + (scale.limit or 0.0) * per_unit
    if x - 1 < limit_x < x + 14 + len(bar.end_text) * CHARACTER_WIDTH:
        x = limit_x
    return [*parts, text("total", x + 7, middle, bar.end_text)]
