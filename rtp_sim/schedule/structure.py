"""Is a schedule well formed: names known, lengths fitting, sizes positive, every rank where its program needs
it?

All other checks (and the engines) take for granted what is checked here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from rtp_sim.schedule.finding import Finding, at_op, in_program
from rtp_sim.schedule.ir import (
    CATEGORIES,
    COLLECTIVES,
    DTYPE_BYTES,
    Buffer,
    Collective,
    Compute,
    Group,
    Op,
    Part,
    Recv,
    Schedule,
    Send,
    Shift,
    Size,
)

Problems = Iterator[str]


def structure_findings(schedule: Schedule) -> Iterator[Finding]:
    """Everything that is malformed. Where the groups or the ranks are, nothing further is looked at."""
    whole = [
        Finding("error", "structure", f"structure: {p}")
        for p in (*_rank_problems(schedule), *_group_problems(schedule))
    ]
    yield from whole
    if whole:
        return
    for p, program in enumerate(schedule.programs):
        scope = _Scope(schedule, p)
        for key, buffer in program.buffers.items():
            for problem in _buffer_problems(scope, key, buffer):
                yield in_program(schedule, "structure", p, f"buffer '{key}': {problem}")
        count = Counter(op.name for op in program.ops)
        for place, op in enumerate(program.ops):
            for problem in _op_problems(scope, place, op, count[op.name]):
                yield at_op(schedule, "structure", p, place, problem)


@dataclass(frozen=True)
class _Scope:
    """One program and the facts about its ranks, each worked out once."""

    schedule: Schedule
    program: int
    lost: dict[str, int | None] = field(default_factory=dict)
    ends: dict[tuple[str, tuple[int, ...]], int | None] = field(default_factory=dict)

    def rank_outside(self, group: str) -> int | None:
        """A rank of the program that is in no instance of the group."""
        if group not in self.lost:
            place = self.schedule.groups[group].place
            self.lost[group] = next((r for r in self.schedule.ranks_of(self.program) if r not in place), None)
        return self.lost[group]

    def rank_without_neighbour(self, group: str, offset: tuple[int, ...]) -> int | None:
        """A rank of the program for which position + offset lies past an end of the group."""
        if (group, offset) not in self.ends:
            ranks, neighbour = self.schedule.ranks_of(self.program), self.schedule.groups[group].neighbour
            self.ends[group, offset] = next((r for r in ranks if neighbour(r, offset) is None), None)
        return self.ends[group, offset]

    def group(self, name: str) -> Group | None:
        """The group if the program's ranks can all use it."""
        known = name in self.schedule.groups and self.rank_outside(name) is None
        return self.schedule.groups[name] if known else None


def _rank_problems(schedule: Schedule) -> Problems:
    n, programs = schedule.world_size, len(schedule.programs)
    if n < 1:
        yield f"world size is {n}; expected at least 1"
    if len(schedule.program_of_rank) != n:
        yield f"program_of_rank has {len(schedule.program_of_rank)} entries; expected one per rank, {n}"
    for rank, number in enumerate(schedule.program_of_rank):
        if not 0 <= number < programs:
            yield f"rank {rank} runs program number {number}; expected 0 to {programs - 1}"
            return
    for p, program in enumerate(schedule.programs):
        if p not in schedule.program_of_rank:
            yield f"program {program.name!r} is run by no rank; leave it out or name it in program_of_rank"


def _group_problems(schedule: Schedule) -> Problems:
    for key, group in schedule.groups.items():
        what = f"group {key!r}"
        if group.name != key:
            yield f"{what} calls itself {group.name!r}; expected the same name"
        if not group.dims or min(group.dims) < 1 or not group.instances:
            yield f"{what} has dims {group.dims}, {len(group.instances)} instances; expected one of each"
            continue
        for members in group.instances:
            if len(members) != prod(group.dims):
                size = prod(group.dims)
                yield f"{what}: instance {members} has {len(members)} members; dims {group.dims} need {size}"
        ranks = Counter(r for members in group.instances for r in members)
        for rank, times in ranks.items():
            if not 0 <= rank < schedule.world_size:
                yield f"{what} names rank {rank}; expected 0 to {schedule.world_size - 1}"
            if times > 1:
                yield f"{what} has rank {rank} {times} times; expected each rank in at most one place"


