"""The first step of a distributed run against plain dense training in double precision: loss and every gradient.

Errors of gradients are relative, ||ours - dense|| / ||dense|| per parameter. The limits are rounding errors that such
nets show in each precision (a wrong schedule is off by tens of percent), not properties of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from rtp_sim.executor.dense import Keep, train_dense
from rtp_sim.executor.dropout import masks_of
from rtp_sim.executor.machine import Batch, Machine
from rtp_sim.executor.parameters import Parameters, Share, assembled, owners, unfused_parameters
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import Record

LIMITS = {"fp64": 1e-9, "fp32": 1e-4, "tf32": 1e-2, "fp16": 5e-2, "bf16": 1e-1}
"""Largest relative error by the dtype that is computed in."""

TINY, HUGE = 1e-300, 1e300


def compare_with_dense(
    machine: Machine, request: RunRequest, start: Callable[[], Parameters], loss: float, batches: Sequence[Batch],
    control: dist.ProcessGroup,
) -> Record | None:  # fmt: skip
    """Gathers the gradients of all ranks on rank 0 and compares; None on the others.

    The step is the first whose update was not left out; `start` makes the full parameters that it began with. `loss` is
    this rank's share of the mean (its mean over the ranks is the training loss), `batches` those of all replicas.
    """
    mine = (loss, machine.gradients)
    everyone: list[tuple[float, list[Share]] | None] | None = [None] * machine.schedule.world_size
    everyone = everyone if machine.rank == 0 else None
    dist.gather_object(mine, everyone, dst=0, group=control)
    if everyone is None:
        return None
    found = [item for item in everyone if item is not None]
    network = machine.network
    given = _rounded(start(), machine)
    if given.keys() != owners(network).keys():
        given = unfused_parameters(request.network, given)
    dense = train_dense(
        network, given, [batches], request.training.micro_batch, clip_norm=request.training.clip_norm,
        keep=_masks(machine),
    )  # fmt: skip
    losses = sum(loss for loss, _ in found) / len(found)
    errors = {"loss": _finite(abs(losses - dense.losses[0]) / abs(dense.losses[0]))}
    if found[0][1]:
        ours = assembled(machine.schedule, network, [shares for _, shares in found])
        errors |= gradient_errors(ours, dense.gradients)
    if machine.watch.norm is not None:
        errors["grad_norm"] = _finite(abs(machine.watch.norm - dense.grad_norms[0]) / dense.grad_norms[0])
    worst = max(errors, key=lambda name: errors[name])
    limit = LIMITS[request.float_dtype or request.training.policy.compute_dtype]
    return {
        "loss": losses if math.isfinite(losses) else None,
        "dense_loss": dense.losses[0],
        "largest_error": errors[worst],
        "worst": worst,
        "limit": limit,
        "compared": len(errors),
        "passed": errors[worst] <= limit,
    }


def _masks(machine: Machine) -> Keep:
    """What the dropouts of the machine's step keep."""
    masks = masks_of(machine.schedule, machine.network, machine.seed, machine.device)
    return lambda layer, _, replica, micro, shape: masks.whole(layer, machine.step, replica, micro, shape)


def gradient_errors(ours: Parameters, dense: Parameters) -> dict[str, float]:
    """Relative error per parameter, named layer.parameter."""
    errors = {}
    for layer, tensors in dense.items():
        for name, expected in tensors.items():
            difference = ours[layer][name].double() - expected.double()
            errors[f"{layer}.{name}"] = _finite(float(difference.norm() / expected.double().norm().clamp_min(TINY)))
    return errors


def _finite(error: float) -> float:
    """The error as a number that is compared and written: not a number is as wrong as can be."""
    return error if error <= HUGE else HUGE


def _rounded(parameters: Parameters, machine: Machine) -> Parameters:
    """What the machines started from: the weights in the precision they are stored in."""
    stored = next((b.name for b in machine.program.buffers.values() if b.category == "weights"), None)
    dtype = torch.float64 if stored is None else machine.dtype(stored)
    return {layer: {k: v.to(dtype).double() for k, v in tensors.items()} for layer, tensors in parameters.items()}
