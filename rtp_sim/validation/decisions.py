"""`Decision`: what the planner would have chosen among published runs, and what that choice cost.

Runs of one model on one number of GPUs of one machine with one global batch are the choices of one decision. They are
ranked by predicted step time among those predicted to fit; the first is the pick. Its regret is its measured step time
over the best measured one of the group, 1 if the pick is the best. A pick that failed when it was run is a failed
attempt: the next in rank is taken, as a user would, and attempts are counted beside the regret. Where nothing that ran
was predicted to fit there is no pick; such a decision counts as an infinite regret.

A decision needs two measured runs. The best is taken from all of them, predicted or not. Equal predictions are a tie:
the pick then costs the mean of what the tied runs took.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rtp_sim.validation.accuracy import Fits, Outcome, fits_of, spearman
from rtp_sim.validation.measured import RowFile

LEAST_RUNS = 2
TRIES = 3
MEDIAN_BAR = 1.05
P90_BAR = 1.20
FITS_BAR = 0.9


@dataclass(frozen=True, slots=True)
class Group:
    """What the choices of a decision share."""

    file: str
    source: str
    cluster: str
    model: str
    num_layers: int | None
    hidden_size: int
    seq_len: int
    precision: str
    gpus: int
    global_batch: int

    def __str__(self) -> str:
        name = self.model or f"{self.num_layers} layers of {self.hidden_size}"
        return f"{name}, {self.gpus} GPUs, batch {self.global_batch}"


@dataclass(frozen=True, slots=True)
class Decision:
    """One group: `rows` choices, of which `predicted` have a prediction and `measured` ran. `ranked` are those
    predicted to fit, fastest first; `attempts` how many of them are tried until one runs, that one included.

    `regret` is infinite without a pick. `regret_of_tries` is that of the best of the first TRIES in rank, `blind` that
    of the median of all runs, which is what choosing without a planner costs. `correlation` is Spearman's, of predicted
    and measured times, None below three runs.
    """

    group: Group
    rows: int
    predicted: int
    measured: int
    ranked: tuple[Outcome, ...]
    best: Outcome
    pick: Outcome | None
    attempts: int
    regret: float
    regret_of_tries: float
    blind: float
    correlation: float | None
    fits: Fits


@dataclass(frozen=True, slots=True)
class DecisionSummary:
    """Of all decisions. `left_out` groups have fewer than two measured runs. `fits` is of all predicted rows, those of
    groups left out too. Statistics are None where there is no decision, and infinite where picks are missing."""

    decisions: int
    left_out: int
    median: float | None
    p90: float | None
    worst: float | None
    median_of_tries: float | None
    p90_of_tries: float | None
    median_blind: float | None
    best_found: int
    first_pick_failed: int
    no_pick: int
    fits: Fits

    @property
    def fits_right(self) -> float | None:
        """Share of rows with the right verdict about fitting."""
        f = self.fits
        total = f.true_fit + f.false_fit + f.true_fail + f.false_fail
        return (f.true_fit + f.true_fail) / total if total else None

    @property
    def within_bars(self) -> bool:
        """Whether median, 90th percentile and verdicts reach what this program asks of itself."""
        known = self.median is not None and self.p90 is not None and self.fits_right is not None
        return known and self.median <= MEDIAN_BAR and self.p90 <= P90_BAR and self.fits_right >= FITS_BAR  # type: ignore[operator]


def decisions_of(outcomes: Sequence[Outcome]) -> tuple[list[Decision], int]:
    """The decisions in the order of the rows, and how many groups have too few measured runs for one."""
    groups: dict[Group, list[Outcome]] = {}
    for o in outcomes:
        if o.cells is not None:
            groups.setdefault(group_of(o.file, o.cells), []).append(o)
    made = [_decision(group, rows) for group, rows in groups.items()]
    found = [d for d in made if d is not None]
    return found, len(made) - len(found)


def group_of(file: str, c: RowFile) -> Group:
    """The group of a row; a blank global batch is what the row's replicas work on."""
    batch = c.global_batch or c.micro_batch * c.num_microbatches * c.dp
    return Group(file, c.source, c.cluster, c.model, c.num_layers, c.hidden_size, c.seq_len, c.precision, c.gpus, batch)


def _decision(group: Group, rows: Sequence[Outcome]) -> Decision | None:
    ran = [o for o in rows if _measured_s(o) is not None]
    if len(ran) < LEAST_RUNS:
        return None
    best = min(ran, key=_time)
    fitting = [o for o in rows if o.fits]
    ranked = tuple(sorted(fitting, key=_predicted_s))
    places = [place for place, o in enumerate(ranked) if _measured_s(o) is not None]
    known = [(_predicted_s(o), _time(o)) for o in ran if o.estimate is not None]
    pick = ranked[places[0]] if places else None
    tries = [_time(o) for o in ranked[:TRIES] if _measured_s(o) is not None]
    return Decision(
        group, len(rows), sum(o.fits is not None for o in rows), len(ran), ranked, best, pick,
        attempts=places[0] + 1 if places else len(ranked),
        regret=_taken_s(ranked, pick) / _time(best) if pick is not None else math.inf,
        regret_of_tries=min(tries) / _time(best) if tries else math.inf,
        blind=float(np.median([_time(o) for o in ran])) / _time(best),
        correlation=spearman(known) if len(known) > LEAST_RUNS else None, fits=fits_of(rows),
    )  # fmt: skip


def _taken_s(ranked: Sequence[Outcome], pick: Outcome) -> float:
    """What the pick took, the mean of those that are predicted alike."""
    tied = [_time(o) for o in ranked if _predicted_s(o) == _predicted_s(pick) and _measured_s(o) is not None]
    return sum(tied) / len(tied)


def _predicted_s(o: Outcome) -> float:
    assert o.estimate is not None
    return o.estimate.step_s


def _measured_s(o: Outcome) -> float | None:
    return o.cells.step_time_s if o.cells is not None and o.cells.status == "ok" else None


def _time(o: Outcome) -> float:
    measured = _measured_s(o)
    assert measured is not None
    return measured


def summarise_decisions(outcomes: Sequence[Outcome]) -> DecisionSummary:
    """The statistics of all decisions among the rows."""
    found, left_out = decisions_of(outcomes)
    regrets, tries = [d.regret for d in found], [d.regret_of_tries for d in found]
    return DecisionSummary(
        len(found), left_out, quantile(regrets, 0.5), quantile(regrets, 0.9), max(regrets, default=None),
        quantile(tries, 0.5), quantile(tries, 0.9), quantile([d.blind for d in found], 0.5),
        best_found=sum(d.regret <= 1 for d in found),
        first_pick_failed=sum(d.pick is not None and d.attempts > 1 for d in found),
        no_pick=sum(d.pick is None for d in found), fits=fits_of(outcomes),
    )  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear between the nearest two, infinite as soon as one of them is; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return above if below == above or math.isinf(above) else below + (place - math.floor(place)) * (above - below)
