"""Who receives what a shift or a send sends: the arrows of a trace, found from the schedule alone.

A shift meets the shift of the same group with the same count (its n-th on both ranks). A send meets the
receive with the same group, tag and pair of ranks, again the n-th on both. Tables are built once per
program, so that all arrows of a step are found in time linear in its ops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rtp_sim.schedule.ir import Op, Program, Recv, Schedule, Send, Shift

Slot = tuple[str, tuple[int, ...], str, int]
"""Group, the sender's offset to the receiver (empty for a shift), tag, and which of its kind."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One message stream from op `sender_op` of rank `sender` to op `receiver_op` of rank `receiver`."""

    sender: int
    sender_op: int
    receiver: int
    receiver_op: int
    hop: int


@dataclass(frozen=True, slots=True)
class FlowTables:
    """Per program: the slot of each op, and for each slot the op that sends and the one that receives."""

    slots: tuple[dict[int, Slot], ...]
    senders: tuple[dict[Slot, int], ...]
    receivers: tuple[dict[Slot, int], ...]


def flow_tables(schedule: Schedule) -> FlowTables:
    """The tables that `flows_from` and `flows_into` look up."""
    built = [_program_tables(program) for program in schedule.programs]
    return FlowTables(tuple(b[0] for b in built), tuple(b[1] for b in built), tuple(b[2] for b in built))


def flows_from(schedule: Schedule, tables: FlowTables, rank: int, op: Op) -> Iterator[Flow]:
    """The flows that leave `op` on `rank`, in order of the hops; none where nobody receives."""
    action = op.action
    if not isinstance(action, (Shift, Send)):
        return
    group, slot = schedule.groups[action.group], tables.slots[schedule.program_of_rank[rank]][op.index]
    offsets = [hop.offset for hop in action.hops] if isinstance(action, Shift) else [action.offset]
    for hop, offset in enumerate(offsets):
        peer = group.peer(rank, offset) if isinstance(action, Shift) else group.neighbour(rank, offset)
        if peer is not None and peer != rank:
            receiver_op = tables.receivers[schedule.program_of_rank[peer]].get(slot)
            if receiver_op is not None:
                yield Flow(rank, op.index, peer, receiver_op, hop)


def flows_into(schedule: Schedule, tables: FlowTables, rank: int, op: Op) -> Iterator[Flow]:
    """The flows that arrive at `op` on `rank`: the same objects, seen from the other end."""
    action = op.action
    if not isinstance(action, (Shift, Recv)):
        return
    group, slot = schedule.groups[action.group], tables.slots[schedule.program_of_rank[rank]][op.index]
    if isinstance(action, Shift):
        peers = [group.peer(rank, hop.offset, -1) for hop in action.hops]
    else:
        peers = [peer for peer in [group.neighbour(rank, action.offset)] if peer is not None]
    for hop, peer in enumerate(peers):
        sender_op = tables.senders[schedule.program_of_rank[peer]].get(slot)
        if peer != rank and sender_op is not None:
            yield Flow(peer, sender_op, rank, op.index, hop)


def _program_tables(program: Program) -> tuple[dict[int, Slot], dict[Slot, int], dict[Slot, int]]:
    slots: dict[int, Slot] = {}
    senders: dict[Slot, int] = {}
    receivers: dict[Slot, int] = {}
    seen: Counter[tuple[str, str, tuple[int, ...], str]] = Counter()
    for op in program.ops:
        action = op.action
        if not isinstance(action, (Shift, Send, Recv)):
            continue
        kind, tag = type(action).__name__, ""
        offset: tuple[int, ...] = ()
        if isinstance(action, Send):
            offset, tag = action.offset, action.tag
        elif isinstance(action, Recv):
            offset, tag = tuple(-o for o in action.offset), action.tag
        nth = seen[kind, action.group, offset, tag]
        seen[kind, action.group, offset, tag] += 1
        slot = (action.group, offset, tag, nth)
        slots[op.index] = slot
        if not isinstance(action, Recv):
            senders[slot] = op.index
        if not isinstance(action, Send):
            receivers[slot] = op.index
    return slots, senders, receivers
