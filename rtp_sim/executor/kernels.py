"""The kernels by name: matmuls, convolution, embeddings, norms and elementwise functions here, the others beside.

Conventions: GELU by the error function; norms add 1e-5 to the variance; sums of normalisation, softmax and loss are
taken in at least fp32. A kernel returns new tensors; the machine stores them or adds them to what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from rtp_sim.executor import attention, loss, routing
from rtp_sim.executor.dropout import keep_mask
from rtp_sim.executor.dtypes import accurate
from rtp_sim.executor.launch import Columns, Launch, Made, columns, matrix
from rtp_sim.model.layers import (
    WHOLE,
    Activation,
    Attention,
    Conv2d,
    Embedding,
    Experts,
    LayerOp,
    Linear,
    MaxPool2d,
    Mlp,
    Split,
)

NORM_EPS = 1e-5

Kernel = Callable[[Launch], Made]


# ---- linear


def weights_of(k: Launch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Matrix and bias of the linear that this call is, by the name of what it computes."""
    weight, bias = weight_names(k)
    return k.w[weight], k.w.get(bias)


def weight_names(k: Launch) -> tuple[str, str]:
    """Parameter names of the matrix and the bias of a linear call."""
    match k.op:
        case Attention():
            name = "qkv" if k.call.outputs[0] == "qkv" else "out"
        case Mlp() | Experts():
            name = "up" if k.call.outputs[0] == "up" else "down"
        case _:
            return "weight", "bias"
    return name, f"{name}_bias"


def shares_bias(k: Launch) -> bool:
    """Whether the call's bias lies on every shard: where the shards' outputs are summed."""
    whole_experts = isinstance(k.op, Experts) and k.split.kind == "experts"
    return k.call.outputs[0] in ("y", "down") and k.split.kind in k.op.sums and not whole_experts


@cache
def param_shapes(op: LayerOp, split: Split) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a shard."""
    return {p.name: p.shape for p in op.params(split)}


def _edges(k: Launch) -> tuple[int, int]:
    """First input and first output column of the shard."""
    if not isinstance(k.op, Linear):
        return 0, 0
    return k.start(k.op.in_features, "in"), k.start(k.op.out_features, "out", "vocab")


def linear(k: Launch) -> Made:
    """y = x W^T + b; of several experts each on its own rows."""
    w, b = weights_of(k)
    if b is not None and shares_bias(k) and not k.adds_shared_bias():
        b = None
    if isinstance(k.op, Experts):
        return Made((routing.grouped(k, w, b),))
    first_in, first_out = _edges(k)
    x = columns(k.x[0], k.dims["m"], w.shape[1], first_in)
    return Made((Columns(F.linear(x, w, b), first_out),))


def linear_dgrad(k: Launch) -> Made:
    """dx = dy W."""
    w, _ = weights_of(k)
    if isinstance(k.op, Experts):
        return Made(dx={0: routing.grouped_dgrad(k, w)})
    first_in, first_out = _edges(k)
    dy = columns(k.gradient(), k.dims["m"], w.shape[0], first_out)
    return Made(dx={0: Columns(dy @ w, first_in)})


def linear_wgrad(k: Launch) -> Made:
    """dW = dy^T x, db = the sum of dy over tokens. A bias on every shard gets its whole gradient on each."""
    weight, bias = weight_names(k)
    shapes = param_shapes(k.op, k.split)
    if isinstance(k.op, Experts):
        dw, db = routing.grouped_wgrad(k, shapes[weight])
        return Made(dw={weight: dw, bias: db} if bias in shapes else {weight: dw})
    (out, width), (first_in, first_out) = shapes[weight], _edges(k)
    x = columns(k.x[0], k.dims["m"], width, first_in)
    dy = columns(k.gradient(), k.dims["m"], out, first_out)
    target = k.dw.get(weight)
    if k.fills and target is not None and target.dtype == dy.dtype:
        torch.mm(dy.t(), x, out=target)
        if bias in shapes:
            torch.sum(dy, 0, out=k.dw[bias])
        return Made()
    made = {bias: dy.sum(0)} if bias in shapes else {}
    if target is not None and target.dtype == dy.dtype:
        # Added by the product itself: no tensor in between.
        target.addmm_(dy.t(), x)
        return Made(dw=made)
    return Made(dw={weight: dy.t() @ x, **made})


# ---- convolution and pooling


def _image(k: Launch, flat: torch.Tensor) -> torch.Tensor:
    op = k.op
    assert isinstance(op, Conv2d)
    return flat.view(-1, op.in_channels, op.height, op.width)


def _conv_gradient(k: Launch) -> torch.Tensor:
    """The shard's channels of the output gradient, as images."""
    op = k.op
    assert isinstance(op, Conv2d)
    height, width = op.out_size()
    channels, first = k.dims["cout"], k.start(op.out_channels, "out")
    pixels = height * width
    part = columns(k.gradient(), k.dims["batch"], channels * pixels, first * pixels)
    return part.reshape(k.dims["batch"], channels, height, width)


