"""The twins of tp and tp-sp: the model cut by torch's DTensor, as its tensor-parallelism tutorial does it.

Attention and MLP are split by columns, then by rows; embedding and head by vocabulary, with the loss computed on the
split logits. With sequence parallelism what lies between is split over tokens.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from rtp_sim.errors import InputError
from rtp_sim.executor.twins.module import (
    TwinAttention,
    TwinBlock,
    TwinEmbedding,
    TwinLinear,
    TwinMlp,
    TwinModule,
    TwinPositions,
)
from rtp_sim.model.layers import Attention, Embedding, Linear, Mlp
from rtp_sim.model.network import Network


def require_even(network: Network, n: int, split_tokens: bool) -> None:
    """InputError where torch could not cut a dimension into `n` equal parts."""
    sizes: list[tuple[str, int]] = [("tokens of a sequence", network.seq)] if split_tokens else []
    for layer in network.layers():
        match layer.op:
            case Attention(kv_heads=count):
                sizes.append((f"key-value heads of {layer.name}", count))
            case Mlp(ffn=count):
                sizes.append((f"hidden features of {layer.name}", count))
            case Embedding(vocab=count) | Linear(vocab=True, out_features=count):
                sizes.append((f"words of {layer.name}", count))
    for what, count in sizes:
        if count % n:
            raise InputError(f"--twin: {count} {what} do not divide by {n} ranks; expected an even split")


def tensor_parallel(model: TwinModule, network: Network, split_tokens: bool) -> nn.Module:
    """The model's parameters as DTensors over all ranks; it must have been made for as many shards."""
    require_even(network, dist.get_world_size(), split_tokens)
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    tied = [(m, m.weight) for m in model.modules() if isinstance(m, TwinLinear)]
    tables = [m for m in model.modules() if isinstance(m, TwinEmbedding)]
    ties = [(linear, table) for linear, w in tied for table in tables if table.weight is w]
    parallelize_module(model, mesh, _plan(model, network, split_tokens))
    for linear, table in ties:
        linear.weight = table.table.weight
    if split_tokens:
        for module in model.modules():
            if isinstance(module, TwinPositions):
                module.first = dist.get_rank() * (network.seq // dist.get_world_size())
    return model


def _plan(model: TwinModule, network: Network, split_tokens: bool) -> dict[str, ParallelStyle]:
    outside = Shard(1) if split_tokens else Replicate()
    vocabulary = {layer.name.replace(".", "_") for layer in network.layers() if getattr(layer.op, "vocab", 0) is True}
    plan: dict[str, ParallelStyle] = {}
    for i, block in enumerate(model.blocks):
        assert isinstance(block, TwinBlock)
        for key, module in block.layers.items():
            name = f"blocks.{i}.layers.{key}"
            if isinstance(module, TwinAttention):
                plan[f"{name}.qkv"] = ColwiseParallel(input_layouts=outside)
                plan[f"{name}.out"] = RowwiseParallel(output_layouts=outside)
            elif isinstance(module, TwinMlp):
                plan[f"{name}.up"] = ColwiseParallel(input_layouts=outside)
                plan[f"{name}.down"] = RowwiseParallel(output_layouts=outside)
            elif isinstance(module, TwinEmbedding):
                plan[f"{name}.table"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=outside)
            elif key in vocabulary:
                plan[name] = ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1), use_local_output=False)
            elif split_tokens and isinstance(module, nn.LayerNorm | nn.RMSNorm):
                plan[name] = SequenceParallel(use_local_output=True)
    return plan
