"""Lowering: programs as both engines read them, and where each represented rank sits among the others.

What can be known before time starts is worked out here once: kernel times, host issue times, which
dependencies are not already implied by stream order, who the partners of a rank are and which of their ops
meets which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rtp_sim.engine.costs import CostModel, OpCost, Phase
from rtp_sim.engine.fold import CollectiveKind, Folds, Quotient, Usage, Wire, collective_ranks, fold
from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.ir import (
    Collective,
    Compute,
    Op,
    Part,
    Program,
    Schedule,
    Send,
    Shift,
    Size,
)

Amount = tuple[int, tuple[int, ...]]
"""(-1, (number,)), or (slot, numbers indexed by the shard that the slot names)."""


class Kernel(NamedTuple):
    """A compute op. All lowered ops begin with the same fields: the op's index; the host has issued it
    `offset_ns` after op `gate` ended (-1: after the step began); `deps` are what stream order does not
    imply. `slowdown_permille` as in engine/costs.py, of the first shard."""

    number: int
    gate: int
    offset_ns: int
    deps: tuple[int, ...]
    duration_ns: Amount
    slowdown_permille: int | None = None


class Rotation(NamedTuple):
    """The `nth` shift of its program on a group: hop j uses wire j of shape number `shape` and sends
    sizes[j]."""

    number: int
    gate: int
    offset_ns: int
    deps: tuple[int, ...]
    group: str
    nth: int
    shape: int
    sizes: tuple[Amount, ...]


class Gathering(NamedTuple):
    """The `nth` collective of its program on a group."""

    number: int
    gate: int
    offset_ns: int
    deps: tuple[int, ...]
    group: str
    nth: int
    kind: CollectiveKind


class Sending(NamedTuple):
    """The `nth` send of its program with that tag on that wire."""

    number: int
    gate: int
    offset_ns: int
    deps: tuple[int, ...]
    wire: int
    tag: str
    nth: int
    size_bytes: int


class Receiving(NamedTuple):
    """The receive that meets the `nth` send of the sender with that tag on that wire."""

    number: int
    gate: int
    offset_ns: int
    deps: tuple[int, ...]
    wire: int
    tag: str
    nth: int


LoweredOp = Kernel | Rotation | Gathering | Sending | Receiving


@dataclass(frozen=True, slots=True)
class LoweredProgram:
    """`streams` holds each stream's ops in order; `shifts[group]` the shifts on a group in order; `issue_ns` the host's
    time for each op."""

    program: Program
    streams: tuple[tuple[LoweredOp, ...], ...]
    ops: tuple[LoweredOp, ...]
    shifts: dict[str, list[Rotation]]
    issue_ns: tuple[int, ...]


@dataclass(slots=True)
class Route:
    """One wire as one represented rank uses it: represented partners (numbers of sites), None where it has
    none.

    `alone` marks a hop from a rank to itself, which takes no time. `cache` is the engine's, by message size.
    """

    wire: Wire
    alone: bool
    receiver: int | None
    sender: int | None
    rank: int
    receiver_rank: int
    cache: dict[int, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Site:
    """A represented rank: its program, the shards it holds by slot, its routes by wire number.

    `instances[group]` is (representative instance, number of distinct represented members; 0 if it is alone).
    """

    number: int
    rank: int
    lowered: LoweredProgram
    shards: tuple[int, ...]
    routes: tuple[Route | None, ...]
    instances: dict[str, tuple[int, int]]
    pool: Usage | None


@dataclass(frozen=True)
class Plan:
    """Everything an engine needs before time starts."""

    schedule: Schedule
    cost: CostModel
    quotient: Quotient
    wires: tuple[Wire, ...]
    shapes: tuple[tuple[int, ...], ...]
    sites: tuple[Site, ...]

    def message(self, route: Route, size_bytes: int) -> tuple[Phase, Usage]:
        """The phase of one message on a route, and what it and those it stands for put on the link
        classes."""
        phase = self.cost.point_to_point(route.rank, route.receiver_rank, size_bytes, route.wire.chunk_bytes)
        return phase, self.quotient.usage(("flow", route.wire, route.rank), phase)

    def collective(self, group: str, instance: int, wanted: CollectiveKind) -> list[tuple[Phase, Usage]]:
        """The phases of a collective of a represented instance, with their usages of link classes."""
        kind, size_bytes, dtype, root = wanted
        ranks = collective_ranks(self.schedule.groups[group].instances[instance], root)
        phases = self.cost.collective(kind, ranks, size_bytes, dtype)
        return [(phase, self.quotient.usage(("group", group, instance), phase)) for phase in phases]


def lower(
    schedule: Schedule, cost: CostModel, *, folded: bool, folds: Folds | None = None, alike: bool = False
) -> Plan:
    """Fold (see fold.py for `alike`) and lower a schedule; `folds` remembers quotients of schedules like it. Raises
    ScheduleError where an op names an op or a group that its rank lacks."""
    known = folds if folded else None
    quotient = (
        known.fold(schedule, cost, alike) if known is not None else fold(schedule, cost, folded=folded, alike=alike)
    )
    names = _Numbers({}, {}, {})
    # A program that several numbers stand for is lowered once.
    made: dict[int, LoweredProgram] = {}
    for program in schedule.programs:
        if id(program) not in made:
            made[id(program)] = _Lowering(program, cost, names).run()
    programs = [made[id(program)] for program in schedule.programs]
    number = {rank: n for n, rank in enumerate(quotient.representatives)}
    sites = tuple(
        _site(schedule, cost, quotient, number, rank, programs[schedule.program_of_rank[rank]], names)
        for rank in quotient.representatives
    )
    return Plan(schedule, cost, quotient, tuple(names.wires), tuple(names.shapes), sites)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Numbers given to wires, to the wires of a shift together, and to parts, over all programs."""

    wires: dict[Wire, int]
    shapes: dict[tuple[int, ...], int]
    slots: dict[Part, int]


