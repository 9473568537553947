"""Predictions against published runs as grids of text and as JSON (docs/json.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rtp_sim.report.diff_tables import Grid, Json, signed_percent
from rtp_sim.report.format import MISSING, format_bytes, format_percent, format_seconds
from rtp_sim.schedule.ir import CATEGORIES
from rtp_sim.validation.accuracy import (
    Errors,
    Fits,
    Inside,
    Outcome,
    Summary,
    errors_of,
    inside_of,
    strategy_of,
    summarise,
    worst,
    worst_memory,
)
from rtp_sim.validation.peers import CLAIMS
from rtp_sim.validation.reading import GIB

SCHEMA = "rtp-sim/validate/1"
HEADER = ("rows", "predicted", "median APE", "MAPE", "p90", "bias", "memory MAPE", "memory bias", "rank corr.")
WORST_HEADER = (
    "row", "model", "strategy", "GPUs", "measured", "predicted", "8 of 10 between", "error", "compute",
    "exposed comm.", "bubble", "of it host", "memory error",
)  # fmt: skip

WORST_MEMORY_HEADER = (
    "row", "model", "strategy", "GPUs", "measured", "predicted", "error", *CATEGORIES, "op at the peak", "largest then",
)  # fmt: skip


def sets_of(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The rows that fits may have used, and those they may not."""
    return {
        "validation": [o for o in outcomes if o.cells is not None and not o.calibration],
        "calibration": [o for o in outcomes if o.cells is not None and o.calibration],
    }


def accuracy_grids(outcomes: Sequence[Outcome], count: int) -> list[Grid]:
    """Both halves, the files on each half, the other groups on the validation half, skips, assumptions, worst rows."""
    sets = sets_of(outcomes)
    grids = [
        Grid("sets", "Errors by set", ("set", *HEADER), tuple(_line(n, summarise(o, False)) for n, o in sets.items()))
    ]
    validation = summarise(sets["validation"])
    for what in dict.fromkeys(name for name, _, _ in validation.groups):
        lines = tuple(_line(value, s) for name, value, s in validation.groups if name == what)
        grids.append(Grid(what, f"Validation rows by {what}", (what, *HEADER), lines))
    grids += [interval_grid(sets), peer_grid(outcomes)]
    ends = [worst_grid(outcomes, count), worst_memory_grid(outcomes, count)]
    return [*grids, fits_grid(summarise(outcomes, False).fits), *reason_grids(outcomes), *ends]


def interval_grid(sets: Mapping[str, Sequence[Outcome]]) -> Grid:
    """How many step times lie in the interval that the calibration rows of their machine left, on both halves."""
    lines = []
    for name in ("all machines", *sorted({o.cells.cluster for rows in sets.values() for o in rows if o.cells})):
        found = {
            half: inside_of(o for o in rows if name == "all machines" or (o.cells and o.cells.cluster == name))
            for half, rows in sets.items()
        }
        width = found["validation"].width or found["calibration"].width
        if width is not None:
            halves = [s for half in ("calibration", "validation") for s in _inside(found[half])]
            lines.append((name, *halves, f"{width:.2f}"))
    header = ("machine", "calibration rows", "inside", "validation rows", "inside", "upper / lower end, median")
    return Grid("intervals", "Measured step times inside their prediction interval, stated 80 %", header, tuple(lines))


def _inside(found: Inside) -> tuple[str, str]:
    return str(found.rows), _percent(found.share)


def peer_grid(outcomes: Sequence[Outcome]) -> Grid:
    """What peers say of the same sources beside the errors of all rows of these that are here."""
    lines = []
    for claim in CLAIMS:
        own = errors_of(o.step_time_error for o in outcomes if claim.covers(o.file, o.cells))
        if own.count:
            lines.append((claim.rows, claim.peer, f"{claim.mape:.1%}", f"{own.mape:.1%}", str(own.count)))
    header = ("rows", "peer", "its mean error", "ours", "rows here")
    return Grid("peers", "The same sources as peers predict them", header, tuple(lines), 2)


def fits_grid(fits: Fits) -> Grid:
    """Whether rows were predicted to fit, against whether they ran."""
    lines = (
        ("fits", str(fits.true_fit), str(fits.false_fit)),
        ("does not fit", str(fits.false_fail), str(fits.true_fail)),
    )
    return Grid("fits", "Does it fit? Predicted against what happened, all rows", ("predicted", "ran", "failed"), lines)


