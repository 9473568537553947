"""Predicted against measured as grids of text, which the terminal and the HTML page print alike, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from rtp_sim.metrics import NS_PER_S, op_kind
from rtp_sim.report.format import MISSING, format_bytes, format_percent, format_seconds
from rtp_sim.report.tables import print_table
from rtp_sim.schedule.ir import Op
from rtp_sim.timeline import Timeline
from rtp_sim.validation.diff import GroupDiff, OpDiff, RankDiff, Side, TimelineDiff, relative_error

if TYPE_CHECKING:
    from rtp_sim.validation.runs import Check, Validation

DIFF_SCHEMA = "rtp-sim/diff/1"
VALIDATE_SCHEMA = "rtp-sim/validate-run/1"
REMAINDER = "overlap and waiting"

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of text: `words` columns on the left hold words, the rest numbers. `name` is one word, for links."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def answer(diff: TimelineDiff) -> str:
    """The step times and their difference in a sentence."""
    predicted, measured = diff.predicted.step_time_ns, diff.measured.step_time_ns
    times = f"predicted {_time(predicted)}, measured {_time(measured)} per step"
    return f"{diff.measured.schedule.name}: {times}, error {_signed_time(diff.step_error_ns)}{_in_brackets(diff)}."


def _in_brackets(diff: TimelineDiff) -> str:
    error = relative_error(diff.predicted.step_time_ns, diff.measured.step_time_ns)
    return "" if error is None else f" ({signed_percent(error)})"


def diff_grids(diff: TimelineDiff, worst: int) -> list[Grid]:
    """Ranks, kernel classes, layer kinds, the worst ops, and ops that one side lacks."""
    grids = [
        rank_grid(diff),
        _group_grid("kernels", f"Kernel classes on rank {diff.critical_rank}", "kernel", diff.kernel_classes, diff),
        _group_grid("layers", f"Layers on rank {diff.critical_rank}", "layer", diff.layer_kinds, diff),
        worst_grid(diff, worst),
    ]
    lacking = [
        (str(rank.rank), f"%{op.index} {op.name}", side)
        for rank in diff.ranks
        for side, ops in (("predicted", rank.only_predicted), ("measured", rank.only_measured))
        for op in ops
    ]
    if lacking:
        grids.append(Grid("lacking", "Ops with times on one side only", ("rank", "op", "has times"), tuple(lacking), 3))
    return grids


_RANK_COLUMNS: tuple[tuple[str, Callable[[Side], float | None], Callable[[float | None], str]], ...] = (
    ("end", lambda s: s.end_ns / NS_PER_S, format_seconds),
    ("compute", lambda s: s.split.compute_ns / NS_PER_S, format_seconds),
    ("exposed comm.", lambda s: s.split.exposed_ns / NS_PER_S, format_seconds),
    ("overlapped comm.", lambda s: s.split.overlapped_ns / NS_PER_S, format_seconds),
    ("bubble", lambda s: s.split.bubble_ns / NS_PER_S, format_seconds),
    ("sent", lambda s: s.bytes_sent, lambda v: MISSING if v is None else f"{v:,.0f} B"),
    ("messages", lambda s: s.messages, lambda v: MISSING if v is None else f"{v:,.0f}"),
    ("peak memory", lambda s: s.peak_memory_bytes, format_bytes),
)


def rank_grid(diff: TimelineDiff) -> Grid:
    """Per compared rank predicted / measured: where its step goes, what it sent and held."""
    columns = [
        column
        for column in _RANK_COLUMNS
        if any(column[1](side) is not None for rank in diff.ranks for side in (rank.predicted, rank.measured))
    ]
    rows = []
    for rank in diff.ranks:
        numbers = [f"{text(value(rank.predicted))} / {text(value(rank.measured))}" for _, value, text in columns]
        rows.append((_ranks(rank), *numbers))
    header = ("rank", *(title for title, _, _ in columns))
    return Grid("ranks", "Ranks: predicted / measured", header, tuple(rows))


def worst_grid(diff: TimelineDiff, count: int) -> Grid:
    """The ops with the largest errors."""
    header = ("rank", "op", "kind", "predicted", "measured", "error", "relative", "starts predicted", "starts measured")
    rows = [
        (
            str(o.rank), f"%{o.op.index} {o.op.name}", op_kind(o.op), _time(o.predicted_ns), _time(o.measured_ns),
            _signed_time(o.error_ns), signed_percent(o.relative_error), _time(o.predicted_start_ns),
            _time(o.measured_start_ns),
        )
        for o in diff.worst(count)
    ]  # fmt: skip
    return Grid("worst", "The worst ops", header, tuple(rows), 3)


def check_grid(validation: Validation) -> Grid:
    """The verdict, check by check."""
    rows = []
    for check in validation.checks:
        limit = f"within {format_percent(check.limit)}" if check.limit else "equal"
        verdict = ("yes" if check.passed else "no") + (f": {check.note}" if check.note else "")
        values = (amount(check.unit, check.predicted), amount(check.unit, check.measured))
        rows.append((check.name, *values, signed_percent(check.relative_error), limit, verdict))
    header = ("check", "predicted", "measured", "error", "expected", "as predicted")
    return Grid("checks", "Checks", header, tuple(rows))


def spread_text(validation: Validation) -> str:
    """How the measured step times are spread."""
    spread = validation.step_times
    low, high = _time(spread.p10_ns), _time(spread.p90_ns)
    steps = f"{spread.steps} step{'s' if spread.steps != 1 else ''}"
    return f"Measured step time: median {_time(spread.median_ns)}, p10 {low}, p90 {high}, of {steps}."


def pace_text(validation: Validation) -> str:
    """How fast the cores were, where that was not as when the profile was measured; "" otherwise."""
    pace = validation.pace
    if pace is None or pace.steps == validation.step_times.steps:
        return ""
    head = f"The slowest core took {pace.slower:.2f} times as long for the same work as when the profile was measured"
    if pace.median_ns is None:
        return f"{head} (median), and in no step about as long: the profile does not hold for this run."
    few = f"{head} (median); about as long in {pace.steps} step{'s' if pace.steps != 1 else ''}"
    median = f"{few}, whose median is {_time(pace.median_ns)}"
    if validation.run.only_rank is not None:
        return f"{median}."
    return f"{median}: {signed_percent(relative_error(validation.checks[0].predicted, pace.median_ns))}."


def verdict(validation: Validation) -> str:
    """The answer to "is the prediction right?" in a sentence."""
    step, alone = validation.checks[0], validation.run.only_rank
    what = "per step" if alone is None else f"of kernels on rank {alone} alone"
    of = "median" if alone is None else "median step"
    times = f"{_time(step.predicted)} {what} predicted, {_time(step.measured)} measured ({of})"
    head = f"{validation.run.schedule.name} on {validation.cluster.name}: {times}"
    failed = ", ".join(check.name for check in validation.checks if not check.passed)
    error = signed_percent(step.relative_error)
    return f"{head}, {error}. " + (f"Not as predicted: {failed}." if failed else "All checks passed.")


def print_grid(grid: Grid) -> None:
    """The grid on stdout, below its title."""
    print(f"\n{grid.title}")
    if not grid.rows:
        print("  none")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(grid.header):
        table.add_column(title, justify="left" if i < grid.words else "right", no_wrap=True)
    for row in grid.rows:
        table.add_row(*map(Text, row))
    print_table(table)


def diff_json(diff: TimelineDiff, worst: int) -> Json:
    """The document of a comparison (docs/json.md)."""
    return {
        "schema": DIFF_SCHEMA,
        "schedule": diff.measured.schedule.name,
        "world_size": diff.measured.schedule.world_size,
        "predicted": _timeline_json(diff.predicted),
        "measured": _timeline_json(diff.measured),
        "error_s": diff.step_error_ns / NS_PER_S,
        "relative_error": relative_error(diff.predicted.step_time_ns, diff.measured.step_time_ns),
        "ranks": [_rank_json(rank) for rank in diff.ranks],
        "critical_rank": diff.critical_rank,
        "kernel_classes": [_group_json(group) for group in diff.kernel_classes],
        "layer_kinds": [_group_json(group) for group in diff.layer_kinds],
        "remainder_s": diff.remainder_ns / NS_PER_S,
        "worst_ops": [_op_json(op) for op in diff.worst(worst)],
        "only_predicted": [_lacking_json(rank, op) for rank in diff.ranks for op in rank.only_predicted],
        "only_measured": [_lacking_json(rank, op) for rank in diff.ranks for op in rank.only_measured],
    }


def validation_json(validation: Validation, worst: int) -> Json:
    """The document of a validation (docs/json.md)."""
    spread = validation.step_times
    return {
        "schema": VALIDATE_SCHEMA,
        "run": str(validation.run.path),
        "profile": validation.cluster.name,
        "tolerance": validation.tolerance,
        "passed": validation.passed,
        "checks": [_check_json(check) for check in validation.checks],
        "measured_step_time": {
            "steps": spread.steps,
            "median_s": spread.median_ns / NS_PER_S,
            "p10_s": spread.p10_ns / NS_PER_S,
            "p90_s": spread.p90_ns / NS_PER_S,
        },
        "pace": _pace_json(validation),
        "notes": list(validation.notes),
        "diff": diff_json(validation.diff, worst),
    }


def _pace_json(validation: Validation) -> Json | None:
    pace = validation.pace
    if pace is None:
        return None
    median_s = None if pace.median_ns is None else pace.median_ns / NS_PER_S
    return {"slower": pace.slower, "usual_steps": pace.steps, "usual_median_s": median_s}


def signed_percent(fraction: float | None) -> str:
    """0.123 -> +12.3 %. The missing mark for None."""
    return MISSING if fraction is None else f"{100 * fraction:+.1f} %"


def amount(unit: str, value: float) -> str:
    """A checked number as people read it."""
    return _time(value) if unit == "ns" else format_bytes(value) if unit == "bytes" else f"{value:,.0f}"


def _group_grid(name: str, title: str, what: str, groups: Sequence[GroupDiff], diff: TimelineDiff) -> Grid:
    """Groups, then the remainder and the step, so that the column of errors adds up."""
    rows = [
        (
            g.name, f"{g.ops:,}", _time(g.predicted_ns), _time(g.measured_ns), _signed_time(g.error_ns),
            signed_percent(g.relative_error), format_percent(g.share),
        )
        for g in groups
    ]  # fmt: skip
    share = diff.remainder_ns / diff.step_error_ns if diff.step_error_ns else None
    rows.append((REMAINDER, "", "", "", _signed_time(diff.remainder_ns), "", format_percent(share)))
    predicted, measured = diff.predicted.step_time_ns, diff.measured.step_time_ns
    error = signed_percent(relative_error(predicted, measured))
    rows.append(("step", "", _time(predicted), _time(measured), _signed_time(diff.step_error_ns), error, ""))
    header = (what, "ops", "predicted", "measured", "error", "relative", "share of step error")
    return Grid(name, title, header, tuple(rows))


def _ranks(rank: RankDiff) -> str:
    """A rank, how many are like it, and who was simulated for it if it was another."""
    alike = f" (×{len(rank.stands_for)})" if len(rank.stands_for) > 1 else ""
    return f"{rank.rank}{alike}" + (f" as {rank.predicted_rank}" if rank.predicted_rank != rank.rank else "")


def _time(time_ns: float) -> str:
    return format_seconds(time_ns / NS_PER_S)


def _signed_time(time_ns: float) -> str:
    return f"{'+' if time_ns > 0 else ''}{_time(time_ns)}"


def _timeline_json(timeline: Timeline) -> Json:
    step_s = timeline.step_time_ns / NS_PER_S
    return {"kind": timeline.kind, "step_time_s": step_s, "meta": dict(timeline.meta)}


def _rank_json(rank: RankDiff) -> Json:
    return {
        "rank": rank.rank,
        "stands_for": list(rank.stands_for),
        "predicted_rank": rank.predicted_rank,
        "predicted": _side_json(rank.predicted),
        "measured": _side_json(rank.measured),
    }


def _side_json(side: Side) -> Json:
    return {
        "end_time_s": side.end_ns / NS_PER_S,
        "compute_time_s": side.split.compute_ns / NS_PER_S,
        "exposed_communication_s": side.split.exposed_ns / NS_PER_S,
        "overlapped_communication_s": side.split.overlapped_ns / NS_PER_S,
        "bubble_s": side.split.bubble_ns / NS_PER_S,
        "bytes_sent": side.bytes_sent,
        "messages": side.messages,
        "peak_memory_bytes": side.peak_memory_bytes,
    }


def _group_json(group: GroupDiff) -> Json:
    return {
        "name": group.name,
        "ops": group.ops,
        "predicted_s": group.predicted_ns / NS_PER_S,
        "measured_s": group.measured_ns / NS_PER_S,
        "error_s": group.error_ns / NS_PER_S,
        "relative_error": group.relative_error,
        "share_of_step_error": group.share,
    }


def _op_json(op: OpDiff) -> Json:
    return {
        "rank": op.rank,
        "op": op.op.index,
        "name": op.op.name,
        "kind": op_kind(op.op),
        "layer_kind": op.layer_kind,
        "stream": op.op.stream,
        "predicted_start_s": op.predicted_start_ns / NS_PER_S,
        "predicted_s": op.predicted_ns / NS_PER_S,
        "measured_start_s": op.measured_start_ns / NS_PER_S,
        "measured_s": op.measured_ns / NS_PER_S,
        "error_s": op.error_ns / NS_PER_S,
        "relative_error": op.relative_error,
    }


def _lacking_json(rank: RankDiff, op: Op) -> Json:
    return {"rank": rank.rank, "op": op.index, "name": op.name}


def _check_json(check: Check) -> Json:
    scale = NS_PER_S if check.unit == "ns" else 1
    return {
        "name": check.name,
        "unit": "s" if check.unit == "ns" else check.unit,
        "predicted": check.predicted / scale,
        "measured": check.measured / scale,
        "relative_error": check.relative_error,
        "limit": check.limit,
        "passed": check.passed,
        "note": check.note,
    }
