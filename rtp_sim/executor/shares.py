"""What an optimizer op updates on a rank: per state buffer the flat gradients and weights that belong together.

A share's parameters lie in one buffer that holds just them, or in several one after another; with `slice_of` the rank
updates only its slice of that sequence (schedule/data_parallel.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from rtp_sim.errors import ScheduleError
from rtp_sim.executor.parameters import slice_place
from rtp_sim.schedule.ir import Buffer, Holding, Op, Schedule


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements [start, stop) of buffers laid one after another."""

    buffers: tuple[str, ...]
    start: int
    stop: int

    def views(self, storage: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Views of the elements, buffer by buffer, each with its place in the stretch."""
        begin = 0
        for name in self.buffers:
            flat = storage[name]
            a, b = max(self.start, begin), min(self.stop, begin + flat.numel())
            if a < b:
                yield a - self.start, flat[a - begin : b - begin]
            begin += flat.numel()

    def part(self, storage: Mapping[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the stretch: a view where they lie in one buffer, else a copy."""
        inner = Stretch(self.buffers, self.start + start, self.start + stop)
        found = [view for _, view in inner.views(storage)]
        if not found:
            return storage[self.buffers[0]][:0]
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True, slots=True)
class OptimizerWork:
    """One state buffer with the gradients and the weights it belongs to."""

    state: Buffer
    gradients: Stretch
    weights: Stretch


def optimizer_work(schedule: Schedule, rank: int, op: Op, numel: Callable[[Holding], int]) -> list[OptimizerWork]:
    """The shares of an optimizer op, in the order of its state buffers; `numel` says how many parameters of a holding
    the rank has.

    ScheduleError if the op reads no gradients or weights of parameters that a state buffer holds.
    """
    buffers = schedule.program(rank).buffers
    reads = [buffers[name] for name in op.reads]
    found = []
    for state in (b for b in reads if b.category == "optimizer" and b.holds):
        gradients = _stretch(schedule, rank, op, state, [b for b in reads if b.category == "gradients"])
        weights = _stretch(schedule, rank, op, state, [b for b in reads if b.category == "weights"])
        if not state.slice_of and len(state.holds) == 1:
            # A ring's buffers have room for its largest shard.
            own = numel(state.holds[0])
            gradients, weights = replace(gradients, stop=own), replace(weights, stop=own)
        found.append(OptimizerWork(state, gradients, weights))
    return found


def _stretch(schedule: Schedule, rank: int, op: Op, state: Buffer, among: list[Buffer]) -> Stretch:
    for b in among:
        if b.holds == state.holds and b.slice_of == state.slice_of:
            return Stretch((b.name,), 0, local_numel(schedule, rank, b))
    parts = [next((b for b in among if h in b.holds and not b.slice_of), None) for h in state.holds]
    chosen = dict.fromkeys(b for b in parts if b is not None)
    if None in parts or not parts:
        raise ScheduleError(f"{op.name}: it reads no {among[0].category if among else 'buffers'} of all that "
                            f"{state.name} holds")  # fmt: skip
    total = sum(local_numel(schedule, rank, b) for b in chosen)
    if not state.slice_of:
        return Stretch(tuple(b.name for b in chosen), 0, total)
    at = slice_place(schedule, rank, state.slice_of)
    # Shares are counted with the largest shard of each buffer, as the schedule's collectives are.
    share = -(-sum(b.numel if isinstance(b.numel, int) else max(b.numel) for b in chosen) // at.n)
    first, last = min(at.index * share, total), min((at.index + 1) * share, total)
    return Stretch(tuple(b.name for b in chosen), first, last)


def local_numel(schedule: Schedule, rank: int, buffer: Buffer) -> int:
    """Elements of the buffer on this rank."""
    return buffer.numel if isinstance(buffer.numel, int) else buffer.numel[schedule.shard_index(rank, buffer.part)]
