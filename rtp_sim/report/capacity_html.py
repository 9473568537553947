"""The page about a whole training run: which machine, how many of them, how long, for how much."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from rtp_sim.planner.capacity import Need, Offer
from rtp_sim.planner.workload import Workload
from rtp_sim.report.diff_html import grid_section
from rtp_sim.report.diff_tables import Grid
from rtp_sim.report.format import MISSING, format_count
from rtp_sim.report.html import InputRow, inputs_section, note, page, write_page

DAY_S = 86400.0
SAID = "Steps of the global batch until all tokens are seen: no restarts, no evaluation, all GPUs busy all the time."


def write_capacity_report(path: str | PathLike[str], workload: Workload, need: Need, offers: Sequence[Offer]) -> None:
    """Write the page to `path`. InputError if it cannot be written."""
    write_page(path, capacity_html(workload, need, offers))


def capacity_html(workload: Workload, need: Need, offers: Sequence[Offer]) -> str:
    """The page as text; offers in the order given, the best first."""
    inputs: list[InputRow] = [
        ("Workload", name, str(getattr(workload, name)), "", "")
        for name in ("model", "global_batch", "seq_len", "precision", "optimizer")
        if getattr(workload, name) is not None
    ]
    inputs.append(("Need", "tokens", format_count(need.tokens), "", ""))
    if need.deadline_s is not None:
        inputs.append(("Need", "deadline", f"{need.deadline_s / DAY_S:g} days", "", ""))
    if need.budget_usd is not None:
        inputs.append(("Need", "budget", f"${need.budget_usd:,.0f}", "", ""))
    body = grid_section(offers_grid(offers), note(SAID)) + inputs_section(inputs)
    return page(f"Training {workload.model}", capacity_headline(need, offers), body, [])


def capacity_headline(need: Need, offers: Sequence[Offer]) -> str:
    """The answer in a sentence."""
    good = [offer for offer in offers if not offer.why]
    if not good:
        return f"No machine trains {format_count(need.tokens)} tokens within what is asked."
    best = good[0]
    cost = "" if best.usd is None else f" for ${best.usd:,.0f}"
    days = "" if best.seconds is None else f" in {best.seconds / DAY_S:.1f} days"
    return f"{best.gpus} GPUs of {best.cluster} train {format_count(need.tokens)} tokens{days}{cost}."


def offers_grid(offers: Sequence[Offer]) -> Grid:
    """One row per machine."""
    rows = tuple(
        (
            offer.cluster, MISSING if offer.row is None else str(offer.row.candidate), offer.why or "yes",
            str(offer.gpus) if offer.gpus else MISSING,
            format_count(offer.row.metrics.tokens_per_s) if offer.row and offer.row.metrics else MISSING,
            MISSING if offer.seconds is None else f"{offer.seconds / DAY_S:.1f}",
            MISSING if offer.usd is None else f"${offer.usd:,.0f}",
            MISSING if offer.kwh is None else f"{offer.kwh / 1000:,.1f}",
        )
        for offer in offers
    )  # fmt: skip
    header = ("machine", "plan", "verdict", "GPUs", "tokens/s", "days", "cost", "MWh")
    return Grid("offers", "Machines", header, rows, 3)
