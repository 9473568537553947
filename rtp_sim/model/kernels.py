"""Kernels: every compute op a schedule can hold, defined once: its sizes, FLOPs, bytes moved, and how it is undone.

`flops` counts matrix multiplications and convolutions as torch's FlopCounterMode does (2 per multiply-add, causal
masking not discounted); `elements` counts array elements read and written, once each, in units of the op's dtype;
`fixed_bytes` adds what does not scale with that dtype (indices, masks, fp32 statistics and optimizer states).
`BACKWARD` gives, per forward kernel, the kernels that compute its input and weight gradients and what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rtp_sim.schedule.ir import DTYPE_BYTES, Dims

Count = Callable[[Mapping[str, int]], int]


def _zero(_: Mapping[str, int]) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """`kind` is the class whose efficiency applies: matmul, attention or memory (bandwidth-bound)."""

    name: str
    kind: str
    flops: Count
    elements: Count
    fixed_bytes: Count = _zero

    def bytes_moved(self, dims: Mapping[str, int], dtype: str) -> int:
        """Bytes read plus written, each operand once."""
        return self.elements(dims) * DTYPE_BYTES[dtype] + self.fixed_bytes(dims)


@dataclass(frozen=True, slots=True)
class Rule:
    """One backward kernel of a forward kernel. `reads` are tokens: "dy" (gradient of the first output), "x" (all
    inputs), "x1" (the second), "y" (all outputs), "y1" and "y2" (the second and third, if any), "w" (the layer's
    weights). `makes` is "dx" (gradients of the differentiable inputs) or "dx0" (of the first alone), "dw", or both."""

    kernel: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def _linear_elements(d: Mapping[str, int]) -> int:
    """x (m, k), weights of `groups` experts (k, n), y (m, n)."""
    return d["m"] * d["k"] + d.get("groups", 1) * d["k"] * d["n"] + d["m"] * d["n"]


def _linear_flops(d: Mapping[str, int]) -> int:
    return 2 * d["m"] * d["k"] * d["n"]


def _conv_flops(d: Mapping[str, int]) -> int:
    return 2 * d["batch"] * d["out_pixels"] * d["cout"] * d["cin"] * d["window"]


def _conv_elements(d: Mapping[str, int]) -> int:
    activations = d["batch"] * (d["in_pixels"] * d["cin"] + d["out_pixels"] * d["cout"])
    return activations + d["cin"] * d["cout"] * d["window"]


def _scores(d: Mapping[str, int]) -> int:
    """Elements of one attention score matrix over all heads: batch x heads x q x kv."""
    return d["batch"] * d["heads"] * d["q"] * d["kv"]


def _matmul_of_attention(times: int) -> Count:
    """`times` batched products of (q x head_dim) with (head_dim x kv), 2 FLOPs per multiply-add."""
    return lambda d: 2 * times * _scores(d) * d["head_dim"]


def _qkv(d: Mapping[str, int]) -> int:
    return d["batch"] * d["head_dim"] * (d["heads"] * d["q"] + 2 * d["kv_heads"] * d["kv"])


def _context(d: Mapping[str, int]) -> int:
    return d["batch"] * d["head_dim"] * d["heads"] * d["q"]


def _numel(times: int) -> Count:
    return lambda d: times * d["numel"]


def _rows(times: int) -> Count:
    return lambda d: times * d["rows"] * d["width"]


def _statistics(per_row: int) -> Count:
    return lambda d: 4 * per_row * d["rows"]


_ALL = (
    # Linear: "m" tokens, "k" in, "n" out. Operands: x, w -> y.
    Kernel("linear", "matmul", _linear_flops, _linear_elements),
    Kernel("linear.dgrad", "matmul", _linear_flops, _linear_elements),
    Kernel("linear.wgrad", "matmul", _linear_flops, _linear_elements),
    Kernel("conv2d", "matmul", _conv_flops, _conv_elements),
    Kernel("conv2d.dgrad", "matmul", _conv_flops, _conv_elements),
    Kernel("conv2d.wgrad", "matmul", _conv_flops, _conv_elements),
    # Fused attention (flash): qkv -> context, log-sum-exp (fp32). Its backward recomputes the scores: 5 products.
    Kernel("sdpa", "attention", _matmul_of_attention(2), lambda d: _qkv(d) + _context(d)),
    Kernel("sdpa.bwd", "attention", _matmul_of_attention(5), lambda d: 2 * _qkv(d) + 2 * _context(d)),
    # Materialised attention: qkv -> scores; scores -> probabilities; probabilities, qkv -> context.
    Kernel("attn.scores", "matmul", _matmul_of_attention(1), lambda d: _qkv(d) + _scores(d)),
    Kernel("attn.scores.bwd", "matmul", _matmul_of_attention(2), lambda d: 2 * _qkv(d) + _scores(d)),
    Kernel("attn.context", "matmul", _matmul_of_attention(1), lambda d: _scores(d) + 2 * _context(d)),
    Kernel("attn.context.bwd", "matmul", _matmul_of_attention(2), lambda d: 2 * _scores(d) + 3 * _context(d)),
    Kernel("softmax", "memory", _zero, _rows(2)),
    Kernel("softmax.bwd", "memory", _zero, _rows(3)),
    Kernel("rope", "memory", _zero, _numel(2)),
    Kernel("rope.bwd", "memory", _zero, _numel(2)),
    # Norms: x, w -> y, with one (rms) or two (layer norm) fp32 statistics per row.
    Kernel("layernorm", "memory", _zero, _rows(2), _statistics(2)),
    Kernel("layernorm.bwd", "memory", _zero, _rows(3), _statistics(2)),
    Kernel("rmsnorm", "memory", _zero, _rows(2), _statistics(1)),
    Kernel("rmsnorm.bwd", "memory", _zero, _rows(3), _statistics(1)),
    Kernel("gelu", "memory", _zero, _numel(2)),
    Kernel("gelu.bwd", "memory", _zero, _numel(3)),
    Kernel("silu", "memory", _zero, _numel(2)),
    Kernel("silu.bwd", "memory", _zero, _numel(3)),
    Kernel("relu", "memory", _zero, _numel(2)),
    Kernel("relu.bwd", "memory", _zero, _numel(3)),
    # Gated activation: gate and up halves (2 x numel) -> numel.
    Kernel("gated", "memory", _zero, _numel(3)),
    Kernel("gated.bwd", "memory", _zero, _numel(5)),
    Kernel("add", "memory", _zero, _numel(3)),
    # A gate applied by a kernel of its own: a product of two arrays.
    Kernel("mul", "memory", _zero, _numel(3)),
    Kernel("mul.bwd", "memory", _zero, _numel(5)),
    # Adding a gradient to a wider one that is kept: `state_bytes` moved per number.
    Kernel("accumulate", "memory", _zero, _zero, lambda d: d["numel"] * d["state_bytes"]),
    # Dropout keeps a one-byte mask per element.
    Kernel("dropout", "memory", _zero, _numel(2), _numel(1)),
    Kernel("dropout.bwd", "memory", _zero, _numel(2), _numel(1)),
    # Embedding: ids (int64), table -> rows x width. Positions: x + a row of a small table (positions, token types).
    Kernel("embedding", "memory", _zero, _rows(2), _statistics(2)),
    Kernel("embedding.wgrad", "memory", _zero, _rows(3), _statistics(2)),
    Kernel("positions", "memory", _zero, _rows(2)),
    Kernel("positions.wgrad", "memory", _zero, _rows(1)),
    # Cross-entropy: logits, targets (int64) -> loss, log-probabilities, which the backward reads.
    Kernel("cross_entropy", "memory", _zero, _rows(2), _statistics(3)),
    Kernel("cross_entropy.bwd", "memory", _zero, _rows(2), _statistics(3)),
    # The same in torch's two steps; the look-up's backward fills an array of zeros.
    Kernel("upcast", "memory", _zero, _numel(1), lambda d: 4 * d["numel"]),
    Kernel("upcast.bwd", "memory", _zero, _numel(1), lambda d: 4 * d["numel"]),
    # What several kernels read and write, in words of fp32, where others have one: more `times` than this, `back` in
    # the backward. In place.
    Kernel("passes", "memory", _zero, _zero, lambda d: 4 * d["times"] * d["numel"]),
    Kernel("passes.bwd", "memory", _zero, _zero, lambda d: 4 * d["back"] * d["numel"]),
    Kernel("log_softmax", "memory", _zero, _rows(2)),
    Kernel("log_softmax.bwd", "memory", _zero, _rows(3)),
    Kernel("nll", "memory", _zero, lambda d: d["rows"], _statistics(2)),
    Kernel("nll.bwd", "memory", _zero, _rows(1), _statistics(2)),
    # Mixture of experts: gate logits -> top-k weights and ids; gather tokens to experts; weighted scatter back.
    Kernel("topk", "memory", _zero, _rows(2), lambda d: 12 * d["rows"] * d["top_k"]),
    Kernel("topk.bwd", "memory", _zero, _rows(2), lambda d: 12 * d["rows"] * d["top_k"]),
    Kernel("dispatch", "memory", _zero, _rows(2), _statistics(3)),
    Kernel("dispatch.bwd", "memory", _zero, _rows(2), _statistics(3)),
    Kernel("combine", "memory", _zero, _rows(2), _statistics(3)),
    Kernel("combine.bwd", "memory", _zero, _rows(3), _statistics(3)),
    Kernel("maxpool2d", "memory", _zero, lambda d: d["in_numel"] + d["out_numel"], lambda d: 8 * d["out_numel"]),
    Kernel("maxpool2d.bwd", "memory", _zero, lambda d: d["in_numel"] + d["out_numel"], lambda d: 8 * d["out_numel"]),
    Kernel("copy", "memory", _zero, _numel(2)),
    Kernel("zero", "memory", _zero, _numel(1)),
    # All gradients of a rank, read once -> their sum of squares and whether all are finite (two fp32 numbers).
    Kernel("grad_norm", "memory", _zero, _numel(1), lambda _: 8),
    # The next loss scale: what is known of the gradients, scale and steps since it last changed (fp32 each).
    Kernel("loss_scale", "memory", _zero, _zero, lambda _: 24),
    # Optimizer step over `numel` parameters that moves `state_bytes` per parameter, all operands counted.
    Kernel("optimizer", "memory", _zero, _zero, lambda d: d["numel"] * d["state_bytes"]),
)  # fmt: skip

KERNELS: Mapping[str, Kernel] = {k.name: k for k in _ALL}

_SPLIT_BACKWARD = {
    name: (Rule(f"{name}.dgrad", ("dy", "w"), ("dx",)), Rule(f"{name}.wgrad", ("x", "dy"), ("dw",)))
    for name in ("linear", "conv2d")
}
_NORM_BACKWARD = {n: (Rule(f"{n}.bwd", ("dy", "x", "w"), ("dx", "dw")),) for n in ("layernorm", "rmsnorm")}
_INPUT_BACKWARD = {
    n: (Rule(f"{n}.bwd", ("dy", "x"), ("dx",)),)
    for n in ("gelu", "silu", "mul", "gated", "attn.scores", "attn.context", "combine")
}
_OUTPUT_BACKWARD = {n: (Rule(f"{n}.bwd", ("dy", "y"), ("dx",)),) for n in ("softmax", "relu", "topk")}

BACKWARD: Mapping[str, tuple[Rule, ...]] = {
    **_SPLIT_BACKWARD,
    **_NORM_BACKWARD,
    **_INPUT_BACKWARD,
    **_OUTPUT_BACKWARD,
    "sdpa": (Rule("sdpa.bwd", ("dy", "x", "y"), ("dx",)),),
    "dispatch": (Rule("dispatch.bwd", ("dy", "x1"), ("dx0",)),),
    "rope": (Rule("rope.bwd", ("dy",), ("dx",)),),
    "dropout": (Rule("dropout.bwd", ("dy", "y1"), ("dx",)),),
    "embedding": (Rule("embedding.wgrad", ("dy", "x"), ("dw",)),),
    "positions": (Rule("positions.wgrad", ("dy",), ("dw",)),),
    "cross_entropy": (Rule("cross_entropy.bwd", ("y1", "y2", "x1"), ("dx",)),),
    "log_softmax": (Rule("log_softmax.bwd", ("dy", "y", "x"), ("dx",)),),
    "nll": (Rule("nll.bwd", ("x1",), ("dx0",)),),
    "upcast": (Rule("upcast.bwd", ("dy",), ("dx",)),),
    "copy": (Rule("copy", ("dy",), ("dx",)),),
    "passes": (Rule("passes.bwd", ("dy",), ("dx",)),),
    "maxpool2d": (Rule("maxpool2d.bwd", ("dy", "y1"), ("dx",)),),
}

PASS_THROUGH = frozenset({"add", "positions"})
"""Kernels whose input gradients are their output gradient itself: no kernel runs for them."""


def flops(kernel: str, dims: Dims) -> int:
    """FLOPs of one launch, as FlopCounterMode counts them."""
    return KERNELS[kernel].flops(dict(dims))


def is_empty(dims: Dims) -> bool:
    """Whether there is nothing to do (the shard of a rank beyond the last part): no kernel is launched then."""
    return any(size == 0 and name != "causal" for name, size in dims)


def bytes_moved(kernel: str, dims: Dims, dtype: str) -> int:
    """Bytes of memory traffic of one launch."""
    return KERNELS[kernel].bytes_moved(dict(dims), dtype)
