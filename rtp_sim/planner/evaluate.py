"""`evaluate`: the metrics of a candidate, estimated or simulated, on several processes.

A step of at most `SMALL_OPS` ops is simulated at once. Of longer ones the finalists are: op by op, but of a pipeline
with more than `EXACT_OPS` ops each pass of a micro-batch through a stage as one op (compose/passes.py), the ranks of a
stage taken to behave alike (`alike` in engine/fold.py). How far that is from simulating every op:
tests/test_compose_passes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context

from rtp_sim.compose.estimate import by_passes, estimate
from rtp_sim.experiment import built, run, settle
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import StepMetrics
from rtp_sim.model.network import Network
from rtp_sim.planner.bounds import Model, way_of
from rtp_sim.planner.plan import Bounds, Candidate
from rtp_sim.planner.searched import Found, Searched, slowest
from rtp_sim.planner.workload import Workload
from rtp_sim.schedule.pipeline_order import PIPELINES

SMALL_OPS = 3_000
EXACT_OPS = 20_000
MOST_OPS = 250_000

COMMUNICATION = 1.4
"""Ops per kernel: about as many as strategies with a collective around every second layer have."""

WHOLE = "simulated"
"""What a step rests on that was simulated op by op."""

Places = Sequence[tuple[int, int]]
Run = Callable[[Places, bool], list[Found]]
"""Evaluates candidates by (site, place): estimates, or with True simulations."""


def about_ops(candidate: Candidate, model: Model) -> int:
    """About how many ops all stages of the step have: kernels counted, communication guessed."""
    issue_ns = float(model.cost.cluster.device.host_issue_ns.value)
    way = way_of(candidate.strategy, candidate.sequence_parallel, candidate.ring)
    table = model.times.blocks(way, candidate.inner if candidate.axis in ("tp", "rtp") else 1, candidate.micro_batch,
                               candidate.recompute)  # fmt: skip
    issued = sum(x.forward_issue_ns + x.backward_issue_ns for x in table)
    kernels = issued / issue_ns if issue_ns else 40.0 * len(table)
    return round(kernels * COMMUNICATION * candidate.micro_batches)


# ---- estimates on several processes

_SHARED: Searched | None = None
"""What forked workers inherit: networks, clusters and all prices worked out so far."""


@contextmanager
def estimating(searched: Searched) -> Iterator[Run]:
    """A function that estimates candidates, on as many processes as the question allows."""
    global _SHARED
    _SHARED = searched
    processes = searched.question.processes

    def alone(places: Places, whole: bool) -> list[Found]:
        return [_evaluated((*place, whole)) for place in places]

    if processes < 2:
        yield alone
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        yield lambda places, whole: (
            list(pool.map(_evaluated, [(*place, whole) for place in places])) if len(places) > 1
            else alone(places, whole)
        )  # fmt: skip


def _evaluated(at: tuple[int, int, bool]) -> Found:
    number, place, whole = at
    assert _SHARED is not None
    site, question = _SHARED.sites[number], _SHARED.question
    candidate = site.space.candidate(place)
    metrics, how = evaluate(question.workload, candidate, site.cluster, _SHARED.network, site.model, whole)
    if how != WHOLE:
        metrics, how = _at_least(metrics, how, site.bounds(place), site.machine.memory_bytes)
    return Found(
        number, place, metrics, how, metrics.peak_memory_bytes <= site.machine.allowed_bytes,
        metrics.step_time_s <= slowest(_SHARED), None, whole or how == WHOLE,
        about_ops(candidate, site.model),
    )  # fmt: skip


def _at_least(metrics: StepMetrics, how: str, bounds: Bounds, usable_bytes: int) -> tuple[StepMetrics, str]:
    """A straight line through short steps can miss a peak that only long ones have; the closed form does not."""
    if metrics.peak_memory_bytes >= bounds.memory_bytes:
        return metrics, how
    held = dict.fromkeys(metrics.memory_by_category, 0) | dict(bounds.memory_by_category)
    fits = bounds.memory_bytes <= usable_bytes
    changed = replace(metrics, peak_memory_bytes=bounds.memory_bytes, memory_by_category=held, fits=fits)
    return changed, f"{how}; memory in closed form"


def evaluate(
    workload: Workload, candidate: Candidate, cluster: Cluster, network: Network, model: Model | None = None,
    simulated: bool = False,
) -> tuple[StepMetrics, str]:  # fmt: skip
    """The metrics of a candidate, and what they rest on: those of `rtp-sim simulate --engine estimate`, or of the
    events where the step is short or `simulated` is asked for and it is not too long."""
    setting = settle(candidate.request(workload), cluster, network)
    if model is None:
        found = estimate(setting)
        return found.metrics, found.how
    # The same cost model for all candidates, so that what is priced once stays priced.
    setting = replace(setting, cost=model.cost)
    ops = about_ops(candidate, model)
    if simulated and ops > EXACT_OPS and setting.request.strategy in PIPELINES:
        found = by_passes(setting, model.folds, alike=True)
    elif ops <= (MOST_OPS if simulated else SMALL_OPS):
        return run(built(setting), folds=model.folds).metrics, WHOLE
    else:
        found = estimate(setting, folds=model.folds, alike=True)
    return found.metrics, found.how
