"""Rotation (RTP, arXiv 2311.01635): weights travel a ring while each rank keeps its own micro-batch.

Each rank rests with one shard of every rotating layer. A layer's forward has n sub-steps with n-1 hops between them,
clockwise; it ends one hop short of home, where its backward starts, counter-clockwise, with the gradient shard
travelling along and growing. After the backward each rank holds its own weight shard and the gradient of that shard
summed over all ranks: no reduction follows. Layers that do not rotate (norms, positions, routers) stay replicated and
share one all-reduce at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.model.layers import Layer
from rtp_sim.schedule.data_parallel import DataParallel
from rtp_sim.schedule.ir import Compute, Holding, Hop, Part, Shift, Size
from rtp_sim.schedule.sharding import Sharding, even, rotation_kind, shard_numel
from rtp_sim.schedule.step import Step, Work

GROUP = "rtp"
Offset = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A rotating layer: how it is split, parameters per shard, and its two weight buffers (one in place)."""

    layer: Layer
    kind: str
    numel: Size
    slots: tuple[str, ...]
    grad_slots: tuple[str, ...]


class Ring:
    """The rotation of one program: where every shard is, and the hops that move it.

    `offsets` are the shards that a rank visits on a pass, relative to where the pass starts. On a two-level ring of
    a x b ranks they go b-1 hops inside the node, then one to the same place in the next node, and so on: each shard is
    visited once and only a-1 hops leave the node, all of its ranks at once.
    """

    def __init__(self, step: Step, in_place: bool) -> None:
        self.step, self.in_place = step, in_place
        self.dims = step.groups[GROUP].dims if GROUP in step.groups else (1,)
        self.n = step.group_size(GROUP)
        self.offsets = _visits(self.dims)
        self._at: dict[str, Offset] = {}
        self._slot: dict[str, int] = {}
        # Gradient sums of shared weights that one layer leaves on their way home for the next.
        self.underway: dict[str, _GradientRing] = {}
        self.tied = {layer.shares for layer in step.network.layers() if layer.shares}

    # ---- what rotates

    def unit(self, layer: Layer) -> Unit | None:
        """The layer as a rotating unit, its buffers declared; None if it stays replicated."""
        kind = rotation_kind(layer.op, self.n, tied=layer.name in self.tied)
        if not kind or self.n == 1:
            return None
        kind = "vocab" if layer.shares else kind
        numel, name, step = even(shard_numel(layer.op, kind, self.n)), layer.weight_name, self.step
        most, holds = numel if isinstance(numel, int) else max(numel), [Holding(name, kind)]
        step.b.buffer(f"w.{name}", "weights", step.policy.weight_dtype, most, persistent=True, holds=holds)
        kept = step.options.gradient_buffer
        step.b.buffer(f"g.{name}", "gradients", step.policy.gradient_dtype, most, persistent=kept, holds=holds)
        if self.in_place:
            return Unit(layer, kind, numel, (f"w.{name}",), (f"g.{name}",))
        step.b.buffer(f"w.{name}.in", "weights", step.policy.weight_dtype, most, holds=holds)
        step.b.buffer(f"g.{name}.in", "gradients", step.policy.gradient_dtype, most, holds=holds)
        return Unit(layer, kind, numel, (f"w.{name}", f"w.{name}.in"), (f"g.{name}", f"g.{name}.in"))

    def held(self, unit: Unit) -> str:
        """The buffer that holds the unit's weights now."""
        return unit.slots[self._slot.get(unit.layer.weight_name, 0) % len(unit.slots)]

    def spare(self, unit: Unit) -> tuple[str, ...]:
        """The unit's other weight buffer; none in place."""
        return tuple(slot for slot in unit.slots if slot != self.held(unit))

    def at(self, unit: Unit) -> Offset:
        """The shard the rank holds now, relative to its own."""
        return self._at.get(unit.layer.weight_name, (0,) * len(self.dims))

    def part(self, offset: Offset) -> Part:
        """The shard at `offset`, as the IR names it."""
        return Part(GROUP, _centred(offset, self.dims))

    # ---- hops

    def hop(self, unit: Unit, source: str, target: str, shard: Offset, to: Offset, name: str, stream: str,
            itemsize: int, after: tuple[int, ...] = (), hold: tuple[str, ...] = ()) -> None:  # fmt: skip
        """One shift of shard `shard` so that the receiver can go on with shard `to`; `hold` stays allocated."""
        step = self.step
        offset = _centred(tuple(a - b for a, b in zip(shard, to, strict=True)), self.dims)
        size: Size = tuple(n * itemsize for n in unit.numel) if isinstance(unit.numel, tuple) else unit.numel * itemsize
        hop = Hop(offset, size, self.part(shard))
        if not self.in_place:
            step.b.op(name, stream, Shift(GROUP, (hop,)), (source, *hold), (target,), after=after)
            return
        bounce = step.b.buffer("bounce", "communication", "uint8", step.options.rtp_chunk_bytes)
        action = Shift(GROUP, (hop,), step.options.rtp_chunk_bytes)
        after = (*after, *step.b.last("compute"))
        step.b.op(name, stream, action, (source,), (source, bounce), after=after, blocks_host=True)
        step.b.drop("bounce")

    def weight_hop(self, unit: Unit, to: Offset, name: str, after: tuple[int, ...]) -> None:
        """Moves the unit's weights on: afterwards this rank holds shard `to`."""
        key, source = unit.layer.weight_name, self.held(unit)
        self._slot[key] = self._slot.get(key, 0) + 1
        self.hop(unit, source, self.held(unit), self.at(unit), to, name, "ring", self.step.policy.weight_bytes, after)
        self._at[key] = to

    # ---- passes

    def forward(self, layer: Layer, tag: str = "F", reverse: bool = False, cycle: bool = False) -> None:
        """One pass of a layer over all shards. `reverse` goes counter-clockwise, `cycle` makes the n-th hop back to the
        shard the pass started with."""
        unit = self.unit(layer)
        if unit is None:
            self.step.forward_layer(layer, Work(tag=tag))
            return
        visits = self._pass(unit, reverse)
        visits = [*visits, visits[0]] if cycle else visits
        pace = () if self.step.options.rtp_prefetch else self.step.b.last("compute")
        for i in range(self.n):
            weight, shard = self.held(unit), visits[i]
            work = Work(Sharding(unit.kind, self.n, self.part(shard), assemble=True), i, weight, tag=tag)
            if self.in_place:
                self.step.forward_layer(layer, work)
            if i + 1 < len(visits):
                self.weight_hop(unit, visits[i + 1], f"m{self.step.micro}.{layer.name}.{tag}{i}.hop", pace)
            if not self.in_place:
                self.step.forward_layer(layer, work)
        if cycle:
            self._come_home(unit)

    def backward(self, layer: Layer) -> None:
        """The pass back home, with the gradient shard travelling along."""
        unit = self.unit(layer)
        if unit is None:
            self.step.backward_layer(layer)
            return
        visits, name = self._pass(unit, reverse=True), f"m{self.step.micro}.{layer.name}.B"
        key = layer.weight_name
        grads = self.underway.pop(key, None) or _GradientRing(self, unit, ends_home=not any(visits[-1]))
        pace = () if self.step.options.rtp_prefetch else self.step.b.last("compute")
        for k in range(self.n):
            weight, shard = self.held(unit), visits[k]
            grad = grads.start(k)
            sharding = Sharding(unit.kind, self.n, self.part(shard), assemble=True)
            work = Work(sharding, k, weight, grad, after=grads.wait())
            to = visits[k + 1] if k + 1 < self.n else None
            if to is not None and not self.in_place:
                self.weight_hop(unit, to, f"{name}{k}.hop", pace)
            self.step.backward_layer(layer, work)
            if to is not None and self.in_place:
                self.weight_hop(unit, to, f"{name}{k}.hop", pace)
            grads.send(k, layer, shard, to)
        if any(self.at(unit)):
            # Another layer shares these weights: its backward takes the sum the rest of the way.
            self.underway[key] = grads
        else:
            grads.finish()
        self._come_home(unit)

    def _come_home(self, unit: Unit) -> None:
        """Puts the weights back into their own buffer: a cycle on an odd ring makes an odd number of hops."""
        key, own = unit.layer.weight_name, unit.slots[0]
        if not any(self._at[key]) and self.held(unit) != own:
            most = unit.numel if isinstance(unit.numel, int) else max(unit.numel)
            action = Compute("copy", self.step.policy.weight_dtype, (("numel", most),))
            self.step.b.op(f"m{self.step.micro}.{unit.layer.name}.home", "compute", action, (self.held(unit),), (own,))
            self._slot[key] = 0

    def _pass(self, unit: Unit, reverse: bool) -> list[Offset]:
        """The shards of a pass, starting with the one held now."""
        first = self.offsets[-1] if reverse else self.offsets[0]
        order = self.offsets[::-1] if reverse else self.offsets
        here = self.at(unit)
        return [tuple(h + o - f for h, o, f in zip(here, v, first, strict=True)) for v in order]


