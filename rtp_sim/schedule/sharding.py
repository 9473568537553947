"""`Sharding`: which shard of a layer an op works on, and the sizes this gives, the same or different per shard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from rtp_sim.model.layers import (
    Attention,
    Conv2d,
    Embedding,
    Experts,
    Extent,
    LayerOp,
    Linear,
    Lowered,
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


@cache
def lower(op: LayerOp, extent: Extent, kind: str, n: int) -> tuple[Lowered, ...]:
    """The layer lowered for each shard index; a single entry when the layer is whole."""
    if not kind:
        return (op.lower(extent),)
    return tuple(op.lower(extent, Split(kind, n, i)) for i in range(n))


@cache
def shard_numel(op: LayerOp, kind: str, n: int) -> tuple[int, ...]:
    """Parameters of each shard."""
    return tuple(op.numel(Split(kind, n, i)) for i in range(n))


def even(values: tuple[int, ...]) -> Size:
    """The common value if all are equal, else the tuple."""
    return values[0] if len(set(values)) == 1 else values


def call_dims(lowered: tuple[Lowered, ...], call: int) -> tuple[Dims, tuple[Dims, ...] | None]:
    """Dims of call number `call`: those of the first shard, and the variants by shard where they differ."""
    variants = tuple(shard.calls[call].dims for shard in lowered)
    return variants[0], None if len(set(variants)) == 1 else variants


def tensor_numel(lowered: tuple[Lowered, ...], name: str) -> Size:
    """Elements of a local tensor, by shard where they differ."""
    return even(tuple(shard.tensors[name].numel for shard in lowered))


def split_kind(op: LayerOp, n: int, tied: bool = False) -> str | None:
    """How rotation splits a layer over n ranks, None if it stays replicated.

    A linear goes by output features where they divide, else by input features, else unevenly by output features; a
    head and an embedding that share weights (`tied`) go by vocabulary; experts whole.
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
            return "experts"
    return None
