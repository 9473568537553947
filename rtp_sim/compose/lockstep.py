"""A step in lockstep: the longest path with every group of an axis communicating at once, and with kernels beside
communication slowed down to first order.

Much cheaper than events, and close to them where all ranks do the same at the same time, as training steps do.
"""

from __future__ import annotations

from dataclasses import replace

from rtp_sim.cost.lockstep import LockstepCost
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.memory import memory_profiles
from rtp_sim.experiment import Setting, built, cost_provenance, usable_memory_bytes
from rtp_sim.metrics import NS_PER_S, StepMetrics, critical_rank, step_metrics
from rtp_sim.schedule.ir import Compute
from rtp_sim.timeline import Timeline


def in_lockstep(setting: Setting) -> tuple[StepMetrics, float]:
    """Metrics of the step, and the part of its bubble in which the host had not yet issued the next kernel, in s.

    The longest path slows nothing; each overlapped ns of compute takes (slowdown - 1) ns more.
    """
    cost = LockstepCost(setting.cluster, setting.groups, setting.cost.host)
    prepared = built(replace(setting, cost=cost))
    timeline = longest_path(prepared.schedule, cost)
    metrics = step_metrics(
        timeline, memory_profiles(prepared.schedule, timeline.ranks), usable_memory_bytes(setting.cluster),
        cost.peak_flops_per_s(setting.training.policy.compute_dtype), cost_provenance(prepared, timeline),
    )  # fmt: skip
    more_s = metrics.overlapped_communication_s * (setting.cluster.device.overlap_slowdown.value - 1)
    longer = replace(
        metrics, step_time_s=metrics.step_time_s + more_s, compute_time_s=metrics.compute_time_s + more_s
    )
    return longer, _host_ns(timeline, critical_rank(timeline)) / NS_PER_S


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
