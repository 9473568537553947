"""The other half of a transformer's block: an MLP, or a router and experts in its place."""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.model.layers.base import WHOLE, Call, Extent, LayerOp, Lowered, Param, Split, Tensor, dims_of, split_sizes


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
        act = [Call("gated" if self.gated else self.activation, dims_of(numel=t * f), ("up",), ("act",))]
        if self.gated and self.separate_gate:
            tensors["gate"] = Tensor(t * f)
            act = [
                Call(self.activation, dims_of(numel=t * f), ("up",), ("gate",)),
                Call("mul", dims_of(numel=t * f), ("gate", "up"), ("act",)),
            ]
        calls = (
            Call("linear", dims_of(m=t, k=self.hidden, n=up), ("x0",), ("up",), True),
            *act,
            Call("linear", dims_of(m=t, k=f, n=self.hidden), ("act",), ("y",), True),
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
            Call("linear", dims_of(m=t, k=self.hidden, n=self.experts), ("x0",), ("logits",), True),
            Call("topk", dims_of(rows=t, width=self.experts, top_k=self.top_k), ("logits",), ("y",)),
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
            Call("dispatch", dims_of(rows=rows, width=h), ("x0", "x1"), ("routed",)),
            Call("linear", dims_of(m=rows, k=h, n=up, groups=e), ("routed",), ("up",), True),
            Call("gated" if self.gated else self.activation, dims_of(numel=rows * f), ("up",), ("act",)),
            Call("linear", dims_of(m=rows, k=f, n=h, groups=e), ("act",), ("down",), True),
            Call("combine", dims_of(rows=rows, width=h), ("down", "x1"), ("y",)),
        )
        tensors = {
            "routed": Tensor(rows * h), "up": Tensor(rows * up), "act": Tensor(rows * f),
            "down": Tensor(rows * h), "y": Tensor(extent.tokens * h),
        }  # fmt: skip
        return Lowered(calls, tensors)
