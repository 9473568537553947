"""Results as text: tables for a terminal, and the same rows as JSON and CSV for programs.

Tables go to stdout unless told otherwise. `rich` drops colours where NO_COLOR is set or the output is no
terminal; what colour says is said in words as well, or in bold (best values).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rtp_sim.metrics import StepMetrics, metrics_row
from rtp_sim.report.format import format_bytes, format_count, format_percent, format_seconds, format_shares

COMPARE_SCHEMA = "rtp-sim/compare/1"
SIMULATE_SCHEMA = "rtp-sim/simulate/1"
PIPED_WIDTH = 200
BEST_STYLE = "bold green"
PROBLEM_STYLE = "bold red"


@dataclass(frozen=True, slots=True)
class Column:
    """A number of the comparison: how to read it from a row, how to print it, and which end is best (0:
    none)."""

    title: str
    value: Callable[[StepMetrics], float | None]
    text: Callable[[float | None], str]
    better: int = 0


COLUMNS = (
    Column("step", lambda m: m.step_time_s, format_seconds, -1),
    Column("tokens/s", lambda m: m.tokens_per_s, format_count, 1),
    Column("tokens/s per GPU", lambda m: m.tokens_per_s_per_gpu, format_count, 1),
    Column("MFU", lambda m: m.mfu, format_percent, 1),
    Column("compute", lambda m: m.compute_time_s, format_seconds),
    Column("exposed comm.", lambda m: m.exposed_communication_s, format_seconds, -1),
    Column("overlapped comm.", lambda m: m.overlapped_communication_s, format_seconds),
    Column("bubble", lambda m: m.bubble_s, format_seconds),
    Column("sent per rank", lambda m: m.bytes_sent_per_rank, format_bytes, -1),
    Column("messages per rank", lambda m: m.messages_per_rank, format_count),
    Column("peak memory", lambda m: m.peak_memory_bytes, format_bytes, -1),
)


def best_value(column: Column, rows: Sequence[StepMetrics]) -> float | None:
    """The best of a column among the rows that fit; None if there is nothing to compare."""
    values = [value for m in rows if m.fits and (value := column.value(m)) is not None]
    if not column.better or len(values) < 2 or min(values) == max(values):
        return None
    return max(values) if column.better > 0 else min(values)


def fits_text(metrics: StepMetrics, device_memory_bytes: int | None) -> str:
    """ "yes", or what is needed of what there is."""
    if metrics.fits:
        return "yes"
    needed = f"no: needs {format_bytes(metrics.peak_memory_bytes)}"
    return needed if device_memory_bytes is None else f"{needed} of {format_bytes(device_memory_bytes)}"


def comparison_table(rows: Sequence[StepMetrics], device_memory_bytes: int | None = None) -> Table:
    """One line per strategy; the best value of each column, among those that fit, is bold and green."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    best = {column.title: best_value(column, rows) for column in COLUMNS}
    for m in rows:
        cells = [Text(m.strategy), Text(m.layout)]
        for column in COLUMNS:
            value = column.value(m)
            is_best = m.fits and value is not None and value == best[column.title]
            cells.append(Text(column.text(value), style=BEST_STYLE if is_best else ""))
        cells.append(Text(fits_text(m, device_memory_bytes), style="" if m.fits else PROBLEM_STYLE))
        table.add_row(*cells)
    return table


def summary_table(metrics: StepMetrics, device_memory_bytes: int | None = None) -> Table:
    """One simulation, top to bottom: where the step's time goes, what is sent, and memory at the peak."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("strategy", Text(f"{metrics.strategy} {metrics.layout}".rstrip()), "")
    share_of = metrics.step_time_s or 1.0
    in_step = {"compute", "exposed comm.", "bubble"}
    for column in COLUMNS:
        value = column.value(metrics)
        share = format_percent(value / share_of) if column.title in in_step and value is not None else ""
        table.add_row(column.title, column.text(value), share)
    for category, size_bytes in metrics.memory_by_category.items():
        if not size_bytes:
            continue
        share = format_percent(size_bytes / metrics.peak_memory_bytes) if metrics.peak_memory_bytes else ""
        table.add_row(Text(f"  {category}", style="not bold"), format_bytes(size_bytes), share)
    fits = Text(fits_text(metrics, device_memory_bytes), style="" if metrics.fits else PROBLEM_STYLE)
    table.add_row("fits", fits, "")
    table.add_row("costs rest on", Text(format_shares(metrics.cost_provenance)), "")
    return table


def print_table(table: Table, out: TextIO | None = None) -> None:
    """Print a table to `out`, stdout by default; as wide as it needs where the output is not a terminal."""
    stream = sys.stdout if out is None else out
    width = None if stream.isatty() else PIPED_WIDTH
    Console(file=stream, width=width, highlight=False, soft_wrap=width is not None).print(table)


def compare_json(rows: Sequence[StepMetrics], inputs: Mapping[str, object]) -> dict[str, object]:
    """The document of a comparison: {"schema", "rows", "inputs"}."""
    return {"schema": COMPARE_SCHEMA, "rows": [metrics_row(m) for m in rows], "inputs": dict(inputs)}


def simulate_json(
    metrics: StepMetrics, inputs: Mapping[str, object], jitter: Mapping[str, object] | None = None
) -> dict[str, object]:
    """The document of one simulation: {"schema", "row", "inputs", "jitter"}."""
    return {"schema": SIMULATE_SCHEMA, "row": metrics_row(metrics), "inputs": dict(inputs), "jitter": jitter}


def write_json(document: Mapping[str, object], out: TextIO | None = None) -> None:
    """Write a document as indented JSON, keys in the order given. ValueError for NaN or infinity."""
    stream = sys.stdout if out is None else out
    stream.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(rows: Sequence[StepMetrics], out: TextIO | None = None) -> None:
    """Write the rows as CSV in base units; dictionaries become columns named key.name, empty where absent."""
    flat = [_flattened(m) for m in rows]
    header = list(dict.fromkeys(key for row in flat for key in row))
    groups = list(dict.fromkeys(key.split(".")[0] for key in header))
    header.sort(key=lambda key: groups.index(key.split(".")[0]))
    writer = csv.DictWriter(sys.stdout if out is None else out, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


def _flattened(metrics: StepMetrics) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in metrics_row(metrics).items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = "" if value is None else value
    return flat
