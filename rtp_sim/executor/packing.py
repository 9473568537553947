"""Where a shard's parameters lie: ranges of the full tensors, and their places in flat buffers.

A flat buffer holds the parameters of its `holds` one after another, each layer's in the order of its op's `params`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch

from rtp_sim.model.layers import Attention, Conv2d, Embedding, Experts, LayerOp, Linear, Mlp, Split, split_sizes

Ranges = tuple[int, tuple[tuple[int, int], ...]]
"""A dimension, and the stretches [begin, end) of it that a shard has."""


def begin(total: int, split: Split) -> int:
    """Where the shard begins when `total` is split over its n."""
    return sum(split_sizes(total, split.n)[: split.index])


def stretch(total: int, split: Split) -> tuple[int, int]:
    """The shard's stretch [begin, end) of `total`."""
    first = begin(total, split)
    return first, first + split_sizes(total, split.n)[split.index]


def ranges(op: LayerOp, name: str, split: Split) -> Ranges | None:
    """Which part of the full parameter `name` a shard has; None for all of it (a copy on every shard)."""
    match op, split.kind:
        case _, "" | "rows":
            return None
        case ((Linear() | Conv2d() | Embedding()), ("out" | "vocab")):
            total = {Linear: "out_features", Conv2d: "out_channels", Embedding: "vocab"}[type(op)]
            return 0, (stretch(getattr(op, total), split),)
        case Linear(), "in":
            return (1, (stretch(op.in_features, split),)) if name == "weight" else None
        case Embedding(), "width":
            return 1, (stretch(op.width, split),)
        case Attention(), "heads":
            return _attention(op, name, split)
        case Mlp(), "ffn":
            return _feed_forward(op.ffn, op.gated, name, split, 0)
        case Experts(), "ffn":
            return _feed_forward(op.ffn, op.gated, name, split, 1)
        case Experts(), "experts":
            return 0, (stretch(op.experts, split),)
    raise ValueError(f"{type(op).__name__} has no split {split.kind!r}")


def _attention(op: Attention, name: str, split: Split) -> Ranges | None:
    """Rows of queries, keys and values of the shard's heads; the columns of the output projection they feed."""
    first, last = stretch(op.kv_heads, split)
    d, group = op.head_dim, op.heads // op.kv_heads
    queries, keys, values = 0, op.heads * d, (op.heads + op.kv_heads) * d
    if name == "out_bias":
        return None
    mine = (queries + first * group * d, queries + last * group * d)
    if name == "out":
        return 1, (mine,)
    return 0, (mine, (keys + first * d, keys + last * d), (values + first * d, values + last * d))


def _feed_forward(ffn: int, gated: bool, name: str, split: Split, dim: int) -> Ranges | None:
    """Rows of the first linear (of its gate half and its up half), columns of the second."""
    first, last = stretch(ffn, split)
    if name == "down_bias":
        return None
    if name == "down":
        return dim + 1, ((first, last),)
    return dim, ((first, last), (ffn + first, ffn + last)) if gated else ((first, last),)


def shard(op: LayerOp, name: str, full: torch.Tensor, split: Split) -> torch.Tensor:
    """The shard's part of a full parameter."""
    found = ranges(op, name, split)
    if found is None:
        return full
    dim, stretches = found
    return torch.cat([full.narrow(dim, a, b - a) for a, b in stretches], dim)


def packed(op: LayerOp, split: Split, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The shard's parameters in one flat tensor."""
    parts = [shard(op, p.name, params[p.name], split).reshape(-1) for p in op.params(split)]
    return torch.cat(parts) if parts else torch.zeros(0)


def unpacked(op: LayerOp, split: Split, flat: torch.Tensor, offset: int = 0) -> dict[str, torch.Tensor]:
    """Views of the shard's parameters in a flat tensor that holds them from `offset` on."""
    return placed(layout(op, split), flat, offset)


def placed(places: Sequence[Place], flat: torch.Tensor, offset: int = 0) -> dict[str, torch.Tensor]:
    """Views of the parameters at `places`, counted from `offset` on."""
    return {name: flat[offset + a : offset + b].view(shape) for name, a, b, shape in places}


Place = tuple[str, int, int, tuple[int, ...]]
"""Name, first and last element (exclusive) and shape of a parameter in a flat tensor."""


@cache
def layout(op: LayerOp, split: Split) -> tuple[Place, ...]:
    """The places of the parameters of a shard."""
    found, offset = [], 0
    for p in op.params(split):
        found.append((p.name, offset, offset + p.numel, p.shape))
        offset += p.numel
    return tuple(found)


def put(op: LayerOp, split: Split, flat: torch.Tensor, full: Mapping[str, torch.Tensor]) -> None:
    """Copies a shard's flat parameters to their places in the full tensors."""
    for name, part in unpacked(op, split, flat).items():
        found = ranges(op, name, split)
        if found is None:
            full[name].copy_(part)
            continue
        dim, stretches = found
        at = 0
        for a, b in stretches:
            full[name].narrow(dim, a, b - a).copy_(part.narrow(dim, at, b - a))
            at += b - a


def empty_parameters(ops: Sequence[tuple[str, LayerOp]], dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """Full tensors of zeros for every layer with parameters."""
    return {name: {p.name: torch.zeros(p.shape, dtype=dtype) for p in op.params()} for name, op in ops if op.params()}
