"""The processes that evaluate candidates, and which does what.

A process remembers what it has folded and composed (evaluate.py), so a candidate goes where its layout, or it itself,
was evaluated before, unless it is done sooner elsewhere. What comes out does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

from rtp_sim.metrics import StepMetrics
from rtp_sim.planner.evaluate import WHOLE, about_ops, evaluate
from rtp_sim.planner.plan import Bounds
from rtp_sim.planner.searched import Found, Searched, slowest

Places = Sequence[tuple[int, int]]
Run = Callable[[Places, bool], list[Found]]
"""Evaluates candidates by (site, place): estimates, or with True simulations."""

PASS_S, COMPOSED_S, FOLD_S = 60e-6, 0.2, 0.15
"""What simulating a pass, composing a step and folding a layout take."""

_SHARED: Searched | None = None
"""What forked workers inherit: networks, clusters and all prices worked out so far."""


@contextmanager
def evaluating(searched: Searched) -> Iterator[Run]:
    """A function that evaluates candidates, on as many processes as the question allows."""
    global _SHARED
    _SHARED = searched
    count = searched.question.processes
    if count < 2:
        yield lambda places, whole: [_evaluated(*place, whole) for place in places]
        return
    homes: dict[object, int] = {}
    with ExitStack() as stack:
        fork = get_context("fork")
        processes = [stack.enter_context(ProcessPoolExecutor(1, mp_context=fork)) for _ in range(count)]

        def run(places: Places, whole: bool) -> list[Found]:
            work = [_work(searched, *place, whole) for place in places]
            chosen = share_out(work, homes, count)
            futures = [
                processes[k].submit(_evaluated, *place, whole) for k, place in zip(chosen, places, strict=True)
            ]
            return [future.result() for future in futures]

        yield run


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work: what it is known as, about how long it takes, and how much longer in a process that knows none
    of these names."""

    names: tuple[object, ...]
    takes_s: float
    unknown_s: float


def share_out(work: Sequence[Work], homes: dict[object, int], count: int) -> list[int]:
    """Which of `count` processes does each of these pieces of work, the longest first: the one that would be done with
    it first. `homes` is which process knows what, and learns."""
    load, chosen = [0.0] * count, [0] * len(work)
    for i in sorted(range(len(work)), key=lambda i: -work[i].takes_s):
        one = work[i]
        home = next((homes[name] for name in one.names if name in homes), None)
        ends_s = [load[k] + one.takes_s + (one.unknown_s if k != home else 0.0) for k in range(count)]
        chosen[i] = ends_s.index(min(ends_s))
        load[chosen[i]] = min(ends_s)
        homes |= dict.fromkeys(one.names, chosen[i])
    return chosen


def _work(searched: Searched, site: int, place: int, whole: bool) -> Work:
    """A candidate: by itself once it has been estimated, and by what it has in common with others: how ranks fold, and
    the programs of stages. Times are those of Llama-2 70B on 1,024 GPUs, roughly."""
    one = searched.sites[site].space.candidate(place)
    if whole:
        return Work(((site, place),), one.pp * one.vpp * one.micro_batches * PASS_S, COMPOSED_S)
    degrees = one.axis, one.inner, one.dp, one.pp
    programs = site, degrees, one.strategy, one.vpp, one.micro_batch
    return Work(((site, place), (site, degrees, one.order), programs), COMPOSED_S, FOLD_S)


def _evaluated(number: int, place: int, whole: bool) -> Found:
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
