"""`Launch`: what one kernel launch works on, and `Made`, what it leaves. The narrow waist between machine and kernels.

Tensors come flat, as buffers hold them. A rank that works through the shards of a layer one after another (rotation)
has whole inputs and outputs, of which a shard uses some columns: `columns` and `Columns` read and write these.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from rtp_sim.executor.packing import begin
from rtp_sim.model.layers import Call, Extent, LayerOp, Split


@dataclass(frozen=True, slots=True)
class Route:
    """Which tokens the experts of a shard work on: row r of the routed tokens is token `tokens[r]`, which chose the
    row's expert as its number `slots[r]`; `counts[e]` rows in order belong to the shard's expert e."""

    tokens: torch.Tensor
    slots: torch.Tensor
    counts: tuple[int, ...]


@dataclass(slots=True)
class Launch:
    """One launch of a kernel of `call` of layer `op`, on shard `split`.

    `x`, `y`, `dy` are flat operands (operands.py) and `w` the layer's parameters by name. `dims` are the op's sizes,
    `wanted` the numbers of the inputs whose gradients are asked for.
    `gradient_scale` is what the loss counts in the step's mean. `route` passes the routing of tokens from the dispatch
    to the kernels of the same experts that follow. `dw` are the gradients of the parameters so far: a kernel adds to
    them what it does not return, or with `fills`, where they hold nothing yet, writes them.
    """

    op: LayerOp
    call: Call
    split: Split
    dims: Mapping[str, int]
    extent: Extent
    x: Mapping[int, torch.Tensor]
    y: Mapping[int, torch.Tensor]
    w: Mapping[str, torch.Tensor]
    dy: torch.Tensor | None = None
    wanted: tuple[int, ...] = ()
    seed: int = 0
    dropout: float = 0.0
    gradient_scale: float = 1.0
    route: MutableMapping[str, Route] = field(default_factory=dict)
    dw: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fills: bool = False

    def gradient(self) -> torch.Tensor:
        """The gradient of the first output."""
        assert self.dy is not None, "only a loss has no output gradient"
        return self.dy

    def start(self, total: int, *kinds: str) -> int:
        """Where the shard begins along a dimension of `total`, if it is split by one of `kinds`; else 0."""
        return begin(total, self.split) if self.split.kind in kinds else 0

    def adds_shared_bias(self) -> bool:
        """Whether this shard adds the bias that lies on every shard: exactly one of them does."""
        return self.split.kind == "" or self.split.index == 0


class Columns(NamedTuple):
    """Values (rows x width) for the columns of a tensor from `start` on."""

    values: torch.Tensor
    start: int


Result = torch.Tensor | Columns


@dataclass(frozen=True, slots=True)
class Made:
    """What a kernel computed: outputs in the call's order (forward), gradients of inputs by number and of parameters by
    name (backward), as far as they have not been added to `Launch.dw` already."""

    outputs: tuple[Result, ...] = ()
    dx: Mapping[int, Result] = field(default_factory=dict)
    dw: Mapping[str, torch.Tensor] = field(default_factory=dict)


def matrix(flat: torch.Tensor, rows: int) -> torch.Tensor:
    """A flat tensor as `rows` rows."""
    return flat.view(rows, flat.numel() // rows if rows else 0)


def columns(flat: torch.Tensor, rows: int, width: int, start: int) -> torch.Tensor:
    """The shard's `width` columns of a tensor: those from `start` on, or all where it holds no others."""
    whole = matrix(flat, rows)
    return whole if whole.shape[1] == width else whole[:, start : start + width]
