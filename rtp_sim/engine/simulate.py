"""The discrete-event engine: plays a schedule against a cost model, with links, cores and partners contended
for.

One generator process per (rank, stream) takes the stream's ops in order. A process waits for an event only
where an end is not yet known: the end of a kernel that nothing can disturb is known as soon as it starts, so
the process runs ahead of the clock and leaves numbers behind (`end`) that other processes read. Transfers are
activities of the fluid network; their ends become known when they happen.

The only module that imports SimPy.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy
from simpy.events import EventPriority

from rtp_sim.engine.activities import (
    Flow,
    Leg,
    Meeting,
    PooledKernel,
    Prepared,
    RankState,
    SlowedKernel,
    Takeoff,
)
from rtp_sim.engine.blocked import deadlock
from rtp_sim.engine.costs import CostModel, Phase
from rtp_sim.engine.fluid import NS_PER_S, Network, Profile, Timed
from rtp_sim.engine.fold import Folds, Usage
from rtp_sim.engine.lowering import (
    Gathering,
    Kernel,
    LoweredOp,
    Plan,
    Receiving,
    Rotation,
    Route,
    Sending,
)
from rtp_sim.engine.lowering import lower as lower_schedule
from rtp_sim.schedule.ir import Schedule
from rtp_sim.timeline import RankTimes, Timeline

PS_PER_NS = 1000
_AFTER_ALL_ELSE = EventPriority(2)
"""For what happens when a nanosecond has settled; SimPy's own events have 0 and 1."""

Wait = Generator[simpy.Event, Any, None]


def simulate(
    schedule: Schedule, cost: CostModel, *, fold: bool = True, folds: Folds | None = None, alike: bool = False
) -> Timeline:
    """When every op starts and ends. With `fold`, ranks that provably behave alike are simulated once; `folds`
    remembers which, for schedules like this one. With `alike` ranks of one program are (engine/fold.py).

    The same input gives the same times, folded or not. Raises DeadlockError where no op can go on although
    some are left, ScheduleError where an op names an op, a group or a peer that its rank lacks.
    """
    plan = lower_schedule(schedule, cost, folded=fold, folds=folds, alike=alike)
    run = _Run(plan)
    run.play()
    times = {
        rank.site.rank: RankTimes(np.frombuffer(rank.start, dtype=np.int64), np.frombuffer(rank.end, dtype=np.int64))
        for rank in run.ranks
    }
    meta: dict[str, str | int | float | bool | None] = {
        "engine": "simulate",
        "folded": fold,
        "simulated_ranks": len(times),
    }
    return Timeline(schedule, "predicted", times, plan.quotient.representative_of, meta)