def reason_grids(outcomes: Sequence[Outcome]) -> list[Grid]:
    """Why rows were not predicted, and what was assumed of those that were: how many rows each."""
    named = {
        "skipped": ("Rows that cannot be predicted", Counter(o.skipped for o in outcomes if o.skipped)),
        "refused": ("Rows that their framework refuses to start", Counter(o.refused for o in outcomes if o.refused)),
        "invalid": ("Rows with mistakes", Counter(o.invalid for o in outcomes if o.invalid)),
        "assumed": ("Assumptions", Counter(a for o in outcomes for a in o.assumptions)),
    }
    return [
        Grid(name, title, ("what", "rows"), tuple((text, str(n)) for text, n in counts.most_common()))
        for name, (title, counts) in named.items()
    ]


def worst_grid(outcomes: Sequence[Outcome], count: int) -> Grid:
    """The rows furthest off, with what the model thinks happened in their step."""
    rows = []
    for o in worst(outcomes, count):
        assert o.cells is not None
        assert o.estimate is not None
        e = o.estimate
        shares = (e.compute_s, e.exposed_s, e.bubble_s, min(e.host_s, e.bubble_s))
        rows.append(
            (
                o.row_id, o.cells.model, strategy_of(o.cells), str(o.cells.gpus), _seconds(o.cells.step_time_s),
                _seconds(e.step_s), interval_text(o), signed_percent(o.step_time_error),
                *(format_percent(share / e.step_s) for share in shares), signed_percent(o.peak_memory_error),
            )
        )  # fmt: skip
    return Grid("worst", "Rows that are furthest off, and what the model thinks happened", WORST_HEADER, tuple(rows), 3)


def worst_memory_grid(outcomes: Sequence[Outcome], count: int) -> Grid:
    """The rows whose peak memory is furthest off, with what the fullest stage holds at its peak and when that is."""
    rows = []
    for o in worst_memory(outcomes, count):
        assert o.cells is not None
        assert o.estimate is not None
        stage, measured = o.estimate.fullest, (o.cells.peak_memory_gib or 0) * o.reading.unit_bytes
        largest = ", ".join(f"{name} {format_bytes(size)}" for name, size in stage.largest)
        rows.append(
            (
                o.row_id, o.cells.model, strategy_of(o.cells), str(o.cells.gpus), format_bytes(round(measured)),
                memory_text(o), signed_percent(o.peak_memory_error),
                *(format_bytes(stage.held.get(c, 0)) for c in CATEGORIES), stage.op or MISSING, largest or MISSING,
            )
        )  # fmt: skip
    title = "Peak memory that is furthest off, what tensors hold on the fullest stage, and the moment"
    return Grid("worst-memory", title, WORST_MEMORY_HEADER, tuple(rows), 3)


def row_grid(outcomes: Sequence[Outcome]) -> Grid:
    """Every row that has a prediction and a measured step time, with its interval."""
    rows = []
    for o in outcomes:
        if o.cells is None or o.estimate is None or o.cells.step_time_s is None:
            continue
        inside = {True: "inside", False: "outside", None: MISSING}[o.in_interval]
        half = "calibration" if o.calibration else "validation"
        rows.append(
            (o.row_id, o.cells.cluster, half, _seconds(o.cells.step_time_s), _seconds(o.estimate.step_s),
             signed_percent(o.step_time_error), interval_text(o), inside)
        )  # fmt: skip
    header = ("row", "machine", "half", "measured", "predicted", "error", "8 of 10 between", "measured is")
    return Grid("rows", "All rows with their prediction intervals", header, tuple(rows), 3)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """The answer in a sentence."""
    everything, half = summarise(outcomes, False), summarise(sets_of(outcomes)["validation"], False)
    said = f"{everything.predicted} of {everything.rows} rows predicted"
    if half.step_time.count:
        said += (
            f"; on the validation half the step time is off by {_percent(half.step_time.median_ape)} in the median, "
            f"{_percent(half.step_time.mape)} on average"
        )
    if half.peak_memory.count:
        said += f", peak memory by {_percent(half.peak_memory.mape)} on average"
    return said + "."