class _GradientRing:
    """The gradient shard of one weight on its way home. Sub-step k adds the local gradient to what arrived; with
    `rtp_hide_gradient_hop` the local gradient has its own buffer and is added once the partial sum is there."""

    def __init__(self, ring: Ring, unit: Unit, ends_home: bool) -> None:
        self.ring, self.unit, self.step = ring, unit, ring.step
        self.hide = self.step.options.rtp_hide_gradient_hop and not ring.in_place
        # The travelling sum must end in slot 0: n-1 hops from here, or 2(n-1) where two layers share the weights.
        self.slot = (ring.n - 1) % 2 if ends_home and not ring.in_place else 0
        self.kept: str | None = None
        self.last_hop: tuple[int, ...] = ()
        self._set_aside()

    def _set_aside(self) -> None:
        """Earlier micro-batches' gradient must not be overwritten by this one's travelling sum."""
        b, home = self.step.b, self.unit.grad_slots[0]
        if self.step.options.gradient_buffer and self.step.micro == 0:
            self._kernel("zero", (home,), (home,), "zero")
        elif not b.fresh(home):
            like = b.declared(home)
            self.kept = b.buffer(f"{home}.kept", "gradients", like.dtype, like.numel, holds=like.holds)
            self._kernel("copy", (home,), (self.kept,), "keep")
        for slot in self.unit.grad_slots:
            b.drop(slot)

    def _kernel(self, kernel: str, reads: tuple[str, ...], writes: tuple[str, ...], name: str) -> None:
        most = self.unit.numel if isinstance(self.unit.numel, int) else max(self.unit.numel)
        action = Compute(kernel, self.step.policy.gradient_dtype, (("numel", most),))
        self.step.b.op(f"m{self.step.micro}.{self.unit.layer.name}.B.{name}", "compute", action, reads, writes)

    def current(self) -> str:
        """The buffer of the travelling sum."""
        return self.unit.grad_slots[self.slot % len(self.unit.grad_slots)]

    def start(self, k: int) -> str:
        """The buffer into which sub-step k computes its local gradient."""
        if not self.hide or k == 0:
            return self.current()
        like = self.step.b.declared(self.current())
        name = f"g.{self.unit.layer.weight_name}.local"
        local = self.step.b.buffer(name, "gradients", like.dtype, like.numel, holds=like.holds)
        self.step.b.drop(local)
        return local

    def wait(self) -> tuple[int, ...]:
        """What a sub-step must wait for: the gradient hop before it, unless that is hidden."""
        return () if self.hide else self.last_hop

    def send(self, k: int, layer: Layer, shard: Offset, to: Offset | None) -> None:
        """After sub-step k of `layer`: complete the sum and pass it on, if the shard goes on."""
        current, name = self.current(), f"m{self.step.micro}.{layer.name}.B{k}"
        if self.hide and k > 0:
            local = f"g.{self.unit.layer.weight_name}.local"
            most = self.unit.numel if isinstance(self.unit.numel, int) else max(self.unit.numel)
            add = Compute("add", self.step.policy.gradient_dtype, (("numel", most),))
            self.step.b.op(f"{name}.sum", "compute", add, (current, local), (current,))
        if to is None:
            return
        self.slot += 1
        stream = "ring.gradient" if self.hide else "ring"
        # Both spare buffers belong to the sub-step until both hops are done, unless the hops go their own ways.
        hold = () if self.hide else self.ring.spare(self.unit)
        itemsize = self.step.policy.gradient_bytes
        self.ring.hop(self.unit, current, self.current(), shard, to, f"{name}.grad", stream, itemsize, hold=hold)
        self.last_hop = self.step.b.last(stream)

    def finish(self) -> None:
        """The sum is home: add what earlier micro-batches left."""
        if self.kept is not None:
            home = self.unit.grad_slots[0]
            self._kernel("add", (home, self.kept), (home,), "add")


