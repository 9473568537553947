"""Ranks of one host that move data through shared memory, as they are or over an emulated link.

A rank copies what it sends into its slot of a channel (mailboxes.py), waits until its partners have done so too, and
copies what it receives out of theirs: two copies at memory speed instead of gloo's way through sockets. Sums are added
up in order of position, so all members get the same bits; of large ones among more than two each member adds up its
part and reads the others' results.

With `times`, the statement of a link, a transfer that starts when the last of its partners was ready first lasts as
long as the statement says: the stream's thread sleeps, then copies. Streams do not share the link (a delay line).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist

from rtp_sim.executor.clocks import sleep_until
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.executor.mailboxes import Channel, key_of, plan_channels
from rtp_sim.executor.memory import Memory
from rtp_sim.executor.transport import Traffic
from rtp_sim.schedule.ir import Collective, Op, Schedule, Shift

WHOLE_BYTES = 1 << 16
"""Up to this size everybody adds up everything: meeting a second time costs more than reading it."""


class TransferTimes(Protocol):
    """How long transfers take once everybody is there: a `Link`, or stated times."""

    def message_ns(self, source: int, target: int, size_bytes: int, chunk_bytes: int | None) -> int:
        """One message."""

    def collective_ns(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> int:
        """A collective of two or more ranks."""


@dataclass(frozen=True, slots=True)
class Slots:
    """The data of the op under way on a channel, in the memory `all_bytes`."""

    channel: Channel
    all_bytes: torch.Tensor

    def mine(self, like: torch.Tensor, part: int = 0) -> torch.Tensor:
        """Where this rank leaves a tensor of that size and dtype."""
        return self.theirs(self.channel.position, like, part)

    def theirs(self, position: int, like: torch.Tensor, part: int = 0) -> torch.Tensor:
        """What that member has left, flat, as many elements as `like` has."""
        size_bytes, start = like.numel() * like.element_size(), self.channel.start_of(position, part)
        assert size_bytes <= self.channel.place.part_bytes
        return self.all_bytes[start : start + size_bytes].view(like.dtype)


class SharedMemoryTransport:
    """The transport of `rank`; all ranks of `control` must make theirs together. `itemsize` as in `plan_channels`."""

    def __init__(
        self, schedule: Schedule, rank: int, control: dist.ProcessGroup, timeout_s: float,
        times: TransferTimes | None = None, itemsize: int | None = None,
    ) -> None:  # fmt: skip
        self._schedule, self._rank, self._times = schedule, rank, times
        places, size_bytes = plan_channels(schedule, itemsize)
        ranks = dist.get_world_size(control)
        memory = Memory(size_bytes, rank, ranks, timeout_s, lambda text: _from_rank_0(text, control))
        self._bytes = torch.frombuffer(memory.map, dtype=torch.uint8)
        self._channels = {key: Channel(memory, p, rank) for key, p in places.items() if rank in p.members}

    def exchange(self, op: Op, transfers: Sequence[Transfer], tag: int) -> Traffic:
        """Does the transfers of a shift, send or receive. In place needs no bounce buffer: the slot is one."""
        away = [(part, t) for part, t in enumerate(transfers) if t.to != self._rank]
        for t in transfers:
            if t.to == self._rank:
                t.receive.copy_(t.send)
        if not away:
            return Traffic()
        channel = self._channels[key_of(self._schedule, self._rank, op)]
        position = channel.place.members.index
        partners = {position(r) for _, t in away for r in (t.to, t.source)}
        slots = Slots(channel, self._bytes)
        channel.begin()
        for part, t in away:
            slots.mine(t.send, part).copy_(t.send)
        ready = channel.meet(partners)
        if self._times is not None:
            chunk_bytes = op.action.chunk_bytes if isinstance(op.action, Shift) else None
            ready = {channel.place.members[p]: ready_ns for p, ready_ns in ready.items()}
            flows = [f for _, t in away for f in self._flows(t)]
            sleep_until(max(
                max(ready[source], ready[target]) + self._times.message_ns(source, target, size_bytes, chunk_bytes)
                for source, target, size_bytes in flows
            ))  # fmt: skip
        for part, t in away:
            t.receive.copy_(slots.theirs(position(t.source), t.receive, part))
        channel.end(partners)
        return sum((Traffic(t.sent_bytes, t.messages) for _, t in away), Traffic())

    def _flows(self, t: Transfer) -> Iterator[tuple[int, int, int]]:
        """(source, target, bytes) of the messages of a transfer; empty ones are none."""
        if t.send.numel():
            yield self._rank, t.to, t.sent_bytes
        if t.receive.numel():
            yield t.source, self._rank, t.receive.numel() * t.receive.element_size()

    def collective(self, op: Op, parcel: Parcel) -> Traffic:
        """Does this rank's part of a collective."""
        if len(parcel.members) == 1:
            parcel.receive.copy_(parcel.send)
            return Traffic(*parcel.traffic())
        channel = self._channels[key_of(self._schedule, self._rank, op)]
        others = tuple(channel.others())
        slots = Slots(channel, self._bytes)
        channel.begin()
        if parcel.kind != "broadcast" or channel.position == parcel.root:
            slots.mine(parcel.send).copy_(parcel.send)
        ready = channel.meet(others)
        if self._times is not None:
            action = op.action
            assert isinstance(action, Collective)
            ranks = collective_ranks(parcel.members, action.root)
            took_ns = self._times.collective_ns(action.kind, ranks, action.size_bytes, action.dtype)
            sleep_until(max(ready.values()) + took_ns)
        _receive(slots, parcel, others)
        channel.end(others)
        return Traffic(*parcel.traffic())


