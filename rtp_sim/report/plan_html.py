"""The page about a plan: what is best and by how much, what it trades, where its time and memory go, why not the
others, and on which numbers of the machine the choice hangs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike

from rtp_sim.metrics import StepMetrics
from rtp_sim.planner.plan import Candidate, Plan, Row
from rtp_sim.report.bars import NAMES, Bar, Scale, chart
from rtp_sim.report.diff_html import grid_section
from rtp_sim.report.diff_tables import Grid
from rtp_sim.report.format import (
    MISSING,
    format_bytes,
    format_count,
    format_percent,
    format_seconds,
    size_unit,
    time_unit,
)
from rtp_sim.report.html import InputRow, inputs_section, note, page, section, write_page
from rtp_sim.report.palette import in_stack_order
from rtp_sim.report.pareto import Axis, Point, pareto_chart
from rtp_sim.report.plan_tables import estimate_words, variants_words

OBJECTIVES = {"time": "shortest step", "memory": "least memory", "gpus": "fewest GPUs", "cost": "cheapest",
              "energy": "least energy"}  # fmt: skip
STAGE_WORDS = {
    "constraints": "a limit that was asked for rules it out",
    "rules": "the strategy cannot split the model or the batch so",
    "memory": "its closed form says that it needs more memory than there is",
    "bounds": "it cannot be faster than a plan that was evaluated, by its lower bound",
    "estimate": "estimated, and behind the plans that were simulated",
    "simulate": "simulated, and not among the plans shown",
}
NOTES = {
    "front": "Plans that no other beats in step time, memory and cost together. Numbers are ranks of the table above, "
    "letters plans of the table below; the tooltip of a point says which plan it is.",
    "time": "On the rank that ends last. The bubble is waiting: for dependencies, partners, stages or the host.",
    "memory": "On the rank with the highest peak, by what holds the memory at that moment.",
    "others": "The best of every strategy that is not among the plans, and what was in its way.",
    "search": "How many candidates each stage looked at and dropped.",
    "sensitivity": "Each number of the machine changed by itself, and the plans evaluated again: does another one win?",
}


def write_plan_report(
    path: str | PathLike[str], plan: Plan, sensitivity: Grid | None = None, answers: Sequence[str] = ()
) -> None:
    """Write the page to `path`. InputError if it cannot be written."""
    write_page(path, plan_html(plan, sensitivity, answers))


def plan_html(plan: Plan, sensitivity: Grid | None = None, answers: Sequence[str] = ()) -> str:
    """The page as text. `sensitivity` is the table of what changes the choice, `answers` are sentences about what else
    was asked (break-even points, what fits at most), where they were."""
    body = [_plans_section(plan), _front_section(plan), *_bar_sections(plan)]
    if answers:
        body.append(section("what-if", "What if", "".join(note(sentence) for sentence in answers)))
    if sensitivity is not None:
        body.append(grid_section(sensitivity, note(NOTES["sensitivity"])))
    body += [
        grid_section(others_grid(plan), note(NOTES["others"])),
        grid_section(search_grid(plan), note(NOTES["search"])),
        inputs_section(_inputs(plan)),
    ]
    return page(_title(plan), plan_headline(plan), "\n".join(body), [])


def plan_headline(plan: Plan) -> str:
    """The answer in a sentence."""
    if not plan.shown:
        return f"None of {plan.candidates:,} candidates can be used. {' '.join(plan.notes)}".rstrip()
    best = plan.shown[0]
    said = f"{_name(best, plan)}: {_step(best)} per step"
    if best.metrics is not None:
        said += f", {format_count(best.metrics.tokens_per_s)} tokens/s, {_memory(best)} per rank"
    ties = sum(row.tie for row in plan.shown[1:])
    if ties:
        said += f"; {ties} more within its uncertainty"
    elif len(plan.shown) > 1:
        said += f"; the next, {label(plan.shown[1].candidate)}, takes {_step(plan.shown[1])}"
    return f"{said}. Best of {plan.candidates:,} candidates ({OBJECTIVES.get(plan.objective, plan.objective)})."


def plans_grid(plan: Plan) -> Grid:
    """The ranked plans with their numbers."""
    several = len(plan.machines) > 1
    rows = tuple(
        (
            f"{row.rank}. {label(row.candidate)}", *([_machine(row.candidate)] if several else []),
            _verdict(row, plan), _step(row), _interval(row), _tokens(row), _mfu(row), _memory(row), _usd(row),
            _kwh(row), MISSING if row.bounds is None else format_seconds(row.bounds.lower_s), estimate_words(row),
            variants_words(row),
        )
        for row in plan.shown
    )  # fmt: skip
    header = (
        "plan", *(["machine"] if several else []), "against the first", "step", "interval", "tokens/s", "MFU",
        "peak memory", "$ per M tokens", "kWh per M tokens", "lower bound",
        "against its estimate", "variants",
    )  # fmt: skip
    return _filled(Grid("plans", "Plans", header, rows, 3 if several else 2))


def front_grid(plan: Plan) -> Grid:
    """Plans of the front that are not among those shown, by their letters in the chart."""
    rows = tuple(
        (
            f"{letter}. {label(row.candidate)}", _machine(row.candidate), _step(row), _tokens(row), _memory(row),
            _usd(row),
        )
        for letter, row in _lettered(plan).items()
    )
    header = ("plan", "machine", "step", "tokens/s", "peak memory", "$ per M tokens")
    return _filled(Grid("front-plans", "Also on the front", header, rows, 2))


def _lettered(plan: Plan) -> dict[str, Row]:
    """The front beyond what is shown: a, b, ... z, aa, ..."""
    shown = {row.candidate for row in plan.shown}
    extra = [row for row in plan.front if row.candidate not in shown]
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {letters[i % 26] * (1 + i // 26): row for i, row in enumerate(extra)}


def _filled(grid: Grid) -> Grid:
    """The grid without columns in which no row has anything."""
    keep = [i for i in range(len(grid.header)) if i < grid.words or any(row[i] != MISSING for row in grid.rows)]
    rows = tuple(tuple(row[i] for i in keep) for row in grid.rows)
    return Grid(grid.name, grid.title, tuple(grid.header[i] for i in keep), rows, grid.words)


def others_grid(plan: Plan) -> Grid:
    """What is not shown, and why."""
    rows = tuple(
        (label(row.candidate), row.stage, row.reason, _step(row), _memory(row), _least(row)) for row in plan.others
    )
    return Grid("others", "Why not the others", ("candidate", "stage", "reason", "step", "memory", "least"), rows, 3)


def search_grid(plan: Plan) -> Grid:
    """The stages of the search."""
    rows = tuple(
        (s.stage, STAGE_WORDS.get(s.stage, ""), f"{s.entered:,}", f"{s.dropped:,}") for s in plan.stages
    )
    header = ("stage", "dropped where", "looked at", "dropped")
    return Grid("search", f"The search among {plan.candidates:,} candidates", header, rows, 2)


def _plans_section(plan: Plan) -> str:
    said = ["Plans keep everything for the backward pass where they say nothing of recompute."]
    if any(row.interval_s for row in plan.shown):
        said.append("Ties are plans whose interval of the step time meets that of the first.")
    ways: dict[str, list[str]] = {}
    for row in plan.shown:
        # How many micro-batches were gone through differs from plan to plan, and stands in the JSON output.
        ways.setdefault(re.sub(r" \([^)]*\)", "", row.how or row.stage), []).append(str(row.rank))
    if ways:
        said.append("Evaluated: " + "; ".join(f"{', '.join(n)} {way}" for way, n in ways.items()) + ".")
    return grid_section(plans_grid(plan), note(" ".join(said)))


def _front_section(plan: Plan) -> str:
    """Time against memory, and against cost where that is another order."""
    rows = _distinct([*plan.front, *plan.shown, *(row for row in plan.others if row.feasible)])
    drawn = [row for row in rows if row.metrics is not None]
    if len(drawn) < 2:
        return ""
    front = {row.candidate for row in plan.front}
    rank = {row.candidate: letter for letter, row in _lettered(plan).items()}
    rank |= {row.candidate: str(row.rank) for row in plan.shown}
    times, memory = [_metrics(r).step_time_s for r in drawn], [float(_metrics(r).peak_memory_bytes) for r in drawn]
    unit_s, second = time_unit(max(times))
    x = Axis(f"step time ({second})", unit_s)
    limit = plan.machines[0].allowed_bytes if len(plan.machines) == 1 else None
    unit_bytes, size = size_unit(max([*memory, limit or 0]))
    y = Axis(f"peak memory per rank ({size})", unit_bytes, limit, f"allowed {format_bytes(limit)}")
    charts = [_points("Step time against memory", drawn, front, rank, memory, x, y)]
    usd = [row.price.usd_per_step if row.price else None for row in drawn]
    costs = [u for u in usd if u is not None]
    # On one machine cost is time by another name.
    if len(costs) == len(drawn) and len({(r.candidate.cluster, r.candidate.gpus) for r in drawn}) > 1:
        cost_axis = Axis("cost per step ($)", 1.0)
        charts.append(_points("Step time against cost", drawn, front, rank, costs, x, cost_axis))
    figures = "".join(f"<figure>{drawing}</figure>" for drawing in charts)
    extra = grid_section(front_grid(plan)) if _lettered(plan) else ""
    return section("front", "What the plans trade", note(NOTES["front"]) + figures) + extra


def _points(
    name: str, rows: Sequence[Row], front: set[Candidate], rank: dict[Candidate, str], values: Sequence[float], x: Axis,
    y: Axis,
) -> str:  # fmt: skip
    points = [
        Point(
            _metrics(row).step_time_s, value, rank.get(row.candidate, ""),
            f"{label(row.candidate)} on {_machine(row.candidate)}: {_step(row)}, {_memory(row)}",
            row.candidate in front,
        )
        for row, value in zip(rows, values, strict=True)
    ]  # fmt: skip
    return pareto_chart(name, points, x, y)


def _bar_sections(plan: Plan) -> list[str]:
    """Time and memory of the plans shown, as bars."""
    shown = [row for row in plan.shown if row.metrics is not None]
    if not shown:
        return []
    metrics = [_metrics(row) for row in shown]
    unit_s, second = time_unit(max(m.step_time_s for m in metrics))
    times = [
        Bar(_short(row), _degrees(row.candidate), _time_segments(m), format_seconds(m.step_time_s))
        for row, m in zip(shown, metrics, strict=True)
    ]
    limit = plan.machines[0].allowed_bytes if len(plan.machines) == 1 else None
    unit_bytes, size = size_unit(max([m.peak_memory_bytes for m in metrics] + [limit or 0]))
    memory = [
        Bar(
            _short(row), _degrees(row.candidate),
            tuple((c, float(m.memory_by_category[c])) for c in in_stack_order(m.memory_by_category)),
            format_bytes(m.peak_memory_bytes),
        )
        for row, m in zip(shown, metrics, strict=True)
    ]  # fmt: skip
    time_chart = chart("Step time of the plans", times, Scale(unit_s, f"step time ({second})", NAMES))
    scale = Scale(unit_bytes, f"peak memory per rank ({size})", {}, limit, f"allowed {format_bytes(limit)}")
    return [
        section("time", "Where the step's time goes", f"{note(NOTES['time'])}<figure>{time_chart}</figure>"),
        section("memory", "Peak memory", f"{note(NOTES['memory'])}<figure>{chart('Memory', memory, scale)}</figure>"),
    ]


def _inputs(plan: Plan) -> list[InputRow]:
    """Workload, constraints, machines with the sources of their prices, notes."""
    w = plan.workload
    rows: list[InputRow] = [
        ("Workload", name, str(getattr(w, name)), "", "")
        for name in ("model", "global_batch", "seq_len", "precision", "optimizer", "attention", "clip_norm",
                     "loss_scale", "dropout")
        if getattr(w, name) is not None
    ]  # fmt: skip
    rows += [("Constraints", name, str(value), "", "") for name, value in plan.constraints.items()]
    rows.append(("Constraints", "objective", plan.objective, "", ""))
    for m in plan.machines:
        title = f"{m.cluster}, {m.nodes} x {m.gpus // m.nodes} GPUs"
        rows.append((title, "memory per rank", f"{format_bytes(m.allowed_bytes)} of {format_bytes(m.memory_bytes)}",
                     "", "what is usable, less the head-room asked for"))  # fmt: skip
        price = MISSING if m.price_usd_per_gpu_hour is None else f"${m.price_usd_per_gpu_hour:g} per GPU and hour"
        rows.append((title, "price", price, *_provenance(m.price_source)))
        power = MISSING if m.tdp_w is None else f"{m.tdp_w:g} W per GPU"
        rows.append((title, "power", power, *_provenance(m.tdp_source)))
    return rows + [("Notes", str(i), text, "", "") for i, text in enumerate(plan.notes, 1)]


def _provenance(source: str) -> tuple[str, str]:
    kind, colon, rest = source.partition(": ")
    return (kind, rest) if colon and kind in ("measured", "vendor", "assumed") else ("", source)


def _title(plan: Plan) -> str:
    machines = dict.fromkeys(f"{m.gpus} GPUs of {m.cluster}" for m in plan.machines)
    named = ", ".join(machines) if len(machines) <= 3 else f"{len(machines)} machines"
    return f"Plans for {plan.workload.model} on {named}"


def label(c: Candidate) -> str:
    """The candidate in words, without what is usual."""
    return str(c).replace(" recompute=none", "")


def _name(row: Row, plan: Plan) -> str:
    return label(row.candidate) + (f" on {_machine(row.candidate)}" if len(plan.machines) > 1 else "")


def _machine(c: Candidate) -> str:
    return f"{c.gpus} GPUs of {c.cluster}"


def _short(row: Row) -> str:
    return f"{row.rank}. {row.candidate.strategy}"


def _degrees(c: Candidate) -> str:
    """The degrees alone: what fits beside a bar."""
    degrees = ((c.axis, c.inner), ("dp", c.dp), ("pp", c.pp), ("vpp", c.vpp))
    return " ".join(f"{name}={n}" for name, n in degrees if n > 1)


def _metrics(row: Row) -> StepMetrics:
    assert row.metrics is not None
    return row.metrics


def _time_segments(m: StepMetrics) -> tuple[tuple[str, float], ...]:
    split = (m.compute_time_s, m.exposed_communication_s, m.bubble_s)
    return tuple(zip(("compute", "communication", "bubble"), split, strict=True))


def _verdict(row: Row, plan: Plan) -> str:
    """How a plan stands to the first, in the first's measure of step time."""
    first = plan.shown[0]
    if row is first:
        return "best" + (" (tie)" if any(other.tie for other in plan.shown[1:]) else "")
    if row.metrics is None or first.metrics is None:
        return MISSING
    longer = row.metrics.step_time_s / first.metrics.step_time_s - 1
    return f"{100 * longer:+.1f} % time" + (", a tie" if row.tie else "")


def _step(row: Row) -> str:
    return MISSING if row.metrics is None else format_seconds(row.metrics.step_time_s)


def _interval(row: Row) -> str:
    return MISSING if row.interval_s is None else " to ".join(format_seconds(s) for s in row.interval_s)


def _tokens(row: Row) -> str:
    return MISSING if row.metrics is None else format_count(row.metrics.tokens_per_s)


def _mfu(row: Row) -> str:
    return MISSING if row.metrics is None else format_percent(row.metrics.mfu)


def _memory(row: Row) -> str:
    return MISSING if row.metrics is None else format_bytes(row.metrics.peak_memory_bytes)


def _least(row: Row) -> str:
    """What closed forms say a rank needs at least."""
    return MISSING if row.bounds is None else format_bytes(row.bounds.memory_bytes)


def _usd(row: Row) -> str:
    value = row.price.usd_per_million_tokens if row.price else None
    return MISSING if value is None else f"${value:.3g}"


def _kwh(row: Row) -> str:
    value = row.price.kwh_per_million_tokens if row.price else None
    return MISSING if value is None else f"{value:.3g}"


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Each candidate once."""
    return list({row.candidate: row for row in reversed(rows)}.values())[::-1]
