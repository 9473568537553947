"""How well predictions meet measurements: errors of rows, their statistics, and what they say about fitting and
ranking, and how many fall into their prediction interval.

An error is (predicted - measured) / measured; APE is its size. `bias` is the mean error, `p90_ape` the 90th percentile
(linear between the nearest two). The rank correlation is Spearman's, of predicted and measured step times within groups
of rows with the same machine, model, sequence length and number of GPUs: whether the faster configuration is predicted
to be the faster one. It is the mean over groups of three and more different times, weighted by their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rtp_sim.validation.evaluate import Estimate
from rtp_sim.validation.measured import RowFile
from rtp_sim.validation.reading import AS_TENSORS, Reading

LEAST_IN_GROUP = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row with its estimate, or with why there is none: `refused` (the framework would not start it, which is a
    prediction too), `skipped` (nothing can predict it) or `invalid` (a mistake in the file). `cells` is None for a row
    that could not be read. `spread` is what the machine's fit left: the 10th and 90th percentile of measured /
    predicted step time of its calibration rows, None where nothing was fitted."""

    file: str
    line: int
    row_id: str
    cells: RowFile | None
    calibration: bool
    estimate: Estimate | None = None
    assumptions: tuple[str, ...] = ()
    skipped: str = ""
    invalid: str = ""
    refused: str = ""
    reading: Reading = AS_TENSORS
    spread: tuple[float, float] | None = None

    @property
    def interval_s(self) -> tuple[float, float] | None:
        """Between which step times eight of ten such runs are said to lie."""
        e = self.estimate
        return None if e is None or self.spread is None else (e.step_s * self.spread[0], e.step_s * self.spread[1])

    @property
    def in_interval(self) -> bool | None:
        """Whether the measured step time lies between these; None where one of the two is missing."""
        if self.interval_s is None or self.cells is None or self.cells.step_time_s is None:
            return None
        low_s, high_s = self.interval_s
        return low_s <= self.cells.step_time_s <= high_s

    @property
    def peak_bytes(self) -> int | None:
        """Predicted peak memory as the row's source counts it."""
        e = self.estimate
        return None if e is None else self.reading.peak_bytes(e.stages, e.capacity_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether the framework starts the run and every rank has room on its device."""
        if self.refused:
            return False
        e = self.estimate
        return None if e is None else self.reading.needed_bytes(e.stages, e.capacity_bytes) <= e.capacity_bytes

    @property
    def step_time_error(self) -> float | None:
        """(predicted - measured) / measured step time, where both are there."""
        if self.estimate is None or self.cells is None or self.cells.step_time_s is None:
            return None
        return self.estimate.step_s / self.cells.step_time_s - 1

    @property
    def peak_memory_error(self) -> float | None:
        """(predicted - measured) / measured peak memory, where both are there."""
        if self.peak_bytes is None or self.cells is None or self.cells.peak_memory_gib is None:
            return None
        return self.peak_bytes / self.reading.unit_bytes / self.cells.peak_memory_gib - 1


@dataclass(frozen=True, slots=True)
class Errors:
    """Statistics of `count` errors; None where there are none."""

    count: int
    mape: float | None
    median_ape: float | None
    p90_ape: float | None
    bias: float | None


@dataclass(frozen=True, slots=True)
class Fits:
    """Rows by whether they were predicted to fit (true: rightly so) and whether they ran."""

    true_fit: int
    false_fit: int
    true_fail: int
    false_fail: int


@dataclass(frozen=True, slots=True)
class Inside:
    """Of `rows` with a prediction interval and a measured step time, so many lie `inside`; `width` is the median of
    upper over lower end, None where there are no rows."""

    rows: int
    inside: int
    width: float | None

    @property
    def share(self) -> float | None:
        """The part of the rows that lies inside: the intervals state 0.8."""
        return self.inside / self.rows if self.rows else None


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a set of rows; `predicted` are those with an estimate or a verdict; `groups` holds those of its parts, by
    (what they share, its value)."""

    rows: int
    predicted: int
    skipped: int
    invalid: int
    step_time: Errors
    peak_memory: Errors
    fits: Fits
    rank_correlation: float | None
    interval: Inside
    groups: tuple[tuple[str, str, Summary], ...] = ()


def errors_of(values: Iterable[float | None]) -> Errors:
    """Statistics of those that are not None."""
    errors = np.array([v for v in values if v is not None])
    if not errors.size:
        return Errors(0, None, None, None, None)
    ape = np.abs(errors)
    p90 = float(np.quantile(ape, 0.9))
    return Errors(int(errors.size), float(ape.mean()), float(np.median(ape)), p90, float(errors.mean()))


def fits_of(outcomes: Iterable[Outcome]) -> Fits:
    """The table of predicted against actual outcome; a row that ran is one with status ok."""
    counts = {(predicted, ran): 0 for predicted in (True, False) for ran in (True, False)}
    for o in outcomes:
        if o.fits is not None and o.cells is not None:
            counts[o.fits, o.cells.status == "ok"] += 1
    return Fits(counts[True, True], counts[True, False], counts[False, False], counts[False, True])


def inside_of(outcomes: Iterable[Outcome]) -> Inside:
    """How many measured step times lie in the interval stated for them."""
    judged = [(o.spread, o.in_interval) for o in outcomes if o.in_interval is not None]
    widths = [spread[1] / spread[0] for spread, _ in judged if spread is not None]
    width = float(np.median(widths)) if widths else None
    return Inside(len(judged), sum(bool(inside) for _, inside in judged), width)


def summarise(outcomes: Sequence[Outcome], grouped: bool = True) -> Summary:
    """The statistics of the rows, and of their groups by file, machine, strategy, scale and model."""
    groups: list[tuple[str, str, Summary]] = []
    for what, key in GROUPS.items() if grouped else ():
        parts: dict[str, list[Outcome]] = {}
        for o in outcomes:
            if what == "file" or o.cells is not None:
                parts.setdefault(key(o), []).append(o)
        groups += [(what, name, summarise(parts[name], grouped=False)) for name in sorted(parts, key=_natural)]
    return Summary(
        len(outcomes),
        sum(o.fits is not None for o in outcomes),
        sum(bool(o.skipped) for o in outcomes),
        sum(bool(o.invalid) for o in outcomes),
        errors_of(o.step_time_error for o in outcomes),
        errors_of(o.peak_memory_error for o in outcomes),
        fits_of(outcomes),
        rank_correlation(outcomes),
        inside_of(outcomes),
        tuple(groups),
    )


def rank_correlation(outcomes: Sequence[Outcome]) -> float | None:
    """The weighted mean of Spearman's correlation over the groups that can be ranked; None if there are none."""
    groups: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for o in outcomes:
        c = o.cells
        if o.estimate is not None and c is not None and c.step_time_s is not None:
            key = (c.cluster, c.model, c.num_layers, c.hidden_size, c.seq_len, c.gpus)
            groups.setdefault(key, []).append((o.estimate.step_s, c.step_time_s))
    found = [(len(pairs), spearman(pairs)) for pairs in groups.values() if len(pairs) >= LEAST_IN_GROUP]
    known = [(n, rho) for n, rho in found if rho is not None]
    return sum(n * rho for n, rho in known) / sum(n for n, _ in known) if known else None


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one side is constant."""
    a, b = (_ranks(np.array(side)) for side in zip(*pairs, strict=True))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else None


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return mean


def worst(outcomes: Sequence[Outcome], count: int = 20) -> list[Outcome]:
    """The rows whose step time is furthest off, worst first."""
    off = [o for o in outcomes if o.step_time_error is not None]
    return sorted(off, key=lambda o: -abs(o.step_time_error or 0.0))[:count]


def worst_memory(outcomes: Sequence[Outcome], count: int = 20) -> list[Outcome]:
    """The rows whose peak memory is furthest off, worst first."""
    off = [o for o in outcomes if o.peak_memory_error is not None]
    return sorted(off, key=lambda o: -abs(o.peak_memory_error or 0.0))[:count]


def strategy_of(cells: RowFile) -> str:
    """The row's strategy with the other axes it uses."""
    parts = [cells.strategy]
    if cells.tp > 1:
        parts.append("tp-sp" if cells.sequence_parallel else "tp")
    if cells.pp > 1:
        parts.append((cells.pipeline_schedule or "1f1b").lower())
    return " + ".join(parts)


def _with_cells(key: Callable[[RowFile], str]) -> Callable[[Outcome], str]:
    return lambda o: key(o.cells) if o.cells is not None else ""


GROUPS: dict[str, Callable[[Outcome], str]] = {
    "file": lambda o: o.file,
    "machine": _with_cells(lambda c: c.cluster),
    "strategy": _with_cells(strategy_of),
    "scale": _with_cells(lambda c: f"{c.gpus} GPUs"),
    "model": _with_cells(lambda c: c.model or f"{c.num_layers} layers of {c.hidden_size}"),
}


def _natural(name: str) -> tuple[int, str]:
    """Numbers in front count as numbers."""
    head = name.split(" ")[0]
    return (int(head) if head.isdigit() else 0, name)
