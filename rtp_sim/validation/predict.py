"""The prediction of a run: its schedule as a rank's host really issues it, on the costs that fit how it was run.

On a CPU the host computes itself: it issues nothing more until a kernel is done. The schedule says that of no op, since
the host of a GPU goes on. Transfers over an emulated link and the times of sleeping ranks cost what was stated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rtp_sim.cost.emulated import EmulatedCost
from rtp_sim.cost.model import ClusterCost
from rtp_sim.cost.slow import slow_apart
from rtp_sim.cost.stated import StatedCost
from rtp_sim.engine.costs import CostModel
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.hardware.spec import Cluster
from rtp_sim.link import Link
from rtp_sim.schedule.ir import Compute, Schedule
from rtp_sim.stated import StatedTimes
from rtp_sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Conditions:
    """How a run was made, as far as its times depend on it and no profile says it: on CPUs or GPUs, over an emulated
    link, by stated times. (A profile is calibrated with the transport that it is to predict.)"""

    device: str = "cuda"
    link: Link | None = None
    times: StatedTimes | None = None


def predict(schedule: Schedule, cluster: Cluster, conditions: Conditions, engine: str = "simpy") -> Timeline:
    """The predicted timeline of a run under these conditions, with the run's own schedule."""
    cost: CostModel = ClusterCost(cluster)
    issued = on_host(schedule) if conditions.device == "cpu" else schedule
    if conditions.times is not None:
        cost = StatedCost(conditions.times)
        issued = slow_apart(issued, conditions.times.slow)
    elif conditions.link is not None:
        cost = EmulatedCost(ClusterCost(cluster), conditions.link)
    return replace(_simulated(issued, cost, engine), schedule=schedule)


def on_host(schedule: Schedule) -> Schedule:
    """The schedule of a host that computes itself: every kernel blocks it."""
    programs = tuple(
        replace(
            program,
            ops=tuple(replace(op, blocks_host=True) if isinstance(op.action, Compute) else op for op in program.ops),
        )
        for program in schedule.programs
    )
    return replace(schedule, programs=programs)


def _simulated(schedule: Schedule, cost: CostModel, engine: str) -> Timeline:
    if engine == "longest-path":
        return longest_path(schedule, cost)
    # Imported here: the event engine needs SimPy, the other does not.
    from rtp_sim.engine.simulate import simulate

    return simulate(schedule, cost)