def conv2d(k: Launch) -> Made:
    """The shard's output channels."""
    op = k.op
    assert isinstance(op, Conv2d)
    height, width = op.out_size()
    first = k.start(op.out_channels, "out") * height * width
    if k.dims["cout"] == 0:
        return Made((Columns(k.x[0].new_zeros(k.dims["batch"], 0), first),))
    y = F.conv2d(_image(k, k.x[0]), k.w["weight"], k.w.get("bias"), op.stride, op.padding)
    return Made((Columns(y.reshape(k.dims["batch"], -1), first),))


def conv2d_dgrad(k: Launch) -> Made:
    """The input gradient that passes through the shard's channels."""
    op = k.op
    assert isinstance(op, Conv2d)
    dy, shape = _conv_gradient(k), (k.dims["batch"], op.in_channels, op.height, op.width)
    if k.dims["cout"] == 0:
        return Made(dx={0: dy.new_zeros(shape)})
    # torch leaves these two untyped.
    dx = conv2d_input(shape, k.w["weight"], dy, op.stride, op.padding)  # type: ignore[no-untyped-call]
    return Made(dx={0: dx})


def conv2d_wgrad(k: Launch) -> Made:
    """The gradients of the shard's filters."""
    op = k.op
    assert isinstance(op, Conv2d)
    dy, shape = _conv_gradient(k), op.params(k.split)[0].shape
    if k.dims["cout"] == 0:
        dw = dy.new_zeros(shape)
    else:
        dw = conv2d_weight(_image(k, k.x[0]), shape, dy, op.stride, op.padding)  # type: ignore[no-untyped-call]
    return Made(dw={"weight": dw, "bias": dy.sum((0, 2, 3))} if op.bias else {"weight": dw})


def maxpool2d(k: Launch) -> Made:
    """Largest of each window, and where it stood."""
    op = k.op
    assert isinstance(op, MaxPool2d)
    y, indices = F.max_pool2d(k.x[0].view(-1, op.channels, op.height, op.width), op.window, return_indices=True)
    return Made((y, indices))


def maxpool2d_bwd(k: Launch) -> Made:
    """Each gradient goes where the largest element stood."""
    op = k.op
    assert isinstance(op, MaxPool2d)
    dy = k.gradient().view(k.extent.batch * op.channels, -1)
    dx = dy.new_zeros(k.extent.batch * op.channels, op.height * op.width)
    return Made(dx={0: dx.scatter_add_(1, k.y[1].view(dy.shape), dy)})


# ---- embeddings


def _ids(k: Launch) -> torch.Tensor:
    """Token ids, counted from the shard's first vocabulary row."""
    assert isinstance(k.op, Embedding)
    return k.x[0] - k.start(k.op.vocab, "vocab")


def _found(ids: torch.Tensor, rows: int) -> torch.Tensor:
    return (ids >= 0) & (ids < rows)


