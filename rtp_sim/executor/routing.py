"""Kernels of a mixture of experts: choosing experts, gathering tokens to them, and adding their outputs up.

The routing tensor has three words per token and chosen expert: weight, expert id and a spare. Weights are the softmax
over the chosen logits; no expert is ever full. How many tokens an expert gets depends on the data, so the tensors of
routed tokens have the size that the data give them, not the balanced one of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from rtp_sim.executor.dtypes import accurate
from rtp_sim.executor.launch import Launch, Made, Route, matrix
from rtp_sim.executor.packing import stretch
from rtp_sim.model.layers import Experts, Router

WEIGHT, EXPERT, WORDS = 0, 1, 3


def topk(k: Launch) -> Made:
    """The chosen experts and their weights."""
    assert isinstance(k.op, Router)
    values, ids = matrix(accurate(k.x[0]), k.dims["rows"]).topk(k.op.top_k, 1)
    y = values.new_zeros(k.dims["rows"], k.op.top_k, WORDS)
    y[:, :, WEIGHT], y[:, :, EXPERT] = torch.softmax(values, 1), ids.to(y.dtype)
    return Made((y,))


def topk_bwd(k: Launch) -> Made:
    """Gradient of the softmax, at the chosen logits."""
    assert isinstance(k.op, Router)
    shape = (k.dims["rows"], k.op.top_k, WORDS)
    y, dy = k.y[0].view(shape), k.gradient().view(shape)
    w, dw = y[:, :, WEIGHT], dy[:, :, WEIGHT]
    chosen = w * (dw - (w * dw).sum(1, keepdim=True))
    dx = w.new_zeros(k.dims["rows"], k.op.experts)
    return Made(dx={0: dx.scatter_(1, y[:, :, EXPERT].long(), chosen)})


def _experts(k: Launch) -> Experts:
    assert isinstance(k.op, Experts)
    return k.op


def _routing(k: Launch, flat: torch.Tensor) -> torch.Tensor:
    return flat.view(k.extent.tokens, _experts(k).top_k, WORDS)


def _route(k: Launch, routing: torch.Tensor) -> Route:
    """Tokens in the order of the shard's experts, in their own order within an expert."""
    op = _experts(k)
    first, last = stretch(op.experts, k.split) if k.split.kind == "experts" else (0, op.experts)
    ids = routing[:, :, EXPERT].long().reshape(-1)
    order = torch.argsort(ids, stable=True)
    order = order[(ids[order] >= first) & (ids[order] < last)]
    counts = torch.bincount(ids[order] - first, minlength=last - first)
    return Route(order // op.top_k, order % op.top_k, tuple(counts.tolist()))


def dispatch(k: Launch) -> Made:
    """A row per token and chosen expert of the shard."""
    k.route["now"] = route = _route(k, _routing(k, k.x[1]))
    return Made((matrix(k.x[0], k.extent.tokens)[route.tokens],))


def dispatch_bwd(k: Launch) -> Made:
    """Each routed row's gradient, added to its token's."""
    route, width = k.route["now"], _experts(k).hidden
    dx = k.gradient().new_zeros(k.extent.tokens, width)
    return Made(dx={0: dx.index_add_(0, route.tokens, k.gradient().view(-1, width))})


def combine(k: Launch) -> Made:
    """The experts' outputs, weighted and added up by token."""
    route, width = k.route["now"], _experts(k).hidden
    weight = _routing(k, k.x[1])[route.tokens, route.slots, WEIGHT]
    down = k.x[0].view(-1, width)
    y = down.new_zeros(k.extent.tokens, width)
    return Made((y.index_add_(0, route.tokens, down * weight[:, None].to(down.dtype)),))


def combine_bwd(k: Launch) -> Made:
    """Gradients of the experts' outputs and of the routing weights."""
    route, width = k.route["now"], _experts(k).hidden
    routing, dy = _routing(k, k.x[1]), matrix(k.gradient(), k.extent.tokens)[route.tokens]
    weight = routing[route.tokens, route.slots, WEIGHT]
    drouting = torch.zeros_like(routing)
    drouting[route.tokens, route.slots, WEIGHT] = (accurate(dy) * k.x[0].view(-1, width)).sum(1).to(routing.dtype)
    return Made(dx={0: dy * weight[:, None].to(dy.dtype), 1: drouting})


# ---- one matmul per expert


def grouped(k: Launch, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """Each expert's rows times its own matrix (w[e] is out x in), plus its bias."""
    rows = k.x[0].view(-1, w.shape[2]) if w.shape[2] else k.x[0].view(sum(k.route["now"].counts), 0)
    parts = torch.split(rows, list(k.route["now"].counts))
    found = [F.linear(x, w[e], None if b is None else b[e]) for e, x in enumerate(parts)]
    return torch.cat(found) if found else rows.new_zeros(0)


def grouped_dgrad(k: Launch, w: torch.Tensor) -> torch.Tensor:
    """Each expert's output gradient times its matrix."""
    counts = k.route["now"].counts
    parts = torch.split(k.gradient().view(sum(counts), w.shape[1]), list(counts))
    found = [dy @ w[e] for e, dy in enumerate(parts)]
    return torch.cat(found) if found else k.gradient().new_zeros(0)


def grouped_wgrad(k: Launch, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the experts' matrices and biases; zeros where no token came."""
    counts = k.route["now"].counts
    experts, out, width = shape
    dy, x = k.gradient().view(sum(counts), out), k.x[0].view(sum(counts), width)
    dw, db = x.new_zeros(shape), x.new_zeros(experts, out)
    for e, (mine, inputs) in enumerate(zip(torch.split(dy, list(counts)), torch.split(x, list(counts)), strict=True)):
        dw[e], db[e] = mine.t() @ inputs, mine.sum(0)
    return dw, db


KERNELS: Mapping[str, Callable[[Launch], Made]] = {
    "topk": topk, "topk.bwd": topk_bwd, "dispatch": dispatch, "dispatch.bwd": dispatch_bwd,
    "combine": combine, "combine.bwd": combine_bwd,
}  # fmt: skip
