"""`Finding`: one thing a check has to say about a schedule, with the program printed around the op it points
at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rtp_sim.schedule.ir import Program, Schedule
from rtp_sim.schedule.text import op_line

CONTEXT_OPS = 2
"""Ops printed before and after the one a message points at."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`level` is "error" (the schedule must not run) or "warning"; `rule` names the check: structure,
    matching, deadlock, hazard or lifetime. `program` and `op` say where, as far as there is a place.
    """

    level: str
    rule: str
    message: str
    program: int | None = None
    op: int | None = None


def at_op(schedule: Schedule, rule: str, program: int, op: int, what: str, *, level: str = "error") -> Finding:
    """A finding at op number `op` of program number `program`."""
    return at_ops(schedule, rule, program, (op,), what, level=level)


def at_ops(
    schedule: Schedule, rule: str, program: int, ops: tuple[int, ...], what: str, *, level: str = "error"
) -> Finding:
    """A finding about several ops of one program, placed at the last of them."""
    listing = excerpt(schedule.programs[program], ops)
    place = f"program {schedule.programs[program].name!r}, {at(schedule, program, ops[-1])}"
    message = f"{rule}: {place}: {what}\n{listing}"
    return Finding(level, rule, message, program, ops[-1])


def in_program(schedule: Schedule, rule: str, program: int, what: str, *, level: str = "error") -> Finding:
    """A finding about a program that no single op is to blame for."""
    return Finding(level, rule, f"{rule}: program {schedule.programs[program].name!r}: {what}", program)


def at(schedule: Schedule, program: int, op: int) -> str:
    """How messages name an op: by number and name."""
    return f"%{op} '{schedule.programs[program].ops[op].name}'"


def excerpt(program: Program, places: Iterable[int], context: int = CONTEXT_OPS) -> str:
    """The text form of the ops around `places`, with an arrow at each of them."""
    marked = set(places)
    shown = sorted({i for p in marked for i in range(max(0, p - context), min(len(program.ops), p + context + 1))})
    lines, previous = [], -1
    for i in shown:
        if i != previous + 1:
            lines.append("      ...")
        lines.append(f"  {'-->' if i in marked else '   '} {op_line(program.ops[i])}")
        previous = i
    if previous + 1 < len(program.ops):
        lines.append("      ...")
    return "\n".join(lines)
