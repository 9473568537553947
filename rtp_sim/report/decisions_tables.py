"""What the planner's decisions on published runs cost, as grids of text, as JSON (docs/json.md) and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

from rtp_sim.report.accuracy_tables import fits_grid, reason_grids
from rtp_sim.report.diff_html import grid_section
from rtp_sim.report.diff_tables import Grid, Json
from rtp_sim.report.format import MISSING, format_percent, format_seconds
from rtp_sim.report.html import note, page, write_page
from rtp_sim.validation.accuracy import Fits, Outcome, strategy_of
from rtp_sim.validation.decisions import (
    FITS_BAR,
    MEDIAN_BAR,
    P90_BAR,
    TRIES,
    Decision,
    DecisionSummary,
    decisions_of,
    summarise_decisions,
)

SCHEMA = "rtp-sim/decisions/1"
HEADER = (
    "decision", "choices", "predicted", "ran", "attempts", "regret", f"best of {TRIES}", "blind", "rank corr.",
    "fits right", "picked", "best",
)  # fmt: skip
FILE_HEADER = (
    "file", "decisions", "left out", "median", "p90", "worst", f"p90, best of {TRIES}", "blind, median", "best found",
    "first failed", "no pick", "fits right",
)  # fmt: skip
SIDES_HEADER = (
    "decision", "", "plan", "measured", "predicted", "error", "compute", "exposed comm.", "bubble", "memory",
)  # fmt: skip
INTRO = (
    "Regret is the measured step time of the configuration that is predicted to be the fastest of those that fit, over "
    "the best measured one of the same model, GPUs and global batch. Attempts counts the picks until one ran. Blind is "
    "what the median run of the group takes over the best."
)


def decision_grids(outcomes: Sequence[Outcome], count: int) -> list[Grid]:
    """All decisions, the verdicts about fitting, the decisions that cost most with pick and best side by side, why rows
    are not predicted."""
    found, _ = decisions_of(outcomes)
    lines = tuple(_line(d) for d in sorted(found, key=lambda d: -d.regret))
    return [
        file_grid(outcomes),
        Grid("decisions", "Decisions, the costliest first", HEADER, lines),
        fits_grid(summarise_decisions(outcomes).fits),
        _sides_grid(found, count),
        *(grid for grid in reason_grids(outcomes) if grid.name != "assumed"),
    ]


def by_file(outcomes: Sequence[Outcome]) -> dict[str, DecisionSummary]:
    """The statistics of each file's decisions."""
    files: dict[str, list[Outcome]] = {}
    for o in outcomes:
        files.setdefault(o.file, []).append(o)
    return {name: summarise_decisions(rows) for name, rows in files.items()}


def file_grid(outcomes: Sequence[Outcome]) -> Grid:
    """A line per file."""
    lines = tuple(
        (
            name, str(s.decisions), str(s.left_out), ratio(s.median), ratio(s.p90), ratio(s.worst),
            ratio(s.p90_of_tries),
            ratio(s.median_blind), str(s.best_found), str(s.first_pick_failed), str(s.no_pick),
            MISSING if s.fits_right is None else format_percent(s.fits_right),
        )
        for name, s in by_file(outcomes).items()
    )  # fmt: skip
    return Grid("files", "Decisions by file", FILE_HEADER, lines)


def decision_verdict(outcomes: Sequence[Outcome]) -> str:
    """The answer in a sentence."""
    s = summarise_decisions(outcomes)
    if not s.decisions:
        return f"No decision to judge: {s.left_out} groups with fewer than two measured runs each."
    parts = [
        f"{s.decisions} decisions ({s.left_out} groups with fewer than two measured runs left out): median regret "
        f"{ratio(s.median)}, 90th percentile {ratio(s.p90)}, worst {ratio(s.worst)}",
        f"trying the first {TRIES}: median {ratio(s.median_of_tries)}, 90th percentile {ratio(s.p90_of_tries)}",
        f"choosing blindly: median {ratio(s.median_blind)}",
        f"the best run was picked in {s.best_found}",
        f"the first pick had failed in {s.first_pick_failed}",
        f"{s.no_pick} without a pick",
        f"fits was right for {format_percent(s.fits_right)} of rows ({s.fits.false_fit} predicted to fit failed, "
        f"{s.fits.false_fail} predicted not to fit ran)",
    ]
    reached = "reached" if s.within_bars else "missed"
    return f"{'; '.join(parts)}. Bars ({MEDIAN_BAR}, {P90_BAR:.2f}, {FITS_BAR:.0%}): {reached}."


def write_decision_report(path: str | PathLike[str], outcomes: Sequence[Outcome], count: int) -> None:
    """Write the page to `path`. InputError if it cannot be written."""
    body = "\n".join([note(INTRO), *(grid_section(grid) for grid in decision_grids(outcomes, count))])
    write_page(path, page("Decisions on published runs", decision_verdict(outcomes), body, []))


