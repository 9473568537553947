"""Layers: the units that models are made of and that strategies gather, rotate or split.

A layer op states its parameters and lowers to kernel `Call`s over local tensors, whole or as one of `n` shards. How it
may be split is a word: "out" (output features), "in" (input features, result summed), "heads", "ffn", "experts",
"vocab", "width", or "rows" (tokens; for ops without a split of their own). The same words serve Megatron tensor
parallelism and rotation; uneven shards differ by at most one element of the split dimension, larger ones first.
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


def _dims(**sizes: int) -> Dims:
    return tuple(sizes.items())


def _single(kernel: str, dims: Dims, numel: int, inputs: tuple[str, ...] = ("x0",), weight: bool = False) -> Lowered:
    return Lowered((Call(kernel, dims, inputs, ("y",), weight),), {"y": Tensor(numel)})


def _passes(times: tuple[int, int], numel: int, tensor: str) -> tuple[Call, ...]:
    """What a chain of elementwise ops in fp32 moves beyond the one kernel that stands for it: so many reads and writes
    of the tensor in the forward and in the backward pass; nothing for (0, 0)."""
    if times == (0, 0):
        return ()
    return (Call("passes", _dims(numel=numel, times=times[0], back=times[1]), (tensor,), (tensor,)),)


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
        return _single("linear", _dims(m=m, k=k, n=n), m * n, weight=True)


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
        dims = _dims(
            batch=extent.batch, in_pixels=self.height * self.width, out_pixels=pixels,
            cin=self.in_channels, cout=cout, window=self.kernel_size**2,
        )  # fmt: skip
        return _single("conv2d", dims, extent.batch * pixels * cout, weight=True)


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
        call = Call("maxpool2d", _dims(in_numel=inputs, out_numel=outputs), ("x0",), ("y", "indices"))
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
        return _single("embedding", _dims(rows=rows, width=width), rows * width, weight=True)


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
        return _single("positions", _dims(rows=rows, width=self.width), rows * self.width, weight=True)


@dataclass(frozen=True, slots=True)
class Norm(LayerOp):
    """Layer norm (weight and bias) or RMS norm (weight); with `passes` made of several kernels (`_passes`)."""

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
        one = _single(self.kind, _dims(rows=rows, width=self.width), rows * self.width, weight=True)
        return Lowered((*one.calls, *_passes(self.passes, rows * self.width, "y")), one.tensors)


@dataclass(frozen=True, slots=True)
class Add(LayerOp):
    """Residual connection: x0 + x1."""

    width: int

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One elementwise kernel."""
        numel = split.share(extent.tokens, "rows") * self.width
        return _single("add", _dims(numel=numel), numel, ("x0", "x1"))


@dataclass(frozen=True, slots=True)
class Dropout(LayerOp):
    """Zeroes elements with `probability` and scales up the others; keeps a one-byte mask."""

    width: int
    probability: float = 0.5

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One elementwise kernel."""
        numel = split.share(extent.tokens, "rows") * self.width
        call = Call("dropout", _dims(numel=numel), ("x0",), ("y", "mask"))
        return Lowered((call,), {"y": Tensor(numel), "mask": Tensor(numel, "uint8")})


@dataclass(frozen=True, slots=True)
class Activation(LayerOp):
    """Elementwise function of `width` features per token; "gated" takes 2 x width (gate and up) to width."""

    function: str
    width: int

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One elementwise kernel."""
        numel = split.share(extent.tokens, "rows") * split.share(self.width, "out")
        return _single(self.function, _dims(numel=numel), numel)


UNFUSED_SOFTMAX = ("cast", "scaled_scores", "masked", "cast_back")
"""What the kernels around a softmax that is not fused leave behind."""


