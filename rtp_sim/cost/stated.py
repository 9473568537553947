"""Costs that are stated instead of modelled: a run's `StatedTimes`, an emulated `Link`, and how they are made.

Transfers are latencies without flow: like the executor's sleeping streams they share no link. `priced` takes the
statement from another cost model, each op alone on its device and its links.
"""

from __future__ import annotations

from collections.abc import Mapping

from rtp_sim.cost.slow import unmarked
from rtp_sim.engine.costs import CostModel, OpCost, Phase
from rtp_sim.schedule.ir import Collective, Compute, Dims, Op, Recv, Schedule, Send, Shift
from rtp_sim.stated import StatedTimes, slowed


class StatedCost:
    """Implements engine.costs.CostModel with the times of a run whose ranks only sleep."""

    overlap_slowdown_permille = 1000

    def __init__(self, times: StatedTimes) -> None:
        self.times = times

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """Time of one kernel, on a slow rank if its sizes say so (slow.py)."""
        own, permille = unmarked(dims)
        return OpCost(slowed(self.times.kernels[kernel, dtype, own], permille), "assumed")

    def host_issue_ns(self, op: Op) -> int:
        """Host time per op."""
        return self.times.issue_ns

    def link_capacity(self, link: int) -> int:
        """There are no links."""
        raise AssertionError("stated transfers use no link")

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One message."""
        return Phase(self.times.message_ns(src_rank, dst_rank, size_bytes, chunk_bytes), 0, {})

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """One phase."""
        return (Phase(self.times.collective_ns(kind, ranks, size_bytes, dtype), 0, {}),)

    def compute_pool(self, rank: int) -> None:
        """Sleeping ranks share no cores."""
        return


# ---- a statement from another cost model


def priced(schedule: Schedule, cost: CostModel, stretch: float, slow: Mapping[int, int]) -> StatedTimes:
    """What every op of the schedule costs alone by `cost`, times `stretch`."""
    kernels: dict[tuple[str, str, Dims], int] = {}
    messages: dict[tuple[int, int, int, int | None], int] = {}
    collectives: dict[tuple[str, tuple[int, ...], int, str], int] = {}
    issue_ns = 0
    for rank in range(schedule.world_size):
        for op in schedule.program(rank).ops:
            issue_ns = max(issue_ns, cost.host_issue_ns(op))
            action = op.action
            if isinstance(action, Compute):
                dims = action.dims_at(schedule.shard_index(rank, action.part))
                key = (action.kernel, action.dtype, dims)
                if key not in kernels:
                    kernels[key] = round(cost.compute(*key).duration_ns * stretch)
            elif isinstance(action, Collective):
                group = schedule.groups[action.group]
                members = group.instances[group.place[rank][0]]
                ranks = members[action.root :] + members[: action.root]
                if len(ranks) > 1:
                    phases = cost.collective(action.kind, ranks, action.size_bytes, action.dtype)
                    taken = (action.kind, ranks, action.size_bytes, action.dtype)
                    collectives[taken] = round(sum(alone_ns(cost, p) for p in phases) * stretch)
            else:
                for message in messages_of(schedule, rank, op):
                    messages[message] = round(alone_ns(cost, cost.point_to_point(*message)) * stretch)
    return StatedTimes(round(issue_ns * stretch), kernels, messages, collectives, dict(slow))


def messages_of(schedule: Schedule, rank: int, op: Op) -> list[tuple[int, int, int, int | None]]:
    """(source, target, size_bytes, chunk_bytes) of what `rank` sends to others for an op."""
    action = op.action
    if isinstance(action, Send):
        peer = schedule.groups[action.group].neighbour(rank, action.offset)
        return [] if peer is None else [(rank, peer, action.size_bytes, None)]
    if not isinstance(action, Shift):
        assert isinstance(action, Recv)
        return []
    group = schedule.groups[action.group]
    found = []
    for hop in action.hops:
        to, size_bytes = group.peer(rank, hop.offset), hop.bytes_at(schedule.shard_index(rank, hop.part))
        if to != rank:
            found.append((rank, to, size_bytes, action.chunk_bytes))
    return found


def alone_ns(cost: CostModel, phase: Phase) -> float:
    """Time of a phase when nothing else uses its links."""
    rates: list[float] = [cost.link_capacity(link) / weight for link, weight in phase.usage.items()]
    rates += [phase.cap_bytes_per_s] if phase.cap_bytes_per_s else []
    return phase.latency_ns + (phase.work_bytes / min(rates) * 1e9 if phase.work_bytes and rates else 0.0)
