"""Builds a `Program` op by op and derives each op's `after` from what it reads and writes.

An op must wait for the last write of what it reads, and for the last write and all later reads of what it overwrites.
Dependencies that stream order, an earlier dependency or a blocked host already imply are left out, so that the listing
of a program shows exactly the synchronisation that it needs. A vector clock per stream tells which are implied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from rtp_sim.schedule.ir import DTYPE_BYTES, Action, Buffer, Holding, Op, Part, Program, Recv, Send, Size


@dataclass
class Tape:
    """What was asked of a builder, to be asked again for another micro-batch: `first` is the op it began with."""

    first: int
    buffers: list[Buffer] = field(default_factory=list)
    calls: list[tuple[str, str, Action, tuple[str, ...], tuple[str, ...], tuple[int, ...], bool]] = field(
        default_factory=list
    )


class Builder:
    """Collects buffers and ops of one program. `fresh` is true for a buffer that holds nothing yet."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffers: dict[str, Buffer] = {}
        self._ops: list[Op] = []
        self._filled: set[str] = set()
        self._writer: dict[str, int] = {}
        self._readers: dict[str, list[int]] = {}
        self._last: dict[str, int] = {}
        # What each op knows to be done when it ends: stream -> index of the latest op of that stream.
        self._known: list[dict[str, int]] = []
        self._host_known: dict[str, int] = {}
        self._next_after: dict[str, list[int]] = {}
        self._tape: Tape | None = None

    def buffer(
        self, name: str, category: str, dtype: str, numel: Size, *,
        part: Part | None = None, persistent: bool = False, live_in: bool = False, live_out: bool = False,
        holds: Sequence[Holding] = (), slice_of: str = "",
    ) -> str:  # fmt: skip
        """Declares a buffer and returns its name; `persistent` is live_in and live_out. Declaring again is free."""
        if name not in self._buffers:
            live_in, live_out = live_in or persistent, live_out or persistent
            flat = tuple(holds), slice_of
            self._buffers[name] = Buffer(name, category, dtype, numel, part, live_in, live_out, *flat)
            if live_in:
                self._filled.add(name)
            if self._tape is not None:
                self._tape.buffers.append(self._buffers[name])
        return name

    def declared(self, name: str) -> Buffer:
        """The buffer of that name. KeyError if it was not declared."""
        return self._buffers[name]

    def bytes_of(self, name: str) -> int:
        """Bytes of a declared buffer whose size is the same for all shards."""
        return self._buffers[name].size_bytes()

    @property
    def count(self) -> int:
        """Ops so far."""
        return len(self._ops)

    @staticmethod
    def itemsize(dtype: str) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[dtype]

    def fresh(self, name: str) -> bool:
        """Whether the buffer holds nothing yet, so that the next write starts a new content."""
        return name not in self._filled

    def drop(self, name: str) -> None:
        """Forgets the buffer's content: the next write starts afresh."""
        self._filled.discard(name)

    def last(self, stream: str) -> tuple[int, ...]:
        """The latest op of a stream, as a tuple for `after`; empty if there is none."""
        return (self._last[stream],) if stream in self._last else ()

    def next_waits(self, stream: str, op: int) -> None:
        """The next op of a stream starts after `op` (pacing that no buffer carries)."""
        self._next_after.setdefault(stream, []).append(op)

    def op(
        self, name: str, stream: str, action: Action, reads: tuple[str, ...] = (), writes: tuple[str, ...] = (), *,
        after: tuple[int, ...] = (), blocks_host: bool = False,
    ) -> int:  # fmt: skip
        """Appends an op and returns its index; `after` adds dependencies that no buffer carries (pacing)."""
        index = len(self._ops)
        if self._tape is not None:
            self._tape.calls.append((name, stream, action, reads, writes, after, blocks_host))
        needed = {*after, *self._next_after.pop(stream, ())}
        for b in reads:
            if b in self._writer:
                needed.add(self._writer[b])
        for b in writes:
            if b in self._writer:
                needed.add(self._writer[b])
            needed.update(self._readers.get(b, ()))
        known, kept = self._order(stream, needed)
        if blocks_host:
            _merge(self._host_known, known)
            self._host_known[stream] = index
        known[stream] = index
        self._known.append(known)
        self._ops.append(Op(index, name, stream, action, reads, writes, kept, blocks_host))
        self._last[stream] = index
        for b in reads:
            self._readers.setdefault(b, []).append(index)
        for b in writes:
            self._writer[b] = index
            self._readers[b] = []
            self._filled.add(b)
        return index

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Notes buffers and ops that are asked for inside. Contents that are dropped and pacing by `next_waits` are not
        noted."""
        self._tape = tape = Tape(len(self._ops))
        try:
            yield tape
        finally:
            self._tape = None

    def play(self, tape: Tape, old: str, new: str) -> None:
        """The same again, with names that begin with the micro-batch `old` beginning with `new`. Ops that were added as
        dependencies are the ones as far behind. Dependencies through buffers are found anew."""
        shift = len(self._ops) - tape.first
        begins, skip = (f"{old}/", f"{old}."), len(old)

        def named(name: str) -> str:
            return new + name[skip:] if name.startswith(begins) else name

        for like in tape.buffers:
            name = named(like.name)
            if name not in self._buffers:
                self._buffers[name] = replace(like, name=name)
                if like.live_in:
                    self._filled.add(name)
        for name, stream, action, reads, writes, after, blocks_host in tape.calls:
            if isinstance(action, Send | Recv):
                action = replace(action, tag=named(action.tag))
            self.op(named(name), stream, action, tuple([named(b) for b in reads]), tuple([named(b) for b in writes]),
                    after=tuple([d + shift for d in after]), blocks_host=blocks_host)  # fmt: skip

    def host_waits(self) -> None:
        """The host issues nothing more until the latest op is done."""
        index = len(self._ops) - 1
        self._ops[index] = replace(self._ops[index], blocks_host=True)
        _merge(self._host_known, self._known[index])

    def _order(self, stream: str, needed: set[int]) -> tuple[dict[str, int], tuple[int, ...]]:
        """What is known done when the op starts, and the dependencies that are not implied by the others."""
        known = dict(self._host_known)
        if stream in self._last:
            _merge(known, self._known[self._last[stream]])
        kept = []
        for d in sorted(needed, reverse=True):
            if known.get(self._ops[d].stream, -1) < d:
                kept.append(d)
                _merge(known, self._known[d])
        return known, tuple(sorted(kept))

    def program(self) -> Program:
        """The finished program."""
        return Program(self._name, dict(self._buffers), tuple(self._ops))


def _merge(into: dict[str, int], other: dict[str, int]) -> None:
    for stream, index in other.items():
        if into.get(stream, -1) < index:
            into[stream] = index
