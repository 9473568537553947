"""`Activations`: what a micro-batch keeps for its backward on one rank, read off short programs of the real strategies.

A program with one and one with two transformer blocks say what a block keeps, what comes before the first, and how
much more the head, or the backward of a block, needs at its worst moment. What is kept is held until the last op of
any stream that reads it; at the worst moment counts what ops of the compute stream hold. Sizes are those of the rank
with the smallest shards, for one sequence: larger micro-batches hold at least as many times that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from rtp_sim.compose.estimate import shortened
from rtp_sim.engine.memory import live_intervals
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Compute, Group, Program
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.step import Step
from rtp_sim.schedule.strategies import STRATEGIES

COUNTED = ("activations", "workspace", "communication")
BUILT_BY = {"whole": "single", "tp": "tp", "sp": "tp-sp"}


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes for one sequence: kept by what comes before the blocks and by each block; what the head, and a block's
    backward, need beyond what is kept, at the most."""

    first_bytes: int
    block_bytes: int
    head_bytes: int
    backward_bytes: int


class Activations:
    """What is kept for the backward, by way to split, ranks and recomputation."""

    def __init__(self, network: Network, unfused: Network, precision: str) -> None:
        self.networks = {False: network, True: unfused}
        self.precision = precision
        self.kept = cache(self._kept)

    def _kept(self, way: str, n: int, recompute: str) -> Kept:
        """Rotation computes all shards of a layer on every rank, so it keeps what whole layers keep."""
        network = self.networks[way.startswith("rtp")]
        blocks = sum(block.recomputable for block in network.blocks)
        way = "whole" if way.startswith("rtp") or n == 1 else way
        if not blocks:
            whole = self._read(network, way, n, recompute)
            return Kept(0, 0, whole[1], 0)
        if blocks == 1:
            kept, head, back, _ = self._read(network, way, n, recompute)
            return Kept(kept, 0, head, back)
        one = self._read(shortened(network, 1), way, n, recompute)
        two = self._read(shortened(network, 2), way, n, recompute)
        each = two[0] - one[0]
        # What only messages read in a block's backward may be gone at its worst moment.
        messages = two[3] - one[3]
        return Kept(one[0] - each, each, two[1], max(0, two[2] - messages))

    def _read(self, network: Network, way: str, n: int, recompute: str) -> tuple[int, int, int, int]:
        """(kept behind the head, head's peak beyond it, last block's peak beyond it, what of the first only messages
        read)."""
        training = TrainingSpec(1, network.seq, precision=self.precision, recompute=recompute)
        groups = {"tp": Group("tp", (n,), (tuple(range(n)),))} if n > 1 else {}
        step = Step(way, network, training, groups, Options())
        STRATEGIES[BUILT_BY[way]](step)
        program = step.b.program()
        owner = {layer.name: k for k, block in enumerate(network.blocks) for layer in block.layers}
        last = max((k for k, block in enumerate(network.blocks) if block.recomputable), default=len(network.blocks))
        block_of = {
            op.index: owner[op.action.site.layer]
            for op in program.ops
            if isinstance(op.action, Compute) and op.action.site is not None
        }
        head = [i for i, k in block_of.items() if k > last] or list(block_of)
        begin, end = min(head), max(head)
        spans, longer = list(_spans(program, messages=False)), _spans(program, messages=True)
        kept = sum(size for first, stop, size in spans if first < begin and stop > end)
        more = sum(size for first, stop, size in longer if first < begin and stop > end) - kept
        backward = [i for i, k in block_of.items() if k == last and i > end]
        head_bytes, backward_bytes = _most(spans, range(begin, end + 1)) - kept, _most(spans, backward) - kept
        return kept + more, head_bytes, max(0, backward_bytes), more


def _spans(program: Program, messages: bool) -> Iterable[tuple[int, int, int]]:
    """(first op, last op, bytes) of everything counted: first among the ops of the compute stream, last among these or,
    with `messages`, among all."""
    compute = {op.index for op in program.ops if isinstance(op.action, Compute)}
    for version in live_intervals(program):
        buffer = program.buffers[version.buffer]
        touched = [i for i in version.users if i in compute]
        # A single number, the loss, is one however many sequences there are.
        if buffer.category not in COUNTED or buffer.numel == 1 or not (touched or version.writer is None):
            continue
        # A size by shard is that of this rank's; of others it is the least.
        sizes = buffer.numel if isinstance(buffer.numel, tuple) else None
        index = 0 if sizes is None else min(range(len(sizes)), key=sizes.__getitem__)
        first = -1 if version.writer is None else min(touched)
        last = max(version.users if messages else touched, default=len(program.ops) if version.kept else first)
        yield first, last, buffer.size_bytes(index)


def _most(spans: list[tuple[int, int, int]], places: Iterable[int]) -> int:
    """The most bytes held at any of these ops."""
    change: dict[int, int] = {}
    for first, stop, size in spans:
        change[first] = change.get(first, 0) + size
        change[stop + 1] = change.get(stop + 1, 0) - size
    wanted, level, best = sorted(places), 0, 0
    events = sorted(change)
    at = 0
    for place in wanted:
        while at < len(events) and events[at] <= place:
            level += change[events[at]]
            at += 1
        best = max(best, level)
    return best
