"""Which elements a dropout drops, by a seed: the same in a forward and its recomputation, and in any other program.

An element is kept where a uniform number is at least the probability. The numbers come from torch's generator, seeded
by the run's seed, the step (from 1), the replica, the micro-batch ("m0"), the kernel's place in the model and the shard
it works on. So ranks of a tensor-parallel group that work on the same elements drop the same, and ranks that work on
their own replicas, rows or heads drop their own.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rtp_sim.model.layers import Attention, Dropout, Layer, Split, split_sizes
from rtp_sim.model.network import Network
from rtp_sim.schedule.ir import Compute, Schedule, Site


def mask_seed(seed: int, step: int, replica: int, micro: str, site: Site, shard: int) -> int:
    """The generator's seed for one launch."""
    return zlib.crc32(repr((seed, step, replica, micro, site, shard)).encode())


def keep_mask(numel: int, probability: float, seed: int, device: torch.device | str) -> torch.Tensor:
    """Which of `numel` elements are kept. Numbers differ from one kind of device to another."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(numel, generator=generator, device=device) >= probability


def probability_of(op: object) -> float:
    """The probability with which a layer drops: 0 for layers that drop nothing."""
    if isinstance(op, Dropout):
        return op.probability
    return op.dropout if isinstance(op, Attention) else 0.0


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of whole tensors, put together from the shards that a schedule works on: for dense training."""

    seed: int
    device: torch.device | str
    sites: Mapping[str, tuple[Site, int]]
    """layer -> the kernel's place and how many shards there are."""

    def whole(self, layer: Layer, step: int, replica: int, micro: int, shape: torch.Size) -> torch.Tensor:
        """The mask of a tensor of (batch, tokens, features), or for attention of (batch, heads, tokens, tokens)."""
        site, n = self.sites[layer.name]
        parts = []
        for shard in range(n):
            part = _shard_shape(layer, Split(site.split, n, shard), shape)
            seed = mask_seed(self.seed, step, replica, f"m{micro}", site, shard)
            mask = keep_mask(part.numel(), probability_of(layer.op), seed, self.device)
            parts.append(mask.view(part).cpu())
        return torch.cat(parts, 1 if site.split == "heads" else 0).reshape(shape)


def masks_of(schedule: Schedule, network: Network, seed: int, device: torch.device | str) -> Masks:
    """The masks of a schedule of `network`."""
    found = {}
    for program in schedule.programs:
        for op in program.ops:
            a = op.action
            if isinstance(a, Compute) and a.kernel == "dropout" and a.site is not None:
                n = schedule.groups[a.part.group].size if a.part is not None and a.site.split else 1
                found[a.site.layer] = (a.site, n)
    return Masks(seed, device, {x.name: found[x.name] for x in network.layers() if x.name in found})


def _shard_shape(layer: Layer, split: Split, shape: torch.Size) -> torch.Size:
    """The shape of a shard's elements: its tokens of (batch x tokens, features), or its heads."""
    if split.kind == "rows":
        return torch.Size((split_sizes(shape[0] * shape[1], split.n)[split.index], *shape[2:]))
    if split.kind == "heads":
        op = layer.op
        assert isinstance(op, Attention)
        heads = split_sizes(op.kv_heads, split.n)[split.index] * (op.heads // op.kv_heads)
        return torch.Size((shape[0], heads, *shape[2:]))
    return shape
