"""In which order the ops of all ranks can be evaluated, many ranks at a time, without knowing any time.

Ranks that run one program form a cell, whose ops are taken one by one for all its ranks at once; ops of several cells
that wait for each other form a meeting. Where that order goes round in a circle (ranks of one program that send to each
other in a chain) every rank is a cell of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rtp_sim.engine.fold import Wire
from rtp_sim.engine.lowering import Gathering, Kernel, LoweredOp, LoweredProgram, Plan, Rotation, Sending
from rtp_sim.schedule.ir import Schedule

Node = tuple[int, int]
"""(cell, op)."""
Ranks = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """Ranks that are evaluated together. `before[i]` is the op before op i on its stream, -1 for none; `last` are the
    last ops of the streams."""

    ranks: Ranks
    lowered: LoweredProgram
    before: tuple[int, ...]
    last: tuple[int, ...]

    def read_by(self, op: LoweredOp) -> Iterator[int]:
        """The ops of the cell whose ends decide when `op` is ready."""
        if self.before[op.number] >= 0:
            yield self.before[op.number]
        yield from op.deps
        if op.gate >= 0:
            yield op.gate


@dataclass(frozen=True)
class Step:
    """One thing to evaluate: op `node` of a cell (a kernel, or a communication op that gets ready), or with `meeting`
    all of these communication ops, which are ready. Ends of `free` are not read any more afterwards."""

    node: Node
    meeting: tuple[Node, ...] = ()
    free: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Order:
    """`receiver[wire]` and `sender[wire]` say who is at the other end, by rank; -1 for nobody. `most_alive` is how many
    ranks' ends are kept at once at most."""

    cells: tuple[Cell, ...]
    steps: tuple[Step, ...]
    receiver: tuple[Ranks, ...]
    sender: tuple[Ranks, ...]
    most_alive: int


def order(plan: Plan) -> Order:
    """The order for a lowered schedule. ValueError for a schedule that blocks itself."""
    schedule = plan.schedule
    programs = {schedule.program_of_rank[site.rank]: site.lowered for site in plan.sites}
    ends = tuple(_ends(schedule, wire) for wire in plan.wires)
    together = [np.flatnonzero(np.array(schedule.program_of_rank) == p) for p in sorted(programs)]
    alone = [np.array([rank]) for rank in range(schedule.world_size)]
    for parts in (together, alone):
        cells = tuple(_cell(ranks, programs[schedule.program_of_rank[int(ranks[0])]]) for ranks in parts)
        steps = _Walk(plan, cells, [receiver for receiver, _ in ends]).run()
        if steps is not None:
            freed, most = _freed(cells, steps)
            return Order(cells, freed, tuple(r for r, _ in ends), tuple(s for _, s in ends), most)
    raise ValueError(f"{schedule.name}: some ops wait for each other")


def _cell(ranks: Ranks, lowered: LoweredProgram) -> Cell:
    before = [-1] * len(lowered.ops)
    for stream in lowered.streams:
        for previous, op in pairwise(stream):
            before[op.number] = previous.number
    return Cell(ranks, lowered, tuple(before), tuple(stream[-1].number for stream in lowered.streams))


def _ends(schedule: Schedule, wire: Wire) -> tuple[Ranks, Ranks]:
    """(receiver, sender) by rank."""
    group = schedule.groups[wire.group]
    receiver, sender = np.full((2, schedule.world_size), -1, dtype=np.int64)
    for rank in group.place:
        to, source = wire.receiver(group, rank), wire.sender(group, rank)
        receiver[rank] = -1 if to is None else to
        sender[rank] = -1 if source is None else source
    return receiver, sender


def _freed(cells: tuple[Cell, ...], steps: list[Step]) -> tuple[tuple[Step, ...], int]:
    """The steps, each with what nobody reads after it, and the most ranks whose ends are alive at once."""
    kept = {(c, i) for c, cell in enumerate(cells) for i in cell.last}
    last_read: dict[Node, int] = {}
    for n, step in enumerate(steps):
        for node in step.meeting or (step.node,):
            last_read[node] = n
        if not step.meeting:
            cell, op = cells[step.node[0]], cells[step.node[0]].lowered.ops[step.node[1]]
            last_read |= {(step.node[0], i): n for i in cell.read_by(op)}
    free: dict[int, list[Node]] = {}
    for node, n in last_read.items():
        if node not in kept:
            free.setdefault(n, []).append(node)
    found, alive, most = [], 0, 1
    for n, step in enumerate(steps):
        gone = tuple(free.get(n, ()))
        # A communication op is alive from when it is ready: its end takes that place.
        alive += 0 if step.meeting else len(cells[step.node[0]].ranks)
        most = max(most, alive)
        alive -= sum(len(cells[c].ranks) for c, _ in gone)
        found.append(Step(step.node, step.meeting, gone))
    return tuple(found), most


