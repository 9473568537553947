"""Small schedules for tests: ops written as rows, with buffers declared and dependencies derived in the
plainest way.

The derivation here (wait for every earlier op that conflicts on a buffer) is deliberately not the builder's,
so that tests of the checks do not lean on the code that makes real schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rtp_sim.schedule.ir import Action, Buffer, Compute, Group, Hop, Op, Part, Program, Schedule, Shift

NUMEL = 256
SIZE = 2 * NUMEL
"""Bytes of a buffer that is declared by default: 256 elements of fp16."""


@dataclass(frozen=True)
class Row:
    """An op without its index; `after` names ops, and None means: derive it."""

    name: str
    stream: str
    action: Action
    reads: str = ""
    writes: str = ""
    after: str | None = None
    blocks_host: bool = False


def kernel(name: str = "linear", part: Part | None = None) -> Compute:
    """A small compute action."""
    return Compute(name, "fp16", (("m", 4), ("k", 4), ("n", 4)), part)


def program(name: str, rows: Sequence[Row], buffers: Mapping[str, Buffer] | None = None) -> Program:
    """The program of `rows`. Undeclared buffers have 256 fp16 elements, are live in where first read, and
    live out.
    """
    number = {row.name: i for i, row in enumerate(rows)}
    known = dict(buffers or {})
    ops = []
    for i, row in enumerate(rows):
        reads, writes = tuple(row.reads.split()), tuple(row.writes.split())
        for b in (*reads, *writes):
            if b not in known:
                known[b] = Buffer(b, "activations", "fp16", NUMEL, live_in=b in reads, live_out=True)
        after = conflicts(rows, i) if row.after is None else tuple(number[n] for n in row.after.split())
        ops.append(Op(i, row.name, row.stream, row.action, reads, writes, after, row.blocks_host))
    return Program(name, known, tuple(ops))


def conflicts(rows: Sequence[Row], i: int) -> tuple[int, ...]:
    """Every earlier op on another stream that shares a buffer with op i which one of the two writes."""
    mine = rows[i]
    found = []
    for j in range(i):
        other = rows[j]
        ours, theirs = set(mine.reads.split()), set(other.reads.split())
        written = set(mine.writes.split()) & (theirs | set(other.writes.split()))
        if other.stream != mine.stream and (written or set(other.writes.split()) & ours):
            found.append(j)
    return tuple(found)


def ring(size: int, name: str = "rtp") -> Group:
    """One ring of all ranks."""
    return Group(name, (size,), (tuple(range(size)),))


def grid(rows: int, columns: int, name: str = "grid") -> Group:
    """One two-dimensional group of all ranks."""
    return Group(name, (rows, columns), (tuple(range(rows * columns)),))


def schedule(groups: Sequence[Group], *programs: Program, of_rank: Sequence[int] | None = None) -> Schedule:
    """A schedule; by default every rank runs the first program."""
    world_size = max(r for g in groups for members in g.instances for r in members) + 1
    of = tuple(of_rank) if of_rank is not None else (0,) * world_size
    return Schedule("test", world_size, {g.name: g for g in groups}, programs, of, {"strategy": "test"})


def shift(offset: int = 1, size_bytes: int = SIZE, group: str = "rtp") -> Shift:
    """One hop along a ring."""
    return Shift(group, (Hop((offset,), size_bytes),))


def rotation(size: int = 4) -> Schedule:
    """A double-buffered rotation, dependencies by hand: `f` computes with one buffer while `hop` fills the
    other.

    The first hop reads w.a, the second w.b and overwrites w.a, which f0 must have finished reading, and so
    on.
    """
    rows = []
    for i in range(size):
        here, there = ("w.a", "w.b") if i % 2 == 0 else ("w.b", "w.a")
        if i < size - 1:
            # hop i overwrites the buffer that f(i-1) reads; what it sends came with hop i-1, on this stream.
            before = "" if i == 0 else f"f{i - 1}"
            rows.append(Row(f"hop{i}", "ring", shift(), here, there, before))
        before = "" if i == 0 else f"hop{i - 1}"
        rows.append(Row(f"f{i}", "compute", kernel(part=Part("rtp", (-i,))), f"x {here}", f"y{i}", before))
    return schedule([ring(size)], program("all", rows))


def without_dependency(s: Schedule, op: str, other: str) -> Schedule:
    """The schedule with `other` taken out of the `after` of `op` (both in the first program)."""
    ops = s.programs[0].ops
    index = {o.name: o.index for o in ops}
    assert index[other] in ops[index[op]].after
    changed = tuple(
        replace(o, after=tuple(a for a in o.after if a != index[other])) if o.name == op else o for o in ops
    )
    return replace(s, programs=(replace(s.programs[0], ops=changed), *s.programs[1:]))


def with_op(s: Schedule, op: str, /, **changes: object) -> Schedule:
    """The schedule with fields of one op of the first program replaced."""
    first = s.programs[0]
    assert any(o.name == op for o in first.ops)
    ops = tuple(replace(o, **changes) if o.name == op else o for o in first.ops)  # type: ignore[arg-type]
    return replace(s, programs=(replace(first, ops=ops), *s.programs[1:]))


def without_op(p: Program, name: str) -> Program:
    """The program with one op removed and the others renumbered."""
    gone = next(o.index for o in p.ops if o.name == name)
    kept = [o for o in p.ops if o.name != name]
    ops = tuple(
        replace(o, index=i, after=tuple(a - (a > gone) for a in o.after if a != gone))
        for i, o in enumerate(kept)
    )
    return replace(p, ops=ops)
