"""`DataParallel`: what becomes of finished gradients along the data-parallel axis, and the optimizer step after it.

Modes: "ddp" all-reduces gradients in buckets while the backward goes on, every rank updates all; "zero1" and "zero2"
reduce-scatter them, each rank updates its 1/n and the new weights are all-gathered at the end of the step. zero1 keeps
the whole gradient, zero2 only the shard (ZeRO, arXiv 1910.02054). A group of one communicates nothing, so this also
ends the step of every strategy without data parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.model.layers import Layer
from rtp_sim.schedule.ir import Compute, Holding, Part, Size
from rtp_sim.schedule.step import Step
from rtp_sim.schedule.update import OptimizerShare

ZERO1 = "zero1"
"""The group of replicas that share the optimizer's state, where it is smaller than all of them."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A finished gradient: parameters of one weight (by shard where uneven), and the most of any shard."""

    name: str
    numel: Size
    part: Part | None
    split: str

    @property
    def holding(self) -> Holding:
        """Whose gradient it is, as buffers say it."""
        return Holding(self.name, self.split)

    @property
    def most(self) -> int:
        """Elements, padded to the largest shard."""
        return self.numel if isinstance(self.numel, int) else max(self.numel)


class DataParallel:
    """Collects finished gradients into buckets and communicates each bucket as soon as it is full."""

    def __init__(self, step: Step, mode: str, group: str = "dp", *, copy: bool = False) -> None:
        self.step, self.mode, self.group, self.copy = step, mode, group, copy
        self.n = step.group_size(group)
        # Who shares the optimizer's state: all, or under zero1 groups within them.
        self.sharing = ZERO1 if mode == "zero1" and ZERO1 in step.groups else group
        self._bucket: list[Ready] = []
        self._buckets: list[list[Ready]] = []
        self._all: dict[str, Ready] = {}

    @property
    def every_microbatch(self) -> bool:
        """Whether gradients are reduced in each micro-batch instead of only in the last."""
        return self.mode == "zero2" and self.n > 1

    def ready(self, layer: Layer, numel: Size | None = None, part: Part | None = None, split: str = "") -> None:
        """The gradient of a layer's own weights is finished for this micro-batch."""
        if not self.step.keeps(layer):
            return
        item = Ready(layer.weight_name, layer.op.numel() if numel is None else numel, part, split)
        self._all[item.name] = item
        self._bucket.append(item)
        options = self.step.options
        if not options.dp_overlap:
            return
        limit = options.ddp_first_bucket_bytes if not self._buckets else options.ddp_bucket_bytes
        if sum(i.most for i in self._bucket) * self.step.policy.gradient_bytes >= limit:
            self.flush()

    def flush(self) -> None:
        """Communicates what is in the open bucket."""
        bucket, self._bucket = self._bucket, []
        if not bucket:
            return
        self._buckets.append(bucket)
        if self.n > 1:
            self._reduce(len(self._buckets) - 1, bucket)

    def end_microbatch(self) -> None:
        """Closes the pass over the layers when gradients are reduced in each micro-batch (zero2)."""
        self.flush()
        self._buckets = []
        for name in self._all:
            self.step.b.drop(f"g.{name}")

    def finish(self) -> None:
        """Waits for the gradients, takes the optimizer step, and gathers what was updated elsewhere."""
        self.flush()
        step = self.step
        if self.n == 1 or self.mode == "ddp":
            self._copy_out()
            step.optimizer(
                [
                    OptimizerShare(i.name, i.numel, (f"g.{i.name}",), (f"w.{i.name}",), (i.holding,), part=i.part)
                    for i in self._all.values()
                ]
            )
            return
        shares = []
        for k, bucket in enumerate(self._buckets):
            weights = tuple(f"w.{i.name}" for i in bucket)
            grads = tuple(f"g.{i.name}" for i in bucket) if self.mode == "zero1" else (f"g.shard{k}",)
            holds = tuple(i.holding for i in bucket)
            shares.append(OptimizerShare(f"bucket{k}", self._shard(bucket), grads, weights, holds, self.sharing))
        step.optimizer(shares)
        for k, bucket in enumerate(self._buckets):
            weights = tuple(f"w.{i.name}" for i in bucket)
            padded = self._shard(bucket) * step.group_size(self.sharing)
            step.collective("all_gather", self.sharing, self.group, f"gather_weights.{k}", padded, weights, weights)

    def _shard(self, bucket: list[Ready]) -> int:
        """Elements of one rank's share of a bucket, padded."""
        return -(-sum(i.most for i in bucket) // self.step.group_size(self.sharing))

    def _reduce(self, k: int, bucket: list[Ready]) -> None:
        step, dtype, options = self.step, self.step.policy.gradient_dtype, self.step.options
        total = sum(i.most for i in bucket)
        source = grads = tuple(f"g.{i.name}" for i in bucket)
        name = f"m{step.micro}.reduce.{k}"
        if self.copy:
            source = (self._copy_in(k, bucket, total, f"{name}.copy_in"),)
        if self.mode == "ddp" or self.sharing != self.group or (self.mode == "zero1" and options.zero1_all_reduce):
            kept = source if self.mode == "ddp" else grads
            reads = tuple(dict.fromkeys((*source, *kept)))
            step.collective("all_reduce", self.group, self.group, name, total, reads, kept, dtype)
            return
        padded = self._shard(bucket) * self.n
        if self.mode == "zero1":
            # The shard's sum replaces this rank's part of the gradient that is kept anyway.
            reads = tuple(dict.fromkeys((*source, *grads)))
            step.collective("reduce_scatter", self.group, self.group, name, padded, reads, grads, dtype)
            return
        holds, numel = tuple(i.holding for i in bucket), self._shard(bucket)
        shard = step.b.buffer(f"g.shard{k}", "gradients", dtype, numel, holds=holds, slice_of=self.group)
        if step.b.fresh(shard):
            step.collective("reduce_scatter", self.group, self.group, name, padded, source, (shard,), dtype)
            return
        arrived = step.b.buffer(f"g.arrived{k}", "communication", dtype, numel, holds=holds, slice_of=self.group)
        step.collective("reduce_scatter", self.group, self.group, name, padded, source, (arrived,), dtype)
        add = Compute("add", dtype, (("numel", numel),))
        step.b.op(f"{name}.add", "compute", add, (shard, arrived), (shard,))

    def _copy_in(self, k: int, items: list[Ready], numel: int, name: str) -> str:
        """torch DDP keeps its buckets for the whole run beside the gradients (gradient_as_bucket_view=False)."""
        step, dtype = self.step, self.step.policy.gradient_dtype
        keep, grads = self.mode == "ddp", tuple(f"g.{i.name}" for i in items)
        holds = tuple(i.holding for i in items)
        bucket = step.b.buffer(f"bucket{k}", "communication", dtype, numel, persistent=keep, holds=holds)
        if not keep:
            step.b.drop(bucket)
        # A kept bucket is updated, not made anew: its memory is held through the whole step.
        reads = grads if step.b.fresh(bucket) else (*grads, bucket)
        step.b.op(name, "compute", Compute("copy", dtype, (("numel", numel),)), reads, (bucket,))
        return bucket

    def _copy_out(self) -> None:
        if not self.copy or self.n == 1:
            return
        dtype = self.step.policy.gradient_dtype
        for k, bucket in enumerate(self._buckets):
            numel, grads = sum(i.most for i in bucket), tuple(f"g.{i.name}" for i in bucket)
            action = Compute("copy", dtype, (("numel", numel),))
            self.step.b.op(f"reduce.{k}.copy_out", "compute", action, (f"bucket{k}", *grads), grads)


def keep_gradients(step: Step) -> None:
    """Declares every gradient as kept from step to step (ZeRO-1's contiguous gradient buffer, zero at the start)."""
    for layer in step.network.layers():
        if layer.owned_numel:
            numel, dtype = layer.op.numel(), step.policy.gradient_dtype
            holds = (Holding(layer.name),)
            step.b.buffer(f"g.{layer.name}", "gradients", dtype, numel, persistent=True, holds=holds)
