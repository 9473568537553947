"""A plan as tables for a terminal: the ranked plans, the front, why other strategies are not shown, the stages."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from rtp_sim.planner.capacity import Offer
from rtp_sim.planner.plan import Plan, Row, StageCount
from rtp_sim.report.format import MISSING, format_bytes, format_count, format_percent, format_seconds

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "communication", "workspace")


def plans_table(plan: Plan, rows: Sequence[Row]) -> Table:
    """One line per plan, with where its time and its memory go."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    several = len(plan.machines) > 1
    for title in ("#", *(["machine"] if several else []), "plan"):
        table.add_column(title, no_wrap=True)
    for title in ("step", "of estimate", "tokens/s", "MFU", "compute", "exposed", "bubble", "no less than", "memory",
                  "USD/Mtok", "kWh/Mtok", "variants"):  # fmt: skip
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if row.metrics is None or row.bounds is None:
            continue
        m = row.metrics
        where = [f"{row.candidate.gpus} x {row.candidate.cluster}"] if several else []
        usd = row.price.usd_per_million_tokens if row.price else None
        kwh = row.price.kwh_per_million_tokens if row.price else None
        table.add_row(
            f"{row.rank or '-'}{'=' if row.tie else ''}", *where, str(row.candidate), format_seconds(m.step_time_s),
            estimate_words(row), format_count(m.tokens_per_s), format_percent(m.mfu), format_seconds(m.compute_time_s),
            format_seconds(m.exposed_communication_s), format_seconds(m.bubble_s), format_seconds(row.bounds.lower_s),
            format_bytes(m.peak_memory_bytes), _number(usd), _number(kwh),
            variants_words(row),
        )  # fmt: skip
    return table


def estimate_words(row: Row) -> str:
    """How far the simulated step is from the estimate that chose it; "–" where there was none."""
    if row.estimated_s is None or row.metrics is None:
        return MISSING
    return f"{100 * (row.metrics.step_time_s / row.estimated_s - 1):+.2f} %"


def variants_words(row: Row) -> str:
    """How many candidates of the plan's kind there are beside it, and how far the evaluated ones are: "+2 within
    0.9 %, 5 more"."""
    seen, more = row.variants.seen, row.variants.beaten_by_bounds
    if row.metrics is None or not (seen or more):
        return MISSING
    words = [f"+{len(seen)} within {100 * row.variants.within:.1f} %"] if seen else []
    return ", ".join([*words, f"{more} more"] if more else words)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def memory_table(rows: Sequence[Row]) -> Table:
    """Memory of the plans by category."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("#", no_wrap=True)
    for title in ("peak memory", *CATEGORIES):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if row.metrics is not None:
            held = [format_bytes(row.metrics.memory_by_category.get(c, 0)) for c in CATEGORIES]
            table.add_row(str(row.rank or "-"), format_bytes(row.metrics.peak_memory_bytes), *held)
    return table


def others_table(rows: Sequence[Row]) -> Table:
    """The best of every other strategy and why it is not among the plans."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("not shown: the best of each other strategy", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows:
        table.add_row(str(row.candidate), row.reason)
    return table


def offers_table(offers: Sequence[Offer]) -> Table:
    """What each cluster takes for the whole run."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in ("machine", "GPUs", "plan", "tokens/s", "days", "USD", "MWh", "verdict"):
        table.add_column(title, justify="left" if title in ("machine", "plan", "verdict") else "right",
                         no_wrap=title != "verdict")  # fmt: skip
    for offer in offers:
        speed = offer.row.metrics.tokens_per_s if offer.row and offer.row.metrics else None
        table.add_row(
            offer.cluster, str(offer.gpus or "-"), str(offer.row.candidate) if offer.row else "-",
            format_count(speed), "-" if offer.seconds is None else f"{offer.seconds / 86400:.1f}",
            "-" if offer.usd is None else f"{offer.usd:,.0f}", "-" if offer.kwh is None else f"{offer.kwh / 1000:,.1f}",
            offer.why or "yes",
        )  # fmt: skip
    return table


def stages_table(stages: Sequence[StageCount]) -> Table:
    """How many candidates came to each stage and were dropped there."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in ("stage", "candidates", "dropped"):
        table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
    for stage in stages:
        table.add_row(stage.stage, f"{stage.entered:,}", f"{stage.dropped:,}")
    return table
