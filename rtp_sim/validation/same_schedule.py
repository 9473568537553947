"""Are two timelines of the same schedule? If not, what differs first, in words that point at it.

Timelines are joined on (rank, op index), which means something only if both sides count the same ops. Names and
`meta` of the schedules may differ: they change nothing that is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from rtp_sim.errors import InputError
from rtp_sim.schedule.ir import Group, Op, Program, Schedule


def require_same_schedule(a: Schedule, b: Schedule, a_name: str = "predicted", b_name: str = "measured") -> None:
    """InputError with the first difference of the two schedules, if there is one."""
    difference = first_difference(a, b, a_name, b_name)
    if difference:
        raise InputError(
            f"the {a_name} and the {b_name} schedule differ: {difference}; expected two timelines of one schedule"
        )


def first_difference(a: Schedule, b: Schedule, a_name: str, b_name: str) -> str:
    """What differs first: number of ranks, groups, then rank by rank buffers, op count and ops. Empty if nothing."""
    if a.world_size != b.world_size:
        return f"{a_name} has {a.world_size} ranks, {b_name} {b.world_size}"
    if difference := _groups(a.groups, b.groups, a_name, b_name):
        return difference
    seen: set[tuple[int, int]] = set()
    for rank in range(a.world_size):
        pair = a.program_of_rank[rank], b.program_of_rank[rank]
        if pair not in seen:
            seen.add(pair)
            if difference := _programs(a.program(rank), b.program(rank), a_name, b_name):
                return f"on rank {rank}, {difference}"
    return ""


def _groups(a: Mapping[str, Group], b: Mapping[str, Group], a_name: str, b_name: str) -> str:
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            return f"the group {name!r} is in {a_name if name in a else b_name} only"
        if a[name] != b[name]:
            return f"the group {name!r} is {_members(a[name])} in {a_name}, {_members(b[name])} in {b_name}"
    return ""


def _members(group: Group) -> str:
    rings = "; ".join(" ".join(map(str, members)) for members in group.instances[:4])
    more = "; ..." if len(group.instances) > 4 else ""
    return f"{'x'.join(map(str, group.dims))} ({rings}{more})"


def _programs(a: Program, b: Program, a_name: str, b_name: str) -> str:
    for one, other in zip(a.ops, b.ops, strict=False):
        if one != other:
            return _ops(one, other, a_name, b_name)
    if len(a.ops) != len(b.ops):
        longer, extra = (a_name, a.ops) if len(a.ops) > len(b.ops) else (b_name, b.ops)
        first = extra[min(len(a.ops), len(b.ops))].name
        return f"{a_name} has {len(a.ops)} ops, {b_name} {len(b.ops)}; {first!r} is the first that only {longer} has"
    for name in sorted({*a.buffers, *b.buffers}):
        if a.buffers.get(name) != b.buffers.get(name):
            return f"the buffer {name!r} is not the same"
    return ""


def _ops(a: Op, b: Op, a_name: str, b_name: str) -> str:
    if a.name != b.name:
        return f"op {a.index} is {a.name!r} in {a_name}, {b.name!r} in {b_name}"
    part = next(f.name for f in fields(Op) if getattr(a, f.name) != getattr(b, f.name))
    return f"op {a.index} ({a.name}): {part} is {getattr(a, part)!r} in {a_name}, {getattr(b, part)!r} in {b_name}"