@dataclass(frozen=True, slots=True)
class Attention(LayerOp):
    """Self-attention with its input and output projections. Split "heads": whole groups of query heads with their
    key/value head and the matching columns of the output projection; the output bias is on every shard. `dropout` is
    the probability with which attention probabilities are dropped: the fused kernel drops none.

    `context_copy`: the context is copied into the projection's layout, as torch.nn.MultiheadAttention does, so autograd
    keeps it twice. `scaled_copies`: materialised attention keeps scaled queries and keys beside the projection's
    output, as torch's own fallback does. `stacked_kv`: keys and values are stacked once more for the rotary kernel,
    while the queries still hold on to the storage of all three. `rotary_passes`: rotation by several kernels.
    `dropout_kept`: dropout inside materialised attention is taken as a part of the softmax, whose kernel leaves the
    dropped probabilities and a mask behind as well: unlike `dropout` it costs memory, but no kernel.
    `fused_matrices`: the softmax of materialised attention fuses the cast to fp32 and back, the scale and the mask only
    for whole multiples of so many matrices (sequences x heads of a rank); else each is a kernel of its own."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = True
    out_bias: bool = True
    rotary: bool = False
    causal: bool = True
    implementation: str = "flash"
    dropout: float = 0.0
    context_copy: bool = False
    scaled_copies: bool = False
    dropout_kept: bool = False
    rotary_passes: tuple[int, int] = (0, 0)
    stacked_kv: bool = False
    fused_matrices: int = 0

    def _heads(self, split: Split) -> tuple[int, int]:
        kv = split.share(self.kv_heads, "heads")
        return kv * (self.heads // self.kv_heads), kv

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """qkv (rows x hidden) and out (hidden x heads*head_dim), with biases."""
        q, kv = self._heads(split)
        rows = (q + 2 * kv) * self.head_dim
        found = [Param("qkv", (rows, self.hidden))]
        if self.qkv_bias:
            found.append(Param("qkv_bias", (rows,)))
        found.append(Param("out", (self.hidden, q * self.head_dim)))
        if self.out_bias:
            found.append(Param("out_bias", (self.hidden,)))
        return tuple(found)

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """Projection, rotation of queries and keys, attention core, projection."""
        q, kv = self._heads(split)
        t, d = extent.tokens, self.head_dim
        width = (q + 2 * kv) * d
        calls = [Call("linear", _dims(m=t, k=self.hidden, n=width), ("x0",), ("qkv",), True)]
        tensors = {"qkv": Tensor(t * width), "y": Tensor(t * self.hidden)}
        if self.rotary:
            calls.append(Call("rope", _dims(numel=t * (q + kv) * d), ("qkv",), ("qkv",)))
            calls += _passes(self.rotary_passes, t * (q + kv) * d, "qkv")
        core, core_tensors = self._core(extent, q, kv)
        context = "context"
        if self.context_copy:
            context, core_tensors["merged"] = "merged", Tensor(t * q * d)
            core.append(Call("copy", _dims(numel=t * q * d), ("context",), ("merged",)))
        calls += [*core, Call("linear", _dims(m=t, k=q * d, n=self.hidden), (context,), ("y",), True)]
        return Lowered(tuple(calls), tensors | core_tensors)

    def _core(self, extent: Extent, heads: int, kv_heads: int) -> tuple[list[Call], dict[str, Tensor]]:
        """Scores, softmax, weighted sum: one fused kernel, or three with the score matrices in memory."""
        b, s, d = extent.batch, extent.seq, self.head_dim
        shape = _dims(batch=b, heads=heads, kv_heads=kv_heads, q=s, kv=s, head_dim=d, causal=int(self.causal))
        context = Tensor(b * s * heads * d)
        if self.implementation == "flash":
            fused = {"context": context, "lse": Tensor(b * heads * s, "fp32")}
            if not self.stacked_kv:
                return [Call("sdpa", shape, ("qkv",), ("context", "lse"))], fused
            fused["stacked"] = Tensor(2 * b * s * kv_heads * d)
            copy = Call("copy", _dims(numel=fused["stacked"].numel), ("qkv",), ("stacked",))
            return [copy, Call("sdpa", shape, ("qkv", "stacked"), ("context", "lse"))], fused
        scores = Tensor(b * heads * s * s)
        tensors = {"context": context, "scores": scores, "probs": scores}
        scaled: list[Call] = []
        operands: tuple[str, ...] = ("qkv",)
        if self.scaled_copies:
            numel = b * s * (heads + kv_heads) * d
            tensors["scaled"], operands = Tensor(numel), ("qkv", "scaled")
            scaled.append(Call("copy", _dims(numel=numel), ("qkv",), ("scaled",)))
        calls = [*scaled, Call("attn.scores", shape, operands, ("scores",))]
        read = "scores"
        for name in UNFUSED_SOFTMAX if self.fused_matrices and b * heads % self.fused_matrices else ():
            calls.append(Call("copy", _dims(numel=scores.numel), (read,), (name,)))
            tensors[name], read = scores, name
        kept = ("dropped", "probs", "mask") if self.dropout_kept else ("probs",)
        calls.append(Call("softmax", _dims(rows=b * heads * s, width=s), (read,), kept))
        probs = kept[0]
        if self.dropout_kept:
            tensors |= {"dropped": scores, "mask": Tensor(scores.numel, "uint8")}
        if self.dropout:
            calls.append(Call("dropout", _dims(numel=scores.numel), ("probs",), ("dropped", "mask")))
            tensors |= {"dropped": scores, "mask": Tensor(scores.numel, "uint8")}
            probs = "dropped"
        calls.append(Call("attn.context", shape, (probs, "qkv"), ("context",)))
        return calls, tensors


@dataclass(frozen=True, slots=True)
class Mlp(LayerOp):
    """Two linears with an activation between; gated: gate and up projections side by side. Split "ffn": rows of the
    first and matching columns of the second; the output bias is on every shard. `separate_gate`: the gate is applied by
    a kernel of its own, which keeps the activated gate."""

    hidden: int
    ffn: int
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    separate_gate: bool = False

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """up (ffn or 2*ffn x hidden) and down (hidden x ffn), with biases."""
        f = split.share(self.ffn, "ffn")
        up = f * (2 if self.gated else 1)
        found = [Param("up", (up, self.hidden)), Param("down", (self.hidden, f))]
        return (*found, Param("up_bias", (up,)), Param("down_bias", (self.hidden,))) if self.bias else tuple(found)

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """Matmul, activation, matmul."""
        f = split.share(self.ffn, "ffn")
        t, up = extent.tokens, f * (2 if self.gated else 1)
        tensors = {"up": Tensor(t * up), "act": Tensor(t * f), "y": Tensor(t * self.hidden)}
        act = [Call("gated" if self.gated else self.activation, _dims(numel=t * f), ("up",), ("act",))]
        if self.gated and self.separate_gate:
            tensors["gate"] = Tensor(t * f)
            act = [
                Call(self.activation, _dims(numel=t * f), ("up",), ("gate",)),
                Call("mul", _dims(numel=t * f), ("gate", "up"), ("act",)),
            ]
        calls = (
            Call("linear", _dims(m=t, k=self.hidden, n=up), ("x0",), ("up",), True),
            *act,
            Call("linear", _dims(m=t, k=f, n=self.hidden), ("act",), ("y",), True),
        )
        return Lowered(calls, tensors)


@dataclass(frozen=True, slots=True)
class Router(LayerOp):
    """Gate of a mixture of experts: logits, then the weights (fp32) and ids (int64) of the top k experts per token."""

    hidden: int
    experts: int
    top_k: int

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """weight (experts, hidden)."""
        return (Param("weight", (self.experts, self.hidden)),)

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """Matmul and top-k. The routing tensor holds 12 bytes per token and chosen expert: three fp32 words."""
        t = split.share(extent.tokens, "rows")
        calls = (
            Call("linear", _dims(m=t, k=self.hidden, n=self.experts), ("x0",), ("logits",), True),
            Call("topk", _dims(rows=t, width=self.experts, top_k=self.top_k), ("logits",), ("y",)),
        )
        return Lowered(calls, {"logits": Tensor(t * self.experts), "y": Tensor(3 * t * self.top_k, "fp32")})


@dataclass(frozen=True, slots=True)
class Experts(LayerOp):
    """Feed-forward experts, inputs (x, routing). Split "experts": whole experts, or "ffn": a slice of each. Tokens are
    assumed balanced over the experts."""

    hidden: int
    ffn: int
    experts: int
    top_k: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def _sizes(self, split: Split) -> tuple[int, int]:
        return split.share(self.experts, "experts"), split.share(self.ffn, "ffn")

    def params(self, split: Split = WHOLE) -> tuple[Param, ...]:
        """up (experts, ffn or 2*ffn, hidden) and down (experts, hidden, ffn), with biases."""
        e, f = self._sizes(split)
        up = f * (2 if self.gated else 1)
        found = (Param("up", (e, up, self.hidden)), Param("down", (e, self.hidden, f)))
        return (*found, Param("up_bias", (e, up)), Param("down_bias", (e, self.hidden))) if self.bias else found

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """Gather the routed tokens, two grouped matmuls with the activation between, weighted scatter."""
        e, f = self._sizes(split)
        per_expert = split_sizes(extent.tokens * self.top_k, self.experts)
        first = sum(split_sizes(self.experts, split.n)[: split.index]) if split.kind == "experts" else 0
        rows, h, up = sum(per_expert[first : first + e]), self.hidden, f * (2 if self.gated else 1)
        calls = (
            Call("dispatch", _dims(rows=rows, width=h), ("x0", "x1"), ("routed",)),
            Call("linear", _dims(m=rows, k=h, n=up, groups=e), ("routed",), ("up",), True),
            Call("gated" if self.gated else self.activation, _dims(numel=rows * f), ("up",), ("act",)),
            Call("linear", _dims(m=rows, k=f, n=h, groups=e), ("act",), ("down",), True),
            Call("combine", _dims(rows=rows, width=h), ("down", "x1"), ("y",)),
        )
        tensors = {
            "routed": Tensor(rows * h), "up": Tensor(rows * up), "act": Tensor(rows * f),
            "down": Tensor(rows * h), "y": Tensor(extent.tokens * h),
        }  # fmt: skip
        return Lowered(calls, tensors)


@dataclass(frozen=True, slots=True)
class CrossEntropy(LayerOp):
    """Mean cross-entropy of logits (x0) and targets (x1); keeps the log-probabilities. Split "vocab" by columns, and
    then maximum, sum and target logit of each token (`statistics`, fp32) are to be reduced over the shards.

    `unfused`: as torch.nn.CrossEntropyLoss in a loop that holds on to the logits: the backward has logits,
    log-probabilities, their gradient and that of the logits at the same time. `upcast`: the logits are first copied to
    the dtype of the loss; the log-probabilities are made in another copy of them, beside the first. `passes`: maximum,
    shift, exponentials, sum and division are torch ops of their own, as in Megatron's vocabulary-parallel loss (see
    `_passes`)."""

    vocab: int
    unfused: bool = False
    upcast: bool = False
    passes: tuple[int, int] = (0, 0)

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One row-wise kernel, or log-softmax and look-up."""
        rows = split.share(extent.tokens, "rows")
        width = split.share(self.vocab, "vocab")
        if self.unfused and split.kind != "vocab":
            dims, loss = _dims(rows=rows, width=width), Tensor(rows * width, "loss")
            calls = (
                Call("log_softmax", dims, ("x0",), ("log_probs",)),
                Call("nll", dims, ("log_probs", "x1"), ("y",)),
            )
            return Lowered(calls, {"y": Tensor(1, "fp32"), "log_probs": loss})
        outputs = ("y", "log_probs", "statistics")[: 3 if split.kind == "vocab" else 2]
        tensors = {
            "y": Tensor(1, "fp32"),
            "log_probs": Tensor(rows * width, "loss"),
            "statistics": Tensor(3 * rows, "fp32"),
        }
        dims = _dims(rows=rows, width=width)
        if self.upcast:
            cast = Call("upcast", _dims(numel=rows * width), ("x0",), ("wide",))
            call = Call("cross_entropy", dims, ("wide", "x1"), ("y", "log_probs", "statistics"))
            chain = (cast, *_passes(self.passes, rows * width, "wide"), call)
            return Lowered(chain, tensors | {"wide": Tensor(rows * width, "loss")})
        return Lowered((Call("cross_entropy", dims, ("x0", "x1"), outputs),), tensors)


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