def embedding(k: Launch) -> Made:
    """Rows of the table; zeros for ids that another shard has."""
    assert isinstance(k.op, Embedding)
    w, ids = k.w["weight"], _ids(k)
    first = k.start(k.op.width, "width")
    if k.split.kind != "vocab":
        return Made((Columns(F.embedding(ids, w), first),))
    found = _found(ids, w.shape[0])
    y = w.new_zeros(ids.numel(), w.shape[1])
    y[found] = w[ids[found]]
    return Made((y,))


def embedding_wgrad(k: Launch) -> Made:
    """Each token's gradient added to its row."""
    assert isinstance(k.op, Embedding)
    rows, width = param_shapes(k.op, k.split)["weight"]
    ids = _ids(k)
    dy = columns(k.gradient(), ids.numel(), width, k.start(k.op.width, "width"))
    if k.split.kind == "vocab":
        found = _found(ids, rows)
        ids, dy = ids[found], dy[found]
    target = k.dw.get("weight")
    if target is not None and target.dtype == dy.dtype:
        target.index_add_(0, ids, dy)
        return Made()
    return Made(dw={"weight": dy.new_zeros(rows, width).index_add_(0, ids, dy)})


def _position(k: Launch, device: torch.device) -> torch.Tensor:
    """Position of each of the shard's tokens in its sequence."""
    first = k.start(k.extent.tokens, "rows")
    return torch.arange(first, first + k.dims["rows"], device=device) % k.extent.seq


def _whole_sequences(k: Launch) -> bool:
    """Whether the rank has sequences from their first token to their last."""
    return k.start(k.extent.tokens, "rows") % k.extent.seq == 0 and k.dims["rows"] % k.extent.seq == 0


def positions(k: Launch) -> Made:
    """x + the row of the token's position. Further rows (token types) are not looked up: all tokens are of one."""
    x, w, seq = matrix(k.x[0], k.dims["rows"]), k.w["weight"], k.extent.seq
    if _whole_sequences(k):
        return Made(((x.view(-1, seq, x.shape[1]) + w[:seq]).view(x.shape),))
    return Made((x + w[_position(k, x.device)],))


def positions_wgrad(k: Launch) -> Made:
    """Each token's gradient added to the row of its position."""
    dy, seq = matrix(k.gradient(), k.dims["rows"]), k.extent.seq
    dw = dy.new_zeros(param_shapes(k.op, WHOLE)["weight"])
    if _whole_sequences(k):
        dw[:seq] = dy.view(-1, seq, dy.shape[1]).sum(0)
        return Made(dw={"weight": dw})
    return Made(dw={"weight": dw.index_add_(0, _position(k, dy.device), dy)})


# ---- norms


def layernorm(k: Launch) -> Made:
    """(x - mean) / deviation * w + b, row by row."""
    x = matrix(k.x[0], k.dims["rows"])
    return Made((F.layer_norm(x, (x.shape[1],), k.w["weight"], k.w["bias"], NORM_EPS),))


def layernorm_bwd(k: Launch) -> Made:
    """Statistics are taken again by a forward pass (the IR keeps none), then torch's own backward."""
    x, dy = (accurate(matrix(t, k.dims["rows"])) for t in (k.x[0], k.gradient()))
    w, b, shape = k.w["weight"].to(x.dtype), k.w["bias"].to(x.dtype), [x.shape[1]]
    _, mean, inverse = torch.native_layer_norm(x, shape, w, b, NORM_EPS)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy, x, shape, mean, inverse, w, b, [bool(k.wanted), True, True]
    )
    return Made(dx={0: dx} if k.wanted else {}, dw={"weight": dw, "bias": db})


def rmsnorm(k: Launch) -> Made:
    """x / root mean square * w, row by row."""
    x = accurate(matrix(k.x[0], k.dims["rows"]))
    inverse = (x.square().mean(1, keepdim=True) + NORM_EPS).rsqrt()
    return Made((x * inverse * k.w["weight"].to(x.dtype),))


def rmsnorm_bwd(k: Launch) -> Made:
    """As layer norm, without the mean."""
    x, dy = (accurate(matrix(t, k.dims["rows"])) for t in (k.x[0], k.gradient()))
    inverse = (x.square().mean(1, keepdim=True) + NORM_EPS).rsqrt()
    h, g = x * inverse, dy * k.w["weight"].to(dy.dtype)
    dw = {"weight": (dy * h).sum(0)}
    return Made(dx={0: (g - h * (g * h).mean(1, keepdim=True)) * inverse}, dw=dw) if k.wanted else Made(dw=dw)


