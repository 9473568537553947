"""Where a rank is, in words for people: "was in step 3 at %12 'm0.h0.attn.F1.0.linear' (linear)"."""

from __future__ import annotations

from rtp_sim.executor.progress import PHASES, Place
from rtp_sim.schedule.ir import Collective, Compute, Op, Schedule


def describe(schedule: Schedule, rank: int, place: Place) -> str:
    """The place of a rank, with the op its host is at and those in flight."""
    if place.phase != "step":
        which = {"between steps": f" (before step {place.step})", "saving": f" (after step {place.step})"}
        return f"was {place.phase}{which.get(place.phase, '')}"
    ops = schedule.program(rank).ops
    words = [f"was in step {place.step}"]
    if 0 <= place.op < len(ops):
        words.append(f"at {_named(ops[place.op])}")
    flying = [_named(ops[i]) for i in place.in_flight if i < len(ops) and i != place.op]
    return " ".join(words) + (f", with {', '.join(flying)} in flight" if flying else "")


def furthest_behind(place: Place) -> tuple[int, int, int, int]:
    """A key by which the rank that the others wait for comes first."""
    of_a_step = ("between steps", "step", "saving")
    if place.phase in of_a_step:
        return PHASES.index("step"), place.step, of_a_step.index(place.phase), place.op
    return PHASES.index(place.phase), 0, 0, 0


def _named(op: Op) -> str:
    action = op.action
    if isinstance(action, Compute):
        what = action.kernel
    else:
        what = action.kind if isinstance(action, Collective) else type(action).__name__.lower()
    return f"%{op.index} {op.name!r} ({what})"
