"""`Timeline`: when every op of every rank started and ended. The simulator predicts one, the executor measures one.

It is compact: per represented rank two integer arrays indexed by op, beside the `Schedule` that names the ops.
Ranks that behave alike share one representative (`representative_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rtp_sim.schedule.ir import Op, Schedule

TimesNs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RankTimes:
    """Start and end of each op of one rank, in ns since the step began, indexed by `Op.index`.

    A communication op starts when its transfer starts, that is, when every partner is there.
    """

    start_ns: TimesNs
    end_ns: TimesNs


@dataclass(frozen=True)
class Span:
    """One op on one rank, as a trace shows it."""

    rank: int
    op: Op
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class Timeline:
    """Times of one step. `kind` is "predicted" or "measured"; `meta` says by what (engine, host, date, seed).

    `ranks` holds the represented ranks; `representative_of[r]` names the one that stands for rank r.
    """

    schedule: Schedule
    kind: str
    ranks: Mapping[int, RankTimes]
    representative_of: tuple[int, ...]
    meta: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    @property
    def step_time_ns(self) -> int:
        """From the start of the step to the end of the last op of any rank."""
        return max((int(t.end_ns.max()) for t in self.ranks.values() if t.end_ns.size), default=0)

    def times(self, rank: int) -> RankTimes:
        """The times of `rank`, through its representative."""
        return self.ranks[self.representative_of[rank]]

    def spans(self, rank: int) -> list[Span]:
        """The ops of `rank` in program order."""
        times = self.times(rank)
        return [
            Span(rank, op, int(times.start_ns[op.index]), int(times.end_ns[op.index]))
            for op in self.schedule.program(rank).ops
        ]

    def population(self, rank: int) -> int:
        """How many ranks the represented rank `rank` stands for, itself included."""
        return sum(1 for r in self.representative_of if r == rank)


def of_one_rank(
    schedule: Schedule, kind: str, rank: int, times: RankTimes, meta: Mapping[str, str | int | float | bool | None]
) -> Timeline:
    """The timeline of a rank that ran, or was simulated, without its partners. It stands for the ranks of its program;
    ops of other programs have no times (-1)."""
    own = schedule.program_of_rank[rank]
    ranks, stands_for = {rank: times}, {own: rank}
    for other, number in enumerate(schedule.program_of_rank):
        if number not in stands_for:
            stands_for[number] = other
            none = np.full(len(schedule.programs[number].ops), -1, dtype=np.int64)
            ranks[other] = RankTimes(none, none)
    return Timeline(schedule, kind, ranks, tuple(stands_for[number] for number in schedule.program_of_rank), meta)
