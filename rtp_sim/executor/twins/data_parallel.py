"""The twins of ddp and fsdp: DistributedDataParallel, and fully_shard of each block."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rtp_sim.executor.dtypes import torch_dtype
from rtp_sim.executor.twins.module import TwinModule
from rtp_sim.model.training import TrainingSpec


def data_parallel(model: TwinModule) -> nn.Module:
    """The model on every rank, gradients averaged in buckets of 25 MiB that the gradients are views of."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def without_sync(model: nn.Module) -> Any:
    """A context in which gradients of a micro-batch that is not the last are kept, not averaged (ddp alone)."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def fully_sharded(model: TwinModule, training: TrainingSpec) -> nn.Module:
    """Each block gathered and freed on its own, whatever it shares parameters with in one group with the root."""
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = training.policy
    mixed: dict[str, Any] = {}
    if policy.master_dtype is not None:
        reduced = torch_dtype(policy.gradient_dtype, None)
        mixed = {"mp_policy": MixedPrecisionPolicy(torch_dtype(policy.compute_dtype, None), reduced)}
    owners: dict[nn.Parameter, int] = {}
    for block in model.blocks:
        for parameter in block.parameters():
            owners[parameter] = owners.get(parameter, 0) + 1
    for block in model.blocks:
        own = list(block.parameters())
        if own and all(owners[p] == 1 for p in own):
            fully_shard(block, mesh=mesh, **mixed)
    fully_shard(model, mesh=mesh, **mixed)
    return model