def rtp(step: Step) -> None:
    """Out of place: a second buffer per unit, the next shard arrives while this one computes."""
    _rotate(step, Ring(step, in_place=False))


def rtp_inplace(step: Step) -> None:
    """In place: shards are exchanged between sub-steps, chunk by chunk through a bounce buffer; nothing overlaps."""
    _rotate(step, Ring(step, in_place=True))


def _rotate(step: Step, ring: Ring) -> None:
    if step.options.eval_passes:
        _evaluate(step, ring)
        return
    sync = DataParallel(step, step.options.dp_sync)
    for last in step.microbatches():
        for layer in step.network.layers():
            ring.forward(layer)
        for block in reversed(step.network.blocks):
            if step.recomputes(block):
                for layer in block.layers:
                    ring.forward(layer, "R", reverse=True, cycle=True)
            for layer in reversed(block.layers):
                ring.backward(layer)
                step.merge_input_grads(layer)
                if last or sync.every_microbatch:
                    _ready(step, ring, sync, layer)
        if last or sync.every_microbatch:
            _reduce_replicated(step, ring, sync)
        if not last and sync.every_microbatch:
            sync.end_microbatch()
    sync.finish()


def _ready(step: Step, ring: Ring, sync: DataParallel, layer: Layer) -> None:
    unit = ring.unit(layer)
    if unit is not None and layer.owned_numel:
        part = ring.part((0,) * len(ring.dims)) if isinstance(unit.numel, tuple) else None
        sync.ready(layer, unit.numel, part, unit.kind)


