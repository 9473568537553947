"""The page about a sweep: lines over each axis with the crossings marked and told, every point, inputs."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from os import PathLike
from typing import Any

from rtp_sim.report.html import InputRow, inputs_section, note, page, scroll, section, write_page
from rtp_sim.report.lines import MEASURES, line_chart
from rtp_sim.report.sweep_tables import crossing_text, point_cells, verdict
from rtp_sim.sweep.axes import Axis
from rtp_sim.sweep.table import STRATEGY, Overtaking, Table, numbers, overtakings

MOST_CHARTS = 600
"""Axes are drawn along as long as the page holds no more charts than this."""

LINES_NOTE = (
    "A line per strategy. Between two points of the grid the GPU time per token is taken to go in a straight line; "
    "rings mark where one strategy overtakes another, firm ones where the fastest changes. Hollow points do not fit "
    "into memory, and the way to them is dashed."
)
CROSSINGS_NOTE = (
    "Places on straight lines (of GPU time per token) between neighbouring points of the grid; only strategies that "
    "fit into memory at both ends take part."
)


def write_sweep_report(path: str | PathLike[str], table: Table, base: Mapping[str, Any]) -> None:
    """Write the page to `path`. `base` is what all points have in common. InputError if it cannot be written."""
    write_page(path, sweep_html(table, base))


def sweep_html(table: Table, base: Mapping[str, Any]) -> str:
    """The page as text."""
    found = overtakings(table)
    body = [_charts(table, found), _crossings(table, found), _points(table), inputs_section(_inputs(table, base))]
    title = f"{base['model']} on {base['cluster']}: " + " x ".join(axis.name for axis in table.axes)
    return page(title, verdict(table), "\n".join(body), [])


def _charts(table: Table, found: list[Overtaking]) -> str:
    drawn, left_out = _drawn_along(table)
    if not drawn:
        return ""
    others = [axis for axis in table.axes if axis.name != STRATEGY]
    panels = []
    for x, axis in enumerate(drawn):
        places = numbers(axis) if axis.is_numeric else [float(i) for i in range(len(axis.values))]
        for setting in table.settings(axis.name):
            lines = table.lines(axis.name, setting)
            crossings = [o.crossing for o in found if o.x == axis.name and o.setting == setting]
            chosen = ["*" if a is axis else str([v.text for v in a.values].index(setting[a.name])) for a in others]
            for y, measure in enumerate(MEASURES):
                chart = line_chart(axis, places, lines, measure, crossings)
                panels.append(f'<figure data-sweep-panel="{" ".join([str(x), str(y), *chosen])}">{chart}</figure>')
    controls = [
        _select(
            "sweep-along", "Along", [(str(i), a.name, f' data-axis="{escape(a.name)}"') for i, a in enumerate(drawn)]
        ),
        _select("sweep-measure", "Show", [(str(i), m.title, "") for i, m in enumerate(MEASURES)]),
    ]
    for number, axis in enumerate(others):
        options = [(str(i), value.text, "") for i, value in enumerate(axis.values)]
        controls.append(_select(f"sweep-axis-{number}", axis.name, options, f' data-sweep-axis="{escape(axis.name)}"'))
    names = ", ".join(a.name for a in left_out)
    more = note(f"Not drawn along {names}: the page would grow too large.") if left_out else ""
    script = f"<script>{files('rtp_sim.report').joinpath('sweep.js').read_text(encoding='utf-8')}</script>"
    parts = [note(LINES_NOTE), more, f'<div class="controls">{"".join(controls)}</div>', *panels, script]
    return section("lines", "Lines over what is varied", "".join(parts))


def _drawn_along(table: Table) -> tuple[list[Axis], list[Axis]]:
    """Axes that are drawn along, and those for which there is no room; words only where there are no numbers."""
    wanted = table.numeric_axes() or [a for a in table.axes if a.name != STRATEGY and len(a.values) > 1]
    wanted = wanted or [axis for axis in table.axes if axis.name != STRATEGY]
    drawn: list[Axis] = []
    charts = 0
    for axis in wanted:
        charts += len(table.settings(axis.name)) * len(MEASURES)
        if not drawn or charts <= MOST_CHARTS:
            drawn.append(axis)
    return drawn, [axis for axis in wanted if axis not in drawn]


def _select(name: str, label: str, options: list[tuple[str, str, str]], attributes: str = "") -> str:
    inside = "".join(f'<option value="{value}"{more}>{escape(text)}</option>' for value, text, more in options)
    return f'<label for="{name}">{escape(label)}</label><select id="{name}"{attributes}>{inside}</select>'


def _crossings(table: Table, found: list[Overtaking]) -> str:
    if not found:
        return section("crossings", "Crossings", note("No strategy overtakes another between the points of this grid."))
    leading = sorted(found, key=lambda o: not o.crossing.leads)
    items = "".join(f"<li>{escape(crossing_text(table, o))}</li>" for o in leading)
    return section("crossings", "Crossings", f'{note(CROSSINGS_NOTE)}<ul id="crossings">{items}</ul>')


def _points(table: Table) -> str:
    titles, rows = point_cells(table)
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    shown = f'<table id="points"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return section("all-points", "All points", scroll("all-points", shown))


def _inputs(table: Table, base: Mapping[str, Any]) -> list[InputRow]:
    rows: list[InputRow] = [
        ("Varied", axis.name, ", ".join(v.text for v in axis.values), "", "") for axis in table.axes
    ]
    for name, value in base.items():
        if isinstance(value, Mapping):
            rows += [("Options", key, str(one), "", "") for key, one in value.items()]
        elif value is not None:
            rows.append(("All points", name, str(value), "", ""))
    return rows
