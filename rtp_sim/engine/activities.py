"""What goes on in a simulation, and the state of the ranks it happens to.

Messages, collectives and kernels on shared cores are activities of the fluid network. A kernel that
communication slows down keeps its own account of what is left. Each tells its `Host`, the engine,
when it ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, Protocol

from rtp_sim.engine.fluid import Activity, Clock, Profile
from rtp_sim.engine.lowering import Route, Site

Prepared = tuple[int, int, Profile]
"""latency_ns, work_bytes, profile of one phase."""


class Host(Protocol):
    """The engine as what goes on in it sees it."""

    @property
    def clock(self) -> Clock:
        """The event loop."""

    @property
    def slowdown_permille(self) -> int:
        """How much longer compute takes beside a communication: 1126 is 12.6 %."""

    def complete(self, rank: RankState, op: int, end_ns: int) -> None:
        """The op ends at `end_ns`."""

    def flow_ended(self, rank: RankState, op: int, now_ns: int) -> None:
        """One flow of the op has ended."""

    def take_off(self, activity: Flow | Meeting, now_ns: int) -> None:
        """The communication has started."""


Leg = tuple[int, Route, "RankState", "RankState"]
"""One hop of a shift as a rank takes part in it: hop number, route, receiver, sender."""


class RankState:
    """What one represented rank has done so far. Times are -1 while unknown.

    `arrived` is when a communication op was ready for its partners, `pending` counts the flows of such an op
    that have not ended, `flying` holds those in flight, `jobs` the kernels that these slow down.
    """

    __slots__ = (
        "arrived", "end", "flying", "jobs", "legs", "lowered", "number", "pending", "pool", "routes",
        "shards", "site", "start", "waiting",
    )  # fmt: skip

    def __init__(self, site: Site, pool: Profile | None) -> None:
        blank = array("q", [-1]) * len(site.lowered.ops)
        self.site = site
        self.number = site.number
        self.lowered = site.lowered
        self.routes = site.routes
        self.shards = site.shards
        self.start, self.end, self.arrived = blank[:], blank[:], blank[:]
        self.legs: dict[int, list[Leg]] = {}
        self.pending: dict[int, int] = {}
        self.waiting: dict[int, Any] = {}
        self.flying: set[int] = set()
        self.jobs: list[SlowedKernel] = []
        self.pool = pool


class Flow(Activity):
    """One message from op `sent` of `sender` to op `received` of `receiver`."""

    __slots__ = ("received", "receiver", "run", "sender", "sent")

    def __init__(self, run: Host, sender: RankState, sent: int, receiver: RankState, received: int) -> None:
        self.run = run
        self.sender = sender
        self.sent = sent
        self.receiver = receiver
        self.received = received

    def ends(self) -> list[tuple[RankState, int]]:
        return [(self.sender, self.sent), (self.receiver, self.received)]

    def finished(self, now_ns: int) -> None:
        run = self.run
        run.flow_ended(self.sender, self.sent, now_ns)
        run.flow_ended(self.receiver, self.received, now_ns)


class Meeting(Activity):
    """One collective of one group instance: the rendezvous of its members, then its phases."""

    __slots__ = ("members", "phases", "run", "start_ns")

    def __init__(self, run: Host) -> None:
        self.run = run
        self.members: list[tuple[RankState, int]] = []
        self.start_ns = 0
        self.phases: Iterator[Prepared] = iter(())

    def ends(self) -> list[tuple[RankState, int]]:
        return self.members

    def finished(self, now_ns: int) -> None:
        phase = next(self.phases, None)
        if phase is not None:
            latency_ns, work, profile = phase
            self.begin(profile, work, now_ns + latency_ns)
        else:
            for rank, op in self.members:
                self.run.complete(rank, op, now_ns)


class Takeoff:
    """A communication that starts later: from then on it slows the compute of its ranks."""

    __slots__ = ("activity",)

    def __init__(self, activity: Flow | Meeting) -> None:
        self.activity = activity

    def fire(self, now_ns: int) -> None:
        self.activity.run.take_off(self.activity, now_ns)


class PooledKernel(Activity):
    """A kernel on a pool of cores that other ranks use too."""

    __slots__ = ("op", "rank", "run")

    def __init__(self, run: Host, rank: RankState, op: int) -> None:
        self.run = run
        self.rank = rank
        self.op = op

    def finished(self, now_ns: int) -> None:
        self.run.complete(self.rank, self.op, now_ns)


class SlowedKernel:
    """A kernel that progresses by `permille` units per ns alone and by 1,000 beside a communication of its
    rank."""

    __slots__ = ("finish_ns", "op", "permille", "rank", "rate", "remaining", "run", "since_ns")

    def __init__(self, run: Host, rank: RankState, op: int, duration_ns: int, now_ns: int, permille: int) -> None:
        self.run = run
        self.rank = rank
        self.op = op
        self.permille = permille
        self.remaining = duration_ns * permille
        self.rate = 0
        self.since_ns = now_ns
        rank.jobs.append(self)
        self.retime(now_ns)

    def retime(self, now_ns: int) -> None:
        """Go on at the rate that the rank's communication allows from now on."""
        self.remaining -= self.rate * (now_ns - self.since_ns)
        self.rate = 1000 if self.rank.flying else self.permille
        self.since_ns = now_ns
        self.finish_ns = now_ns + max(0, -(-self.remaining // self.rate))
        self.run.clock.at(self.finish_ns, self)

    def fire(self, now_ns: int) -> None:
        if self.finish_ns == now_ns:
            self.finish_ns = -1
            self.rank.jobs.remove(self)
            self.run.complete(self.rank, self.op, now_ns)
