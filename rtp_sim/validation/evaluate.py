"""The prediction of one experiment: its schedule on the longest-path engine, and what it means for time and memory.

Micro-batches are not all simulated. From the second on each adds the same time, so the schedule is evaluated with two
and with three of them, and time and peak memory of the rest follow on the line through both. (Memory hardly grows: what
a micro-batch leaves is gradients, which exist from the first on, but the inputs of all of them are there from the
start.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from rtp_sim.cost.lockstep import LockstepCost
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.memory import memory_profiles
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import TimeSplit, critical_rank, peak_memory_rank, time_split
from rtp_sim.schedule.build import build_schedule
from rtp_sim.schedule.ir import Compute, Schedule
from rtp_sim.schedule.layout import make_groups, make_layout
from rtp_sim.timeline import Timeline
from rtp_sim.validation.interpret import Experiment

EXACT = 3
"""Micro-batches that are simulated where a step has more."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the model thinks happens in a step. compute + exposed + bubble is the step; `host_s` is the part of the
    bubble in which the host had not yet issued the next kernel. Memory is the peak of the worst rank, by category."""

    step_s: float
    compute_s: float
    exposed_s: float
    overlapped_s: float
    bubble_s: float
    host_s: float
    peak_bytes: int
    memory_by_category: Mapping[str, int]
    capacity_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the peak is within what the device has for tensors."""
        return self.peak_bytes <= self.capacity_bytes


@lru_cache(maxsize=256)
def cluster_of(name: str, gpus: int) -> Cluster:
    """The cluster profile with this many devices."""
    return load_cluster(name, gpus=gpus)


def evaluate(experiment: Experiment, cluster: Cluster | None = None) -> Estimate:
    """The estimate of an experiment on its cluster, or on another of the same size. InputError if it cannot be
    built."""
    cluster = cluster or cluster_of(experiment.cluster, experiment.gpus)
    wanted = experiment.training.num_microbatches
    if wanted <= EXACT:
        return _whole(experiment, cluster, wanted)
    less, more = _whole(experiment, cluster, EXACT - 1), _whole(experiment, cluster, EXACT)
    rest = wanted - EXACT
    times = {
        name: getattr(more, name) + rest * (getattr(more, name) - getattr(less, name))
        for name in ("step_s", "compute_s", "exposed_s", "overlapped_s", "bubble_s", "host_s")
    }
    inputs = rest * (more.peak_bytes - less.peak_bytes)
    held = dict(more.memory_by_category)
    held["activations"] = held.get("activations", 0) + inputs
    return replace(more, **times, peak_bytes=more.peak_bytes + inputs, memory_by_category=held)


def _whole(experiment: Experiment, cluster: Cluster, microbatches: int) -> Estimate:
    schedule = _schedule(experiment, cluster, microbatches)
    cost = LockstepCost(cluster, schedule.groups, experiment.host)
    timeline = longest_path(schedule, cost)
    split, host_ns = _stretched(timeline, cluster.device.overlap_slowdown.value)
    memory = memory_profiles(schedule, timeline.ranks)
    peak = memory[peak_memory_rank(memory)]
    device = cluster.device
    return Estimate(
        split.step_ns / 1e9, split.compute_ns / 1e9, split.exposed_ns / 1e9, split.overlapped_ns / 1e9,
        split.bubble_ns / 1e9, host_ns / 1e9, peak.peak_bytes, dict(peak.by_category_at_peak),
        int(device.memory_bytes.value - device.runtime_reserved_bytes.value),
    )  # fmt: skip


def _schedule(experiment: Experiment, cluster: Cluster, microbatches: int) -> Schedule:
    """The experiment's schedule with this many micro-batches."""
    has_axis = experiment.strategy.startswith(("rtp", "tp"))
    layout = make_layout(experiment.strategy, cluster.world_size, experiment.inner if has_axis else None, None)
    groups = make_groups(layout, cluster.topology, experiment.options.rtp_ring)
    training = replace(experiment.training, num_microbatches=microbatches)
    return build_schedule(experiment.strategy, experiment.network(), training, layout, groups, experiment.options)


def _stretched(timeline: Timeline, slowdown: float) -> tuple[TimeSplit, int]:
    """The split of the step, with compute that runs beside communication slowed down, and the host's part of the
    bubble.

    The longest-path engine slows nothing; to first order each overlapped ns of compute takes (slowdown - 1) ns more.
    """
    rank = critical_rank(timeline)
    split, host_ns = time_split(timeline, rank), _host_ns(timeline, rank)
    more_ns = round(split.overlapped_ns * (slowdown - 1))
    longer = replace(split, step_ns=split.step_ns + more_ns, compute_ns=split.compute_ns + more_ns)
    return longer, host_ns


def _host_ns(timeline: Timeline, rank: int) -> int:
    """Time in which the compute stream was idle although all that its next kernel depends on was done: the host had
    not issued it yet."""
    times, ops = timeline.times(rank), timeline.schedule.program(rank).ops
    end, waited, last_end = times.end_ns, 0, 0
    for op in ops:
        if isinstance(op.action, Compute):
            ready = max([last_end, *(int(end[d]) for d in op.after)])
            waited += max(0, int(times.start_ns[op.index]) - ready)
            last_end = int(end[op.index])
    return int(np.int64(waited))
