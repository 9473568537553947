"""A small training step run by the executor itself: what its interpreter and its machine add to the kernels.

A kernel of a step takes longer than the same kernel called alone: the machine finds the operands by name, cuts out
shards and puts the result in its place. On a CPU all of this lies between the start and the end of an op, so it is part
of the op's time; the issue cost is the time between two ops. On CUDA the host does it while the device computes: there
all of it is issue cost.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from rtp_sim.executor.batches import random_batch
from rtp_sim.executor.calibrate.kernels import layer_case, timed
from rtp_sim.executor.calibrate.samples import KernelSample, median
from rtp_sim.executor.distributed import HostInterpreter
from rtp_sim.executor.groups import Groups
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.progress import Progress
from rtp_sim.model.layers import Add, Extent, Linear, Norm
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Compute, Dims, Schedule

WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Probe:
    """A training step of one rank: a schedule without communication and what it trains."""

    schedule: Schedule
    network: Network
    training: TrainingSpec


@dataclass(frozen=True, slots=True)
class ProbeTimes:
    """`issue_ns` per op, one entry per step; `samples` the step's kernels, with all that the machine adds to them."""

    issue_ns: tuple[int, ...]
    samples: tuple[KernelSample, ...]


def run_probe(probe: Probe, device: torch.device, steps: int) -> ProbeTimes:
    """Times of `steps` steps on this rank."""
    machine = Machine(probe.schedule, 0, probe.network, probe.training, initial_parameters(probe.network), device)
    ops = probe.schedule.program(0).ops
    issue: list[int] = []
    times: dict[tuple[str, str, Dims], list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Without communication no group is ever asked for.
        groups = Groups(cast("torch.distributed.ProcessGroup", None), {})
        interpreter = HostInterpreter(probe.schedule, 0, machine, groups, Progress(Path(folder) / "progress"))
        for step in range(WARM_UP + steps):
            machine.start_step(random_batch(probe.network, probe.training.micro_batch, 1, step=step))
            done = interpreter.run_step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step < WARM_UP:
                continue
            took = [int(t) for t in done.ops[1] - done.ops[0]]
            inside = 0 if device.type == "cuda" else sum(took)
            issue.append((done.end_ns - done.start_ns - inside) // len(ops))
            for op, ns in zip(ops, took, strict=True):
                if isinstance(op.action, Compute) and device.type != "cuda":
                    times.setdefault((op.action.kernel, op.action.dtype, op.action.dims), []).append(max(1, ns))
    samples = tuple(KernelSample(*key, tuple(all_times)) for key, all_times in times.items())
    return ProbeTimes(tuple(issue), samples)


def machine_ns(probe: Probe, times: ProbeTimes, device: torch.device, rounds: int) -> int:
    """What the machine adds to a kernel: the median over the step's additions, norms and products of the time in the
    step less the time of the same kernel called alone."""
    measured = {(s.kernel, s.dtype, s.dims): median(s.times_ns) for s in times.samples}
    layers = {layer.name: layer.op for layer in probe.network.layers()}
    extent = Extent(probe.training.micro_batch, probe.network.seq)
    added: list[float] = []
    for op in probe.schedule.program(0).ops:
        action = op.action
        if not isinstance(action, Compute) or action.site is None or action.site.layer not in layers:
            continue
        layer, key = layers[action.site.layer], (action.kernel, action.dtype, action.dims)
        if isinstance(layer, Add | Norm | Linear) and key in measured:
            run = layer_case(action.kernel, action.dtype, layer, extent).make(device)
            alone = median(timed(device, run, [run] * rounds))
            added.append(measured.pop(key) - alone)
    return max(0, round(median(added))) if added else 0
