"""What every layer is made of: how much work it sees, its split, its parameters and the kernel calls of one shard.

A layer op states its parameters and lowers to kernel `Call`s over local tensors, whole or as one of `n` shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from rtp_sim.schedule.ir import Dims


@dataclass(frozen=True, slots=True)
class Extent:
    """How much work a layer sees: `batch` sequences (or images) of `seq` tokens (1 for images)."""

    batch: int
    seq: int

    @property
    def tokens(self) -> int:
        """Rows of the activations."""
        return self.batch * self.seq


@dataclass(frozen=True, slots=True)
class Split:
    """Shard `index` of `n` along the dimension that `kind` names; kind "" is the whole layer."""

    kind: str = ""
    n: int = 1
    index: int = 0

    def share(self, total: int, kind: str) -> int:
        """This shard's part of `total` if the layer is split by `kind`, else all of it; 0 where there are more ranks
        than parts."""
        return total if self.kind != kind else split_sizes(total, self.n)[self.index]


WHOLE = Split()


def split_sizes(total: int, n: int) -> list[int]:
    """`total` in n parts that differ by at most one, larger ones first."""
    base, extra = divmod(total, n)
    return [base + (i < extra) for i in range(n)]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter tensor of a layer (or of one of its shards)."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A local tensor of a lowered layer; dtype "" is the compute dtype, "loss" the dtype of the loss."""

    numel: int
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel launch on local tensors: "x0", "x1" are the layer's inputs, "y" its output, others its own."""

    kernel: str
    dims: Dims
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: bool = False


@dataclass(frozen=True, slots=True)
class Lowered:
    """A layer (or shard) as kernel calls; `tensors` sizes every tensor the calls write."""

    calls: tuple[Call, ...]
    tensors: Mapping[str, Tensor]


class LayerOp:
    """What a layer computes. Subclasses are frozen dataclasses of architecture numbers."""

    __slots__ = ()
    sums = frozenset({"in", "heads", "ffn", "experts"})
    """Split kinds whose shards' outputs are summed; the outputs of the others are concatenated."""

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """Parameter tensors of the layer or of one shard."""
        return ()

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """Kernel calls of the forward pass."""
        raise NotImplementedError(type(self).__name__)

    def numel(self, split: Split = WHOLE) -> int:
        """Parameters of the layer or of one shard."""
        return sum(p.numel for p in self.params(split))


def dims_of(**sizes: int) -> Dims:
    """A kernel's sizes by name."""
    return tuple(sizes.items())


def one_call(kernel: str, dims: Dims, numel: int, inputs: tuple[str, ...] = ("x0",), weight: bool = False) -> Lowered:
    """A layer that is one kernel; `numel` elements come out."""
    return Lowered((Call(kernel, dims, inputs, ("y",), weight),), {"y": Tensor(numel)})


def more_passes(times: tuple[int, int], numel: int, tensor: str) -> tuple[Call, ...]:
    """What a chain of elementwise ops in fp32 moves beyond the one kernel that stands for it: so many reads and writes
    of the tensor in the forward and in the backward pass; nothing for (0, 0)."""
    if times == (0, 0):
        return ()
    return (Call("passes", dims_of(numel=numel, times=times[0], back=times[1]), (tensor,), (tensor,)),)


@dataclass(frozen=True, slots=True)
class Layer:
    """A named layer of a network: reads tensors `inputs`, writes tensor `output`.

    `shares` names another layer whose weights it uses (tied embeddings); it then has none of its own.
    """

    name: str
    op: LayerOp
    inputs: tuple[str, ...]
    output: str
    shares: str | None = None

    @property
    def weight_name(self) -> str:
        """Name of the layer that owns the weights."""
        return self.shares or self.name

    @property
    def owned_numel(self) -> int:
        """Parameters this layer owns."""
        return 0 if self.shares else self.op.numel()
