"""`Channel`: how the members of a group meet in shared memory, and where each leaves data for the others.

A channel is for ops that follow one another in the same order on all members: the shifts and collectives of one group
on one stream, or the sends from one rank to another under one tag. Each member has two slots that take turns, so that
the next op need not wait for everybody to have read the last one, and three words: a stamp of when it was ready, how
often it has posted, how many ops it has done. The places of all channels follow from the schedule (`plan_channels`),
so all ranks know them without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from rtp_sim.executor.clocks import now_ns
from rtp_sim.executor.memory import LINE_BYTES, Memory, aligned, first_free
from rtp_sim.schedule.ir import DTYPE_BYTES, Collective, Compute, Op, Program, Recv, Schedule, Send, Shift, Size

Key = tuple[str, ...]
"""(group, stream, instance's number); of a send (group, "", instance's number, tag, sender)."""

SLOTS = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a channel lies: its `members` by position, the first byte, the parts of a slot (one per hop) and their
    size."""

    members: tuple[int, ...]
    offset: int
    parts: int
    part_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one member."""
        return self.parts * self.part_bytes

    @property
    def size_bytes(self) -> int:
        """All of the channel."""
        return len(self.members) * (LINE_BYTES + SLOTS * self.slot_bytes)


def key_of(schedule: Schedule, rank: int, op: Op) -> Key:
    """The channel of a communication op on this rank."""
    action = op.action
    assert not isinstance(action, Compute)
    group = schedule.groups[action.group]
    instance = str(group.place[rank][0])
    if isinstance(action, Shift | Collective):
        return action.group, op.stream, instance
    sender = rank if isinstance(action, Send) else group.neighbour(rank, action.offset)
    return action.group, "", instance, action.tag, str(sender)


def plan_channels(schedule: Schedule, itemsize: int | None) -> tuple[dict[Key, Place], int]:
    """The places of all channels and the bytes they take together. `itemsize` replaces that of floats, where the run
    computes in another dtype than the schedule says; with 0 there is no room for data, only for meeting."""
    needs: dict[Key, tuple[tuple[int, ...], int, int]] = {}
    for rank in range(schedule.world_size):
        program = schedule.program(rank)
        for op in program.ops:
            members = _members(schedule, rank, op)
            if len(members) < 2:
                continue
            parts, size = _need(program, op, len(members), itemsize)
            key = key_of(schedule, rank, op)
            _, most, largest = needs.get(key, (members, 0, 0))
            needs[key] = members, max(most, parts), max(largest, size)
    places, offset = {}, first_free(schedule.world_size)
    for key, (members, parts, size) in needs.items():
        places[key] = Place(members, offset, parts, aligned(size))
        offset += places[key].size_bytes
    return places, offset - first_free(schedule.world_size)


def _members(schedule: Schedule, rank: int, op: Op) -> tuple[int, ...]:
    """Who meets for this op; sender and receiver for a send or receive that has a partner."""
    action = op.action
    if isinstance(action, Compute):
        return ()
    group = schedule.groups[action.group]
    if isinstance(action, Shift | Collective):
        return group.instances[group.place[rank][0]]
    peer = group.neighbour(rank, action.offset)
    if peer is None:
        return ()
    return (rank, peer) if isinstance(action, Send) else (peer, rank)


def _need(program: Program, op: Op, members: int, itemsize: int | None) -> tuple[int, int]:
    """Parts of a slot and their size in bytes; a collective's data may be padded to equal shares."""
    action = op.action
    if isinstance(action, Shift):
        return len(action.hops), max(_scaled(_most(hop.size_bytes), itemsize) for hop in action.hops)
    if isinstance(action, Send | Recv):
        return 1, _scaled(action.size_bytes, itemsize)
    assert isinstance(action, Collective)
    buffers = [program.buffers[name] for name in op.reads]
    elements = max(sum(_most(b.numel) for b in buffers), action.size_bytes // DTYPE_BYTES[action.dtype]) + members
    target = program.buffers[op.writes[0]]
    if action.kind == "reduce_scatter" and isinstance(target.numel, tuple):
        elements = max(elements, members * _most(target.numel))
    return 1, elements * max(DTYPE_BYTES[b.dtype] for b in buffers) if itemsize is None else elements * itemsize


def _most(size: Size) -> int:
    return size if isinstance(size, int) else max(size)


def _scaled(size_bytes: int, itemsize: int | None) -> int:
    """Room for bytes whose elements may become wider: from a byte at least."""
    return size_bytes * itemsize if itemsize is not None else size_bytes


class Channel:
    """A rank's end of a channel. For every op: `begin`, write, `meet`, read what others wrote, `end`."""

    def __init__(self, memory: Memory, place: Place, rank: int) -> None:
        self.place, self.position = place, place.members.index(rank)
        self._memory = memory
        self._posts = self._slot = 0
        # By slot: until which post of theirs whom must have read what lies there.
        self._readers: list[tuple[int, tuple[int, ...]]] = [(0, ())] * SLOTS

    def begin(self, ready_ns: int | None = None) -> None:
        """The rank is ready for the next op, now or at the moment given. Waits until the slot has been read."""
        ready_ns = ready_ns or now_ns()
        self._slot = (self._slot + 1) % SLOTS
        post, readers = self._readers[self._slot]
        for p in readers:
            self._memory.wait(self._line(p) // 4 + 1, post, self.place.members[p])
        self._memory.stamps[self._line(self.position) // 8 + 1 + self._slot] = ready_ns

    def start_of(self, position: int, part: int = 0) -> int:
        """The byte of the memory at which that member leaves its data for this op."""
        start = self.place.offset + len(self.place.members) * LINE_BYTES + part * self.place.part_bytes
        return start + (SLOTS * position + self._slot) * self.place.slot_bytes

    def meet(self, partners: Collection[int]) -> Mapping[int, int]:
        """Posts, waits until these members have posted as often; when each was ready (ns), this rank among them."""
        self._posts += 1
        self._memory.announce(self._line(self.position) // 4, self._posts)
        for p in partners:
            self._memory.wait(self._line(p) // 4, self._posts, self.place.members[p])
        return {p: self._memory.stamps[self._line(p) // 8 + 1 + self._slot] for p in (*partners, self.position)}

    def end(self, readers: Collection[int]) -> None:
        """The rank has read what it needs of the others; `readers` are those who read its slot or its stamp."""
        self._memory.announce(self._line(self.position) // 4 + 1, self._posts)
        self._readers[self._slot] = self._posts, tuple(readers)

    def others(self) -> Iterator[int]:
        """The other members' positions, the next one first: so that not all read the same memory at once."""
        n = len(self.place.members)
        return ((self.position + i) % n for i in range(1, n))

    def _line(self, position: int) -> int:
        return self.place.offset + position * LINE_BYTES