def decisions_json(outcomes: Sequence[Outcome]) -> Json:
    """The document of a judgement of decisions. A regret without a pick is null."""
    found, _ = decisions_of(outcomes)
    return {
        "schema": SCHEMA,
        "summary": summary_json(summarise_decisions(outcomes)),
        "files": {name: summary_json(s) for name, s in by_file(outcomes).items()},
        "decisions": [_decision_json(d) for d in found],
    }


def summary_json(s: DecisionSummary) -> Json:
    """The statistics; infinite ones are null."""
    return {
        "decisions": s.decisions, "left_out": s.left_out,
        "median_regret": _finite(s.median), "p90_regret": _finite(s.p90),
        "worst_regret": _finite(s.worst), "median_regret_of_tries": _finite(s.median_of_tries),
        "p90_regret_of_tries": _finite(s.p90_of_tries), "median_blind": _finite(s.median_blind),
        "best_found": s.best_found, "first_pick_failed": s.first_pick_failed, "no_pick": s.no_pick,
        "fits": _fits_json(s.fits), "fits_right": s.fits_right, "within_bars": s.within_bars,
    }  # fmt: skip


def _decision_json(d: Decision) -> Json:
    g = d.group
    return {
        "model": g.model, "gpus": g.gpus, "global_batch": g.global_batch, "seq_len": g.seq_len, "cluster": g.cluster,
        "precision": g.precision, "file": g.file, "source": g.source, "rows": d.rows, "predicted": d.predicted,
        "measured": d.measured, "attempts": d.attempts, "regret": _finite(d.regret),
        "regret_of_tries": _finite(d.regret_of_tries), "blind": d.blind, "rank_correlation": d.correlation,
        "pick": d.pick.row_id if d.pick else None, "best": d.best.row_id,
        "ranked": [o.row_id for o in d.ranked], "fits": _fits_json(d.fits),
    }  # fmt: skip


def _fits_json(f: Fits) -> Json:
    return {"true_fit": f.true_fit, "false_fit": f.false_fit, "true_fail": f.true_fail, "false_fail": f.false_fail}


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value


def ratio(value: float | None) -> str:
    """1.043; "no pick" for infinity."""
    return MISSING if value is None else "no pick" if math.isinf(value) else f"{value:.3f}"


def plan_of(o: Outcome) -> str:
    """The configuration of a row in a few words."""
    c = o.cells
    assert c is not None
    axes = [f"{name}={n}" for name, n in (("dp", c.dp), ("tp", c.tp), ("pp", c.pp), ("vpp", c.vpp)) if n > 1]
    recompute = c.recompute.split()[0].strip("(,").lower() if c.recompute else "none"
    return " ".join([strategy_of(c), *axes, f"mb={c.micro_batch}x{c.num_microbatches}"]
                    + ([f"recompute={recompute}"] if recompute != "none" else []))  # fmt: skip


def _line(d: Decision) -> tuple[str, ...]:
    right, total = d.fits.true_fit + d.fits.true_fail, d.predicted
    return (
        str(d.group), str(d.rows), str(d.predicted), str(d.measured), str(d.attempts), ratio(d.regret),
        ratio(d.regret_of_tries), ratio(d.blind), MISSING if d.correlation is None else f"{d.correlation:.2f}",
        f"{right} of {total}", plan_of(d.pick) if d.pick else MISSING, plan_of(d.best),
    )  # fmt: skip


def _sides_grid(found: Sequence[Decision], count: int) -> Grid:
    """Pick and best of the costliest decisions: where the prediction of one or the other was off."""
    lines: list[tuple[str, ...]] = []
    costly = [d for d in sorted(found, key=lambda d: -d.regret) if d.regret > 1][:count]
    for d in costly:
        lines += [_side(str(d.group), "picked", d.pick)] if d.pick else []
        lines.append(_side(str(d.group), "best", d.best))
    return Grid("sides", "What was picked, and what was best", SIDES_HEADER, tuple(lines), 3)


def _side(name: str, what: str, o: Outcome) -> tuple[str, ...]:
    assert o.cells is not None
    measured, e = o.cells.step_time_s, o.estimate
    if e is None or measured is None:
        return (name, what, plan_of(o), format_seconds(measured), *(MISSING,) * 6)
    shares = (format_percent(part / e.step_s) for part in (e.compute_s, e.exposed_s, e.bubble_s))
    fits = f"{(o.peak_bytes or 0) / 2**30:.1f} of {e.capacity_bytes / 2**30:.1f} GiB"
    error = f"{100 * (e.step_s / measured - 1):+.1f} %"
    return (name, what, plan_of(o), format_seconds(measured), format_seconds(e.step_s), error, *shares, fits)