class _Lowering:
    """Walks one program in issue order."""

    def __init__(self, program: Program, cost: CostModel, names: _Numbers) -> None:
        self.program = program
        self.cost = cost
        self.names = names
        self.shifts: dict[str, list[Rotation]] = {}
        self.counts: dict[object, int] = {}
        self.known_shapes: dict[object, int] = {}
        self.prices: dict[object, OpCost] = {}

    def run(self) -> LoweredProgram:
        ops = self.program.ops
        lowered: list[LoweredOp] = []
        issue_ns: list[int] = []
        gate, offset_ns = -1, 0
        for place, op in enumerate(ops):
            if op.index != place:
                raise ScheduleError(
                    f"program {self.program.name!r}: op {op.name!r} has index {op.index}, but its place is {place}"
                )
            issue_ns.append(self.cost.host_issue_ns(op))
            offset_ns += issue_ns[-1]
            lowered.append(self.lowered(op, (place, gate, offset_ns, self.deps(op, gate))))
            if op.blocks_host:
                gate, offset_ns = place, 0
        by_stream: dict[str, list[LoweredOp]] = {stream: [] for stream in self.program.streams}
        for op, low in zip(ops, lowered, strict=True):
            by_stream[op.stream].append(low)
        streams = tuple(tuple(s) for s in by_stream.values())
        return LoweredProgram(self.program, streams, tuple(lowered), self.shifts, tuple(issue_ns))

    def deps(self, op: Op, gate: int) -> tuple[int, ...]:
        """The last dependency on each other stream: the earlier ones, and those on the op's own, are
        implied."""
        ops = self.program.ops
        before = (*op.after, gate) if gate >= 0 else op.after
        if not before:
            return ()
        last: dict[str, int] = {}
        for d in before:
            if not 0 <= d < len(ops):
                raise ScheduleError(
                    f"program {self.program.name!r}: op {op.name!r} comes after op {d}; there are {len(ops)} ops"
                )
            stream = ops[d].stream
            if stream != op.stream or d >= op.index:
                last[stream] = max(d, last.get(stream, -1))
        return tuple(last.values())

    def lowered(self, op: Op, common: tuple[int, int, int, tuple[int, ...]]) -> LoweredOp:
        """The op with what its kind needs after the fields `common` to all kinds."""
        action = op.action
        if isinstance(action, Compute):
            return Kernel(*common, self.duration(action), self.cost_of(action, 0).slowdown_permille)
        if isinstance(action, Shift):
            on_group = self.shifts.setdefault(action.group, [])
            shape = self.shape(action)
            sizes = tuple([self.amount(hop.part, hop.size_bytes) for hop in action.hops])
            on_group.append(Rotation(*common, action.group, len(on_group), shape, sizes))
            return on_group[-1]
        if isinstance(action, Collective):
            kind = (action.kind, action.size_bytes, action.dtype, action.root)
            return Gathering(*common, action.group, self.count(action.group), kind)
        if isinstance(action, Send):
            wire = self.wire(Wire(action.group, action.offset, None, False))
            nth = self.count((wire, action.tag, "send"))
            return Sending(*common, wire, action.tag, nth, action.size_bytes)
        wire = self.wire(Wire(action.group, tuple(-o for o in action.offset), None, False))
        return Receiving(*common, wire, action.tag, self.count((wire, action.tag, "recv")))

    def shape(self, action: Shift) -> int:
        """The number of the wires that the hops use together."""
        key = (action.group, action.chunk_bytes, tuple([hop.offset for hop in action.hops]))
        found = self.known_shapes.get(key)
        if found is None:
            wires = tuple(self.wire(Wire(action.group, o, action.chunk_bytes, True)) for o in key[2])
            found = self.names.shapes.setdefault(wires, len(self.names.shapes))
            self.known_shapes[key] = found
        return found

    def duration(self, action: Compute) -> Amount:
        if action.variants is None:
            return -1, (self.price(action, 0),)
        return self.amount(action.part, tuple(self.price(action, s) for s in range(len(action.variants))))

    def price(self, action: Compute, shard: int) -> int:
        return self.cost_of(action, shard).duration_ns

    def cost_of(self, action: Compute, shard: int) -> OpCost:
        key = (action.kernel, action.dtype, action.dims_at(shard))
        found = self.prices.get(key)
        if found is None:
            found = self.prices[key] = self.cost.compute(*key)
        return found

    def amount(self, part: Part | None, size: Size) -> Amount:
        if isinstance(size, int):
            return -1, (size,)
        if part is None or len(set(size)) == 1:
            return -1, size[:1]
        return self.names.slots.setdefault(part, len(self.names.slots)), size

    def wire(self, wire: Wire) -> int:
        return self.names.wires.setdefault(wire, len(self.names.wires))

    def count(self, key: object) -> int:
        n = self.counts.get(key, 0)
        self.counts[key] = n + 1
        return n


