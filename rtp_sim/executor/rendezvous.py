"""When measured transfers really began: a rank that waits for a late partner is not yet transferring.

A `Timeline` lets a communication op start when every partner is there. A rank only knows when it was ready itself, so
the starts are moved here, once the times of all ranks are together: to the latest of the members of a collective, and
to the first exchange that can begin in a shift. Ranks of one program only, where op i of one meets op i of the other;
one-sided sends and receives keep their own times. Standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rtp_sim.schedule.ir import Collective, Op, Schedule, Shift
from rtp_sim.timeline import RankTimes


def with_partners(schedule: Schedule, measured: Mapping[int, RankTimes]) -> dict[int, RankTimes]:
    """The same times with communication starting when its partners were there, and never after it ended."""
    starts = {rank: times.start_ns.copy() for rank, times in measured.items()}
    for rank, times in measured.items():
        for op in schedule.program(rank).ops:
            ready = _began_ns(schedule, measured, rank, op)
            if ready is not None:
                starts[rank][op.index] = min(ready, int(times.end_ns[op.index]))
    return {rank: RankTimes(starts[rank], np.asarray(times.end_ns)) for rank, times in measured.items()}


def _began_ns(schedule: Schedule, measured: Mapping[int, RankTimes], rank: int, op: Op) -> int | None:
    """When the op's transfer began on this rank; None if that is the rank's own time."""
    action = op.action
    if not isinstance(action, Shift | Collective):
        return None
    group = schedule.groups[action.group]
    if isinstance(action, Collective):
        members = group.instances[group.place[rank][0]]
        return _latest_ns(schedule, measured, op.index, rank, members)
    partners = {p for hop in action.hops for sign in (1, -1) if (p := group.peer(rank, hop.offset, sign)) != rank}
    flows = [_latest_ns(schedule, measured, op.index, rank, (partner,)) for partner in partners]
    return min(flows, default=None)


def _latest_ns(
    schedule: Schedule, measured: Mapping[int, RankTimes], index: int, rank: int, partners: tuple[int, ...]
) -> int:
    """When the last of the rank and its partners was ready for op `index`."""
    own = schedule.program_of_rank[rank]
    there = [rank, *(p for p in partners if p in measured and schedule.program_of_rank[p] == own)]
    return max(int(measured[p].start_ns[index]) for p in there)
