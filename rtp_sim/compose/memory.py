"""Memory of a composed step: what each stretch adds and gives back, swept over the order of the stretches.

A buffer is held from its fresh write to its last use, as in engine/memory.py, here in the order of the program instead
of in time: what arrives early or leaves late beside computation is not seen. What belongs to a micro-batch (its name
says so) comes with each one; everything else is there from the first stretch that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rtp_sim.engine.memory import Version
from rtp_sim.schedule.ir import CATEGORIES, Program

Label = object
"""What names a stretch: kind, chunk, and whether it is the last micro-batch's."""

Amount = dict[str, int]
"""Bytes by category."""


@dataclass
class Footprint:
    """`net` is what stays after a stretch, `peak` the most within it beyond what was there before, at the peak of the
    total; both by category, `highest` is the sum of the peak. `op` is the one that makes the peak."""

    net: Amount = field(default_factory=dict)
    peak: Amount = field(default_factory=dict)
    highest: int = 0
    op: int | None = None


@dataclass(frozen=True)
class StageMemory:
    """What a rank holds at its peak, by category; the op that makes the peak, and the largest buffers then (of one
    micro-batch, and of what is there for all)."""

    held: Mapping[str, int]
    op: str = ""
    largest: tuple[tuple[str, int], ...] = ()

    @property
    def total_bytes(self) -> int:
        """All categories together."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Memory:
    """`resident` is there all the time; `per_input` is each micro-batch's input, there from the start. `each[label]` is
    what a stretch does every time, `first[label]` what it does the first time, where something arises that stays."""

    resident: Amount
    per_input: Amount
    each: Mapping[Label, Footprint]
    first: Mapping[Label, Footprint]


Delta = tuple[int, int, str, int]
"""Op, 0 for a write or 1 for a last use, category, bytes."""


def footprints(
    program: Program, versions: Sequence[Version], ranges: Sequence[tuple[Label, int, int, int]],
    shards: Mapping[str, int],
) -> Memory:  # fmt: skip
    """The memory of a program's stretches, given as (label, micro-batch, first op, end). `versions` are its live
    intervals (engine/memory.py), `shards` is the index of this rank's shard by buffer (0 where absent)."""
    label_of = {i: (label, micro) for label, micro, first, stop in ranges for i in range(first, stop)}
    deltas: dict[tuple[Label, int], list[Delta]] = {}
    arising: dict[Label, list[Delta]] = {}
    resident: Amount = {}
    inputs: dict[str, Amount] = {}
    for version in versions:
        buffer = program.buffers[version.buffer]
        size, category = buffer.size_bytes(shards.get(version.buffer, 0)), buffer.category
        micro = version.buffer.partition("/")[0] if "/" in version.buffer and version.buffer[0] == "m" else ""
        if version.writer is None:
            _add(inputs.setdefault(micro, {}) if micro else resident, category, size)
        elif micro:
            deltas.setdefault(label_of[version.writer], []).append((version.writer, 0, category, size))
        else:
            arising.setdefault(label_of[version.writer][0], []).append((version.writer, 0, category, size))
        if micro and not version.kept and version.users:
            last = max(version.users)
            deltas.setdefault(label_of[last], []).append((last, 1, category, -size))
    each: dict[Label, list[Delta]] = {}
    for (label, _), found in deltas.items():
        each.setdefault(label, found)
    return Memory(
        resident,
        next(iter(inputs.values()), {}),
        {label: _footprint(found) for label, found in each.items()},
        {label: _footprint([*found, *each.get(label, [])]) for label, found in arising.items()},
    )


def sweep(memory: Memory, order: Sequence[Label], micros: int) -> tuple[dict[str, int], int | None]:
    """What is held at the peak over stretches in this order, by category, and the op that makes it (None: the start of
    the step)."""
    start = dict.fromkeys(CATEGORIES, 0)
    for category, size in memory.resident.items():
        start[category] += size
    for category, size in memory.per_input.items():
        start[category] += micros * size
    marks, seen = [], set()
    for label in order:
        # Where something arises that stays, the first time is not like the others.
        first = memory.first.get(label) if label not in seen else None
        seen.add(label)
        marks.append(first or memory.each.get(label, _NOTHING))
    more = {id(mark): sum(mark.net.values()) for mark in {id(mark): mark for mark in marks}.values()}
    total = most = sum(start.values())
    highest = None
    for number, mark in enumerate(marks):
        if total + mark.highest > most:
            most, highest = total + mark.highest, number
        total += more[id(mark)]
    if highest is None:
        return start, None
    for mark in marks[:highest]:
        for category, size in mark.net.items():
            start[category] += size
    return {c: start[c] + marks[highest].peak.get(c, 0) for c in CATEGORIES}, marks[highest].op


def largest_at(
    program: Program, versions: Sequence[Version], op: int, shards: Mapping[str, int], count: int = 3
) -> tuple[tuple[str, int], ...]:
    """The largest buffers that are alive at an op, with their bytes: each once, of the micro-batch that it works on."""
    alive = {
        v.buffer: program.buffers[v.buffer].size_bytes(shards.get(v.buffer, 0))
        for v in versions
        if (v.writer is None or v.writer <= op) and (v.kept or op <= max(v.users, default=-1))
    }
    return tuple(sorted(alive.items(), key=lambda pair: (-pair[1], pair[0]))[:count])


_NOTHING = Footprint()


def _footprint(deltas: list[Delta]) -> Footprint:
    found, best, total = Footprint(), 0, 0
    for op, _, category, size in sorted(deltas):
        _add(found.net, category, size)
        total += size
        if total > best:
            best, found.peak, found.op = total, dict(found.net), op
    found.highest = best
    return found


def _add(amount: Amount, category: str, size: int) -> None:
    amount[category] = amount.get(category, 0) + size
