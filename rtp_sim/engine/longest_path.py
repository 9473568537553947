"""The engine without contention: each op ends as early as its dependencies, its host and its partners allow.

Every transfer has the links of its route to itself and compute is slowed by nothing, so an end is known as
soon as a start is, and no event queue is needed: a worklist of streams suffices. Where nothing contends the
result equals the discrete-event engine's to the nanosecond; elsewhere it is a lower bound that is cheap to
compute.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from rtp_sim.engine.blocked import deadlock
from rtp_sim.engine.costs import CostModel, Phase
from rtp_sim.engine.fluid import NS_PER_S
from rtp_sim.engine.fold import Folds
from rtp_sim.engine.lowering import (
    Gathering,
    Kernel,
    LoweredOp,
    Plan,
    Receiving,
    Rotation,
    Route,
    Sending,
    Site,
    lower,
)
from rtp_sim.schedule.ir import Schedule
from rtp_sim.timeline import RankTimes, Timeline


def longest_path(
    schedule: Schedule, cost: CostModel, *, fold: bool = True, folds: Folds | None = None
) -> Timeline:
    """When every op starts and ends if nothing contends. With `fold`, ranks that behave alike are evaluated
    once.

    Raises DeadlockError where no op can go on although some are left, ScheduleError where an op names an op,
    a group or a peer that its rank lacks.
    """
    plan = lower(schedule, cost, folded=fold, folds=folds)
    walk = _Walk(plan)
    walk.run()
    ranks = {
        rank.site.rank: RankTimes(np.frombuffer(rank.start, dtype=np.int64), np.frombuffer(rank.end, dtype=np.int64))
        for rank in walk.ranks
    }
    meta: dict[str, str | int | float | bool | None] = {
        "engine": "longest_path",
        "folded": fold,
        "simulated_ranks": len(ranks),
    }
    return Timeline(schedule, "predicted", ranks, plan.quotient.representative_of, meta)


def unshared_ns(phase: Phase, cost: CostModel) -> int:
    """Time of a phase that has its links to itself."""
    rates = [max(1, cost.link_capacity(link) // weight) for link, weight in phase.usage.items()]
    if phase.cap_bytes_per_s is not None:
        rates.append(phase.cap_bytes_per_s)
    flowing_ns = -(-phase.work_bytes * NS_PER_S // min(rates)) if rates else 0
    return phase.latency_ns + flowing_ns


Leg = tuple[int, "_Rank", "_Rank"]
"""One hop of a shift as a rank takes part in it: hop number, receiver, sender."""


class _Rank:
    """Known times of one represented rank (-1: not yet), and the streams that wait for one of its ops.

    `left` counts the flows of a shift whose end is not known yet, `last` is the latest end of the others.
    """

    __slots__ = ("arrived", "end", "last", "left", "legs", "lowered", "site", "start", "waiting")

    def __init__(self, site: Site) -> None:
        blank = array("q", [-1]) * len(site.lowered.ops)
        self.site = site
        self.lowered = site.lowered
        self.start, self.end, self.arrived = blank[:], blank[:], blank[:]
        self.left: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.legs: dict[int, list[Leg]] = {}
        self.waiting: dict[int, list[Iterator[int]]] = {}


class _Walk:
    """The worklist and the rendezvous that are open."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ranks = [_Rank(site) for site in plan.sites]
        self.meetings: dict[object, list[tuple[_Rank, int]]] = {}
        self.sends: dict[object, tuple[_Rank, Sending]] = {}
        self.receives: dict[object, tuple[_Rank, Receiving]] = {}
        self.prices: dict[object, int] = {}
        self.ready: list[tuple[_Rank, Iterator[int]]] = []

    def run(self) -> None:
        """Walk every stream to its end. Raises DeadlockError if some cannot get there."""
        ranks = self.ranks
        for rank in reversed(ranks):
            self.ready += [(rank, self.stream(rank, ops)) for ops in rank.site.lowered.streams]
        while self.ready:
            rank, stream = self.ready.pop()
            wanted = next(stream, None)
            if wanted is not None:
                rank.waiting.setdefault(wanted, []).append(stream)
        if any(-1 in rank.end for rank in ranks):
            raise deadlock(self.plan, lambda s, i: ranks[s].end[i] >= 0, lambda s, i: ranks[s].arrived[i] >= 0)

    def stream(self, rank: _Rank, ops: tuple[LoweredOp, ...]) -> Iterator[int]:
        """Take the ops of a stream in order; yields the index of an op whose end it needs and does not
        know."""
        start, end, shards, waiting = rank.start, rank.end, rank.site.shards, rank.waiting
        clock = 0
        for op in ops:
            index = op.number
            for d in op.deps:
                if end[d] < 0:
                    yield d
                if end[d] > clock:
                    clock = end[d]
            issued = op.offset_ns if op.gate < 0 else end[op.gate] + op.offset_ns
            if issued > clock:
                clock = issued
            if isinstance(op, Kernel):
                start[index] = clock
                slot, durations = op.duration_ns
                clock += durations[0] if slot < 0 else durations[shards[slot]]
                end[index] = clock
                if index in waiting:
                    self.wake(rank, index)
            else:
                rank.arrived[index] = clock
                self.arrive(rank, op, clock)
                if end[index] < 0:
                    yield index
                clock = end[index]

    def wake(self, rank: _Rank, index: int) -> None:
        """Streams that wait for the op can go on."""
        for stream in rank.waiting.pop(index, ()):
            self.ready.append((rank, stream))

    def arrive(self, rank: _Rank, op: Rotation | Gathering | Sending | Receiving, ready_ns: int) -> None:
        """The rank is ready for a communication: what now has all its partners gets its times."""
        if isinstance(op, Rotation):
            self.arrive_shift(rank, op, ready_ns)
        elif isinstance(op, Gathering):
            self.arrive_collective(rank, op, ready_ns)
        elif isinstance(op, Sending):
            self.sends[op.wire, rank.site.number, op.tag, op.nth] = rank, op
            self.try_message((op.wire, rank.site.number, op.tag, op.nth))
        else:
            route = rank.site.routes[op.wire]
            sender = None if route is None else route.sender
            self.receives[op.wire, sender, op.tag, op.nth] = rank, op
            self.try_message((op.wire, sender, op.tag, op.nth))

    def arrive_shift(self, rank: _Rank, op: Rotation, ready_ns: int) -> None:
        """Every hop that is not from the rank to itself sends one flow and receives another."""
        legs = rank.legs.get(op.shape)
        if legs is None:
            legs = rank.legs[op.shape] = self.legs(rank, self.plan.shapes[op.shape])
        if not legs:
            self.settle(rank, op.number, ready_ns, ready_ns)
            return
        rank.left[op.number] = 2 * len(legs)
        for hop, receiver, sender in legs:
            self.try_hop(rank, receiver, op, hop)
            if sender is not rank:
                self.try_hop(sender, rank, op, hop)

    def legs(self, rank: _Rank, wires: tuple[int, ...]) -> list[Leg]:
        """The hops over these wires that take the rank to another one."""
        routes = [rank.site.routes[wire] for wire in wires]
        return [
            (hop, self.ranks[route.receiver], self.ranks[route.sender])
            for hop, route in enumerate(routes)
            if route is not None and route.receiver is not None and route.sender is not None and not route.alone
        ]

    def try_hop(self, sender: _Rank, receiver: _Rank, op: Rotation, hop: int) -> None:
        """One hop of the shift that both know as `op.nth` on the group, if both are there."""
        sent = received = op
        if sender.lowered is not receiver.lowered:
            theirs, ours = sender.lowered.shifts.get(op.group, ()), receiver.lowered.shifts.get(op.group, ())
            if op.nth >= len(theirs) or op.nth >= len(ours):
                return
            sent, received = theirs[op.nth], ours[op.nth]
        ready_ns, met_ns = sender.arrived[sent.number], receiver.arrived[received.number]
        if ready_ns < 0 or met_ns < 0:
            return
        if met_ns > ready_ns:
            ready_ns = met_ns
        slot, sizes = sent.sizes[hop]
        size = sizes[0] if slot < 0 else sizes[sender.site.shards[slot]]
        route = sender.site.routes[self.plan.shapes[sent.shape][hop]]
        assert route is not None
        end_ns = ready_ns + (route.cache[size] if size in route.cache else self.message_ns(route, size))
        self.flow(sender, sent.number, ready_ns, end_ns)
        self.flow(receiver, received.number, ready_ns, end_ns)

    def flow(self, rank: _Rank, op: int, start_ns: int, end_ns: int) -> None:
        """The times of one flow of a shift are known."""
        if not 0 <= rank.start[op] <= start_ns:
            rank.start[op] = start_ns
        if end_ns > rank.last.get(op, -1):
            rank.last[op] = end_ns
        rank.left[op] -= 1
        if not rank.left[op]:
            del rank.left[op]
            self.settle(rank, op, rank.start[op], rank.last.pop(op))

    def try_message(self, key: tuple[int, int | None, str, int]) -> None:
        """A send and its receive, if both are there."""
        if key in self.sends and key in self.receives:
            (source, sent), (target, received) = self.sends.pop(key), self.receives.pop(key)
            start_ns = max(source.arrived[sent.number], target.arrived[received.number])
            route = source.site.routes[sent.wire]
            assert route is not None
            end_ns = start_ns + self.message_ns(route, sent.size_bytes)
            self.settle(source, sent.number, start_ns, end_ns)
            self.settle(target, received.number, start_ns, end_ns)

    def message_ns(self, route: Route, size_bytes: int) -> int:
        """Time of one message alone."""
        price: int | None = route.cache.get(size_bytes)
        if price is None:
            phase, _ = self.plan.message(route, size_bytes)
            price = route.cache[size_bytes] = unshared_ns(phase, self.plan.cost)
        return price

    def arrive_collective(self, rank: _Rank, op: Gathering, ready_ns: int) -> None:
        """The last member to come gives all of them their times."""
        instance, size = rank.site.instances[op.group]
        if not size:
            self.settle(rank, op.number, ready_ns, ready_ns)
            return
        key = (op.group, instance, op.nth, op.kind)
        members = self.meetings.setdefault(key, [])
        members.append((rank, op.number))
        if len(members) == size:
            del self.meetings[key]
            start_ns = max(member.arrived[i] for member, i in members)
            end_ns = start_ns + self.collective_ns(op, instance)
            for member, i in members:
                self.settle(member, i, start_ns, end_ns)

    def collective_ns(self, op: Gathering, instance: int) -> int:
        """Time of a collective alone: its phases one after another."""
        key = (op.group, instance, op.kind)
        price = self.prices.get(key)
        if price is None:
            phases = self.plan.collective(op.group, instance, op.kind)
            price = self.prices[key] = sum(unshared_ns(phase, self.plan.cost) for phase, _ in phases)
        return price

    def settle(self, rank: _Rank, op: int, start_ns: int, end_ns: int) -> None:
        """The times of a communication op are known."""
        rank.start[op] = start_ns
        rank.end[op] = end_ns
        self.wake(rank, op)
