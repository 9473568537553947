"""How well a profile gives back what was measured: every sample priced by the cost model, and the errors by class.

Ring shifts are simulated, because their flows share links and cores; collectives are priced alone on the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rtp_sim.cost.communication import CommunicationCost
from rtp_sim.cost.cores import cores_of
from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.simulate import simulate
from rtp_sim.executor.calibrate.samples import (
    FLOOR_NUMEL,
    SHIFT,
    KernelSample,
    Measurements,
    TransferSample,
    median,
    quantile,
    typical,
)
from rtp_sim.hardware.spec import Cluster
from rtp_sim.model.kernels import KERNELS
from rtp_sim.schedule.ir import Group, Hop, Op, Program, Schedule, Shift

FLOOR, MESSAGES, COLLECTIVES, MEMORY = "floor", "messages", "collectives", "memory-bound kernels"


@dataclass(frozen=True, slots=True)
class Residual:
    """Relative errors |predicted / measured - 1| of a class of samples: how many, their median and 90 % quantile."""

    count: int
    median: float
    p90: float

    def __str__(self) -> str:
        sizes = "1 size" if self.count == 1 else f"{self.count} sizes"
        return f"{sizes}, residual median {self.median:.1%}, 90 % below {self.p90:.1%}"


def predicted_ns(cluster: Cluster, sample: KernelSample | TransferSample) -> float:
    """What the cost model says this sample takes on `cluster`."""
    if isinstance(sample, KernelSample):
        return ClusterCost(cluster).compute(sample.kernel, sample.dtype, sample.dims).duration_ns
    ranks = tuple(range(sample.ranks))
    if sample.kind == SHIFT:
        return _shift_ns(cluster, ranks, sample.size_bytes)
    cost = CommunicationCost(cluster, cores_of(cluster))
    return cost.alone_ns(cost.collective(sample.kind, ranks, sample.size_bytes, "fp32"))


def _shift_ns(cluster: Cluster, ranks: tuple[int, ...], size_bytes: int) -> int:
    op = Op(0, "shift", "shift", Shift("ring", (Hop((1,), size_bytes),)))
    groups = {"ring": Group("ring", (len(ranks),), (ranks,))}
    schedule = Schedule("shift", len(ranks), groups, (Program("all", {}, (op,)),), (0,) * len(ranks))
    timeline = simulate(schedule, ClusterCost(cluster))
    return max(int(times.end_ns[0] - times.start_ns[0]) for times in timeline.ranks.values())


def class_of(sample: KernelSample | TransferSample) -> str:
    """The class of samples whose residuals are stated together: one per parameter that they fix."""
    if isinstance(sample, TransferSample):
        return MESSAGES if sample.kind == SHIFT else COLLECTIVES
    kind = KERNELS[sample.kernel].kind
    if kind == "memory":
        return FLOOR if dict(sample.dims).get("numel") == FLOOR_NUMEL else MEMORY
    return f"{'products' if kind == 'matmul' else 'attention'} {sample.dtype}"


def residuals(cluster: Cluster, measured: Measurements) -> dict[str, Residual]:
    """By class, how far the predictions for `cluster` are from what was measured."""
    errors: dict[str, list[float]] = {}
    lines = cluster.device.kernels
    # Of a kernel with a line of its own the steps count: alone it is called without what the machine adds.
    alone = [s for s in measured.kernels if (s.kernel, s.dtype) not in lines]
    samples: Sequence[KernelSample | TransferSample] = (*alone, *measured.transfers, *measured.steps)
    for sample in samples:
        error = abs(predicted_ns(cluster, sample) / typical(sample.times_ns) - 1)
        inside = isinstance(sample, KernelSample) and (sample.kernel, sample.dtype) in lines
        errors.setdefault(f"{class_of(sample)} in steps" if inside else class_of(sample), []).append(error)
    return {name: Residual(len(e), median(e), quantile(e, 0.9)) for name, e in errors.items()}
