"""`Sharding`: which shard of a layer an op works on, and the sizes this gives, the same or different per shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from rtp_sim.model.layers import (
    Attention,
    Call,
    Conv2d,
    CrossEntropy,
    Embedding,
    Experts,
    Extent,
    LayerOp,
    Linear,
    Mlp,
    Split,
)
from rtp_sim.schedule.ir import Dims, Part, Size


@dataclass(frozen=True, slots=True)
class Sharding:
    """One of `n` shards of a layer split by `kind` (layers.py); `part` says which, relative to the rank.

    With `assemble` the rank works through all shards one after another, so outputs have their full size there
    (rotation); without it the rank has only its own shard of the output (tensor parallelism).
    """

    kind: str
    n: int
    part: Part
    assemble: bool = False

    @property
    def sums(self) -> bool:
        """Whether the shards' outputs add up (else they lie side by side)."""
        return self.kind in LayerOp.sums


@dataclass(frozen=True, slots=True)
class ShardedLayer:
    """A lowered layer for all its shards: the calls (of the first shard), and per call the dims, with their variants
    by shard index where the shards differ; `numel` and `dtype` of each local tensor."""

    calls: tuple[Call, ...]
    dims: tuple[tuple[Dims, tuple[Dims, ...] | None], ...]
    numel: Mapping[str, Size]
    dtype: Mapping[str, str]


@cache
def lower(op: LayerOp, extent: Extent, kind: str = "", n: int = 1) -> ShardedLayer:
    """The layer split by `kind` over n ranks, or whole."""
    shards = [op.lower(extent, Split(kind, n, i)) for i in range(n if kind else 1)]
    first = shards[0]
    dims = []
    for i, call in enumerate(first.calls):
        variants = tuple(shard.calls[i].dims for shard in shards)
        dims.append((call.dims, None if len(set(variants)) == 1 else variants))
    numel = {name: even(tuple(shard.tensors[name].numel for shard in shards)) for name in first.tensors}
    return ShardedLayer(first.calls, tuple(dims), numel, {name: t.dtype for name, t in first.tensors.items()})


@cache
def shard_numel(op: LayerOp, kind: str, n: int) -> tuple[int, ...]:
    """Parameters of each shard."""
    return tuple(op.numel(Split(kind, n, i)) for i in range(n))


def even(values: tuple[int, ...]) -> Size:
    """The common value if all are equal, else the tuple."""
    return values[0] if len(set(values)) == 1 else values


def rotation_kind(op: LayerOp, n: int, tied: bool = False) -> str:
    """How rotation splits a layer over n ranks, "" if it stays replicated.

    A linear goes by output features where they divide, else by input features, else unevenly by output features; a
    head, and an embedding that shares its weights (`tied`), by vocabulary; experts whole, or in slices where there
    are fewer than ranks.
    """
    match op:
        case Linear(vocab=True):
            return "vocab"
        case Linear():
            return "in" if op.in_features % n == 0 and op.out_features % n != 0 else "out"
        case Embedding():
            return "vocab" if tied or op.width % n else "width"
        case Conv2d():
            return "out"
        case Attention():
            return "heads"
        case Mlp():
            return "ffn"
        case Experts():
            return "experts" if op.experts >= n else "ffn"
    return ""


def tensor_kind(op: LayerOp) -> str:
    """How Megatron tensor parallelism splits a layer, "" if it does not."""
    match op:
        case Attention():
            return "heads"
        case Mlp() | Experts():
            return "ffn"
        case Embedding() | Linear(vocab=True) | CrossEntropy():
            return "vocab"
    return ""


def parts(op: LayerOp, kind: str) -> tuple[int, str]:
    """How many parts a layer has along the dimension that `kind` splits, and what people call them."""
    match op, kind:
        case Attention(), "heads":
            return op.kv_heads, "heads" if op.kv_heads == op.heads else "key/value heads"
        case ((Mlp() | Experts()), "ffn"):
            return op.ffn, "feed-forward features"
        case Experts(), "experts":
            return op.experts, "experts"
        case Linear(), "in":
            return op.in_features, "input features"
        case Linear(), _:
            return op.out_features, "vocabulary rows" if kind == "vocab" else "output features"
        case Conv2d(), _:
            return op.out_channels, "output channels"
        case Embedding(), "width":
            return op.width, "embedding columns"
        case ((Embedding() | CrossEntropy()), _):
            return op.vocab, "vocabulary rows"
    raise ValueError(f"{type(op).__name__} has no split {kind!r}")
