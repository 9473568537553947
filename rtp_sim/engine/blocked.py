"""What a deadlock is told as: each blocked rank, the op it is stuck at, and whom or what that op waits
for."""

from __future__ import annotations

from collections.abc import Callable

from rtp_sim.engine.lowering import Gathering, LoweredOp, Plan, Rotation, Site
from rtp_sim.errors import DeadlockError
from rtp_sim.schedule.ir import Collective, Recv, Send, Shift

MAX_RANKS = 8

Seen = Callable[[int, int], bool]
"""(site number, op index) -> whether that has happened."""


def deadlock(plan: Plan, ended: Seen, arrived: Seen) -> DeadlockError:
    """The error for a run that stopped with ops left. `arrived`: the op was ready for its partners."""
    lines: list[str] = []
    blocked = 0
    for site in plan.sites:
        heads = _heads(site, ended)
        blocked += bool(heads)
        if heads and blocked <= MAX_RANKS:
            at_partner = [op for op in heads if arrived(site.number, op.number)]
            op = min(at_partner or heads, key=lambda head: head.number)
            named = site.lowered.program.ops[op.number]
            reason = _partners(plan, site, op, arrived) if at_partner else _predecessors(site, op, ended)
            lines.append(f"  rank {site.rank}: {named.name!r} on stream {named.stream!r} waits for {reason}")
    if blocked > MAX_RANKS:
        lines.append(f"  and {blocked - MAX_RANKS} more")
    return DeadlockError(f"deadlock: {blocked} simulated rank(s) cannot go on\n" + "\n".join(lines))


def _heads(site: Site, ended: Seen) -> list[LoweredOp]:
    """The first op of each stream that has not ended."""
    firsts = (next((op for op in stream if not ended(site.number, op.number)), None) for stream in site.lowered.streams)
    return [op for op in firsts if op is not None]


def _predecessors(site: Site, op: LoweredOp, ended: Seen) -> str:
    ops = site.lowered.program.ops
    left = [f"{ops[d].name!r}" for d in op.deps if not ended(site.number, d)]
    return f"{', '.join(left)} of the same rank"


def _partners(plan: Plan, site: Site, op: LoweredOp, arrived: Seen) -> str:
    """Whom a communication that is ready itself waits for."""
    action = site.lowered.program.ops[op.number].action
    groups = plan.schedule.groups
    if isinstance(action, Send | Recv):
        peer = groups[action.group].neighbour(site.rank, action.offset)
        whom = f"rank {peer}" if peer is not None else f"nobody: {action.offset} is past the end of the group"
        return f"{whom} to {'receive' if isinstance(action, Send) else 'send'} tag {action.tag!r}"
    if isinstance(action, Collective):
        assert isinstance(op, Gathering)
        instance = groups[action.group].place[site.rank][0]
        peers = [r for r in groups[action.group].instances[instance] if not _there(plan, r, op, arrived)]
        what = f"{action.kind} of {action.size_bytes} bytes, collective {op.nth} on group {action.group!r}"
    else:
        assert isinstance(action, Shift)
        assert isinstance(op, Rotation)
        around = [groups[action.group].peer(site.rank, h.offset, sign) for h in action.hops for sign in (1, -1)]
        peers = [r for r in dict.fromkeys(around) if r != site.rank and not _there(plan, r, op, arrived)]
        what = f"shift {op.nth} on group {action.group!r}"
    more = f" and {len(peers) - 8} more" if len(peers) > 8 else ""
    return f"rank(s) {', '.join(map(str, peers[:8]))}{more} to join {what}"


def _there(plan: Plan, rank: int, op: Gathering | Rotation, arrived: Seen) -> bool:
    """Whether `rank` has come to its op that meets `op`."""
    by = plan.quotient.representative_of[rank]
    site = next(s for s in plan.sites if s.rank == by)
    for theirs in site.lowered.ops:
        if isinstance(op, Rotation):
            same = isinstance(theirs, Rotation) and (theirs.group, theirs.nth) == (op.group, op.nth)
        else:
            same = isinstance(theirs, Gathering) and (theirs.group, theirs.nth, theirs.kind) == (
                op.group,
                op.nth,
                op.kind,
            )
        if same:
            return arrived(site.number, theirs.number)
    return False
