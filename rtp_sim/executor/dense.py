"""Plain dense training of a network with torch autograd: what every schedule must agree with.

Written from the layers' definitions with torch's own functions, layers' gradients by autograd and updates by
torch.optim. It shares no code with the kernels, and none with the schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rtp_sim.model.layers import (
    Activation,
    Add,
    Attention,
    Conv2d,
    CrossEntropy,
    Dropout,
    Embedding,
    Experts,
    Layer,
    Linear,
    MaxPool2d,
    Mlp,
    Norm,
    Positions,
    Router,
)
from rtp_sim.model.network import Network

Tensors = Mapping[str, torch.Tensor]
Parameters = dict[str, dict[str, torch.Tensor]]
Keep = Callable[[Layer, int, int, int, torch.Size], torch.Tensor]
"""Layer, step (from 1), replica, micro-batch, shape -> which elements a dropout keeps."""
Drop = Callable[[Layer, float, torch.Tensor], torch.Tensor]
"""Layer, probability, tensor -> the tensor with elements dropped."""


@dataclass(frozen=True)
class DenseResult:
    """`losses` per step; `gradients` of the last step, as the optimizer saw them; `parameters` after it; `grad_norms`
    per step, before clipping."""

    losses: list[float]
    gradients: Parameters
    parameters: Parameters
    grad_norms: list[float]


def train_dense(
    network: Network, parameters: Parameters, batches: Sequence[Sequence[Sequence[Tensors]]], micro_batch: int,
    optimizer: str = "sgd", lr: float = 1e-3, weight_decay: float = 0.01, momentum: float = 0.9,
    eps: float = 1e-8, dtype: torch.dtype = torch.float64, clip_norm: float | None = None, keep: Keep | None = None,
) -> DenseResult:  # fmt: skip
    """One step per entry of `batches[step][replica][micro-batch]`; the loss is the mean over all of a step. Gradients
    are clipped by torch's own function; `keep` gives the masks of dropouts, which else are torch's."""
    ps = {n: {k: v.to(dtype).clone().requires_grad_() for k, v in t.items()} for n, t in parameters.items()}
    flat = [v for t in ps.values() for v in t.values()]
    step_rule = _optimizer(optimizer, flat, lr, weight_decay, momentum, eps)
    losses: list[float] = []
    norms: list[float] = []
    for number, step in enumerate(batches, start=1):
        step_rule.zero_grad()
        found = [
            dense_loss(network, ps, inputs, micro_batch, dtype, keep and _masked(keep, number, replica, micro))
            for replica, micros in enumerate(step)
            for micro, inputs in enumerate(micros)
        ]
        total = torch.stack(found).mean()
        total.backward()  # type: ignore[no-untyped-call]
        losses.append(float(total.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(flat, math.inf if clip_norm is None else clip_norm)))
        gradients = {n: {k: v.grad.clone() for k, v in t.items() if v.grad is not None} for n, t in ps.items()}
        step_rule.step()
    return DenseResult(losses, gradients, {n: {k: v.detach() for k, v in t.items()} for n, t in ps.items()}, norms)


def _masked(keep: Keep, step: int, replica: int, micro: int) -> Drop:
    """Dropout with given masks."""
    return lambda layer, p, x: x * keep(layer, step, replica, micro, x.shape).to(x.device) / (1 - p)


def _optimizer(
    kind: str, flat: list[torch.Tensor], lr: float, weight_decay: float, momentum: float, eps: float
) -> torch.optim.Optimizer:
    match kind:
        case "adamw":
            return torch.optim.AdamW(flat, lr=lr, weight_decay=weight_decay, eps=eps)
        case "adam":
            return torch.optim.Adam(flat, lr=lr, eps=eps)
        case "sgd-momentum":
            return torch.optim.SGD(flat, lr=lr, momentum=momentum)
    return torch.optim.SGD(flat, lr=lr)


def dense_loss(
    network: Network, parameters: Parameters, inputs: Tensors, micro_batch: int, dtype: torch.dtype = torch.float64,
    drop: Drop | None = None,
) -> torch.Tensor:  # fmt: skip
    """The last layer's output for one micro-batch; of a network that ends without a loss, its sum."""
    drop = drop or (lambda _, p, x: F.dropout(x, p))
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    for layer in network.layers():
        given = [tensors[i] for i in layer.inputs]
        p = parameters.get(layer.weight_name, {})
        tensors[layer.output] = _layer(layer, given, p, micro_batch, network.seq, drop)
    return tensors[network.blocks[-1].layers[-1].output].sum()


