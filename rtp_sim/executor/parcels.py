"""Between a collective's buffers and the flat tensors that travel: laying buffers end to end, padding, cutting.

Several buffers of one collective are one array, padded at its end to equal parts. Where members' shares differ (token
shards of uneven size) each part is padded to the largest, and the padding is cut off on arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rtp_sim.executor.exchange import Parcel
from rtp_sim.executor.shares import Stretch, local_numel
from rtp_sim.executor.storage import Storage
from rtp_sim.schedule.ir import DTYPE_BYTES, Buffer, Collective, Op, Program, Schedule, shifted

STATISTICS = {"max": 0, "sum": 1, "target": 2}
"""Which row of a split loss's statistics a collective of that last name reduces."""


@dataclass(frozen=True, slots=True)
class Wire:
    """Where a collective stands: the rank's program and storage, the members of its group and its own place."""

    schedule: Schedule
    rank: int
    storage: Storage

    @property
    def program(self) -> Program:
        """The rank's program."""
        return self.schedule.program(self.rank)

    def members(self, group: str) -> tuple[int, ...]:
        """Ranks of this rank's instance of the group, in order of position."""
        g = self.schedule.groups[group]
        return g.instances[g.place[self.rank][0]]

    def position(self, group: str) -> int:
        """This rank's position in its instance."""
        return self.schedule.groups[group].position(self.rank)

    def shares(self, group: str, buffer: Buffer, total: int) -> tuple[int, ...]:
        """Elements of each member's part: by the buffer's sizes where these differ, else equal parts of `total`."""
        g = self.schedule.groups[group]
        if isinstance(buffer.numel, tuple) and buffer.part is not None and buffer.part.group == group:
            numel, offset = buffer.numel, buffer.part.offset
            return tuple(numel[shifted(p, g.dims, offset)] for p in range(g.size))
        return (-(-total // g.size),) * g.size


def sources(op: Op) -> tuple[str, ...]:
    """What a collective (or copy) takes its data from: what it reads and does not write, or all it reads."""
    return tuple(b for b in op.reads if b not in op.writes) or op.reads


def laid_out(storage: Storage, names: Sequence[str], size: int | None = None) -> torch.Tensor:
    """The buffers one after another, padded with zeros to `size`: the buffer itself where nothing is to be done."""
    flat = storage[names[0]] if len(names) == 1 else torch.cat([storage[n] for n in names])
    if size is None or flat.numel() == size:
        return flat
    return torch.cat([flat, flat.new_zeros(size - flat.numel())]) if flat.numel() < size else flat[:size]


def spread(storage: Storage, names: Sequence[str], flat: torch.Tensor, start: int = 0) -> None:
    """Copies `flat` to where elements from `start` on lie in the buffers one after another; what is beyond them is
    padding."""
    begin, end = 0, start + flat.numel()
    targets, parts = [], []
    for name in names:
        target = storage[name]
        numel = target.numel()
        a, b = max(start, begin), min(end, begin + numel)
        if a < b:
            targets.append(target if b - a == numel else target[a - begin : b - begin])
            parts.append(flat[a - start : b - start])
        begin += numel
    if targets:
        torch._foreach_copy_(targets, parts)


def make_parcel(wire: Wire, op: Op) -> Parcel:
    """The rank's part of a collective, from what its buffers hold now."""
    action, storage = op.action, wire.storage
    assert isinstance(action, Collective)
    members, taken = wire.members(action.group), sources(op)
    total = action.size_bytes // DTYPE_BYTES[action.dtype]
    if action.kind == "reduce_scatter":
        shares = wire.shares(action.group, wire.program.buffers[op.writes[0]], total)
        send = _padded_parts(laid_out(storage, taken, sum(shares)), shares)
        return Parcel(action.kind, members, send, send.new_empty(max(shares)), sum(shares))
    if action.kind == "all_gather":
        return _gather(wire, op, action, taken, total)
    if action.kind == "all_to_all":
        send = laid_out(storage, taken)
        return Parcel(action.kind, members, send, torch.empty_like(send), send.numel())
    flat = laid_out(storage, taken)
    if len(taken) == 1 and op.writes != taken:
        flat = flat.clone()
    return Parcel(action.kind, members, flat, flat, flat.numel(), root=action.root)


def _gather(wire: Wire, op: Op, action: Collective, taken: tuple[str, ...], total: int) -> Parcel:
    shares = wire.shares(action.group, wire.program.buffers[taken[0]], total)
    own, most = shares[wire.position(action.group)], max(shares)
    if taken == op.writes:
        # The new weights of this rank's slice, out of buffers that hold all of them.
        start = wire.position(action.group) * most
        own_part = Stretch(taken, start, start + most).part(wire.storage, 0, most)
    else:
        own_part = laid_out(wire.storage, taken, own)
    send = torch.cat([own_part, own_part.new_zeros(most - own_part.numel())]) if own_part.numel() < most else own_part
    return Parcel(action.kind, wire.members(action.group), send, send.new_empty(most * len(shares)), sum(shares))


def _padded_parts(flat: torch.Tensor, shares: tuple[int, ...]) -> torch.Tensor:
    most = max(shares)
    if min(shares) == most:
        return flat
    parts = [torch.cat([p, p.new_zeros(most - p.numel())]) for p in torch.split(flat, list(shares))]
    return torch.cat(parts)


def deliver(wire: Wire, op: Op, parcel: Parcel) -> None:
    """Puts what a collective left in `parcel.receive` into the buffers it writes."""
    action = op.action
    assert isinstance(action, Collective)
    if action.kind == "reduce_scatter":
        _deliver_slice(wire, op, action, parcel)
    elif action.kind == "all_gather":
        total = action.size_bytes // DTYPE_BYTES[action.dtype]
        shares = wire.shares(action.group, wire.program.buffers[sources(op)[0]], total)
        parts = torch.split(parcel.receive, max(shares))
        flat = parcel.receive if min(shares) == max(shares) else torch.cat(
            [p[:s] for p, s in zip(parts, shares, strict=True)]
        )  # fmt: skip
        _deliver_all(wire, op, flat)
    else:
        _deliver_all(wire, op, parcel.receive)


def _deliver_slice(wire: Wire, op: Op, action: Collective, parcel: Parcel) -> None:
    target = wire.program.buffers[op.writes[0]]
    if op.writes[0] in op.reads:
        # The slice's sum replaces this rank's part of gradients that are kept whole (zero1).
        start = wire.position(action.group) * parcel.receive.numel()
        spread(wire.storage, op.writes, parcel.receive, start)
        return
    own = local_numel(wire.schedule, wire.rank, target)
    received = parcel.receive if parcel.receive.numel() == own else parcel.receive[:own].clone()
    wire.storage.put(target.name, received)


def _deliver_all(wire: Wire, op: Op, flat: torch.Tensor) -> None:
    storage, begin = wire.storage, 0
    for name in op.writes:
        if name in op.reads:
            continue
        numel = local_numel(wire.schedule, wire.rank, wire.program.buffers[name])
        part = flat[begin : begin + numel]
        storage.put(name, part if len(op.writes) == 1 else part.clone())
        begin += numel
    kept = [name for name in op.writes if name in op.reads]
    if kept and not (len(kept) == 1 and storage[kept[0]] is flat):
        spread(storage, kept, flat)
