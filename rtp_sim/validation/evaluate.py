"""The prediction of one experiment: its step by the composed estimator, and what that means for time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from rtp_sim.compose.estimate import estimate
from rtp_sim.compose.memory import StageMemory
from rtp_sim.cost.model import ClusterCost
from rtp_sim.cost.piped import piped_groups
from rtp_sim.experiment import Request, Setting, usable_memory_bytes
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.schedule.layout import make_groups, make_layout
from rtp_sim.schedule.pipeline_order import PIPELINES
from rtp_sim.validation.interpret import Experiment


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the model thinks happens in a step. compute + exposed + bubble is the step; `host_s` is how long
    kernels waited for nothing but the host to issue them. Memory is what tensors hold at the peak of each stage (one
    without a pipeline)."""

    step_s: float
    compute_s: float
    exposed_s: float
    overlapped_s: float
    bubble_s: float
    host_s: float
    stages: tuple[StageMemory, ...]
    capacity_bytes: int

    @property
    def fullest(self) -> StageMemory:
        """The stage that holds most."""
        return max(self.stages, key=lambda stage: stage.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that tensors of a rank hold."""
        return self.fullest.total_bytes

    @property
    def memory_by_category(self) -> Mapping[str, int]:
        """The same by category."""
        return self.fullest.held


@lru_cache(maxsize=256)
def cluster_of(name: str, gpus: int) -> Cluster:
    """The cluster profile with this many devices."""
    return load_cluster(name, gpus=gpus)


def evaluate(experiment: Experiment, cluster: Cluster | None = None) -> Estimate:
    """The estimate of an experiment on its cluster, or on another of the same size. InputError if it cannot be
    built."""
    found = estimate(setting_of(experiment, cluster), engine="lockstep")
    m = found.metrics
    return Estimate(
        m.step_time_s, m.compute_time_s, m.exposed_communication_s, m.overlapped_communication_s, m.bubble_s,
        found.host_s or 0.0, found.memory,
        usable_memory_bytes(cluster or cluster_of(experiment.cluster, experiment.gpus)),
    )  # fmt: skip


def setting_of(e: Experiment, cluster: Cluster | None = None) -> Setting:
    """The experiment with its cluster, layout and groups."""
    cluster = cluster or cluster_of(e.cluster, e.gpus)
    if e.rings:
        cluster = replace(cluster, communication=replace(cluster.communication, most_rings=e.rings))
    request = Request(e.model.name, e.cluster, e.strategy, options=e.options)
    piped = e.strategy in PIPELINES
    layout = make_layout(e.strategy, cluster.world_size, e.inner if e.inner or piped else None, None,
                         e.pp if piped else None)  # fmt: skip
    groups = make_groups(layout, cluster.topology, e.options.rtp_ring, e.options.zero1_size)
    cost = ClusterCost(cluster, host=e.host, piped=piped_groups(groups, cluster.topology))
    return Setting(request, e.network(), cluster, layout, e.training, groups, cost)
