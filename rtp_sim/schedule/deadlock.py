"""Can every rank run its program to the end, whatever the times?

Without times a schedule is a set of events, "op i of rank r is ready" and "... is done", each of which only
waits for others: ready for the ops before it on the rank (`hazards.direct_predecessors`), done for its own
readiness and that of its partners' ops. Either all events come to pass or a set of them waits for itself; the
order in which they are tried makes no difference, so one topological pass is exact.

Ranks that cannot differ are tried once: ranks are put into classes, first by program, then split until the
partners of two ranks of a class are always of equal classes (an equitable partition). By induction on the
rounds of the pass, all ranks of a class get equally far. A thousand ranks of one program are one class.

The partners of a shift are the ranks it sends to and receives from, not its whole group, as in a batched
isend/irecv.
"""

from __future__ import annotations

from collections.abc import Iterator

from rtp_sim.schedule.finding import Finding, at, excerpt
from rtp_sim.schedule.hazards import direct_predecessors
from rtp_sim.schedule.ir import Collective, Communication, Compute, Schedule, Shift
from rtp_sim.schedule.matching import channels, lane_of

SHOWN_RANKS = 4
"""Blocked ranks (one for each class) that a message lists."""

Event = tuple[int, int]
"""(first rank of a class, op index)."""

Meeting = tuple[str, str, tuple[tuple[int, ...], ...]]
"""What decides who an op's partners are: kind, group, offsets."""


def deadlock_findings(schedule: Schedule) -> Iterator[Finding]:
    """At most one finding, naming the blocked ranks, their ops and what these wait for. The schedule must be
    well formed and its communication must match.
    """
    run = _Run(schedule)
    blocked = run.first_blocked()
    if not blocked:
        return
    count = sum(run.class_of[r] in blocked for r in range(schedule.world_size))
    lines = [f"deadlock: no op can go on; {count} of {schedule.world_size} ranks are blocked"]
    lines += [run.describe(leader, op) for leader, op in list(blocked.items())[:SHOWN_RANKS]]
    if len(blocked) > SHOWN_RANKS:
        lines.append(f"  ... and {len(blocked) - SHOWN_RANKS} more kinds of ranks")
    leader, op = next(iter(blocked.items()))
    yield Finding("error", "deadlock", "\n".join(lines), schedule.program_of_rank[leader], op)


