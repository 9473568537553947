"""`evaluate`: the metrics of a candidate, estimated or simulated.

A step of at most `SMALL_OPS` ops is simulated at once. Of longer ones the finalists are: op by op, but of a pipeline
that is not `short` each pass of a micro-batch through a stage in a few (compose/passes.py), the ranks of a stage taken
to behave alike (`alike` in engine/fold.py). How far that is from simulating every op: tests/test_compose_passes.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rtp_sim.compose.composition import composition
from rtp_sim.compose.estimate import by_passes, composed, estimate
from rtp_sim.compose.pipeline import walked
from rtp_sim.experiment import Setting, built, run, settle
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import StepMetrics
from rtp_sim.model.network import Network
from rtp_sim.planner.bounds import Composed, Model, way_of
from rtp_sim.planner.plan import Candidate
from rtp_sim.planner.workload import Workload
from rtp_sim.schedule.pipeline_order import PIPELINES

SMALL_OPS = 3_000
EXACT_OPS = 20_000
EXACT_GPUS = 1_024
MOST_OPS = 250_000

MOST_KEPT = 40
"""Composed steps that are kept for their simulations: some MB each."""

COMMUNICATION = 1.4
"""Ops per kernel: about as many as strategies with a collective around every second layer have."""

WHOLE = "simulated"
"""What a step rests on that was simulated op by op."""


def about_ops(candidate: Candidate, model: Model) -> int:
    """About how many ops all stages of the step have: kernels counted, communication guessed."""
    issue_ns = float(model.cost.cluster.device.host_issue_ns.value)
    way = way_of(candidate.strategy, candidate.sequence_parallel, candidate.ring)
    table = model.times.blocks(way, candidate.inner if candidate.axis in ("tp", "rtp") else 1, candidate.micro_batch,
                               candidate.recompute)  # fmt: skip
    issued = sum(x.forward_issue_ns + x.backward_issue_ns for x in table)
    kernels = issued / issue_ns if issue_ns else 40.0 * len(table)
    return round(kernels * COMMUNICATION * candidate.micro_batches)


def short(candidate: Candidate, model: Model) -> bool:
    """Whether a pipeline is simulated op by op: with up to `EXACT_OPS` ops; on more than `EXACT_GPUS` GPUs with fewer
    in proportion, as the more there are the more do not behave alike."""
    return about_ops(candidate, model) * max(1.0, candidate.gpus / EXACT_GPUS) <= EXACT_OPS


def evaluate(
    workload: Workload, candidate: Candidate, cluster: Cluster, network: Network, model: Model | None = None,
    simulated: bool = False,
) -> tuple[StepMetrics, str]:  # fmt: skip
    """The metrics of a candidate, and what they rest on: those of `rtp-sim simulate --engine estimate`, or of the
    events where the step is short or `simulated` is asked for and it is not too long."""
    if model is None:
        found = estimate(settle(candidate.request(workload), cluster, network))
        return found.metrics, found.how
    ops = about_ops(candidate, model)
    if candidate.strategy in PIPELINES and not (short(candidate, model) if simulated else ops <= SMALL_OPS):
        made, walk = _composed(workload, candidate, network, model)
        found = by_passes(made, walk, model.folds, alike=True) if simulated else composed(made, walk.stages)
        return found.metrics, found.how
    setting = _setting(workload, candidate, network, model)
    if ops <= (MOST_OPS if simulated else SMALL_OPS):
        return run(built(setting), folds=model.folds).metrics, WHOLE
    found = estimate(setting, folds=model.folds)
    return found.metrics, found.how


def _setting(workload: Workload, candidate: Candidate, network: Network, model: Model) -> Setting:
    """The candidate's experiment, with the same cost model for all, so that what is priced once stays priced."""
    return replace(settle(candidate.request(workload), model.cluster, network), cost=model.cost)


def _composed(workload: Workload, candidate: Candidate, network: Network, model: Model) -> Composed:
    """The candidate's pipeline in its stretches: made at its estimate, taken, and forgotten, at its simulation."""
    if candidate in model.composed:
        return model.composed.pop(candidate)
    setting = _setting(workload, candidate, network, model)
    made = composition(setting, folds=model.folds, alike=True, kinds=model.kinds)
    model.composed[candidate] = made, walked(made)
    _keep_few(model.composed)
    _keep_few(model.kinds)
    return model.composed[candidate]


def _keep_few(found: dict[Any, Any]) -> None:
    """Forgets the oldest."""
    while len(found) > MOST_KEPT:
        del found[next(iter(found))]