def _buffer_problems(scope: _Scope, key: str, buffer: Buffer) -> Problems:
    if buffer.name != key:
        yield f"it calls itself {buffer.name!r}; expected the same name"
    if buffer.category not in CATEGORIES:
        yield f"category {buffer.category!r} is unknown; expected one of {', '.join(CATEGORIES)}"
    yield from _dtype_problems(buffer.dtype)
    yield from _part_problems(scope, buffer.part)
    # The state of an optimizer that keeps none is a buffer of no elements.
    yield from _size_problems(scope, "numel", buffer.numel, buffer.part, least=int(buffer.category != "optimizer"))


def _op_problems(scope: _Scope, place: int, op: Op, same_name: int) -> Problems:
    if op.index != place:
        yield f"its index is {op.index}; expected its place in the program, {place}"
    if same_name > 1:
        yield f"{same_name} ops are called {op.name!r}; expected names that are unique in the program"
    for a in op.after:
        if not 0 <= a < place:
            yield f"it comes after %{a}; expected earlier ops of this program, %0 to %{place - 1}"
    buffers = scope.schedule.programs[scope.program].buffers
    unknown = [b for b in (*op.reads, *op.writes) if b not in buffers]
    if unknown:
        yield f"buffer {unknown[0]!r} is unknown; the program declares {_some(list(buffers))}"
        return
    match op.action:
        case Compute() as action:
            yield from _compute_problems(scope, action)
        case Shift() as action:
            yield from _member_problems(scope, action.group) or _shift_problems(scope, op, action)
        case Collective() as action:
            yield from _member_problems(scope, action.group) or _collective_problems(scope, op, action)
        case Send() | Recv() as action:
            yield from _member_problems(scope, action.group) or _transfer_problems(scope, op, action)


def _compute_problems(scope: _Scope, action: Compute) -> Problems:
    yield from _dtype_problems(action.dtype)
    yield from _part_problems(scope, action.part)
    # Zero is a size (the shard of a rank beyond the last part, a flag that is off), a negative number none.
    for name, size in (*action.dims, *(d for v in action.variants or () for d in v)):
        if size < 0:
            yield f"dimension {name} is {size}; expected at least 0"
    if action.variants is None:
        return
    if action.part is None:
        yield "it has variants but no part to choose among them; expected a part such as rtp[-1]"
    elif (group := scope.group(action.part.group)) and len(action.variants) != group.size:
        yield f"it has {len(action.variants)} variants; group {group.name!r} has {group.size} shards"
    names = [n for n, _ in action.dims]
    if any([n for n, _ in v] != names for v in action.variants):
        yield f"its variants name other dimensions than {names}; expected the same names in the same order"


def _member_problems(scope: _Scope, group: str) -> list[str]:
    if group not in scope.schedule.groups:
        return [f"group {group!r} is unknown; the schedule has {_some(list(scope.schedule.groups))}"]
    if (rank := scope.rank_outside(group)) is not None:
        return [f"rank {rank} runs it but is in no instance of group {group!r}"]
    return []


def _shift_problems(scope: _Scope, op: Op, action: Shift) -> Problems:
    n = len(action.hops)
    if not n:
        yield "it has no hop; expected at least one"
    for hop in action.hops:
        yield from _offset_problems(scope, action.group, hop.offset)
        yield from _part_problems(scope, hop.part)
        yield from _size_problems(scope, "size", hop.size_bytes, hop.part)
    if len(op.reads) < n:
        yield f"it reads {len(op.reads)} buffers; expected {n} or more, first the one that each hop sends"
        return
    in_place = [name for name, other in zip(op.reads, op.writes, strict=False) if name == other]
    if len(op.writes) != n + bool(in_place):
        bounce = f" and, as it moves {in_place[0]!r} in place, a bounce buffer" if in_place else ""
        wanted = f"{n + bool(in_place)}, the one each hop receives into{bounce}"
        yield f"it writes {len(op.writes)} buffers; expected {wanted}"
        return
    if in_place and (action.chunk_bytes or 0) < 1:
        yield f"it moves {in_place[0]!r} in place; expected a positive chunk_bytes, got {action.chunk_bytes}"
    if not in_place and action.chunk_bytes is not None:
        yield f"it has chunks of {action.chunk_bytes} bytes but is not in place; expected none"
    crossed = [w for j, w in enumerate(op.writes) if w in op.writes[:j] or w in (*op.reads[:j], *op.reads[j + 1 :])]
    if crossed:
        yield f"it receives into {crossed[0]!r}, which another hop sends or receives at the same time"
    for hop, read, write in zip(action.hops, op.reads, op.writes, strict=False):
        yield from _room_problems(scope, _largest(hop.size_bytes), read, write)
    if in_place and action.chunk_bytes:
        yield from _room_problems(scope, action.chunk_bytes, op.writes[n])


