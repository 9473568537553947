"""Process groups for the groups of a schedule: one per stream and instance, members in ring order, with a timeout.

Every rank makes every group in the same order, as torch wants it. Ops of one stream follow one another on every rank,
so a process group of their own per stream keeps the ops of different streams from meeting each other; sends and
receives of a group share one more, because the two halves of a transfer may lie on streams of different names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from rtp_sim.errors import ScheduleError
from rtp_sim.executor.communicate import collective, exchange
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.executor.transport import Traffic
from rtp_sim.schedule.ir import Collective, Op, Program, Recv, Schedule, Send, Shift

Key = tuple[str, str]
"""(group of the schedule, stream); stream "" for sends and receives."""


@dataclass(frozen=True)
class Groups:
    """The process groups that one rank is in, and `control`, a gloo group of all ranks for barriers and clocks. Also
    the `Transport` over them."""

    control: dist.ProcessGroup
    of: Mapping[Key, dist.ProcessGroup]

    def group(self, op: Op) -> dist.ProcessGroup:
        """The process group on which `op` communicates."""
        action = op.action
        assert isinstance(action, Shift | Collective | Send | Recv)
        return self.of[action.group, "" if isinstance(action, Send | Recv) else op.stream]

    def exchange(self, op: Op, transfers: Sequence[Transfer], tag: int) -> Traffic:
        """Does the transfers of a shift, send or receive."""
        return exchange(transfers, self.group(op), dist.get_rank(), tag)

    def collective(self, op: Op, parcel: Parcel) -> Traffic:
        """Does this rank's part of a collective."""
        return collective(parcel, self.group(op))


def make_groups(schedule: Schedule, rank: int, backend: str, timeout_s: float) -> Groups:
    """Makes all process groups; `init_process_group` must have been called. ScheduleError where two ranks meet on
    streams of different names."""
    timeout = timedelta(seconds=timeout_s)
    require_same_streams(schedule)
    control = make_control(timeout_s)
    made: dict[Key, dist.ProcessGroup] = {}
    for name, stream in _keys(schedule):
        for members in schedule.groups[name].instances:
            # Unsorted: position p of the process group is position p of the ring.
            group = dist.new_group(list(members), timeout=timeout, backend=backend, sort_ranks=False)
            if rank in members:
                assert dist.get_process_group_ranks(group) == list(members)
                made[name, stream] = group
    return Groups(control, made)


def make_control(timeout_s: float) -> dist.ProcessGroup:
    """The group of all ranks for barriers and clocks."""
    control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return control


def _keys(schedule: Schedule) -> list[Key]:
    """Every (group, stream) that some op communicates on, in an order that all ranks agree on."""
    keys: dict[Key, None] = {}
    for program in schedule.programs:
        for op in program.ops:
            if isinstance(op.action, Shift | Collective):
                keys[op.action.group, op.stream] = None
            elif isinstance(op.action, Send | Recv):
                keys[op.action.group, ""] = None
    return list(keys)


def require_same_streams(schedule: Schedule) -> None:
    """The k-th collective or shift of a group must lie on the same stream for all members."""
    for name, group in schedule.groups.items():
        for members in group.instances:
            first = _rounds(schedule.program(members[0]), name)
            others = [r for r in members if schedule.program_of_rank[r] != schedule.program_of_rank[members[0]]]
            for rank in others:
                for mine, theirs in zip(first, _rounds(schedule.program(rank), name), strict=False):
                    if mine.stream != theirs.stream:
                        raise ScheduleError(
                            f"group {name!r}: {mine.name!r} of rank {members[0]} lies on stream {mine.stream!r}, but "
                            f"{theirs.name!r}, which it meets on rank {rank}, on {theirs.stream!r}; expected the same"
                        )


def _rounds(program: Program, group: str) -> list[Op]:
    return [op for op in program.ops if isinstance(op.action, Shift | Collective) and op.action.group == group]
