"""Layers of one kernel each: linear, convolution, embedding, norm, and what works element by element."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from rtp_sim.model.layers.base import (
    WHOLE,
    Call,
    Extent,
    LayerOp,
    Lowered,
    Param,
    Split,
    Tensor,
    dims_of,
    more_passes,
    one_call,
)


@dataclass(frozen=True, slots=True)
class Linear(LayerOp):
    """y = x W^T + b. Split "out" or "vocab" by rows of W, "in" by its columns (the bias is then on every shard).
    `vocab` says that the output features are vocabulary entries (a language-model head)."""

    in_features: int
    out_features: int
    bias: bool = True
    vocab: bool = False

    def _sizes(self, split: Split) -> tuple[int, int]:
        out = split.share(self.out_features, "out")
        out = split.share(out, "vocab")
        return split.share(self.in_features, "in"), out

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """weight (out, in) and bias (out)."""
        k, n = self._sizes(split)
        return (Param("weight", (n, k)), *([Param("bias", (n,))] if self.bias else []))

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One matmul of (tokens x in) with (in x out)."""
        k, n = self._sizes(split)
        m = split.share(extent.tokens, "rows")
        return one_call("linear", dims_of(m=m, k=k, n=n), m * n, weight=True)


@dataclass(frozen=True, slots=True)
class Conv2d(LayerOp):
    """2-D convolution with a square window on (in_channels, height, width) images; split "out" by output channels."""

    in_channels: int
    out_channels: int
    kernel_size: int
    height: int
    width: int
    stride: int = 1
    padding: int = 0
    bias: bool = True

    def out_size(self) -> tuple[int, int]:
        """Output height and width."""
        reach = 2 * self.padding - self.kernel_size
        return (self.height + reach) // self.stride + 1, (self.width + reach) // self.stride + 1

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """weight (out, in, k, k) and bias (out)."""
        cout = split.share(self.out_channels, "out")
        weight = Param("weight", (cout, self.in_channels, self.kernel_size, self.kernel_size))
        return (weight, *([Param("bias", (cout,))] if self.bias else []))

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One convolution."""
        cout = split.share(self.out_channels, "out")
        pixels = prod(self.out_size())
        dims = dims_of(
            batch=extent.batch, in_pixels=self.height * self.width, out_pixels=pixels,
            cin=self.in_channels, cout=cout, window=self.kernel_size**2,
        )  # fmt: skip
        return one_call("conv2d", dims, extent.batch * pixels * cout, weight=True)


@dataclass(frozen=True, slots=True)
class MaxPool2d(LayerOp):
    """Non-overlapping max pooling; keeps one int64 index per output element."""

    channels: int
    height: int
    width: int
    window: int

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One pooling kernel."""
        inputs = extent.batch * self.channels * self.height * self.width
        outputs = extent.batch * self.channels * (self.height // self.window) * (self.width // self.window)
        call = Call("maxpool2d", dims_of(in_numel=inputs, out_numel=outputs), ("x0",), ("y", "indices"))
        return Lowered((call,), {"y": Tensor(outputs), "indices": Tensor(outputs, "int64")})


@dataclass(frozen=True, slots=True)
class Embedding(LayerOp):
    """Table look-up; split "width" by embedding columns or "vocab" by rows (ids uniform over the shards assumed)."""

    vocab: int
    width: int

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """weight (vocab, width)."""
        vocab = split.share(self.vocab, "vocab")
        return (Param("weight", (vocab, split.share(self.width, "width"))),)

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One gather of rows. Split by vocabulary, a shard finds its share of the tokens and adds zeros elsewhere."""
        rows = split.share(extent.tokens, "rows")
        width = split.share(self.width, "width")
        return one_call("embedding", dims_of(rows=rows, width=width), rows * width, weight=True)


@dataclass(frozen=True, slots=True)
class Positions(LayerOp):
    """Adds learned positions (and token types) to the token embeddings."""

    rows: int
    width: int

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """weight (rows, width)."""
        return (Param("weight", (self.rows, self.width)),)

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One add."""
        rows = split.share(extent.tokens, "rows")
        return one_call("positions", dims_of(rows=rows, width=self.width), rows * self.width, weight=True)


@dataclass(frozen=True, slots=True)
class Norm(LayerOp):
    """Layer norm (weight and bias) or RMS norm (weight); with `passes` made of several kernels (`more_passes`)."""

    kind: str
    width: int
    passes: tuple[int, int] = (0, 0)

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """weight, and bias for layer norm."""
        names = ("weight", "bias") if self.kind == "layernorm" else ("weight",)
        return tuple(Param(n, (self.width,)) for n in names)

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One row-wise kernel."""
        rows = split.share(extent.tokens, "rows")
        one = one_call(self.kind, dims_of(rows=rows, width=self.width), rows * self.width, weight=True)
        return Lowered((*one.calls, *more_passes(self.passes, rows * self.width, "y")), one.tensors)


@dataclass(frozen=True, slots=True)
class Add(LayerOp):
    """Residual connection: x0 + x1."""

    width: int

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One elementwise kernel."""
        numel = split.share(extent.tokens, "rows") * self.width
        return one_call("add", dims_of(numel=numel), numel, ("x0", "x1"))


@dataclass(frozen=True, slots=True)
class Dropout(LayerOp):
    """Zeroes elements with `probability` and scales up the others; keeps a one-byte mask."""

    width: int
    probability: float = 0.5

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One elementwise kernel."""
        numel = split.share(extent.tokens, "rows") * self.width
        call = Call("dropout", dims_of(numel=numel), ("x0",), ("y", "mask"))
        return Lowered((call,), {"y": Tensor(numel), "mask": Tensor(numel, "uint8")})


@dataclass(frozen=True, slots=True)
class Activation(LayerOp):
    """Elementwise function of `width` features per token; "gated" takes 2 x width (gate and up) to width."""

    function: str
    width: int

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One elementwise kernel."""
        numel = split.share(extent.tokens, "rows") * split.share(self.width, "out")
        return one_call(self.function, dims_of(numel=numel), numel)
