"""The report people look at: one self-contained HTML page that compares strategies and says what it rests on.

Nothing is loaded from elsewhere (a content security policy in the page forbids it), all text is escaped, and
the same input gives the same bytes. The page is the template beside this file, filled with charts from `bars`
and `areas`, the spans from `timeline_data`, and tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from rtp_sim.errors import InputError
from rtp_sim.metrics import StepMetrics
from rtp_sim.report.areas import memory_areas
from rtp_sim.report.bars import memory_bars, time_bars
from rtp_sim.report.format import format_bytes, format_seconds, format_shares
from rtp_sim.report.palette import css_variables
from rtp_sim.report.svg import key
from rtp_sim.report.tables import COLUMNS, best_value, fits_text
from rtp_sim.report.timeline_data import timeline_data
from rtp_sim.timeline import Timeline

if TYPE_CHECKING:
    from rtp_sim.engine.memory import MemoryProfile

InputRow = tuple[str, str, str, str, str]
"""Section, name, value with unit, kind of provenance (measured, vendor, assumed ...), source."""

BADGES = frozenset({"measured", "vendor", "assumed"})


def write_report(
    path: str | PathLike[str],
    *,
    title: str,
    rows: Sequence[StepMetrics],
    timelines: Mapping[str, Timeline],
    memory: Mapping[str, MemoryProfile],
    inputs: Sequence[InputRow],
    provenance: Mapping[str, str],
    device_memory_bytes: int | None = None,
) -> None:
    """Write the page to `path`. `timelines` and `memory` (one rank each) go by the names shown for choosing.

    `device_memory_bytes` draws the line of what a rank may use. InputError without rows, or if the file
    cannot be written.
    """
    page = report_html(title, rows, timelines, memory, inputs, provenance, device_memory_bytes)
    try:
        Path(path).write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"cannot write the report to {str(path)!r}: {error.strerror}") from error


def report_html(
    title: str,
    rows: Sequence[StepMetrics],
    timelines: Mapping[str, Timeline],
    memory: Mapping[str, MemoryProfile],
    inputs: Sequence[InputRow],
    provenance: Mapping[str, str],
    device_memory_bytes: int | None,
) -> str:
    """The page as text."""
    if not rows:
        raise InputError("a report needs at least one row of metrics; none was given")
    strategies = [timeline_data(name, timeline) for name, timeline in timelines.items()]
    return Template(_resource("report.html")).substitute(
        title=escape(title),
        headline=escape(headline(rows)),
        light=css_variables(dark=False),
        dark=css_variables(dark=True),
        css=_resource("report.css"),
        js=_resource("report.js"),
        time_bars=time_bars(rows),
        memory_bars=memory_bars(rows, device_memory_bytes),
        memory_section=_memory_section(memory, timelines, device_memory_bytes),
        timeline_section=_timeline_section(list(timelines)),
        metrics_table=_metrics_table(rows, device_memory_bytes),
        inputs_section=_inputs_section(inputs),
        provenance_section=_provenance_section(provenance),
        # "<" cannot appear raw: it could end the script element that holds the data.
        data=json.dumps(strategies, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    )


def headline(rows: Sequence[StepMetrics]) -> str:
    """The answer in a sentence: which strategy is fastest of those that fit, and by how much."""
    fitting = sorted((m for m in rows if m.fits), key=lambda m: m.step_time_s)
    if not fitting:
        least = min(rows, key=lambda m: m.peak_memory_bytes)
        return f"Nothing fits: {_name(least)} needs least, {format_bytes(least.peak_memory_bytes)} per rank."
    best = fitting[0]
    if len(rows) == 1:
        peak = format_bytes(best.peak_memory_bytes)
        return f"{_name(best)}: {format_seconds(best.step_time_s)} per step, {peak} per rank."
    fits = f"{len(fitting)} of {len(rows)} fit. " if len(fitting) < len(rows) else ""
    text = f"{fits}Fastest is {_name(best)} with {format_seconds(best.step_time_s)} per step"
    if len(fitting) > 1 and best.step_time_s > 0:
        gain = fitting[1].step_time_s / best.step_time_s
        text += f", {gain:.2f} times as fast as the next, {_name(fitting[1])}"
    return text + "."


def _name(metrics: StepMetrics) -> str:
    return f"{metrics.strategy} ({metrics.layout})" if metrics.layout else metrics.strategy


def _memory_section(
    memory: Mapping[str, MemoryProfile], timelines: Mapping[str, Timeline], device_memory_bytes: int | None
) -> str:
    if not memory:
        return ""
    panels = []
    for i, (name, profile) in enumerate(memory.items()):
        end_ns = timelines[name].step_time_ns if name in timelines else 0
        chart = memory_areas(name, profile, end_ns, device_memory_bytes)
        panels.append(f'<figure data-memory-panel="{i}"><h3>{escape(name)}</h3>{chart}{_largest(profile)}</figure>')
    choice = _choice("memory-choice", list(memory))
    return _section("over-time", "Memory over the step", f'<div class="controls">{choice}</div>{"".join(panels)}')


def _largest(profile: MemoryProfile, count: int = 8) -> str:
    """The biggest buffers alive at the peak, behind a disclosure."""
    if not profile.alive_at_peak:
        return ""
    largest = sorted(profile.alive_at_peak, key=lambda item: (-item[1], item[0]))[:count]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{format_bytes(size)}</dd>" for name, size in largest)
    summary = f"The largest of {len(profile.alive_at_peak)} buffers alive at the peak"
    return f'<details class="note"><summary>{summary}</summary><dl>{items}</dl></details>'


def _timeline_section(names: Sequence[str]) -> str:
    if not names:
        return ""
    buttons = "".join(
        f'<button type="button" id="zoom-{action}" aria-label="{label}">{text}</button>'
        for action, label, text in (
            ("in", "Zoom in", "+"),
            ("out", "Zoom out", "−"),
            ("reset", "Show the whole step", "whole step"),
        )
    )
    body = (
        '<p class="note" id="timeline-help">Wheel or + and − zoom, dragging or the arrow keys move, 0 shows '
        "the whole step. Point at a span for its op.</p>"
        f'<div class="controls">{_choice("timeline-choice", names)}<span>{buttons}</span>'
        f"{key(['compute', 'communication'], {})}</div>"
        '<div id="timeline"><canvas id="timeline-canvas" role="img" tabindex="0" aria-label="Timeline" '
        'aria-describedby="timeline-help timeline-status"></canvas></div>'
        '<p class="note" id="timeline-status"></p><p class="note" id="timeline-note"></p>'
        '<div id="tip" role="status" hidden></div>'
    )
    return _section("timeline", "Timeline of representative ranks", body)


def _metrics_table(rows: Sequence[StepMetrics], device_memory_bytes: int | None) -> str:
    head = "".join(f'<th class="number" scope="col">{escape(column.title)}</th>' for column in COLUMNS)
    best = {column.title: best_value(column, rows) for column in COLUMNS}
    body = []
    for m in rows:
        cells = [f'<th scope="row">{escape(m.strategy)}<span>{escape(m.layout)}</span></th>']
        for column in COLUMNS:
            value = column.value(m)
            css = "number best" if m.fits and value is not None and value == best[column.title] else "number"
            cells.append(f'<td class="{css}">{escape(column.text(value))}</td>')
        css = "words" if m.fits else "words problem"
        cells.append(f'<td class="{css}">{escape(fits_text(m, device_memory_bytes))}</td>')
        cells.append(f'<td class="words">{escape(format_shares(m.cost_provenance))}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    titles = f'<th scope="col">strategy</th>{head}'
    tail = '<th scope="col">fits</th><th scope="col">costs rest on</th>'
    return f'<table id="metrics"><thead><tr>{titles}{tail}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _inputs_section(inputs: Sequence[InputRow]) -> str:
    if not inputs:
        return ""
    note = "Where each number comes from: measured on such hardware, from the vendor, or assumed."
    parts = [f'<p class="note">{note}</p>']
    head = "".join(f'<th scope="col">{name}</th>' for name in ("input", "value", "from", "source"))
    for section in dict.fromkeys(row[0] for row in inputs):
        body = "".join(_input_row(row) for row in inputs if row[0] == section)
        table = f'<table class="inputs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        parts.append(f'<h3>{escape(section)}</h3><div class="scroll">{table}</div>')
    return _section("inputs", "Inputs", "".join(parts))


def _input_row(row: InputRow) -> str:
    _, name, value, kind, source = (escape(str(cell)) for cell in row)
    badge = f'<span class="badge {kind if kind in BADGES else "other"}">{kind}</span>' if kind else ""
    cells = f'<td>{value}</td><td>{badge}</td><td class="source">{source}</td>'
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _provenance_section(provenance: Mapping[str, str]) -> str:
    if not provenance:
        return ""
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in provenance.items())
    return _section("provenance", "How this report came about", f"<dl>{items}</dl>")


def _choice(element_id: str, names: Sequence[str]) -> str:
    options = "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(names))
    return f'<label for="{element_id}">Strategy</label><select id="{element_id}">{options}</select>'


def _section(name: str, title: str, body: str) -> str:
    heading = f'<h2 id="{name}-heading">{escape(title)}</h2>'
    return f'<section aria-labelledby="{name}-heading">{heading}{body}</section>'


def _resource(name: str) -> str:
    return files("rtp_sim.report").joinpath(name).read_text(encoding="utf-8")