def _from_rank_0(text: str, control: dist.ProcessGroup) -> str:
    told = [text]
    dist.broadcast_object_list(told, group=control, group_src=0)
    return told[0]


def collective_ranks(members: tuple[int, ...], root: int) -> tuple[int, ...]:
    """The members as prices of collectives see them: the root first."""
    return members[root:] + members[:root]


def _receive(slots: Slots, parcel: Parcel, others: Sequence[int]) -> None:
    """Fills `parcel.receive` from what all members have left in their slots."""
    n, position, send, receive = len(parcel.members), slots.channel.position, parcel.send, parcel.receive
    match parcel.kind:
        case "all_reduce":
            _all_reduce(slots, parcel, others)
        case "reduce":
            if position == parcel.root:
                _add_up(parcel.reduction, [slots.theirs(p, send) for p in range(n)], receive)
        case "reduce_scatter":
            parts = [slots.theirs(p, send).view(n, -1)[position] for p in range(n)]
            _add_up(parcel.reduction, parts, receive)
        case "broadcast":
            if position != parcel.root:
                receive.copy_(slots.theirs(parcel.root, receive))
        case "all_gather":
            for p in (position, *others):
                receive.view(n, -1)[p].copy_(send if p == position else slots.theirs(p, send))
        case "all_to_all":
            for p in (position, *others):
                receive.view(n, -1)[p].copy_(slots.theirs(p, send).view(n, -1)[position])
        case other:
            raise ValueError(f"unknown collective {other!r}")


def _all_reduce(slots: Slots, parcel: Parcel, others: Sequence[int]) -> None:
    n, send, receive = len(parcel.members), parcel.send, parcel.receive
    data, position = [slots.theirs(p, send) for p in range(n)], slots.channel.position
    if n == 2 or send.numel() * send.element_size() <= WHOLE_BYTES:
        _add_up(parcel.reduction, data, receive)
        return
    # Each adds up one part and leaves it in its slot, in the place of its own data, which nobody else needs.
    bounds = [send.numel() * p // n for p in range(n + 1)]
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    own = parts[position]
    _add_up(parcel.reduction, [theirs[own] for theirs in data], receive[own])
    data[position][own].copy_(receive[own])
    slots.channel.meet(others)
    for p in others:
        receive[parts[p]].copy_(data[p][parts[p]])


def _add_up(reduction: str, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """In order of position, so that every member gets the same bits; `out` is none of the parts."""
    combine = torch.maximum if reduction == "max" else torch.add
    combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)
