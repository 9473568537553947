"""The page that shows a prediction against a measurement: the machinery of `html`, filled with differences."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any

from rtp_sim.metrics import NS_PER_S
from rtp_sim.report.bars import Bar, Scale, chart
from rtp_sim.report.diff_tables import (
    Grid,
    answer,
    check_grid,
    diff_grids,
    pace_text,
    signed_percent,
    spread_text,
    verdict,
)
from rtp_sim.report.format import format_seconds, time_unit
from rtp_sim.report.html import InputRow, inputs_section, note, page, scroll, section, timeline_section, write_page
from rtp_sim.report.scatter import duration_scatter
from rtp_sim.report.timeline_data import MAX_RANKS, MAX_SPANS, timeline_data
from rtp_sim.timeline import Timeline
from rtp_sim.validation.diff import GroupDiff, TimelineDiff

if TYPE_CHECKING:
    from rtp_sim.validation.runs import Validation

MAX_CLASSES = 10

NOTES = {
    "checks": "Step time and memory may be off by the tolerance. Bytes and messages follow from the schedule alone: "
    "they must be equal on every rank.",
    "ranks": "Where the step of each rank goes, what it sent and what it held, each predicted / measured.",
    "kernels": "Errors are predicted less measured. They are added up on the rank that ends last in the measurement; "
    "the rest of the error of the step is what overlap and waiting make of them.",
    "worst": "The largest errors, too slow or too fast, on any rank.",
}


def write_diff_report(
    path: str | PathLike[str],
    diff: TimelineDiff,
    *,
    worst: int,
    validation: Validation | None = None,
    inputs: Sequence[InputRow] = (),
) -> None:
    """Write the page to `path`; with `validation` it begins with the verdict. InputError if it cannot be written."""
    write_page(path, diff_report_html(diff, worst, validation, inputs))


def diff_report_html(diff: TimelineDiff, worst: int, validation: Validation | None, inputs: Sequence[InputRow]) -> str:
    """The page as text."""
    schedule = diff.measured.schedule
    title = f"{schedule.name} on {schedule.world_size} ranks: predicted against measured"
    ops = [op for rank in diff.ranks for op in rank.ops]
    drawn = [pair_data(diff, rank) for rank in drawn_ranks(diff)]
    sections = [
        section("bars", f"Time by kernel class on rank {diff.critical_rank}", _class_bars(diff.kernel_classes)),
        section("scatter", "Error by op", f"<figure>{duration_scatter(ops)}</figure>"),
        timeline_section("Both timelines of a rank", [str(pair["name"]) for pair in drawn], "Rank"),
        *(grid_section(grid) for grid in diff_grids(diff, worst)),
        inputs_section(inputs),
    ]
    if validation is not None:
        texts = (spread_text(validation), pace_text(validation), *validation.notes)
        said = "".join(note(text) for text in texts if text)
        sections.insert(0, grid_section(check_grid(validation), said))
    return page(title, answer(diff) if validation is None else verdict(validation), "\n".join(sections), drawn)


def drawn_ranks(diff: TimelineDiff) -> list[int]:
    """The critical rank, then the lowest others, as many as a page holds."""
    chosen, spans = [diff.critical_rank], 2 * len(diff.rank(diff.critical_rank).ops)
    for rank in diff.ranks:
        spans += 2 * len(rank.ops)
        if rank.rank != diff.critical_rank and len(chosen) < MAX_RANKS and spans <= 2 * MAX_SPANS:
            chosen.append(rank.rank)
    return chosen


def pair_data(diff: TimelineDiff, rank: int) -> dict[str, Any]:
    """What the canvas draws for one rank: its predicted timeline above its measured one, on one axis."""
    above, below = (
        timeline_data(f"rank {rank}", _alone(timeline, rank), MAX_SPANS // 2)
        for timeline in (diff.predicted, diff.measured)
    )
    pair: dict[str, Any] = dict(above)
    pair["step_ns"] = max(diff.predicted.step_time_ns, diff.measured.step_time_ns)
    pair["summary"] = f"{above['summary']}; {below['summary']}"
    pair["note"] = f"{above['note']} {below['note']}".strip()
    for i, (side, data) in enumerate((("predicted", above), ("measured", below))):
        (drawn,) = _list(data["ranks"])
        label = {"label": f"{side}, rank {rank}"}
        pair["ranks"] = [*_list(pair["ranks"])[:i], drawn | label | {"table": i}]
    first = len(_list(above["details"]))
    pair["details"] = [*_list(above["details"]), *_list(below["details"])]
    shifted = [[(name, comm, first + detail, op) for name, comm, detail, op in t] for t in _list(below["tables"])]
    pair["tables"] = [*_list(above["tables"]), *shifted]
    return pair


def _alone(timeline: Timeline, rank: int) -> Timeline:
    """The timeline of one rank, which stands for all, under the rank's own number."""
    ranks = (rank,) * timeline.schedule.world_size
    return Timeline(timeline.schedule, timeline.kind, {rank: timeline.times(rank)}, ranks)


def _list(value: object) -> list[Any]:
    assert isinstance(value, list)
    return value


def _class_bars(groups: Sequence[GroupDiff]) -> str:
    """Two bars per kernel class, the classes that take longest first; the short ones beyond are one class."""
    ordered = sorted(groups, key=lambda g: (-max(g.predicted_ns, g.measured_ns), g.name))
    shown, rest = ordered[:MAX_CLASSES], ordered[MAX_CLASSES:]
    bars = []
    for g in shown:
        bars += _pair_of_bars(g.name, g.predicted_ns, g.measured_ns)
    if rest:
        sums = sum(g.predicted_ns for g in rest), sum(g.measured_ns for g in rest)
        bars += _pair_of_bars(f"{len(rest)} others", *sums)
    longest_s = max((max(g.predicted_ns, g.measured_ns) for g in groups), default=0) / NS_PER_S
    unit_s, unit = time_unit(longest_s)
    scale = Scale(unit_s, f"time of all ops of the class ({unit})", {})
    return f"<figure>{chart('Time by kernel class', bars, scale)}</figure>"


def _pair_of_bars(name: str, predicted_ns: int, measured_ns: int) -> list[Bar]:
    predicted_s, measured_s = predicted_ns / NS_PER_S, measured_ns / NS_PER_S
    error = signed_percent((predicted_ns - measured_ns) / measured_ns if measured_ns else None)
    above = f"{format_seconds(predicted_s)} ({error})"
    return [
        Bar(name, "", (("predicted", predicted_s),), above),
        Bar(name, "", (("measured", measured_s),), format_seconds(measured_s), paired=True),
    ]


def grid_section(grid: Grid, before: str = "") -> str:
    """A grid as a section of the page."""
    said = note(NOTES[grid.name]) if grid.name in NOTES else ""
    body = scroll(grid.name, grid_table(grid)) if grid.rows else note("None.")
    return section(grid.name, grid.title, said + before + body)


def grid_table(grid: Grid) -> str:
    """The grid as an HTML table; its first column heads the rows."""
    aligned = ["" if i < grid.words else ' class="number"' for i in range(len(grid.header))]
    head = "".join(f'<th scope="col"{css}>{escape(t)}</th>' for t, css in zip(grid.header, aligned, strict=True))
    rows = []
    for first, *others in grid.rows:
        cells = "".join(f"<td{css}>{escape(cell)}</td>" for cell, css in zip(others, aligned[1:], strict=True))
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
