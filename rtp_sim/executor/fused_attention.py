"""torch's fused attention kernels, which never write the score matrix: forward with the log-sum-exp, and backward.

Which one exists depends on device and dtype: flash attention on CPUs, and for 16-bit numbers on CUDA; the
memory-efficient kernel for fp32 on CUDA. Elsewhere there is none and the caller takes the products one by one. They are
called as operators because the public function keeps the log-sum-exp to itself. Operators may change from one torch to
the next, so each is tried once on a small problem, and one that fails or gives other numbers is not used.
"""

from __future__ import annotations

from functools import cache

import torch

Forward = tuple[torch.Tensor, torch.Tensor]
Backward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

TRIAL_TOLERANCE = 0.05
"""Largest error in the trial, on numbers of size 1: above what 16-bit or tf32 rounding leaves, below any mistake."""

EFFICIENT_ALIGNMENT = 32
"""The memory-efficient kernel keeps its log-sum-exp in rows of a multiple of so many numbers."""


def kind_of(q: torch.Tensor) -> str:
    """Which fused kernel takes these queries (batch, heads, seq, head_dim): "cpu", "flash", "efficient", or ""."""
    if q.numel() == 0:
        return ""
    if q.device.type == "cpu":
        kind = "cpu" if q.dtype in (torch.float32, torch.float64) else ""
    elif q.device.type == "cuda" and q.shape[3] % 8 == 0:
        kind = {torch.float16: "flash", torch.bfloat16: "flash", torch.float32: "efficient"}.get(q.dtype, "")
    else:
        kind = ""
    return kind if kind and works(kind, q.device, q.dtype) else ""


@cache
def works(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel agrees with plain products on a small causal problem, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 40, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), float("-inf"))
    lse = scores.logsumexp(-1)
    probs = (scores - lse[..., None]).exp()
    out = probs @ v
    ds = probs * (dout @ v.transpose(2, 3) - (dout * out).sum(-1, keepdim=True)) / 8**0.5
    expected = [out, lse, ds @ k, ds.transpose(2, 3) @ q, probs.transpose(2, 3) @ dout]
    q, k, v, dout = (t.to(device, dtype) for t in (q, k, v, dout))
    try:
        found = forward(kind, q, k, v, True)
        gradients = backward(kind, dout, q, k, v, found[0].contiguous(), found[1].contiguous(), True)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    pairs = zip((*found, *gradients), expected, strict=True)
    return all(float((a.cpu().double() - b).abs().max()) < TRIAL_TOLERANCE for a, b in pairs)


def forward(kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Forward:
    """Context (batch, heads, seq, head_dim) and log-sum-exp (batch, heads, seq)."""
    ops = torch.ops.aten
    if kind == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)[:2]
        return out, lse
    if kind == "flash":
        out, lse = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)[:2]
        return out, lse
    out, lse = ops._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)[:2]
    return out, lse[:, :, : q.shape[2]]


def backward(
    kind: str, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, causal: bool,
) -> Backward:  # fmt: skip
    """Gradients of queries, keys and values."""
    ops, seq = torch.ops.aten, q.shape[2]
    if kind == "cpu":
        dq, dk, dv = ops._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal)
        return dq, dk, dv
    # Neither has dropout: the random state is not read.
    if kind == "flash":
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = ops._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, seq, k.shape[2], 0.0, causal, state, state
        )
        return dq, dk, dv
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    # Rows beyond the last query do not count: exp(score - infinity) is 0.
    padded = lse.new_full((*lse.shape[:2], -(-seq // EFFICIENT_ALIGNMENT) * EFFICIENT_ALIGNMENT), float("inf"))
    padded[:, :, :seq] = lse
    dq, dk, dv, _ = ops._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, padded, state, state, 0.0, [True, True, True, False], causal
    )
    return dq, dk, dv
