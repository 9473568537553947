"""The charts of the report as files for papers, drawn by matplotlib: PNG, PDF or SVG by the suffix.

matplotlib is an optional extra and imported when a plot is drawn. The same input gives the same bytes with
the same matplotlib: files carry no date.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtp_sim.errors import InputError
from rtp_sim.metrics import StepMetrics
from rtp_sim.report.areas import stacked
from rtp_sim.report.format import format_bytes, format_seconds, size_unit, time_unit
from rtp_sim.report.palette import in_stack_order, light
from rtp_sim.report.timeline_data import MAX_RANKS, MAX_SPANS, chosen_ranks, shortest_drawn_ns
from rtp_sim.report.tracks import tracks_of
from rtp_sim.schedule.ir import Compute
from rtp_sim.timeline import Timeline

if TYPE_CHECKING:
    from rtp_sim.engine.memory import MemoryProfile

DATES: dict[str, dict[str, None]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""Suffixes that can be written, and what keeps the date out of the file."""
WIDTH_INCHES = 7.0
NS_PER_S = 1e9
LABEL_SIZE = 8
LIMIT_COLOUR = "#b00020"
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def plot_comparison(
    rows: Sequence[StepMetrics], path: str | PathLike[str], device_memory_bytes: int | None = None
) -> None:
    """Step time by what it goes to, and peak memory by category, as two rows of stacked bars side by side.

    InputError without rows, for an unknown suffix, or without matplotlib.
    """
    if not rows:
        raise InputError("plot_comparison needs at least one row of metrics; none was given")
    with _drawing(path, 1.7 + 0.42 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        unit_s, unit = time_unit(max(m.step_time_s for m in rows))
        times = {
            "compute": [m.compute_time_s / unit_s for m in rows],
            "communication": [m.exposed_communication_s / unit_s for m in rows],
            "bubble": [m.bubble_s / unit_s for m in rows],
        }
        names = {"communication": "exposed communication"}
        _stack_bars(left, times, names, [format_seconds(m.step_time_s) for m in rows])
        left.set_xlabel(f"step time ({unit})")
        left.set_yticks(range(len(rows)), [f"{m.strategy}\n{m.layout}".rstrip() for m in rows])
        left.invert_yaxis()
        unit_bytes, unit = size_unit(max([m.peak_memory_bytes for m in rows] + [device_memory_bytes or 0]))
        categories = in_stack_order({c for m in rows for c, size in m.memory_by_category.items() if size})
        sizes = {c: [m.memory_by_category.get(c, 0) / unit_bytes for m in rows] for c in categories}
        _stack_bars(right, sizes, {}, [format_bytes(m.peak_memory_bytes) for m in rows])
        right.set_xlabel(f"peak memory per rank ({unit})")
        if device_memory_bytes is not None:
            right.set_xlim(right=max(right.get_xlim()[1], 1.1 * device_memory_bytes / unit_bytes))
            right.axvline(device_memory_bytes / unit_bytes, color=LIMIT_COLOUR, linestyle="--", linewidth=1)
            right.text(
                device_memory_bytes / unit_bytes, 0.5, f"device {format_bytes(device_memory_bytes)} ",
                color=LIMIT_COLOUR, fontsize=LABEL_SIZE - 1, ha="right", va="center", bbox=HALO,
                in_layout=False,
            )  # fmt: skip


def plot_memory(
    profile: MemoryProfile,
    path: str | PathLike[str],
    *,
    title: str = "",
    device_memory_bytes: int | None = None,
) -> None:
    """Memory of one rank over the step, stacked by category. Errors as for `plot_comparison`."""
    with _drawing(path, 3.0) as figure:
        axes = figure.subplots()
        stack = stacked(profile)
        unit_s, time_name = time_unit(int(stack.time_ns[-1]) / NS_PER_S if stack.time_ns.size else 0.0)
        unit_bytes, size_name = size_unit(max(profile.peak_bytes, device_memory_bytes or 0))
        x = stack.time_ns / (unit_s * NS_PER_S)
        below: Any = x * 0
        for category, upper_bytes in zip(stack.categories, stack.upper_bytes, strict=True):
            upper = upper_bytes / unit_bytes
            label = f"{category} {format_bytes(profile.by_category_at_peak.get(category, 0))}"
            axes.fill_between(x, below, upper, step="post", color=light(category), label=label, linewidth=0)
            below = upper
        if device_memory_bytes is not None:
            y = device_memory_bytes / unit_bytes
            axes.axhline(y, color=LIMIT_COLOUR, linestyle="--", linewidth=1)
            caption = f" device memory {format_bytes(device_memory_bytes)}"
            axes.text(0, y, caption, color=LIMIT_COLOUR, fontsize=LABEL_SIZE - 1, va="bottom")
            axes.set_ylim(top=1.1 * max(y, profile.peak_bytes / unit_bytes))
        axes.margins(x=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"time ({time_name})")
        axes.set_ylabel(f"memory ({size_name})")
        axes.set_title(title or f"peak {format_bytes(profile.peak_bytes)}", loc="left", fontsize=LABEL_SIZE + 1)
        handles, labels = axes.get_legend_handles_labels()
        _key(figure, handles[::-1], labels[::-1])


def plot_timeline(
    timeline: Timeline, path: str | PathLike[str], *, ranks: Sequence[int] | None = None, title: str = ""
) -> None:
    """The streams of `ranks` (by default the critical one and up to seven others) over time.

    Where a rank has more spans than a page can show, its shortest are left out and the title says so. Errors
    as for `plot_comparison`.
    """
    chosen = chosen_ranks(timeline, MAX_SPANS, MAX_RANKS) if ranks is None else list(ranks)
    tracks = [(rank, track) for rank in chosen for track in tracks_of(timeline, rank)]
    with _drawing(path, 1.2 + 0.24 * len(tracks)) as figure:
        axes = figure.subplots()
        unit_s, time_name = time_unit(timeline.step_time_ns / NS_PER_S)
        left_out = 0
        for y, (rank, track) in enumerate(tracks):
            times, ops = timeline.times(rank), timeline.schedule.program(rank).ops
            shortest_ns = shortest_drawn_ns(times, MAX_SPANS)
            for role in ("compute", "communication"):
                of_role = [i for i in track.ops if isinstance(ops[i].action, Compute) == (role == "compute")]
                start, length = times.start_ns[of_role], times.end_ns[of_role] - times.start_ns[of_role]
                kept = length >= shortest_ns
                left_out += int((~kept).sum())
                spans = zip(start[kept] / (unit_s * NS_PER_S), length[kept] / (unit_s * NS_PER_S), strict=True)
                axes.broken_barh(
                    list(spans), (y - 0.38, 0.76), facecolors=light(role), edgecolors="white", linewidth=0.3
                )
        axes.set_yticks(range(len(tracks)), [f"rank {rank} {track.name}" for rank, track in tracks])
        axes.invert_yaxis()
        axes.margins(x=0)
        axes.set_xlabel(f"time ({time_name})")
        note = f" ({left_out} shortest spans left out)" if left_out else ""
        heading = title or f"{timeline.kind}, {format_seconds(timeline.step_time_ns / NS_PER_S)}"
        axes.set_title(heading + note, loc="left", fontsize=LABEL_SIZE + 1)
        patch = _matplotlib("matplotlib.patches").Patch
        _key(
            figure,
            [patch(color=light(r)) for r in ("compute", "communication")],
            ["compute", "communication"],
        )


def require_plots(path: str | PathLike[str]) -> None:
    """InputError now, before any work, if a plot could not be written to `path`: its suffix, or no matplotlib."""
    _known_suffix(path)
    _matplotlib("matplotlib")


def _known_suffix(path: str | PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in DATES:
        known = ", ".join(DATES)
        raise InputError(f"cannot tell the format of the plot {str(path)!r}: expected a name ending in {known}")
    return suffix


def _matplotlib(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError("plots need matplotlib, which is not installed: pip install rtp-sim[plots]") from error


@contextmanager
def _drawing(path: str | PathLike[str], height_inches: float) -> Iterator[Any]:
    """An empty figure, saved to `path` at the end. Settings of matplotlib outside are left alone."""
    suffix = _known_suffix(path)
    settings = {"svg.hashsalt": "rtp-sim", "pdf.fonttype": 42, "font.size": LABEL_SIZE}
    with _matplotlib("matplotlib").rc_context(settings):
        size = (WIDTH_INCHES, height_inches)
        figure = _matplotlib("matplotlib.figure").Figure(figsize=size, layout="constrained")
        yield figure
        try:
            figure.savefig(path, dpi=200, metadata=DATES[suffix])
        except OSError as error:
            raise InputError(f"cannot write the plot to {str(path)!r}: {error.strerror}") from error


def _stack_bars(axes: Any, stacks: dict[str, list[float]], names: dict[str, str], totals: list[str]) -> None:
    left = [0.0] * len(totals)
    for role, values in stacks.items():
        axes.barh(range(len(values)), values, left=left, height=0.62, color=light(role), label=names.get(role, role))
        left = [a + b for a, b in zip(left, values, strict=True)]
    for y, (end, total) in enumerate(zip(left, totals, strict=True)):
        axes.annotate(
            total, (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=LABEL_SIZE - 1,
            bbox=HALO, in_layout=False,
        )  # fmt: skip
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=LABEL_SIZE - 1,
        borderpad=0, handlelength=1.2, handletextpad=0.5, columnspacing=1.2,
    )  # fmt: skip


def _key(figure: Any, handles: list[Any], labels: list[str]) -> None:
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=LABEL_SIZE - 1)
