"""Training steps of small models that the executor itself runs: what its kernels take where they will run.

In a step a kernel finds its operands in memory and not in the caches, the machine looks them up, cuts out shards and
puts the result into its place, and freed memory comes back. On a CPU all of it lies between the start and the end of an
op. So the times of CPU kernels are taken from steps: one rank's program, its computing done in order, the data of its
communication replaced by what the rank has itself. All ranks that have a core of their own do the same at once.

On CUDA the host does all that while the device computes: there only the time to issue an op is taken from the step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from rtp_sim.executor.alone import StandIn
from rtp_sim.executor.batches import random_batch
from rtp_sim.executor.calibrate.samples import KernelSample
from rtp_sim.executor.clocks import now_ns
from rtp_sim.executor.distributed import HostInterpreter
from rtp_sim.executor.groups import Groups
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.pace import PaceWatch, steady, usual_ns
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.progress import Progress
from rtp_sim.model.kernels import is_empty
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Collective, Compute, Dims, Op, Schedule

WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Probe:
    """A training step: a schedule and what it trains."""

    schedule: Schedule
    network: Network
    training: TrainingSpec


@dataclass(frozen=True, slots=True)
class ProbeTimes:
    """One step: `samples` of the kernels, the host's time for each communication op, the core's pace (pace.py)."""

    samples: tuple[KernelSample, ...]
    communication_ns: tuple[int, ...]
    pace_ns: int


def run_probe(probe: Probe, rank: int, steps: int, wait: Callable[[], None]) -> list[ProbeTimes]:
    """Times of `steps` steps of the rank's program on a CPU; `wait` before each, so that all ranks compute at once, and
    before each communication, where ranks meet in a run, too: what follows it they do at the same time, and kernels
    bound by memory take longer then."""
    machine = _machine(probe, rank, torch.device("cpu"))
    partners = StandIn(machine, copies=False)
    micros = int(probe.schedule.meta.get("num_microbatches") or probe.training.num_microbatches)
    found = []
    for step in range(WARM_UP + steps):
        machine.start_step(random_batch(probe.network, probe.training.micro_batch, micros, step=step))
        watch = PaceWatch()
        watch.begin()
        wait()
        times: dict[tuple[str, str, Dims], list[int]] = {}
        issue: list[int] = []
        for op in machine.program.ops:
            if not isinstance(op.action, Compute):
                wait()
                issue.append(communicate_alone(machine, op, partners))
                continue
            watch(op)
            start_ns = now_ns()
            machine.run(op)
            took_ns = now_ns() - start_ns
            dims = op.action.dims_at(probe.schedule.shard_index(rank, op.action.part))
            if not is_empty(dims):
                times.setdefault((op.action.kernel, op.action.dtype, dims), []).append(max(1, took_ns))
        samples = tuple(KernelSample(*key, tuple(ns)) for key, ns in times.items())
        found.append(ProbeTimes(samples, tuple(issue), watch.end()))
    return found[WARM_UP:]


def waits(probe: Probe, rank: int, steps: int) -> int:
    """How often `run_probe` waits."""
    meetings = sum(not isinstance(op.action, Compute) for op in probe.schedule.program(rank).ops)
    return (WARM_UP + steps) * (1 + meetings)


def communicate_alone(machine: Machine, op: Op, partners: StandIn) -> int:
    """Does a communication op with nobody else; returns the nanoseconds that the host spent on taking the data from the
    machine and putting it back."""
    start_ns = now_ns()
    if isinstance(op.action, Collective):
        parcel = machine.parcel(op)
        taken_ns = now_ns()
        partners.collective(op, parcel)
        moved_ns = now_ns()
        machine.finish(op, parcel)
    else:
        transfers = machine.transfers(op)
        taken_ns = now_ns()
        partners.exchange(op, transfers, 0)
        moved_ns = now_ns()
        machine.finish(op)
    return taken_ns - start_ns + now_ns() - moved_ns


def issue_times(probe: Probe, device: torch.device, steps: int) -> list[int]:
    """Host time per op of a step without communication, one entry per step: on a CPU the time between ops."""
    machine = _machine(probe, 0, device)
    ops = probe.schedule.program(0).ops
    found = []
    with tempfile.TemporaryDirectory() as folder:
        # Without communication no group is ever asked for.
        groups = Groups(cast("torch.distributed.ProcessGroup", None), {})
        interpreter = HostInterpreter(probe.schedule, 0, machine, groups, Progress(Path(folder) / "progress"))
        for step in range(WARM_UP + steps):
            machine.start_step(random_batch(probe.network, probe.training.micro_batch, 1, step=step))
            done = interpreter.run_step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            inside = 0 if device.type == "cuda" else int((done.ops[1] - done.ops[0]).sum())
            if step >= WARM_UP:
                found.append((done.end_ns - done.start_ns - inside) // len(ops))
    return found


def _machine(probe: Probe, rank: int, device: torch.device) -> Machine:
    return Machine(probe.schedule, rank, probe.network, probe.training, initial_parameters(probe.network), device)


def gathered(results: Sequence[ProbeTimes]) -> tuple[list[KernelSample], list[int]]:
    """The samples of several steps, one per kernel and size, and all communication times. Of steps during which the
    core was slower than usual those samples count that no other step has."""
    usual = usual_ns([result.pace_ns for result in results])
    times: dict[tuple[str, str, Dims], list[int]] = {}
    issue: list[int] = []
    for result in (r for r in results if steady(r.pace_ns, usual)):
        issue += result.communication_ns
        for sample in result.samples:
            times.setdefault((sample.kernel, sample.dtype, sample.dims), []).extend(sample.times_ns)
    known = set(times)
    for sample in (s for r in results if not steady(r.pace_ns, usual) for s in r.samples):
        key = (sample.kernel, sample.dtype, sample.dims)
        if key not in known:
            times.setdefault(key, []).extend(sample.times_ns)
    return [KernelSample(*key, tuple(ns)) for key, ns in times.items()], issue
