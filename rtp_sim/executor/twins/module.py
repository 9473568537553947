"""`TwinModule`: a network as an ordinary torch.nn.Module, with the executor's initial parameters.

What a user of torch would write: one module per layer, autograd for the backward. Its blocks are the network's, so that
what gathers or wraps blocks finds them. Where it is to be split over tensor-parallel ranks, rows of fused projections
are put in the order of the shards, so that an even cut gives each rank the queries, keys and values of its own heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rtp_sim.errors import InputError
from rtp_sim.executor.packing import shard
from rtp_sim.executor.parameters import Parameters
from rtp_sim.model.layers import (
    Activation,
    Add,
    Attention,
    Conv2d,
    CrossEntropy,
    Dropout,
    Embedding,
    Layer,
    LayerOp,
    Linear,
    MaxPool2d,
    Mlp,
    Norm,
    Positions,
    Split,
)
from rtp_sim.model.network import Block, Network

EPS = 1e-5


class TwinModule(nn.Module):
    """The whole network: input tensors by name -> the loss. `shards` is the degree of tensor parallelism that it is to
    be cut for; with `recompute` the transformer blocks are run again in the backward."""

    def __init__(self, network: Network, parameters: Parameters, shards: int = 1, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        made: dict[str, nn.Module] = {}
        needed = _needed(network)
        self.blocks = nn.ModuleList(TwinBlock(b, network, parameters, shards, made, needed) for b in network.blocks)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The last layer's output; of a network that ends without a loss, its sum."""
        tensors = dict(inputs)
        found: tuple[torch.Tensor, ...] = ()
        for block in self.blocks:
            assert isinstance(block, TwinBlock)
            given = [tensors[name] for name in block.inputs]
            again = self.recompute and block.recomputable
            found = checkpoint(block, *given, use_reentrant=False) if again else block(*given)
            tensors.update(zip(block.outputs, found, strict=True))
        return found[-1].sum()


def _needed(network: Network) -> set[tuple[int, str]]:
    """(block, tensor): what later blocks read of an earlier one, and the last output."""
    writer = {layer.output: i for i, block in enumerate(network.blocks) for layer in block.layers}
    found = {(len(network.blocks) - 1, network.blocks[-1].layers[-1].output)}
    for i, block in enumerate(network.blocks):
        found |= {(writer[x], x) for layer in block.layers for x in layer.inputs if writer.get(x, i) != i}
    return found


class TwinBlock(nn.Module):
    """One block: tensors of other blocks in, those that others need out."""

    def __init__(
        self, block: Block, network: Network, parameters: Parameters, shards: int, made: dict[str, nn.Module],
        needed: set[tuple[int, str]],
    ) -> None:  # fmt: skip
        super().__init__()
        own = {layer.output for layer in block.layers}
        number = network.blocks.index(block)
        self.recomputable = block.recomputable
        self.inputs = tuple(dict.fromkeys(x for layer in block.layers for x in layer.inputs if x not in own))
        self.outputs = tuple(x.output for x in block.layers if (number, x.output) in needed)
        self.steps = tuple((_key(layer), layer.inputs, layer.output) for layer in block.layers)
        self.layers = nn.ModuleDict()
        for layer in block.layers:
            module = made[layer.name] = _module(layer, network.seq, parameters.get(layer.weight_name, {}), shards)
            if layer.shares:
                module.weight = made[layer.shares].weight
            self.layers[_key(layer)] = module

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The layers in order."""
        tensors = dict(zip(self.inputs, given, strict=True))
        for key, inputs, output in self.steps:
            tensors[output] = self.layers[key](*(tensors[x] for x in inputs))
        return tuple(tensors[name] for name in self.outputs)


def _key(layer: Layer) -> str:
    """A module's name has no dots."""
    return layer.name.replace(".", "_")


def _module(layer: Layer, seq: int, p: Mapping[str, torch.Tensor], shards: int) -> nn.Module:
    op = layer.op
    match op:
        case Linear():
            return TwinLinear(op, seq, p)
        case Conv2d():
            return TwinConv(op, p)
        case MaxPool2d():
            return TwinPool(op)
        case Embedding():
            table = nn.Embedding(op.vocab, op.width, device="meta")
            table.weight = nn.Parameter(p["weight"].clone())
            return TwinEmbedding(table, seq)
        case Positions():
            return TwinPositions(p["weight"])
        case Norm():
            return _norm(op, p)
        case Add():
            return TwinAdd()
        case Dropout():
            return nn.Dropout(op.probability)
        case Activation():
            return TwinActivation(op.function)
        case Attention():
            return TwinAttention(op, p, shards)
        case Mlp():
            return TwinMlp(op, p, shards)
        case CrossEntropy():
            return TwinLoss(op)
    raise InputError(f"--twin: {layer.name} is a {type(op).__name__}, of which torch's twin has no form")


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


