"""`evaluate`: the metrics of a candidate, estimated or simulated whole, on several processes.

A step of at most `SMALL_OPS` ops is simulated at once. Of longer ones the finalists are simulated whole up to
`MOST_OPS` ops. Beyond, a finalist is simulated with all its layers and stages, but fewer micro-batches, and its
estimate is corrected by how far such simulations are from their own estimates. Above `EXACT_OPS` the ranks of a
pipeline's stage are taken to behave alike (`alike` in engine/fold.py). How far both are from whole, exact simulations:
tests/test_planner_evaluate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context

from rtp_sim.compose.estimate import estimate, with_rates
from rtp_sim.engine.fold import Folds
from rtp_sim.experiment import Setting, built, run, settle
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
ROUNDS = (2, 3)
"""Micro-batches of shorter simulations, in multiples of the stages."""

COMMUNICATION = 1.4
"""Ops per kernel: about as many as strategies with a collective around every second layer have."""

TIMES = ("step_time_s", "compute_time_s", "exposed_communication_s")

WHOLE, ALIKE = "simulated", "simulated, ranks of a stage taken alike"
"""What steps rest on that were simulated whole."""

Places = Sequence[tuple[int, int]]
Run = Callable[[Places, bool], list[Found]]
"""Evaluates candidates by (site, place): estimates, or with True whole simulations."""



def about_ops(candidate: Candidate, model: Model) -> int:
    """About how many ops all stages of the step have: kernels counted, communication guessed."""
    issue_ns = float(model.cost.cluster.device.host_issue_ns.value)
    way = way_of(candidate.strategy, candidate.sequence_parallel, candidate.ring)
    table = model.times.blocks(way, candidate.inner if candidate.axis in ("tp", "rtp") else 1, candidate.micro_batch,
                               candidate.recompute)  # fmt: skip
    issued = sum(x.forward_issue_ns + x.backward_issue_ns for x in table)
    kernels = issued / issue_ns if issue_ns else 40.0 * len(table)
    return round(kernels * COMMUNICATION * candidate.micro_batches)


def corrected_step(setting: Setting, ops: int, folds: Folds | None = None) -> tuple[StepMetrics, str]:
    """The estimate of a step of about so many ops, corrected by two simulations with few micro-batches: by how much
    they are off their own estimates, on a straight line. The estimate alone where even these are too long."""
    found = estimate(setting, folds=folds, alike=True)
    every = setting.training.num_microbatches
    few, more = (min(rounds * setting.layout.pp, every) for rounds in ROUNDS)
    if few == more or ops * more > MOST_OPS * every:
        return found.metrics, f"{found.how}; about {ops:,} ops, too many to simulate"
    (few_off, _), (more_off, simulated) = (_off(setting, m, ops * m // every, folds) for m in (few, more))
    off = {name: more_off[name] + (more_off[name] - few_off[name]) * (every - more) / (more - few) for name in TIMES}
    step_s = found.metrics.step_time_s + off["step_time_s"]
    compute_s = min(step_s, found.metrics.compute_time_s + off["compute_time_s"])
    exposed_s = max(0.0, found.metrics.exposed_communication_s + off["exposed_communication_s"])
    exposed_s = min(step_s - compute_s, exposed_s)
    metrics = with_rates(setting, replace(
        found.metrics, step_time_s=step_s, compute_time_s=compute_s, exposed_communication_s=exposed_s,
        bubble_s=step_s - compute_s - exposed_s,
    ))  # fmt: skip
    if metrics.peak_memory_bytes < simulated.peak_memory_bytes:
        metrics = replace(metrics, peak_memory_bytes=simulated.peak_memory_bytes,
                          memory_by_category=simulated.memory_by_category)  # fmt: skip
    return metrics, f"{found.how}, corrected by simulations of {few} and {more} of {every} micro-batches"


def _off(setting: Setting, micros: int, ops: int, folds: Folds | None) -> tuple[dict[str, float], StepMetrics]:
    """How far the simulation of so many micro-batches is from their estimate, and the simulation."""
    short = replace(setting, training=replace(setting.training, num_microbatches=micros))
    simulated, _ = whole_step(short, ops, folds)
    guessed = estimate(short, folds=folds, alike=True).metrics
    return {name: getattr(simulated, name) - getattr(guessed, name) for name in TIMES}, simulated


def whole_step(setting: Setting, ops: int, folds: Folds | None = None) -> tuple[StepMetrics, str]:
    """The metrics of a step of about so many ops, and what they rest on. InputError as build_schedule."""
    alike = ops > EXACT_OPS and setting.request.strategy in PIPELINES
    found = run(built(setting), folds=folds, alike=alike).metrics
    return found, ALIKE if alike else WHOLE


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
    simulated = how in (WHOLE, ALIKE)
    if not simulated:
        metrics, how = _at_least(metrics, how, site.bounds(place), site.machine.memory_bytes)
    return Found(
        number, place, metrics, how, metrics.peak_memory_bytes <= site.machine.allowed_bytes,
        metrics.step_time_s <= slowest(_SHARED), None, whole or simulated,
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
    whole: bool = False,
) -> tuple[StepMetrics, str]:  # fmt: skip
    """The metrics of a candidate, and what they rest on: those of `rtp-sim simulate --engine estimate`, or of the
    events where the step is short or, with `whole`, not too long."""
    setting = settle(candidate.request(workload), cluster, network)
    if model is None:
        found = estimate(setting)
        return found.metrics, found.how
    # The same cost model for all candidates, so that what is priced once stays priced.
    setting = replace(setting, cost=model.cost)
    ops = about_ops(candidate, model)
    if ops <= (MOST_OPS if whole else SMALL_OPS):
        return whole_step(setting, ops, model.folds)
    if whole:
        return corrected_step(setting, ops, model.folds)
    found = estimate(setting, folds=model.folds, alike=True)
    return found.metrics, found.how