class _Calendar:
    """The network's clock on SimPy: one event for everything that is due in the same nanosecond."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.due: dict[int, list[Timed]] = {}
        self.unsettled: list[Callable[[], None]] = []

    @property
    def now_ns(self) -> int:
        return int(self.env.now)

    def at(self, time_ns: int, item: Timed) -> None:
        due = self.due.get(time_ns)
        if due is None:
            self.due[time_ns] = [item]
            self.env.timeout(time_ns - self.env.now).callbacks.append(self._fire)
        else:
            due.append(item)

    def _fire(self, _: simpy.Event) -> None:
        time_ns = self.now_ns
        for item in self.due.pop(time_ns):
            item.fire(time_ns)
        if self.unsettled:
            if self.env.peek() > time_ns:
                self.settle()
            else:
                _Settled(self.env, self.settle)

    def when_settled(self, action: Callable[[], None]) -> None:
        self.unsettled.append(action)

    def settle(self) -> None:
        """Do what waited until the nanosecond had settled."""
        actions, self.unsettled = self.unsettled, []
        for action in actions:
            action()


class _Settled(simpy.Event):
    """Happens in the present nanosecond, after every event that is due in it so far."""

    def __init__(self, env: simpy.Environment, action: Callable[[], None]) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        self.callbacks.append(lambda _: action())
        env.schedule(self, priority=_AFTER_ALL_ELSE)


class _Run:
    """One simulation: the event loop, the network, the ranks and the rendezvous that are open."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.env = simpy.Environment(0)
        self.clock = _Calendar(self.env)
        self.network = Network(self.clock, plan.quotient.capacity)
        self.slowdown_permille = plan.cost.overlap_slowdown_permille
        self.ranks = [RankState(site, self.pool(site.pool)) for site in plan.sites]
        self.meetings: dict[object, Meeting] = {}
        self.sends: dict[object, tuple[RankState, Sending]] = {}
        self.receives: dict[object, tuple[RankState, Receiving]] = {}
        self.messages: dict[tuple[int, Route], Prepared] = {}
        self.collectives: dict[object, list[Prepared]] = {}

    def play(self) -> None:
        """Run to the end. Raises DeadlockError if the queue runs dry with ops left."""
        for rank in self.ranks:
            for ops in rank.lowered.streams:
                self.env.process(self.stream(rank, ops))
        self.env.run()
        ranks = self.ranks
        if any(-1 in rank.end for rank in ranks):
            raise deadlock(self.plan, lambda s, i: ranks[s].end[i] >= 0, lambda s, i: ranks[s].arrived[i] >= 0)

    def stream(self, rank: RankState, ops: tuple[LoweredOp, ...]) -> Wait:
        """Take the ops of one stream in order; `clock` is when it is free, maybe ahead of the event loop."""
        start, end, shards = rank.start, rank.end, rank.shards
        disturbed = rank.pool is not None or self.slowdown_permille > 1000
        clock = 0
        for op in ops:
            ready = clock
            for d in op.deps:
                if end[d] < 0:
                    yield self.end_of(rank, d)
                if end[d] > ready:
                    ready = end[d]
            issued = op.offset_ns if op.gate < 0 else end[op.gate] + op.offset_ns
            if issued > ready:
                ready = issued
            index = op.number
            if isinstance(op, Kernel):
                slot, durations = op.duration_ns
                duration = durations[0] if slot < 0 else durations[shards[slot]]
                start[index] = ready
                if not disturbed or not duration:
                    self.complete(rank, index, ready + duration)
                else:
                    if ready > self.env.now:
                        yield self.env.timeout(ready - self.env.now)
                    self.run_kernel(rank, op, duration, ready)
            else:
                rank.arrived[index] = ready
                self.arrive(rank, op, ready)
            if end[index] < 0:
                yield self.end_of(rank, index)
            clock = end[index]

    def end_of(self, rank: RankState, op: int) -> simpy.Event:
        """The event that op's end is known, for an op whose end is not."""
        event = rank.waiting.get(op)
        if event is None:
            event = rank.waiting[op] = simpy.Event(self.env)
        return event

    def complete(self, rank: RankState, op: int, end_ns: int) -> None:
        """From now on it is known that the op ends at `end_ns`."""
        rank.end[op] = end_ns
        waiting = rank.waiting.pop(op, None)
        if waiting is not None:
            waiting.succeed()
        if op in rank.flying:
            rank.flying.remove(op)
            if not rank.flying:
                for job in rank.jobs:
                    job.retime(end_ns)

    def flow_ended(self, rank: RankState, op: int, now_ns: int) -> None:
        """The op has one flow less to wait for."""
        left = rank.pending[op] - 1
        if left:
            rank.pending[op] = left
        else:
            del rank.pending[op]
            self.complete(rank, op, now_ns)

    def run_kernel(self, rank: RankState, op: Kernel, duration_ns: int, now_ns: int) -> None:
        if rank.pool is None:
            SlowedKernel(self, rank, op.number, duration_ns, now_ns, op.slowdown_permille or self.slowdown_permille)
        else:
            PooledKernel(self, rank, op.number).begin(rank.pool, duration_ns * PS_PER_NS, now_ns)

    def arrive(self, rank: RankState, op: Rotation | Gathering | Sending | Receiving, ready_ns: int) -> None:
        """The rank is ready for a communication; what now has all its partners starts."""
        if isinstance(op, Rotation):
            self.arrive_shift(rank, op, ready_ns)
        elif isinstance(op, Gathering):
            self.arrive_collective(rank, op, ready_ns)
        elif isinstance(op, Sending):
            self.arrive_send(rank, op)
        else:
            self.arrive_receive(rank, op)

    def arrive_shift(self, rank: RankState, op: Rotation, ready_ns: int) -> None:
        """Each hop that is not from the rank to itself is two flows: one to a receiver, one from a sender."""
        index = op.number
        legs = rank.legs.get(op.shape)
        if legs is None:
            legs = rank.legs[op.shape] = self.legs(rank, self.plan.shapes[op.shape])
        if not legs:
            rank.start[index] = ready_ns
            self.complete(rank, index, ready_ns)
            return
        rank.pending[index] = 2 * len(legs)
        for hop, _, receiver, sender in legs:
            theirs = op if receiver.lowered is rank.lowered else self.matching(op, receiver)
            if theirs is not None and receiver.arrived[theirs.number] >= 0:
                self.launch_hop(rank, op, hop, receiver, theirs)
            if sender is not rank:
                theirs = op if sender.lowered is rank.lowered else self.matching(op, sender)
                if theirs is not None and sender.arrived[theirs.number] >= 0:
                    self.launch_hop(sender, theirs, hop, rank, op)

    def legs(self, rank: RankState, wires: tuple[int, ...]) -> list[Leg]:
        """The hops over these wires that take the rank to another one."""
        routes = [rank.routes[wire] for wire in wires]
        return [
            (hop, route, self.ranks[route.receiver], self.ranks[route.sender])
            for hop, route in enumerate(routes)
            if route is not None and route.receiver is not None and route.sender is not None and not route.alone
        ]

    def matching(self, op: Rotation, partner: RankState) -> Rotation | None:
        """The partner's op that meets this shift: the n-th on the group; None if it has fewer."""
        theirs = partner.lowered.shifts.get(op.group, ())
        return theirs[op.nth] if op.nth < len(theirs) else None

    def launch_hop(self, sender: RankState, sent: Rotation, hop: int, receiver: RankState, received: Rotation) -> None:
        slot, sizes = sent.sizes[hop]
        size = sizes[0] if slot < 0 else sizes[sender.shards[slot]]
        wire = self.plan.shapes[sent.shape][hop]
        self.launch(sender, sent.number, receiver, received.number, wire, size)

    def launch(self, sender: RankState, sent: int, receiver: RankState, received: int, wire: int, size: int) -> None:
        """Start the flow of a message whose sender and receiver are both ready (or will be at a known
        time)."""
        start_ns = sender.arrived[sent]
        if receiver.arrived[received] > start_ns:
            start_ns = receiver.arrived[received]
        route = sender.routes[wire]
        assert route is not None
        prepared = route.cache.get(size)
        if prepared is None:
            prepared = route.cache[size] = self.prepared(*self.plan.message(route, size))
        latency_ns, work, profile = prepared
        if not 0 <= sender.start[sent] <= start_ns:
            sender.start[sent] = start_ns
        if not 0 <= receiver.start[received] <= start_ns:
            receiver.start[received] = start_ns
        flow = Flow(self, sender, sent, receiver, received)
        if self.slowdown_permille > 1000:
            self.schedule_take_off(flow, start_ns)
        flow.begin(profile, work, start_ns + latency_ns)

    def arrive_collective(self, rank: RankState, op: Gathering, ready_ns: int) -> None:
        """The last member to come starts it."""
        instance, size = rank.site.instances[op.group]
        if not size:
            rank.start[op.number] = ready_ns
            self.complete(rank, op.number, ready_ns)
            return
        key = (op.group, instance, op.nth, op.kind)
        meeting = self.meetings.get(key)
        if meeting is None:
            meeting = self.meetings[key] = Meeting(self)
        meeting.members.append((rank, op.number))
        meeting.start_ns = max(meeting.start_ns, ready_ns)
        if len(meeting.members) < size:
            return
        del self.meetings[key]
        phases = self.collectives.get((op.group, instance, op.kind))
        if phases is None:
            phases = [self.prepared(*p) for p in self.plan.collective(op.group, instance, op.kind)]
            self.collectives[op.group, instance, op.kind] = phases
        for member, index in meeting.members:
            member.start[index] = meeting.start_ns
        if self.slowdown_permille > 1000:
            self.schedule_take_off(meeting, meeting.start_ns)
        meeting.phases = iter(phases)
        meeting.finished(meeting.start_ns)

    def arrive_send(self, rank: RankState, op: Sending) -> None:
        """The flow starts if the receiver is there already."""
        rank.pending[op.number] = 1
        key = (op.wire, rank.number, op.tag, op.nth)
        other = self.receives.pop(key, None)
        if other is None:
            self.sends[key] = rank, op
        else:
            self.launch(rank, op.number, other[0], other[1].number, op.wire, op.size_bytes)

    def arrive_receive(self, rank: RankState, op: Receiving) -> None:
        """The flow starts if the sender is there already."""
        rank.pending[op.number] = 1
        route = rank.routes[op.wire]
        key = (op.wire, None if route is None else route.sender, op.tag, op.nth)
        other = self.sends.pop(key, None)
        if other is None:
            self.receives[key] = rank, op
        else:
            self.launch(other[0], other[1].number, rank, op.number, op.wire, other[1].size_bytes)

    def schedule_take_off(self, activity: Flow | Meeting, start_ns: int) -> None:
        if start_ns > self.env.now:
            self.clock.at(start_ns, Takeoff(activity))
        else:
            self.take_off(activity, start_ns)

    def take_off(self, activity: Flow | Meeting, now_ns: int) -> None:
        """Its ranks now have a communication in flight, until their op ends."""
        for rank, op in activity.ends():
            if rank.end[op] < 0 and op not in rank.flying:
                rank.flying.add(op)
                if len(rank.flying) == 1:
                    for job in rank.jobs:
                        job.retime(now_ns)

    def prepared(self, phase: Phase, usage: Usage) -> Prepared:
        """A phase as the network wants it."""
        return phase.latency_ns, phase.work_bytes, self.network.profile(usage, phase.cap_bytes_per_s)

    def pool(self, usage: Usage | None) -> Profile | None:
        """Kernels on a pool of cores have picoseconds of work and advance by at most one per ps."""
        return None if usage is None else self.network.profile(usage, PS_PER_NS * NS_PER_S)
