"""Self-attention with its projections: one fused kernel, or scores, softmax and weighted sum with what they keep."""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.model.layers.base import WHOLE, Call, Extent, LayerOp, Lowered, Param, Split, Tensor, dims_of, more_passes

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
        calls = [Call("linear", dims_of(m=t, k=self.hidden, n=width), ("x0",), ("qkv",), True)]
        tensors = {"qkv": Tensor(t * width), "y": Tensor(t * self.hidden)}
        if self.rotary:
            calls.append(Call("rope", dims_of(numel=t * (q + kv) * d), ("qkv",), ("qkv",)))
            calls += more_passes(self.rotary_passes, t * (q + kv) * d, "qkv")
        core, core_tensors = self._core(extent, q, kv)
        context = "context"
        if self.context_copy:
            context, core_tensors["merged"] = "merged", Tensor(t * q * d)
            core.append(Call("copy", dims_of(numel=t * q * d), ("context",), ("merged",)))
        calls += [*core, Call("linear", dims_of(m=t, k=q * d, n=self.hidden), (context,), ("y",), True)]
        return Lowered(tuple(calls), tensors | core_tensors)

    def _core(self, extent: Extent, heads: int, kv_heads: int) -> tuple[list[Call], dict[str, Tensor]]:
        """Scores, softmax, weighted sum: one fused kernel, or three with the score matrices in memory."""
        b, s, d = extent.batch, extent.seq, self.head_dim
        shape = dims_of(batch=b, heads=heads, kv_heads=kv_heads, q=s, kv=s, head_dim=d, causal=int(self.causal))
        context = Tensor(b * s * heads * d)
        if self.implementation == "flash":
            fused = {"context": context, "lse": Tensor(b * heads * s, "fp32")}
            if not self.stacked_kv:
                return [Call("sdpa", shape, ("qkv",), ("context", "lse"))], fused
            fused["stacked"] = Tensor(2 * b * s * kv_heads * d)
            copy = Call("copy", dims_of(numel=fused["stacked"].numel), ("qkv",), ("stacked",))
            return [copy, Call("sdpa", shape, ("qkv", "stacked"), ("context", "lse"))], fused
        scores = Tensor(b * heads * s * s)
        tensors = {"context": context, "scores": scores, "probs": scores}
        scaled: list[Call] = []
        operands: tuple[str, ...] = ("qkv",)
        if self.scaled_copies:
            numel = b * s * (heads + kv_heads) * d
            tensors["scaled"], operands = Tensor(numel), ("qkv", "scaled")
            scaled.append(Call("copy", dims_of(numel=numel), ("qkv",), ("scaled",)))
        calls = [*scaled, Call("attn.scores", shape, operands, ("scores",))]
        read = "scores"
        for name in UNFUSED_SOFTMAX if self.fused_matrices and b * heads % self.fused_matrices else ():
            calls.append(Call("copy", dims_of(numel=scores.numel), (read,), (name,)))
            tensors[name], read = scores, name
        kept = ("dropped", "probs", "mask") if self.dropout_kept else ("probs",)
        calls.append(Call("softmax", dims_of(rows=b * heads * s, width=s), (read,), kept))
        probs = kept[0]
        if self.dropout_kept:
            tensors |= {"dropped": scores, "mask": Tensor(scores.numel, "uint8")}
        if self.dropout:
            calls.append(Call("dropout", dims_of(numel=scores.numel), ("probs",), ("dropped", "mask")))
            tensors |= {"dropped": scores, "mask": Tensor(scores.numel, "uint8")}
            probs = "dropped"
        calls.append(Call("attn.context", shape, (probs, "qkv"), ("context",)))
        return calls, tensors
