"""A step in lockstep: the longest path with every group of an axis communicating at once, and with kernels beside
communication slowed down to first order.

Much cheaper than events, and close to them where all ranks do the same at the same time, as training steps do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from rtp_sim.compose.landmarks import Held, landmarks, repeated
from rtp_sim.compose.memory import StageMemory
from rtp_sim.cost.lockstep import LockstepCost
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.memory import MemoryProfile, memory_profiles
from rtp_sim.errors import InputError
from rtp_sim.experiment import Setting, built, cost_provenance, usable_memory_bytes
from rtp_sim.metrics import NS_PER_S, StepMetrics, critical_rank, peak_memory_rank, step_metrics
from rtp_sim.schedule.ir import Compute
from rtp_sim.timeline import Timeline

LARGEST = 3
"""Buffers that are named at the peak."""


class Lockstep(NamedTuple):
    """Metrics of the step; the part of its bubble in which the host had not yet issued the next kernel, in s; the peak
    of the rank that holds most; what it holds at landmarks (landmarks.py)."""

    metrics: StepMetrics
    host_s: float | None
    memory: StageMemory | None
    landmarks: Mapping[str, Held]


def in_lockstep(setting: Setting) -> Lockstep:
    """The step of a setting.

    The longest path slows nothing; each overlapped ns of compute takes (slowdown - 1) ns more. InputError where some
    GPUs are slow: in lockstep all are equal.
    """
    if setting.request.slow_gpus:
        raise InputError("slow GPUs: in lockstep all ranks are equal; expected the engine simpy or longest-path")
    cost = LockstepCost(setting.cluster, setting.groups, setting.cost.host)
    prepared = built(replace(setting, cost=cost))
    timeline = longest_path(prepared.schedule, cost)
    memory = memory_profiles(prepared.schedule, timeline.ranks)
    metrics = step_metrics(
        timeline, memory, usable_memory_bytes(setting.cluster),
        cost.peak_flops_per_s(setting.training.policy.compute_dtype), cost_provenance(prepared, timeline),
    )  # fmt: skip
    more_s = metrics.overlapped_communication_s * (setting.cluster.device.overlap_slowdown.value - 1)
    longer = replace(
        metrics, step_time_s=metrics.step_time_s + more_s, compute_time_s=metrics.compute_time_s + more_s
    )
    rank = peak_memory_rank(memory)
    host_s = _host_ns(timeline, critical_rank(timeline)) / NS_PER_S
    marks = landmarks(timeline.schedule.program(rank), timeline.times(rank), memory[rank], repeated(setting.network),
                      setting.training.num_microbatches)  # fmt: skip
    return Lockstep(longer, host_s, _at_peak(timeline, rank, memory[rank]), marks)


def _at_peak(timeline: Timeline, rank: int, profile: MemoryProfile) -> StageMemory:
    """The peak with the op that makes it: the first that starts then."""
    times, ops = timeline.times(rank), timeline.schedule.program(rank).ops
    name = next((op.name for op in ops if int(times.start_ns[op.index]) == profile.peak_time_ns), "")
    return StageMemory(dict(profile.by_category_at_peak), name, profile.alive_at_peak[:LARGEST])


def _host_ns(timeline: Timeline, rank: int) -> int:
    """Time in which the compute stream was idle although all that its next kernel depends on was done."""
    times, ops = timeline.times(rank), timeline.schedule.program(rank).ops
    end, waited, last_end = times.end_ns, 0, 0
    for op in ops:
        if isinstance(op.action, Compute):
            ready = max([last_end, *(int(end[d]) for d in op.after)])
            waited += max(0, int(times.start_ns[op.index]) - ready)
            last_end = int(end[op.index])
    return waited
