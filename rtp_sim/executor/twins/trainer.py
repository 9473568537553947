"""`Trainer`: a twin with its optimizer, one training step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from rtp_sim.executor.dtypes import torch_dtype
from rtp_sim.executor.optimizer import DEFAULTS
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.twins.data_parallel import data_parallel, fully_sharded, without_sync
from rtp_sim.executor.twins.module import TwinModule
from rtp_sim.executor.twins.tensor_parallel import tensor_parallel

Batch = Sequence[Mapping[str, torch.Tensor]]


class Trainer:
    """The twin of `strategy` on this rank: the executor's initial parameters, batches and optimizer. The default
    process group must be there."""

    def __init__(self, strategy: str, request: RunRequest, device: torch.device) -> None:
        training = request.training
        self._training, self._device = training, device
        # Mixed precision in torch's manner: weights are kept in fp32, and cast for each use.
        self._dtype = torch.float64 if request.float_dtype == "fp64" else torch.float32
        parameters = {
            layer: {name: t.to(device, self._dtype) for name, t in tensors.items()}
            for layer, tensors in initial_parameters(request.network, request.seed).items()
        }
        self._split = strategy in ("tp", "tp-sp")
        shards = dist.get_world_size() if self._split else 1
        model = TwinModule(request.network, parameters, shards, training.recompute == "full")
        del parameters
        self.model: nn.Module
        if strategy == "ddp":
            self.model = data_parallel(model)
        elif strategy == "fsdp":
            self.model = fully_sharded(model, training)
        else:
            self.model = tensor_parallel(model, request.network, strategy == "tp-sp")
        # Of what is whole on every rank each has the gradient of its own tokens.
        self._to_sum = [p for p in model.parameters() if strategy == "tp-sp" and not isinstance(p, DTensor)]
        self._casts = training.policy.master_dtype is not None and strategy != "fsdp"
        self.optimizer = _optimizer(training.optimizer, list(self.model.parameters()))

    def step(self, batch: Batch) -> torch.Tensor:
        """One training step; the rank's loss, the mean over its micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, micro in enumerate(batch):
            last = number == len(batch) - 1
            with nullcontext() if last else without_sync(self.model), loss_parallel() if self._split else nullcontext():
                loss = self._forward(micro) / len(batch)
                loss.backward()
            losses.append(loss.detach())
        for parameter in self._to_sum:
            dist.all_reduce(parameter.grad)
        self.optimizer.step()
        total = torch.stack([x.full_tensor() if isinstance(x, DTensor) else x for x in losses])
        return total.sum()

    def _forward(self, micro: Mapping[str, torch.Tensor]) -> Any:
        inputs = {name: t.to(self._device, self._dtype if t.is_floating_point() else None) for name, t in micro.items()}
        compute = torch_dtype(self._training.policy.compute_dtype, None)
        with torch.autocast(self._device.type, compute) if self._casts else nullcontext():
            return self.model(inputs)


def _optimizer(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own, with the executor's settings. Parameters of a DTensor are a group of their own: the optimizer's
    loops over many tensors take one kind at a time."""
    groups = [
        {"params": chosen}
        for split in (True, False)
        if (chosen := [p for p in parameters if isinstance(p, DTensor) == split])
    ]
    h = DEFAULTS
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=h.lr, betas=h.betas, eps=h.eps, weight_decay=h.weight_decay)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=h.lr, betas=h.betas, eps=h.eps)
    return torch.optim.SGD(groups, lr=h.lr, momentum=h.momentum if kind == "sgd-momentum" else 0.0)