def _site(
    schedule: Schedule,
    cost: CostModel,
    quotient: Quotient,
    number: dict[int, int],
    rank: int,
    lowered: LoweredProgram,
    names: _Numbers,
) -> Site:
    by = quotient.representative_of
    groups = schedule.groups
    shards = tuple(schedule.shard_index(rank, part) if rank in groups[part.group].place else 0 for part in names.slots)
    routes: list[Route | None] = []
    for wire in names.wires:
        group = groups[wire.group]
        if rank not in group.place:
            routes.append(None)
            continue
        to, source = wire.receiver(group, rank), wire.sender(group, rank)
        receiver = None if to is None else number[by[to]]
        sender = None if source is None else number[by[source]]
        routes.append(Route(wire, to == rank, receiver, sender, rank, -1 if to is None else to))
    instances: dict[str, tuple[int, int]] = {}
    for name, group in groups.items():
        if rank in group.place:
            i = group.place[rank][0]
            members = len({by[r] for r in group.instances[i]}) if group.size > 1 else 0
            instances[name] = (quotient.instance_of[name][i], members)
    pool = cost.compute_pool(rank)
    usage = None if pool is None else quotient.usage(("compute", rank), Phase(0, 1, {pool: 1}))
    return Site(number[rank], rank, lowered, shards, tuple(routes), instances, usage)
