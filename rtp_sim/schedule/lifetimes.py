"""Values that are used before they exist, or made for nobody: empty reads, results never kept or read."""

from __future__ import annotations

from collections.abc import Iterator

from rtp_sim.schedule.finding import Finding, at_op, in_program
from rtp_sim.schedule.hazards import Access, accesses
from rtp_sim.schedule.ir import Program, Schedule, Shift


def lifetime_findings(schedule: Schedule) -> Iterator[Finding]:
    """Errors for reads of a buffer that holds nothing and for `live_out` buffers left empty; warnings for
    writes that no op reads and the step does not keep (workspace and bounce buffers excepted).
    """
    for p, program in enumerate(schedule.programs):
        bounces = bounce_buffers(program)
        for name, users in accesses(program).items():
            buffer = program.buffers[name]
            yield from _empty_reads(schedule, p, name, users)
            if buffer.live_out and not buffer.live_in and not any(u.writes for u in users):
                what = f"buffer '{name}' is live-out, but no op writes it and it is not live-in"
                yield in_program(schedule, "lifetime", p, what)
            if buffer.category != "workspace" and name not in bounces:
                yield from _unread_writes(schedule, p, name, users)


def bounce_buffers(program: Program) -> set[str]:
    """Buffers that in-place shifts move their chunks through."""
    shifts = ((op, op.action) for op in program.ops if isinstance(op.action, Shift))
    return {name for op, shift in shifts for name in op.writes[len(shift.hops) :]}


def _empty_reads(schedule: Schedule, p: int, name: str, users: list[Access]) -> Iterator[Finding]:
    if users and users[0].reads and not schedule.programs[p].buffers[name].live_in:
        what = f"it reads '{name}', which holds nothing yet: no op before it writes it and it is not live-in"
        yield at_op(schedule, "lifetime", p, users[0].op, what)


def _unread_writes(schedule: Schedule, p: int, name: str, users: list[Access]) -> Iterator[Finding]:
    live_out = schedule.programs[p].buffers[name].live_out
    for i, user in enumerate(users):
        if not user.writes:
            continue
        read_next = users[i + 1].reads if i + 1 < len(users) else live_out
        if not read_next:
            fate = "the step does not keep it" if i + 1 == len(users) else f"%{users[i + 1].op} overwrites it"
            what = f"no op reads what it writes to '{name}', and {fate}"
            yield at_op(schedule, "lifetime", p, user.op, what, level="warning")