def _in_shard_order(op: LayerOp, kind: str, n: int, name: str, p: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """A parameter whose rows are split, shard after shard."""
    if name not in p or n == 1:
        return p.get(name)
    return torch.cat([shard(op, name, p[name], Split(kind, n, i)) for i in range(n)])


class TwinLinear(nn.Linear):
    """A linear layer that makes rows of whatever it is given."""

    def __init__(self, op: Linear, seq: int, p: Mapping[str, torch.Tensor]) -> None:
        bias = p.get("bias")
        super().__init__(op.in_features, op.out_features, bias=bias is not None, device="meta")
        self.seq = seq
        self.weight = nn.Parameter(p["weight"].clone())
        if bias is not None:
            self.bias = nn.Parameter(bias.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, in) -> (batch, seq, out)."""
        rows = x if x.shape[-1] == self.in_features else x.reshape(-1, self.seq, self.in_features)
        return F.linear(rows, self.weight, self.bias)


class TwinConv(nn.Module):
    """A convolution on images that come flat."""

    def __init__(self, op: Conv2d, p: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(p["weight"].clone())
        self.bias = nn.Parameter(p["bias"].clone()) if "bias" in p else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, ...) -> (batch, channels, height, width)."""
        op = self.op
        images = x.reshape(-1, op.in_channels, op.height, op.width)
        return F.conv2d(images, self.weight, self.bias, op.stride, op.padding)


class TwinPool(nn.Module):
    """Max pooling on images that come flat."""

    def __init__(self, op: MaxPool2d) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, ...) -> (batch, channels, height / window, width / window)."""
        return F.max_pool2d(x.reshape(-1, self.op.channels, self.op.height, self.op.width), self.op.window)


class TwinEmbedding(nn.Module):
    """A table that ids are looked up in."""

    def __init__(self, table: nn.Embedding, seq: int) -> None:
        super().__init__()
        self.table, self.seq = table, seq

    @property
    def weight(self) -> torch.Tensor:
        """The table's rows."""
        return self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch * seq) -> (batch, seq, width)."""
        found: torch.Tensor = self.table(ids.reshape(-1, self.seq))
        return found


class TwinPositions(nn.Module):
    """Adds learned positions. `first` is the position of the first token it sees, where tokens are split over ranks."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.first = nn.Parameter(weight.clone()), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, width), the same shape out."""
        return x + self.weight[self.first : self.first + x.shape[1]]


def _norm(op: Norm, p: Mapping[str, torch.Tensor]) -> nn.Module:
    made: nn.LayerNorm | nn.RMSNorm
    if op.kind == "layernorm":
        made = nn.LayerNorm(op.width, eps=EPS, device="meta")
        made.bias = nn.Parameter(p["bias"].clone())
    else:
        made = nn.RMSNorm(op.width, eps=EPS, device="meta")
    made.weight = nn.Parameter(p["weight"].clone())
    return made


class TwinAdd(nn.Module):
    """Residual connection."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x + y."""
        return x + y


class TwinActivation(nn.Module):
    """An activation function by name; "gated" is silu of the first half times the second."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Element by element."""
        return activation(self.function, x)


def activation(function: str, x: torch.Tensor) -> torch.Tensor:
    """The activation functions of model/layers/."""
    if function == "gated":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    if function == "gelu":
        return F.gelu(x)
    return F.silu(x) if function == "silu" else F.relu(x)


class TwinAttention(nn.Module):
    """Attention with one projection for queries, keys and values. Cut over ranks, each sees its own heads alone."""

    def __init__(self, op: Attention, p: Mapping[str, torch.Tensor], shards: int) -> None:
        super().__init__()
        self.op, self.shards = op, shards
        weight = _in_shard_order(op, "heads", shards, "qkv", p)
        assert weight is not None
        self.qkv = _linear(weight, _in_shard_order(op, "heads", shards, "qkv_bias", p))
        self.out = _linear(p["out"], p.get("out_bias"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> the same."""
        op, qkv = self.op, self.qkv(x)
        b, s, d = qkv.shape[0], qkv.shape[1], op.head_dim
        heads, kv_heads = op.heads // self.shards, op.kv_heads // self.shards
        sizes = [heads * d, kv_heads * d, kv_heads * d]
        q, k, v = (t.view(b, s, -1, d).transpose(1, 2) for t in torch.split(qkv, sizes, -1))
        if op.rotary:
            q, k = rotated(q), rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=op.causal, enable_gqa=heads != kv_heads)
        found: torch.Tensor = self.out(y.transpose(1, 2).reshape(b, s, -1))
        return found


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions: features i and i + d/2 turned by the angle of their position."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float64, device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class TwinMlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, op: Mlp, p: Mapping[str, torch.Tensor], shards: int) -> None:
        super().__init__()
        self.function = "gated" if op.gated else op.activation
        weight = _in_shard_order(op, "ffn", shards, "up", p)
        assert weight is not None
        self.up = _linear(weight, _in_shard_order(op, "ffn", shards, "up_bias", p))
        self.down = _linear(p["down"], p.get("down_bias"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> the same."""
        found: torch.Tensor = self.down(activation(self.function, self.up(x)))
        return found


class TwinLoss(nn.Module):
    """Mean cross-entropy over all tokens."""

    def __init__(self, op: CrossEntropy) -> None:
        super().__init__()
        self.vocab = op.vocab

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(batch, seq, vocab) and (batch * seq) -> scalar."""
        return F.cross_entropy(logits.reshape(-1, self.vocab), targets.reshape(-1))
