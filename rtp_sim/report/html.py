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
from rtp_sim.report.timeline_data import Json, timeline_data
from rtp_sim.timeline import Timeline

if TYPE_CHECKING:
    from rtp_sim.engine.memory import MemoryProfile

InputRow = tuple[str, str, str, str, str]
"""Section, name, value with unit, kind of provenance (measured, vendor, assumed ...), source."""

TIME_NOTE = (
    "On the rank that ends last. Communication that runs beside compute is not shown. The bubble is waiting for "
    "dependencies, partners or the host."
)
MEMORY_NOTE = "On the rank with the highest peak, by what holds the memory at that moment."
METRICS_NOTE = (
    "Best value of each column, among what fits, in bold. Bytes and messages count what one rank sends under ring "
    "algorithms."
)
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
    write_page(path, report_html(title, rows, timelines, memory, inputs, provenance, device_memory_bytes))


def write_page(path: str | PathLike[str], text: str) -> None:
    """Write a page's text to a file. InputError if that is not possible."""
    try:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
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
    memory_chart, table = memory_bars(rows, device_memory_bytes), _metrics_table(rows, device_memory_bytes)
    sections = (
        section("time", "Where the step's time goes", f"{note(TIME_NOTE)}<figure>{time_bars(rows)}</figure>"),
        section("memory", "Peak memory", f"{note(MEMORY_NOTE)}<figure>{memory_chart}</figure>"),
        _memory_section(memory, timelines, device_memory_bytes),
        timeline_section("Timeline of representative ranks", list(timelines)),
        section("metrics", "All metrics", note(METRICS_NOTE) + scroll("metrics", table)),
        inputs_section(inputs),
        _provenance_section(provenance),
    )
    drawn = [timeline_data(name, timeline) for name, timeline in timelines.items()]
    return page(title, headline(rows), "\n".join(sections), drawn)


def page(title: str, answer: str, body: str, timelines: Sequence[Json]) -> str:
    """The page around `body`, which is HTML, below the `answer` in a sentence. `timelines` is what the canvas of a
    timeline section offers to draw."""
    return Template(_resource("report.html")).substitute(
        title=escape(title),
        headline=escape(answer),
        light=css_variables(dark=False),
        dark=css_variables(dark=True),
        css=_resource("report.css"),
        js=_resource("report.js"),
        body=body,
        # "<" cannot appear raw: it could end the script element that holds the data.
        data=json.dumps(timelines, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
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
    return section("over-time", "Memory over the step", f'<div class="controls">{choice}</div>{"".join(panels)}')


def _largest(profile: MemoryProfile, count: int = 8) -> str:
    """The biggest buffers alive at the peak, behind a disclosure."""
    if not profile.alive_at_peak:
        return ""
    largest = sorted(profile.alive_at_peak, key=lambda item: (-item[1], item[0]))[:count]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{format_bytes(size)}</dd>" for name, size in largest)
    summary = f"The largest of {len(profile.alive_at_peak)} buffers alive at the peak"
    return f'<details class="note"><summary>{summary}</summary><dl>{items}</dl></details>'


def timeline_section(title: str, names: Sequence[str], chosen: str = "Strategy") -> str:
    """The canvas with its controls; `names` are those of the page's timelines, `chosen` says what they are."""
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
        f'<div class="controls">{_choice("timeline-choice", names, chosen)}<span>{buttons}</span>'
        f"{key(['compute', 'communication'], {})}</div>"
        '<div id="timeline"><canvas id="timeline-canvas" role="img" tabindex="0" aria-label="Timeline" '
        'aria-describedby="timeline-help timeline-status"></canvas></div>'
        '<p class="note" id="timeline-status"></p><p class="note" id="timeline-note"></p>'
        '<div id="tip" role="status" hidden></div>'
    )
    return section("timeline", title, body)


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


def inputs_section(inputs: Sequence[InputRow]) -> str:
    """The inputs with where each comes from, one table per section; empty without any."""
    if not inputs:
        return ""
    parts = [note("Where each number comes from: measured on such hardware, from the vendor, or assumed.")]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("input", "value", "from", "source"))
    for title in dict.fromkeys(row[0] for row in inputs):
        body = "".join(_input_row(row) for row in inputs if row[0] == title)
        table = f'<table class="inputs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        parts.append(f'<h3>{escape(title)}</h3><div class="scroll">{table}</div>')
    return section("inputs", "Inputs", "".join(parts))


def _input_row(row: InputRow) -> str:
    _, name, value, kind, source = (escape(str(cell)) for cell in row)
    badge = f'<span class="badge {kind if kind in BADGES else "other"}">{kind}</span>' if kind else ""
    cells = f'<td>{value}</td><td>{badge}</td><td class="source">{source}</td>'
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _provenance_section(provenance: Mapping[str, str]) -> str:
    if not provenance:
        return ""
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in provenance.items())
    return section("provenance", "How this report came about", f"<dl>{items}</dl>")


def _choice(element_id: str, names: Sequence[str], chosen: str = "Strategy") -> str:
    options = "".join(f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(names))
    return f'<label for="{element_id}">{escape(chosen)}</label><select id="{element_id}">{options}</select>'


def section(name: str, title: str, body: str) -> str:
    """A part of the page with its heading; `body` is HTML."""
    heading = f'<h2 id="{name}-heading">{escape(title)}</h2>'
    return f'<section aria-labelledby="{name}-heading">{heading}{body}</section>'


def scroll(name: str, table: str) -> str:
    """A table in a frame of its own that scrolls, named by the heading of section `name`."""
    return f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-heading">{table}</div>'


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def _resource(name: str) -> str:
    return files("rtp_sim.report").joinpath(name).read_text(encoding="utf-8")