class _Run:
    """A schedule, the classes of its ranks (each named by its first rank), and which ops became ready and
    done.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.traffic = [channels(program) for program in schedule.programs]
        self.meetings = [
            list(dict.fromkeys(_meeting(op.action) for op in p.ops if not isinstance(op.action, Compute)))
            for p in schedule.programs
        ]
        self.class_of = self._classes()
        self.leaders = list(dict.fromkeys(self.class_of))
        self.ready: set[Event] = set()
        self.done: set[Event] = set()
        self._go()

    def first_blocked(self) -> dict[int, int]:
        """Leader of each class that does not finish -> its first op that is never done."""
        blocked = {}
        for leader in self.leaders:
            ops = range(len(self.schedule.program(leader).ops))
            first = next((i for i in ops if (leader, i) not in self.done), None)
            if first is not None:
                blocked[leader] = first
        return blocked

    def describe(self, leader: int, op: int) -> str:
        """What a blocked rank waits for. Its first op that is not done is ready, so it waits for partners."""
        p, shown = self.schedule.program_of_rank[leader], self.schedule.program(leader).ops[op]
        alike = self.class_of.count(leader) - 1
        waits = [
            f"rank {other} to reach {at(self.schedule, self.schedule.program_of_rank[other], j)}"
            for other, j in self._partners(leader, op)
            if (other, j) not in self.ready
        ]
        who = f"rank {leader}" + (f" (and {alike} alike)" if alike else "")
        place = f"{at(self.schedule, p, op)} of program {self.schedule.programs[p].name!r}"
        wait = f"  {who} is stuck in {place} on stream '{shown.stream}', waiting for {', '.join(waits)}"
        return f"{wait}\n{excerpt(self.schedule.programs[p], (op,))}"

    def _classes(self) -> list[int]:
        """rank -> first rank of its class: split by program, then by the classes of the partners, until
        stable.
        """
        class_of = list(self.schedule.program_of_rank)
        count = 0
        while count < (count := len(set(class_of))):
            instances: dict[tuple[str, int], tuple[int, ...]] = {}
            first: dict[tuple[object, ...], int] = {}
            split = []
            for rank, p in enumerate(self.schedule.program_of_rank):
                around = (self._partner_classes(rank, m, class_of, instances) for m in self.meetings[p])
                split.append(first.setdefault((class_of[rank], *around), rank))
            class_of = split
        return class_of

    def _partner_classes(
        self,
        rank: int,
        meeting: Meeting,
        class_of: list[int],
        instances: dict[tuple[str, int], tuple[int, ...]],
    ) -> tuple[int, ...]:
        """Classes of the ranks that `rank` meets: of a collective as a set, kept in `instances`, which are
        shared.
        """
        kind, name, offsets = meeting
        group = self.schedule.groups[name]
        if kind == "collective":
            key = name, group.place[rank][0]
            if key not in instances:
                instances[key] = tuple(sorted({class_of[member] for member in group.instances[key[1]]}))
            return instances[key]
        if kind == "shift":
            return tuple(class_of[group.peer(rank, o, sign)] for o in offsets for sign in (1, -1))
        peer = group.neighbour(rank, offsets[0])
        assert peer is not None, "the structure check comes first"
        return (class_of[peer],)

    def _partners(self, leader: int, op: int) -> list[Event]:
        """The ops that must be ready before this one is done, one for each class of partners."""
        action = self.schedule.program(leader).ops[op].action
        if isinstance(action, Compute):
            return []
        place = self.traffic[self.schedule.program_of_rank[leader]].place[op]
        events = []
        for other in dict.fromkeys(self._partner_classes(leader, _meeting(action), self.class_of, {})):
            theirs = self.traffic[self.schedule.program_of_rank[other]]
            if isinstance(action, Collective | Shift):
                assert isinstance(place, int)
                events.append((other, theirs.rounds[action.group][place]))
            else:
                assert not isinstance(place, int)
                events.append((other, theirs.lanes[lane_of(action, other_end=True)][place]))
        return events

    def _go(self) -> None:
        """Let everything happen that can: ready once all ops before are done, done once all partners are
        ready.
        """
        before = [direct_predecessors(program) for program in self.schedule.programs]
        ready_waits: dict[Event, int] = {}
        done_waits: dict[Event, int] = {}
        followers: dict[Event, list[Event]] = {}
        listeners: dict[Event, list[Event]] = {}
        for leader in self.leaders:
            for i, earlier in enumerate(before[self.schedule.program_of_rank[leader]]):
                event, partners = (leader, i), {(leader, i), *self._partners(leader, i)}
                ready_waits[event], done_waits[event] = len(earlier), len(partners)
                for e in earlier:
                    followers.setdefault((leader, e), []).append(event)
                for partner in partners:
                    listeners.setdefault(partner, []).append(event)
        open_events = [event for event, waits in ready_waits.items() if not waits]
        while open_events:
            event = open_events.pop()
            self.ready.add(event)
            for listener in listeners[event]:
                done_waits[listener] -= 1
                if not done_waits[listener]:
                    self.done.add(listener)
                    for follower in followers.get(listener, ()):
                        ready_waits[follower] -= 1
                        if not ready_waits[follower]:
                            open_events.append(follower)


def _meeting(action: Communication) -> Meeting:
    match action:
        case Collective():
            return "collective", action.group, ()
        case Shift():
            return "shift", action.group, tuple(dict.fromkeys(hop.offset for hop in action.hops))
        case _:
            return "transfer", action.group, (action.offset,)
