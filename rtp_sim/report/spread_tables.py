"""How far a step time spreads, as rows below the summary of a step."""

from __future__ import annotations

from rtp_sim.jitter import Spread
from rtp_sim.report.format import format_percent, format_seconds


def spread_cells(found: Spread) -> list[tuple[str, str, str]]:
    """(what, value, share over the step without noise) per row."""
    rows = [
        (
            title,
            format_seconds(ns / 1e9),
            f"{'+' if ns >= found.base_ns else ''}{format_percent(ns / found.base_ns - 1)}",
        )
        for title, ns in (("step with jitter, p50", found.p50_ns), ("step with jitter, p95", found.p95_ns))
    ]
    drawn = f"{found.samples}" if found.samples == found.asked else f"{found.samples} of {found.asked} asked for"
    return [*rows, ("samples", drawn, f"seed {found.seed}"), ("noise", _noise_text(found), "")]


def _noise_text(found: Spread) -> str:
    n = found.noise
    parts = [
        f"{name} {value:g}" for name, value in (("compute", n.compute), ("link", n.link), ("rank", n.rank)) if value
    ]
    if n.straggler:
        parts.append(f"straggler {n.straggler:g} x {n.straggler_factor:g}")
    return ", ".join(parts) or "none"
