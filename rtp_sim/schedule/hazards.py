"""Happens-before inside one program, and the races it leaves: two ops on one buffer, one writing, in no fixed
order.

An op starts after the op before it on its stream, after everything in `after`, and after every earlier op
that blocks the host. Nothing else orders two ops of a rank, so vector clocks with one entry per stream (C.
Fidge and F. Mattern, 1988) decide every pair in constant time. Neither the simulated time nor, usually, a
test run notices a race: only this check does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rtp_sim.schedule.finding import Finding, at, at_ops
from rtp_sim.schedule.ir import Program, Schedule

Clock = tuple[int, ...]


class Access(NamedTuple):
    """One op's use of one buffer."""

    op: int
    reads: bool
    writes: bool


def direct_predecessors(program: Program) -> list[tuple[int, ...]]:
    """Per op, the ops it starts after: the last on its stream, the last that blocks the host, and `after`."""
    last_on: dict[str, int] = {}
    last_blocking = -1
    before: list[tuple[int, ...]] = []
    for i, op in enumerate(program.ops):
        found = {last_on.get(op.stream, -1), last_blocking, *op.after} - {-1}
        before.append(tuple(found))
        last_on[op.stream] = i
        if op.blocks_host:
            last_blocking = i
    return before


@dataclass(frozen=True)
class HappensBefore:
    """The order of a program's ops: `clocks[i][s]` is the last op on stream s that has ended when op i
    starts.
    """

    stream_of: list[int]
    clocks: list[Clock]

    def orders(self, earlier: int, later: int) -> bool:
        """Has `earlier` always ended when `later` starts?"""
        return self.clocks[later][self.stream_of[earlier]] >= earlier


def happens_before(program: Program) -> HappensBefore:
    """The order of the ops of `program`, whose `after` must name earlier ops. Linear in ops times streams."""
    number = {stream: s for s, stream in enumerate(program.streams)}
    stream_of = [number[op.stream] for op in program.ops]
    start: Clock = (-1,) * len(number)
    clocks: list[Clock] = []
    ended: list[Clock] = []
    for i, before in enumerate(direct_predecessors(program)):
        if not before:
            clock = start
        elif len(before) == 1:
            clock = ended[before[0]]
        else:
            clock = tuple(map(max, *(ended[b] for b in before)))
        clocks.append(clock)
        s = stream_of[i]
        ended.append((*clock[:s], i, *clock[s + 1 :]))
    return HappensBefore(stream_of, clocks)


def accesses(program: Program) -> dict[str, list[Access]]:
    """Who uses each buffer of a program, in program order."""
    users: dict[str, list[Access]] = {name: [] for name in program.buffers}
    for i, op in enumerate(program.ops):
        for name in dict.fromkeys((*op.reads, *op.writes)):
            users[name].append(Access(i, name in op.reads, name in op.writes))
    return users


def unordered_pairs(program: Program) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """Races: (earlier, later in program order) -> the (kind, buffer) of each conflict, in order of the later
    op.

    Only the last writer and the readers since (the last on each stream) are compared with an op: where these
    are all ordered, so is every earlier user; where they are not, at least one race is reported.
    """
    order = happens_before(program)
    races: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for name, users in accesses(program).items():
        writer, readers = -1, dict[int, int]()
        for user in users:
            conflicts = []
            if writer >= 0:
                conflicts.append((writer, "read-after-write" if user.reads else "write-after-write"))
            if user.writes:
                conflicts += [(reader, "write-after-read") for reader in readers.values()]
            for other, kind in conflicts:
                if not order.orders(other, user.op):
                    races.setdefault((other, user.op), []).append((kind, name))
            if user.writes:
                writer, readers = user.op, {}
            else:
                readers[order.stream_of[user.op]] = user.op
    return dict(sorted(races.items(), key=lambda race: race[0][::-1]))


def hazard_findings(schedule: Schedule) -> Iterator[Finding]:
    """One finding per pair of ops of a program that race, saying which dependency is missing."""
    for p, program in enumerate(schedule.programs):
        for (earlier, later), conflicts in unordered_pairs(program).items():
            kind = conflicts[0][0]
            buffers = ", ".join(f"'{name}'" for name in dict.fromkeys(name for _, name in conflicts))
            first = "writes" if kind != "write-after-read" else "reads"
            then = "reads" if kind == "read-after-write" else "writes"
            what = (
                f"{kind} hazard on {buffers}: it {then} what {at(schedule, p, earlier)} {first} on stream "
                f"'{program.ops[earlier].stream}', and nothing orders the two; missing dependency: "
                f"%{later} after %{earlier}"
            )
            yield at_ops(schedule, "hazard", p, (earlier, later), what)