def _collective_problems(scope: _Scope, op: Op, action: Collective) -> Problems:
    if action.kind not in COLLECTIVES:
        yield f"collective {action.kind!r} is unknown; expected one of {', '.join(COLLECTIVES)}"
    yield from _dtype_problems(action.dtype)
    if action.size_bytes < 1:
        yield f"its size is {action.size_bytes} bytes; expected at least 1"
    size = scope.schedule.groups[action.group].size
    if not 0 <= action.root < size:
        yield f"its root is position {action.root}; group {action.group!r} has positions 0 to {size - 1}"
    if not op.reads or not op.writes:
        yield f"it reads {len(op.reads)} and writes {len(op.writes)} buffers; expected at least one of each"


def _transfer_problems(scope: _Scope, op: Op, action: Send | Recv) -> Problems:
    yield from (problems := list(_offset_problems(scope, action.group, action.offset)))
    if not problems and (rank := scope.rank_without_neighbour(action.group, action.offset)) is not None:
        yield (
            f"rank {rank} has no neighbour at {list(action.offset)} in group {action.group!r} (send and recv "
            "do not wrap around); expected another program for the ranks at the end, or a shift"
        )
    if action.size_bytes < 1:
        yield f"its size is {action.size_bytes} bytes; expected at least 1"
    used, idle = (op.reads, op.writes) if isinstance(action, Send) else (op.writes, op.reads)
    if not used or idle:
        wanted = "what it sends and writes none" if isinstance(action, Send) else "none and writes what it receives"
        yield f"it reads {len(op.reads)} and writes {len(op.writes)} buffers; expected that it reads {wanted}"
    if len(used) == 1:
        yield from _room_problems(scope, action.size_bytes, used[0])


def _room_problems(scope: _Scope, size_bytes: int, *names: str) -> Problems:
    buffers = scope.schedule.programs[scope.program].buffers
    for name in dict.fromkeys(names):
        buffer = buffers[name]
        if buffer.dtype in DTYPE_BYTES and (room := _largest(buffer.numel) * DTYPE_BYTES[buffer.dtype]) < size_bytes:
            yield f"it moves {size_bytes} bytes, but buffer {name!r} has {room}"


def _dtype_problems(dtype: str) -> Problems:
    if dtype not in DTYPE_BYTES:
        yield f"data type {dtype!r} is unknown; expected one of {', '.join(DTYPE_BYTES)}"


def _part_problems(scope: _Scope, part: Part | None) -> Problems:
    if part is not None:
        yield from _member_problems(scope, part.group) or _offset_problems(scope, part.group, part.offset)


def _offset_problems(scope: _Scope, group: str, offset: tuple[int, ...]) -> Problems:
    dims = scope.schedule.groups[group].dims
    if len(offset) != len(dims):
        dimensions = f"{len(dims)} dimensions {list(dims)}"
        yield f"offset {list(offset)} has {len(offset)} entries; group {group!r} has {dimensions}"


def _size_problems(scope: _Scope, what: str, size: Size, part: Part | None, least: int = 1) -> Problems:
    """A plain size is at least `least`; of sizes by shard some may be zero (fewer experts than ranks), not all."""
    if isinstance(size, int):
        if size < least:
            yield f"{what} is {size}; expected at least {least}"
        return
    if part is None:
        yield f"{what} has one number per shard but no part to choose one; expected a part such as rtp[+0]"
    elif (group := scope.group(part.group)) and len(size) != group.size:
        yield f"{what} has {len(size)} numbers; group {group.name!r} has {group.size} shards"
    if min(size, default=0) < 0 or (least and not any(size)):
        yield f"{what} is {size}; expected no negative number and at least one that is positive"


def _largest(size: Size) -> int:
    return size if isinstance(size, int) else max(size, default=0)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
