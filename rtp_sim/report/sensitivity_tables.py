"""On which numbers of the machine a plan hangs, as a grid of text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rtp_sim.planner.plan import Plan
from rtp_sim.planner.sensitivity import Swing
from rtp_sim.report.diff_tables import Grid, Json, signed_percent
from rtp_sim.report.format import MISSING


def sensitivity_grid(plan: Plan, found: Sequence[Swing]) -> Grid:
    """Numbers that change the winner first, then by what they do to the step of the plan."""
    rows: dict[str, list[Swing]] = {}
    for swing in found:
        rows.setdefault(swing.number, []).append(swing)
    step_s = plan.shown[0].metrics.step_time_s if plan.shown and plan.shown[0].metrics else 0.0

    def weight(name: str) -> tuple[bool, float]:
        changes = [abs(s.kept_s / step_s - 1) for s in rows[name] if s.kept_s and step_s]
        return all(s.same for s in rows[name]), -max(changes, default=float("inf"))

    names = sorted(rows, key=weight)
    factors = [f"{100 * (s.factor - 1):+.0f} %" for s in rows[names[0]]] if names else []
    header = ("number", *(f"{f}: winner" for f in factors), *(f"{f}: the plan's step" for f in factors))
    lines = tuple(
        (name, *(_winner(s) for s in rows[name]), *(_change(s, step_s) for s in rows[name])) for name in names
    )
    return Grid("sensitivity", "On which numbers the choice hangs", header, lines, 1 + len(factors))


def sensitivity_json(found: Sequence[Swing]) -> list[Json]:
    """Each change with its winner; `same` says whether that is the plan's first."""
    return [
        {
            "number": s.number, "factor": s.factor, "same": s.same,
            "winner": None if s.winner is None else asdict(s.winner),
            "label": None if s.winner is None else str(s.winner),
            "step_time_s": s.step_s, "kept_step_time_s": s.kept_s,
        }
        for s in found
    ]  # fmt: skip


def _winner(s: Swing) -> str:
    if s.same:
        return "the same"
    if s.winner is None or s.step_s is None:
        return "nothing fits"
    label = str(s.winner).replace(" recompute=none", "")
    lost = "the plan no longer fits" if s.kept_s is None else f"staying costs {signed_percent(s.kept_s / s.step_s - 1)}"
    return f"{label} ({lost})"


def _change(s: Swing, step_s: float) -> str:
    # Rounded first, so that nothing is "-0.0 %".
    return MISSING if s.kept_s is None or not step_s else signed_percent(round(s.kept_s / step_s - 1, 3) + 0.0)