def _layer(
    layer: Layer, x: list[torch.Tensor], p: Mapping[str, torch.Tensor], b: int, s: int, drop: Drop
) -> torch.Tensor:
    """One layer on tensors of shape (batch, seq, features) or (batch, channels, height, width)."""
    op = layer.op
    match op:
        case Linear():
            return F.linear(x[0].reshape(b, s, op.in_features), p["weight"], p.get("bias"))
        case Conv2d():
            images = x[0].reshape(b, op.in_channels, op.height, op.width)
            return F.conv2d(images, p["weight"], p.get("bias"), op.stride, op.padding)
        case MaxPool2d():
            return F.max_pool2d(x[0].reshape(b, op.channels, op.height, op.width), op.window)
        case Embedding():
            return F.embedding(x[0].reshape(b, s), p["weight"])
        case Positions():
            return x[0] + p["weight"][:s]
        case Norm():
            wide = x[0].reshape(b, s, op.width)
            if op.kind == "layernorm":
                return F.layer_norm(wide, (op.width,), p["weight"], p["bias"], 1e-5)
            return F.rms_norm(wide, (op.width,), p["weight"], 1e-5)
        case Add():
            return x[0] + x[1]
        case Dropout():
            return drop(layer, op.probability, x[0])
        case Activation():
            return _activation(op.function, x[0])
        case Attention():
            return _attention(op, x[0], p, lambda scores: drop(layer, op.dropout, scores))
        case Mlp():
            hidden = _activation("gated" if op.gated else op.activation, F.linear(x[0], p["up"], p.get("up_bias")))
            return F.linear(hidden, p["down"], p.get("down_bias"))
        case Router():
            return F.linear(x[0], p["weight"])
        case Experts():
            return _experts(op, x[0], x[1], p)
        case CrossEntropy():
            return F.cross_entropy(x[0].reshape(-1, op.vocab), x[1].reshape(-1))
    raise TypeError(f"no dense form of {type(op).__name__}")


def _activation(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "gated":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    if name == "gelu":
        return F.gelu(x)
    return F.silu(x) if name == "silu" else F.relu(x)


def _attention(
    op: Attention, x: torch.Tensor, p: Mapping[str, torch.Tensor], drop: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    b, s, _ = x.shape
    d = op.head_dim
    qkv = F.linear(x, p["qkv"], p.get("qkv_bias"))
    sizes = [op.heads * d, op.kv_heads * d, op.kv_heads * d]
    q, k, v = (t.reshape(b, s, -1, d).transpose(1, 2) for t in torch.split(qkv, sizes, -1))
    if op.rotary:
        q, k = _rotate(q), _rotate(k)
    if op.dropout and op.implementation != "flash":
        k, v = (t.repeat_interleave(op.heads // op.kv_heads, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d)
        if op.causal:
            scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -math.inf)
        y = drop(scores.softmax(-1)) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=op.causal, enable_gqa=True)
    return F.linear(y.transpose(1, 2).reshape(b, s, -1), p["out"], p.get("out_bias"))


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions as complex numbers (of fp32 at least): feature i is the real part, i + d/2 the imaginary one."""
    if x.element_size() < 4:
        return _rotate(x.float()).to(x.dtype)
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones((), dtype=x.dtype), torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequency)
    z = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([z.real, z.imag], -1)


def _experts(op: Experts, x: torch.Tensor, logits: torch.Tensor, p: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Every expert on every token, weighted by the softmax over each token's chosen logits, zero for the others."""
    chosen, ids = logits.topk(op.top_k, -1)
    weight = torch.zeros_like(logits).scatter(-1, ids, chosen.softmax(-1))
    y = torch.zeros_like(x)
    for e in range(op.experts):
        up = F.linear(x, p["up"][e], p["up_bias"][e] if op.bias else None)
        hidden = _activation("gated" if op.gated else op.activation, up)
        y = y + weight[..., e : e + 1] * F.linear(hidden, p["down"][e], p["down_bias"][e] if op.bias else None)
    return y