# ---- elementwise


def gelu(k: Launch) -> Made:
    """x times the normal distribution function of x."""
    return Made((F.gelu(k.x[0]),))


def gelu_bwd(k: Launch) -> Made:
    """dx = dy gelu'(x)."""
    return Made(dx={0: torch.ops.aten.gelu_backward(k.gradient(), k.x[0])})


def silu(k: Launch) -> Made:
    """x times the logistic function of x."""
    return Made((F.silu(k.x[0]),))


def silu_bwd(k: Launch) -> Made:
    """dx = dy silu'(x)."""
    return Made(dx={0: torch.ops.aten.silu_backward(k.gradient(), k.x[0])})


def relu(k: Launch) -> Made:
    """The positive part."""
    return Made((F.relu(k.x[0]),))


def relu_bwd(k: Launch) -> Made:
    """The gradient where the output is positive."""
    return Made(dx={0: torch.ops.aten.threshold_backward(k.gradient(), k.y[0], 0)})


def _gated_width(k: Launch) -> int:
    """Features of the gate half."""
    if isinstance(k.op, Activation):
        return k.op.width
    assert isinstance(k.op, Mlp | Experts)
    return k.split.share(k.op.ffn, "ffn")


def _halves(k: Launch) -> tuple[torch.Tensor, torch.Tensor]:
    width = _gated_width(k)
    both = k.x[0].view(-1, 2 * width) if width else k.x[0].view(0, 0)
    return both[:, :width], both[:, width:]


def gated(k: Launch) -> Made:
    """silu(gate) times up, of the two halves of each row."""
    gate, up = _halves(k)
    return Made((F.silu(gate) * up,))


def gated_bwd(k: Launch) -> Made:
    """Gradients of both halves, side by side."""
    gate, up = _halves(k)
    dy = k.gradient().view(gate.shape)
    return Made(dx={0: torch.cat([torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)], 1)})


def add(k: Launch) -> Made:
    """x0 + x1."""
    return Made((k.x[0] + k.x[1],))


def dropout(k: Launch) -> Made:
    """Zeroes a share of the elements and scales up the others; the seed makes a recomputed mask the same."""
    x = k.x[0]
    mask = keep_mask(x.numel(), k.dropout, k.seed, x.device).view(x.shape)
    return Made((x * mask / (1 - k.dropout), mask.to(torch.uint8)))


def dropout_bwd(k: Launch) -> Made:
    """The same elements and scale for the gradient."""
    return Made(dx={0: k.gradient() * k.y[1] / (1 - k.dropout)})


KERNELS: Mapping[str, Kernel] = {
    "linear": linear, "linear.dgrad": linear_dgrad, "linear.wgrad": linear_wgrad,
    "conv2d": conv2d, "conv2d.dgrad": conv2d_dgrad, "conv2d.wgrad": conv2d_wgrad,
    "maxpool2d": maxpool2d, "maxpool2d.bwd": maxpool2d_bwd,
    "embedding": embedding, "embedding.wgrad": embedding_wgrad,
    "positions": positions, "positions.wgrad": positions_wgrad,
    "layernorm": layernorm, "layernorm.bwd": layernorm_bwd, "rmsnorm": rmsnorm, "rmsnorm.bwd": rmsnorm_bwd,
    "gelu": gelu, "gelu.bwd": gelu_bwd, "silu": silu, "silu.bwd": silu_bwd, "relu": relu, "relu.bwd": relu_bwd,
    "gated": gated, "gated.bwd": gated_bwd, "add": add, "dropout": dropout, "dropout.bwd": dropout_bwd,
    **attention.KERNELS, **loss.KERNELS, **routing.KERNELS,
}  # fmt: skip
"""Kernel name (model/kernels.py) -> what it computes. Kernels without a layer (copy, optimizer) are the machine's."""
