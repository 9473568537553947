"""The page about published runs: predicted against measured as points, errors by group, the worst rows, what was
assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

from rtp_sim.report.accuracy_tables import accuracy_grids, interval_text, row_grid, verdict
from rtp_sim.report.diff_html import grid_section
from rtp_sim.report.diff_tables import signed_percent
from rtp_sim.report.format import format_bytes, format_seconds
from rtp_sim.report.html import note, page, section, write_page
from rtp_sim.report.scatter import BOTTOM, axes, place
from rtp_sim.report.svg import dot, frame, key
from rtp_sim.validation.accuracy import Outcome

INTRO = (
    "Errors are (predicted - measured) / measured. Fits may have used the calibration rows (a fixed half of each file, "
    "by a hash of the row's id) and nothing of the validation rows. A prediction interval is what the calibration rows "
    "of the same machine left: eight of ten of them lie inside theirs. How many of the others do is counted below."
)
NAMES = {"measured": "calibration row", "predicted": "validation row"}


def write_accuracy_report(path: str | PathLike[str], outcomes: Sequence[Outcome], worst: int) -> None:
    """Write the page to `path`. InputError if it cannot be written."""
    write_page(path, accuracy_html(outcomes, worst))


def accuracy_html(outcomes: Sequence[Outcome], worst: int) -> str:
    """The page as text."""
    times = [
        (o, o.estimate.step_s, o.cells.step_time_s)
        for o in outcomes
        if o.estimate is not None and o.cells is not None and o.cells.step_time_s is not None
    ]
    memory = [
        (o, float(o.peak_bytes), o.cells.peak_memory_gib * o.reading.unit_bytes)
        for o in outcomes
        if o.peak_bytes is not None and o.cells is not None and o.cells.peak_memory_gib is not None
    ]
    charts = [
        section(
            "step-time", "Step time, predicted against measured", f"<figure>{_scatter(times, 'step time')}</figure>"
        ),
        section(
            "peak-memory", "Peak memory, predicted against measured", f"<figure>{_scatter(memory, 'memory')}</figure>"
        ),
    ]
    grids = [grid_section(grid) for grid in (*accuracy_grids(outcomes, worst), row_grid(outcomes))]
    body = [note(INTRO), *charts, *grids]
    return page("Predicted against published runs", verdict(outcomes), "\n".join(body), [])


Point = tuple[Outcome, float, float]
"""A row with its predicted and its measured number."""


def _scatter(points: Sequence[Point], what: str) -> str:
    """Both axes logarithmic, a point per row."""
    if not points:
        return note(f"No row has a measured {what}.")
    show = format_seconds if what == "step time" else format_bytes
    values = [v for _, predicted, measured in points for v in (predicted, measured)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    parts = axes(low, high, show)
    for o, predicted, measured in points:
        error = signed_percent(predicted / measured - 1)
        tip = f"{o.file}, {o.row_id}: predicted {show(predicted)}, measured {show(measured)} ({error})"
        if what == "step time" and o.interval_s is not None:
            tip += f", 8 of 10 between {interval_text(o)}"
        role = "measured" if o.calibration else "predicted"
        parts.append(dot("point", *place(measured, predicted, low, high), 2.6, role, tip))
    label = f"Predicted against measured {what} of {len(points)} rows"
    return key(list(NAMES), NAMES) + frame("scatter", label, BOTTOM + 46, parts) + note(label)