def _reduce_replicated(step: Step, ring: Ring, sync: DataParallel) -> None:
    """One all-reduce over the ring for the gradients of everything that does not rotate."""
    layers = [x for x in step.network.layers() if x.owned_numel and ring.unit(x) is None]
    grads = tuple(f"g.{x.name}" for x in layers)
    numel = sum(x.owned_numel for x in layers)
    step.collective("all_reduce", GROUP, "ring", f"m{step.micro}.reduce_replicated", numel, grads, grads,
                    step.policy.gradient_dtype)  # fmt: skip
    for layer in layers:
        sync.ready(layer)


def _evaluate(step: Step, ring: Ring) -> None:
    """Forward passes only; every other one runs the ring backwards, so no hop is spent on returning home. The last of
    an odd number makes the n-th hop, so that the next step finds the weights where this one did."""
    passes = step.options.eval_passes
    for micro in range(passes):
        step.start_pass(micro)
        for layer in step.network.layers():
            ring.forward(layer, reverse=micro % 2 == 1, cycle=passes % 2 == 1 and micro == passes - 1)


def _visits(dims: Offset) -> list[Offset]:
    """Shard offsets of a pass: (0,), (-1,), ... on a flat ring; (-o, o-i) at outer o, inner i on a two-level one."""
    if len(dims) == 1:
        return [(-i,) for i in range(dims[0])]
    return [(-o, o - i) for o in range(dims[0]) for i in range(dims[1])]


def _centred(offset: Offset, dims: Offset) -> Offset:
    """The same offset, each component in (-d/2, d/2]."""
    return tuple((o + (d - 1) // 2) % d - (d - 1) // 2 for o, d in zip(offset, dims, strict=True))
