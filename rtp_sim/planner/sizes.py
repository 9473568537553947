"""`Sizes`: how many parameters a rank holds of each block, and how gradients are reduced in buckets.

Rank 0 has the largest shard of everything, so the sizes are those of the rank that holds most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rtp_sim.model.layers import Layer, Split
from rtp_sim.model.network import Block, Network
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.sharding import rotation_kind, tensor_kind


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Parameters of one block on a rank: `items` of each of its weights that finishes during the backward, last layer
    first, and `late` of those that finish after it (schedule/strategies: norms under sequence parallelism, what does
    not rotate); `shared` are weights that another block owns; `unit` the largest rotating layer."""

    items: tuple[int, ...]
    late: tuple[int, ...]
    shared: tuple[int, ...]
    unit: int

    @property
    def owned(self) -> int:
        """All of the block's own."""
        return sum(self.items) + sum(self.late)


class Sizes:
    """Block sizes of a network, split in the ways of `LayerTimes`."""

    def __init__(self, network: Network, unfused: Network) -> None:
        self.networks = {False: network, True: unfused}
        self._tied = {f: {x.shares for x in n.layers() if x.shares} for f, n in self.networks.items()}
        self.blocks = cache(self._blocks)

    def _blocks(self, way: str, n: int) -> tuple[BlockSizes, ...]:
        return tuple(self._block(b, way, n) for b in self.networks[way.startswith("rtp")].blocks)

    def _block(self, block: Block, way: str, n: int) -> BlockSizes:
        items, late, shared, unit = [], [], [], 0
        for layer in reversed(block.layers):
            if not layer.op.numel():
                continue
            kind = self._kind(layer, way, n)
            numel = layer.op.numel(Split(kind, n, 0)) if kind else layer.op.numel()
            unit = max(unit, numel if kind else 0)
            if layer.shares:
                shared.append(numel)
            elif n > 1 and not kind and (way == "sp" or way.startswith("rtp")):
                late.append(numel)
            else:
                items.append(numel)
        return BlockSizes(tuple(items), tuple(late), tuple(shared), unit)

    def _kind(self, layer: Layer, way: str, n: int) -> str:
        if n == 1 or way == "whole":
            return ""
        return tensor_kind(layer.op) if way in ("tp", "sp") else rotation_kind(
            layer.op, n, layer.name in self._tied[True]
        )  # fmt: skip


def buckets(blocks: Sequence[BlockSizes], gradient_bytes: int, options: Options) -> Counter[int]:
    """Parameters per bucket -> how many such buckets, as `schedule.data_parallel.DataParallel` fills them."""
    found: Counter[int] = Counter()
    for size in _filled(blocks, gradient_bytes, options):
        found[size] += 1
    return found


def _filled(blocks: Sequence[BlockSizes], gradient_bytes: int, options: Options) -> list[int]:
    items = [i for block in reversed(blocks) for i in block.items]
    items += [i for block in blocks for i in reversed(block.late)]
    full: list[int] = []
    open_numel = 0
    for numel in items:
        open_numel += numel
        limit = options.ddp_first_bucket_bytes if not full else options.ddp_bucket_bytes
        if options.dp_overlap and open_numel * gradient_bytes >= limit:
            full.append(open_numel)
            open_numel = 0
    return [*full, open_numel] if open_numel else full
