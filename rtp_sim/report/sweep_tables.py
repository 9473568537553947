"""A sweep as text: the verdict in a sentence, a line per point, and the crossings in words."""

from __future__ import annotations

from rich.table import Table as RichTable
from rich.text import Text

from rtp_sim.report.format import format_bytes, format_count, format_percent, format_seconds
from rtp_sim.report.tables import PROBLEM_STYLE
from rtp_sim.sweep.evaluate import Row
from rtp_sim.sweep.table import Overtaking, Table, fastest, overtakings

RATES = ("step", "tokens/s", "per GPU", "MFU", "peak memory")
LISTED = 20
"""So many crossings are printed; all are in the JSON and the report."""


def verdict(table: Table) -> str:
    """How many points there are and what became of them, and who is fastest how often."""
    rows = list(table.rows.values())
    ok = [row for row in rows if row["status"] == "ok"]
    fitting = sum(bool(row["metrics"]["fits"]) for row in ok)
    cannot, failed = (sum(row["status"] == status for row in rows) for status in ("cannot", "failed"))
    parts = [f"{len(rows)} points: {fitting} fit"]
    parts += [f"{count} {what}" for count, what in (
        (len(ok) - fitting, "do not fit"), (cannot, "cannot be laid out"), (failed, "failed")) if count]  # fmt: skip
    wins = {name: count for name, count in fastest(table).items() if count}
    settings = sum(wins.values())
    if not wins:
        return ", ".join(parts) + ". Nothing fits."
    told = ", ".join(f"{name} in {count}" for name, count in sorted(wins.items(), key=lambda item: (-item[1], item[0])))
    return f"{', '.join(parts)}. Fastest of what fits, in {settings} settings: {told}."


def sweep_table(table: Table) -> RichTable:
    """A line per point: where it lies, step time, rates, memory, or the number of the reason why there is none."""
    shown = RichTable(header_style="bold", box=None, pad_edge=False)
    for axis in table.axes:
        shown.add_column(axis.name, no_wrap=True, justify="right" if axis.is_numeric else "left")
    shown.add_column("layout", no_wrap=True)
    for title in RATES:
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("fits", no_wrap=True)
    why = {reason: number for number, reason in enumerate(reasons(table), 1)}
    for at, row in table.rows.items():
        shown.add_row(*at, *_cells(row, why))
    return shown


def point_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the same, with the reasons written out, for a page."""
    titles = [axis.name for axis in table.axes] + ["layout", *RATES, "fits"]
    rows = []
    for at, row in table.rows.items():
        cells = [str(cell) for cell in _cells(row, {})]
        rows.append([*at, *cells])
    return titles, rows


def reasons(table: Table) -> list[str]:
    """Why points have no numbers, each reason once, in the order of the rows."""
    return list(dict.fromkeys(row["reason"] for row in table.rows.values() if row["metrics"] is None))


def reason_lines(table: Table) -> list[str]:
    """The reasons under the numbers by which the table names them."""
    return [f"({number}) {reason}" for number, reason in enumerate(reasons(table), 1)]


def _cells(row: Row, why: dict[str, int]) -> list[Text | str]:
    """The cells behind the coordinates; a reason by its number where it has one in `why`."""
    m = row["metrics"]
    if m is None:
        told = f"({why[row['reason']]})" if row["reason"] in why else f": {row['reason']}"
        return ["", "", "", "", "", "", Text(f"{row['status']} {told}".replace(" :", ":"), style=PROBLEM_STYLE)]
    fits = Text("yes") if m["fits"] else Text("no", style=PROBLEM_STYLE)
    rates = [format_count(m["tokens_per_s"]), format_count(m["tokens_per_s_per_gpu"]), format_percent(m["mfu"])]
    return [m["layout"], format_seconds(m["step_time_s"]), *rates, format_bytes(m["peak_memory_bytes"]), fits]


def crossing_lines(table: Table, limit: int | None = LISTED) -> list[str]:
    """The crossings in words, those that change the fastest first; what they rest on in the first line."""
    found = sorted(overtakings(table), key=lambda o: not o.crossing.leads)
    if not found:
        return []
    shown = found if limit is None else found[:limit]
    heading = f"{len(found)} crossings (straight lines between neighbouring points of the grid)"
    more = "" if len(shown) == len(found) else f", {len(shown)} of them"
    return [f"{heading}{more}:", *(f"  {crossing_text(table, o)}" for o in shown)]


def crossing_text(table: Table, o: Overtaking) -> str:
    """ "micro-batch=1: above link.ib.bandwidth 310Gb/s fsdp beats rtp, and everything else"."""
    setting = ", ".join(f"{name}={text}" for name, text in o.setting.items())
    axis, c = table.axes[table.axis(o.x)], o.crossing
    others = len(table.axes[table.axis("strategy")].values) - 2
    rest = ", and all others" if c.leads and others else ""
    return f"{setting + ': ' if setting else ''}above {o.x} {c.at:.4g}{axis.unit} {c.winner} beats {c.loser}{rest}"