@dataclass
class _Walk:
    """Takes streams as far as they go, until all are at their ends."""

    plan: Plan
    cells: tuple[Cell, ...]
    receivers: list[Ranks]
    done: set[Node] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)
    waiting: dict[Node, list[tuple[int, int]]] = field(default_factory=dict)

    def run(self) -> list[Step] | None:
        """The steps in order; None if it goes round in a circle."""
        self.meeting_of = meetings(self.plan, self.cells, self.receivers)
        self.missing = {id(m): set(m) for m in self.meeting_of.values()}
        self.at = [[0] * len(cell.lowered.streams) for cell in self.cells]
        ready = [(c, s) for c, cell in enumerate(self.cells) for s in range(len(cell.lowered.streams))]
        while ready:
            c, s = ready.pop()
            stream = self.cells[c].lowered.streams[s]
            while self.at[c][s] < len(stream):
                blocked = self.take(c, stream[self.at[c][s]], ready)
                if blocked is not None:
                    self.waiting.setdefault(blocked, []).append((c, s))
                    break
                self.at[c][s] += 1
        return self.steps if len(self.done) == sum(len(cell.lowered.ops) for cell in self.cells) else None

    def take(self, c: int, op: LoweredOp, ready: list[tuple[int, int]]) -> Node | None:
        """Evaluates an op, or says what it waits for."""
        node = c, op.number
        if node in self.done:
            return None
        for i in self.cells[c].read_by(op):
            if (c, i) not in self.done:
                return c, i
        if isinstance(op, Kernel):
            self.steps.append(Step(node))
            self.finish(node, ready)
            return None
        meeting = self.meeting_of[node]
        missing = self.missing[id(meeting)]
        if node in missing:
            self.steps.append(Step(node))
            missing.remove(node)
            if not missing:
                self.steps.append(Step(node, meeting))
                for member in meeting:
                    self.finish(member, ready)
        return None if node in self.done else node

    def finish(self, node: Node, ready: list[tuple[int, int]]) -> None:
        self.done.add(node)
        ready += self.waiting.pop(node, [])


def meetings(plan: Plan, cells: tuple[Cell, ...], receivers: list[Ranks]) -> Mapping[Node, tuple[Node, ...]]:
    """For every communication op the ops that meet, itself included."""
    index = [_by_name(cell) for cell in cells]
    cell_of = np.zeros(plan.schedule.world_size, dtype=np.int64)
    for c, cell in enumerate(cells):
        cell_of[cell.ranks] = c
    beside = _Beside(plan, cells, cell_of, receivers)
    parent: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for c in range(len(cells)):
        for name, i in index[c].items():
            for other in beside.cells(c, name):
                theirs = index[other].get(_answer(name))
                if theirs is not None:
                    parent[root((other, theirs))] = root((c, i))
            root((c, i))
    members: dict[Node, list[Node]] = {}
    for node in parent:
        members.setdefault(root(node), []).append(node)
    return {node: found for some in members.values() for found in [tuple(sorted(some))] for node in found}


Name = tuple[str, str | int, str, int]
"""What partners know a communication op by: "group", name, kind, nth; or "send" or "receive", wire, tag, nth."""


def _by_name(cell: Cell) -> dict[Name, int]:
    """The communication ops of a cell."""
    found: dict[Name, int] = {}
    for op in cell.lowered.ops:
        if isinstance(op, Rotation | Gathering):
            found["group", op.group, type(op).__name__, op.nth] = op.number
        elif not isinstance(op, Kernel):
            found["send" if isinstance(op, Sending) else "receive", op.wire, op.tag, op.nth] = op.number
    return found


def _answer(name: Name) -> Name:
    """What a partner calls its side."""
    return {"send": "receive", "receive": "send", "group": "group"}[name[0]], *name[1:]


class _Beside:
    """Which cells a cell communicates with: those of its groups' instances, or those at the other end of a wire."""

    def __init__(self, plan: Plan, cells: tuple[Cell, ...], cell_of: Ranks, receivers: list[Ranks]) -> None:
        self.plan, self.cells_all, self.cell_of, self.receivers = plan, cells, cell_of, receivers
        self.known: dict[tuple[str, int | str], list[set[int]]] = {}

    def cells(self, cell: int, name: Name) -> set[int]:
        """The cells, maybe itself among them. A receive has none: its send names it."""
        if name[0] == "receive":
            return set()
        key = name[:2]
        if key not in self.known:
            self.known[key] = self._group(str(name[1])) if name[0] == "group" else self._wire(int(name[1]))
        return self.known[key][cell]

    def _group(self, group: str) -> list[set[int]]:
        found: list[set[int]] = [set() for _ in self.cells_all]
        for members in self.plan.schedule.groups[group].instances:
            inside = {int(c) for c in self.cell_of[list(members)]}
            for c in inside:
                found[c] |= inside
        return found

    def _wire(self, wire: int) -> list[set[int]]:
        found: list[set[int]] = [set() for _ in self.cells_all]
        to = self.receivers[wire]
        for rank in np.flatnonzero(to >= 0):
            found[int(self.cell_of[rank])].add(int(self.cell_of[to[rank]]))
        return found
