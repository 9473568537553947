"""Attention kernels: fused and in three steps, and the rotation of queries and keys.

A row of qkv holds the shard's query heads, then its key heads, then its value heads; query head h reads key/value head
h // (query heads per key/value head). Scores are scaled by 1 / sqrt(head_dim). Rotary positions (Su et al., arXiv
2104.09864) have base 10,000 and pair feature i with i + head_dim / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt

import torch

from rtp_sim.executor import fused_attention
from rtp_sim.executor.dtypes import accurate
from rtp_sim.executor.launch import Launch, Made
from rtp_sim.model.layers import Attention

ROPE_BASE = 10_000.0


def _parts(k: Launch, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, each (batch, heads, seq, head_dim)."""
    d, q, kv = k.dims, k.dims["heads"], k.dims["kv_heads"]
    rows = flat.view(d["batch"], d["q"], q + 2 * kv, d["head_dim"]).transpose(1, 2)
    return rows[:, :q], rows[:, q : q + kv], rows[:, q + kv :]


def _joined(k: Launch, *parts: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values back in the layout of qkv, in one pass."""
    return torch.cat([part.transpose(1, 2) for part in parts], 2)


def _repeated(k: Launch, x: torch.Tensor) -> torch.Tensor:
    """Key or value heads, once per query head that reads them."""
    if k.dims["kv_heads"] in (0, k.dims["heads"]):
        return x
    return x.repeat_interleave(k.dims["heads"] // k.dims["kv_heads"], 1)


def _summed(k: Launch, dx: torch.Tensor) -> torch.Tensor:
    """The gradient of a key or value head, over the query heads that read it."""
    d = k.dims
    if d["kv_heads"] in (0, d["heads"]):
        return dx
    return dx.reshape(d["batch"], d["kv_heads"], -1, d["kv"], d["head_dim"]).sum(2)


def _scale(k: Launch) -> float:
    return 1 / sqrt(k.dims["head_dim"])


def _scores(k: Launch, q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled products of queries and (repeated) keys; minus infinity for the future where the mask is causal."""
    scores = q @ key.transpose(2, 3) * _scale(k)
    if not k.dims["causal"]:
        return scores
    future = torch.ones(k.dims["q"], k.dims["kv"], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf"))


def _context(k: Launch, flat: torch.Tensor) -> torch.Tensor:
    """Flat context rows as (batch, heads, seq, head_dim)."""
    d = k.dims
    return flat.view(d["batch"], d["q"], d["heads"], d["head_dim"]).transpose(1, 2)


def _flat_context(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous()


def sdpa(k: Launch) -> Made:
    """Weighted values, and the log of each row's sum of exponentials. One fused kernel where torch has one."""
    q, key, value = _parts(k, k.x[0])
    key, value = _repeated(k, key), _repeated(k, value)
    if kind := fused_attention.kind_of(q):
        out, lse = fused_attention.forward(kind, q, key, value, bool(k.dims["causal"]))
        return Made((_flat_context(out), lse.contiguous()))
    scores = _scores(k, accurate(q), accurate(key))
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return Made((_flat_context((scores - lse).exp() @ accurate(value)), lse))


def sdpa_bwd(k: Launch) -> Made:
    """From the saved lse the probabilities P; dS = P (dP - rowsum(dO O)), as in FlashAttention (arXiv 2205.14135)."""
    d = k.dims
    q, key, value = _parts(k, k.x[0])
    key, value, out, dout = _repeated(k, key), _repeated(k, value), _context(k, k.y[0]), _context(k, k.gradient())
    lse = k.y[1].view(d["batch"], d["heads"], d["q"])
    if kind := fused_attention.kind_of(q):
        dq, dk, dv = fused_attention.backward(kind, dout, q, key, value, out, lse, bool(d["causal"]))
    else:
        q, key, value, out, dout = (accurate(t) for t in (q, key, value, out, dout))
        probs = (_scores(k, q, key) - lse[..., None]).exp()
        dv = probs.transpose(2, 3) @ dout
        ds = probs * (dout @ value.transpose(2, 3) - (dout * out).sum(-1, keepdim=True)) * _scale(k)
        dq, dk = ds @ key, ds.transpose(2, 3) @ q
    return Made(dx={0: _joined(k, dq, _summed(k, dk), _summed(k, dv))})


def scores(k: Launch) -> Made:
    """The score matrices of all heads."""
    q, key, _ = _parts(k, k.x[0])
    return Made((_scores(k, q, _repeated(k, key)),))


def scores_bwd(k: Launch) -> Made:
    """Gradients of queries and keys; none for values."""
    d = k.dims
    q, key, value = _parts(k, k.x[0])
    ds = k.gradient().view(d["batch"], d["heads"], d["q"], d["kv"]) * _scale(k)
    dq, dk = ds @ _repeated(k, key), ds.transpose(2, 3) @ q
    return Made(dx={0: _joined(k, dq, _summed(k, dk), torch.zeros_like(value))})


def softmax(k: Launch) -> Made:
    """Probabilities row by row."""
    x = k.x[0].view(k.dims["rows"], k.dims["width"])
    return Made((torch.softmax(accurate(x), 1),))


def softmax_bwd(k: Launch) -> Made:
    """dx = p (dy - sum(p dy))."""
    p, dy = (accurate(t.view(k.dims["rows"], k.dims["width"])) for t in (k.y[0], k.gradient()))
    return Made(dx={0: p * (dy - (p * dy).sum(1, keepdim=True))})


def context(k: Launch) -> Made:
    """Values weighted by probabilities."""
    d = k.dims
    _, _, value = _parts(k, k.x[1])
    probs = k.x[0].view(d["batch"], d["heads"], d["q"], d["kv"])
    return Made((_flat_context(probs @ _repeated(k, value)),))


def context_bwd(k: Launch) -> Made:
    """Gradients of probabilities and values; none for queries and keys."""
    d = k.dims
    q, key, value = _parts(k, k.x[1])
    probs, dout = k.x[0].view(d["batch"], d["heads"], d["q"], d["kv"]), _context(k, k.gradient())
    dv = _summed(k, probs.transpose(2, 3) @ dout)
    dqkv = _joined(k, torch.zeros_like(q), torch.zeros_like(key), dv)
    return Made(dx={0: dout @ _repeated(k, value).transpose(2, 3), 1: dqkv})


# ---- rotary positions


def _rotated(k: Launch, flat: torch.Tensor, sign: int) -> torch.Tensor:
    """Queries and keys turned by sign * position * base^(-2i / head_dim)."""
    op = k.op
    assert isinstance(op, Attention)
    kv = k.split.share(op.kv_heads, "heads")
    turned, d = kv * (op.heads // op.kv_heads) + kv, op.head_dim
    rows = flat.view(k.extent.batch, k.extent.seq, turned + kv, d)
    frequency = ROPE_BASE ** (-torch.arange(0, d, 2, dtype=torch.float64, device=flat.device) / d)
    angle = torch.arange(k.extent.seq, dtype=torch.float64, device=flat.device)[:, None, None] * frequency
    x = accurate(rows)
    cos, sin = angle.cos().to(x.dtype), (sign * angle.sin()).to(x.dtype)
    a, b = x[:, :, :turned, : d // 2], x[:, :, :turned, d // 2 :]
    moved = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([moved, x[:, :, turned:]], 2)


def rope(k: Launch) -> Made:
    """Turns queries and keys by their positions."""
    return Made((_rotated(k, k.x[0], 1),))


def rope_bwd(k: Launch) -> Made:
    """Turns their gradients back."""
    return Made(dx={0: _rotated(k, k.gradient(), -1)})


KERNELS: Mapping[str, Callable[[Launch], Made]] = {
    "sdpa": sdpa, "sdpa.bwd": sdpa_bwd, "attn.scores": scores, "attn.scores.bwd": scores_bwd,
    "softmax": softmax, "softmax.bwd": softmax_bwd, "attn.context": context, "attn.context.bwd": context_bwd,
    "rope": rope, "rope.bwd": rope_bwd,
}  # fmt: skip