def accuracy_json(outcomes: Sequence[Outcome]) -> Json:
    """The document of a validation against published runs."""
    sets = {name: summary_json(summarise(rows, False)) for name, rows in sets_of(outcomes).items()}
    return {
        "schema": SCHEMA,
        "rows": [row_json(o) for o in outcomes],
        "summary": summary_json(summarise(outcomes)) | {"sets": sets},
    }


def row_json(o: Outcome) -> Json:
    """One row. `status` is what happened when it was measured (ok, failed), null for a row that could not be read."""
    e, c = o.estimate, o.cells
    return {
        "row_id": o.row_id,
        "predicted_step_time_s": e.step_s if e else None,
        "measured_step_time_s": c.step_time_s if c else None,
        "step_time_error": o.step_time_error,
        "step_time_interval_s": None if o.interval_s is None else list(o.interval_s),
        "in_interval": o.in_interval,
        "predicted_peak_memory_gib": None if o.peak_bytes is None else o.peak_bytes / o.reading.unit_bytes,
        "measured_peak_memory_gib": c.peak_memory_gib if c else None,
        "peak_memory_error": o.peak_memory_error,
        "predicted_fits": o.fits,
        "status": c.status if c else None,
        "skipped_reason": o.skipped or o.invalid or None,
        "refused_reason": o.refused or None,
        "valid": not o.invalid,
        "set": ("calibration" if o.calibration else "validation") if c else None,
        "file": o.file,
        "line": o.line,
        "assumptions": list(o.assumptions),
        "breakdown_s": {
            "compute": e.compute_s, "exposed_communication": e.exposed_s, "bubble": e.bubble_s, "host_bound": e.host_s,
            "overlapped_communication": e.overlapped_s,
        } if e else None,
        "memory_unit_bytes": o.reading.unit_bytes,
        "memory_by_category_gib": {k: v / GIB for k, v in e.memory_by_category.items()} if e else None,
        "memory_peak_op": e.fullest.op if e else None,
        "memory_largest_gib": [[name, size / GIB] for name, size in e.fullest.largest] if e else None,
    }  # fmt: skip


def summary_json(s: Summary) -> Json:
    """Statistics of a set of rows; `groups` only where it has them."""
    found: Json = {
        "rows": s.rows, "predicted": s.predicted, "skipped": s.skipped + s.invalid, "invalid": s.invalid,
        "step_time": _errors_json(s.step_time), "peak_memory": _errors_json(s.peak_memory),
        "fits": {"true_fit": s.fits.true_fit, "false_fit": s.fits.false_fit, "true_fail": s.fits.true_fail,
                 "false_fail": s.fits.false_fail},
        "rank_correlation": s.rank_correlation,
        "interval": {"rows": s.interval.rows, "inside": s.interval.inside, "share": s.interval.share,
                     "width": s.interval.width},
    }  # fmt: skip
    if s.groups:
        found["groups"] = [{"by": by, "name": name, **summary_json(part)} for by, name, part in s.groups]
    return found


def _errors_json(e: Errors) -> Json:
    return {"rows": e.count, "mape": e.mape, "median_ape": e.median_ape, "p90_ape": e.p90_ape, "bias": e.bias}


def _line(name: str, s: Summary) -> tuple[str, ...]:
    rank = MISSING if s.rank_correlation is None else f"{s.rank_correlation:.2f}"
    t, m = s.step_time, s.peak_memory
    return (
        name, str(s.rows), str(s.predicted), _percent(t.median_ape), _percent(t.mape), _percent(t.p90_ape),
        signed_percent(t.bias), _percent(m.mape), signed_percent(m.bias), rank,
    )  # fmt: skip


def _percent(fraction: float | None) -> str:
    return MISSING if fraction is None else format_percent(fraction)


def _seconds(seconds: float | None) -> str:
    return MISSING if seconds is None else format_seconds(seconds)


def interval_text(o: Outcome) -> str:
    """The prediction interval in words."""
    if o.interval_s is None:
        return MISSING
    low_s, high_s = o.interval_s
    return f"{format_seconds(low_s)} - {format_seconds(high_s)}"


def memory_text(o: Outcome) -> str:
    """Predicted peak memory in words."""
    return MISSING if o.peak_bytes is None else format_bytes(o.peak_bytes)
