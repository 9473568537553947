"""The processes that evaluate candidates, and which does what.

A process remembers what it has folded and composed (evaluate.py), so a candidate goes where its layout, or it itself, was
evaluated before, as long as that leaves every process its share of a round. What comes out does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context

from rtp_sim.metrics import StepMetrics
from rtp_sim.planner.evaluate import WHOLE, about_ops, evaluate
from rtp_sim.planner.plan import Bounds
from rtp_sim.planner.searched import Found, Searched, slowest

Places = Sequence[tuple[int, int]]
Run = Callable[[Places, bool], list[Found]]
"""Evaluates candidates by (site, place): estimates, or with True simulations."""

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
            chosen = share_out([(place, *_layouts(searched, *place)) for place in places], homes, count)
            futures = [
                processes[k].submit(_evaluated, *place, whole) for k, place in zip(chosen, places, strict=True)
            ]
            return [future.result() for future in futures]

        yield run


def share_out(known_as: Sequence[tuple[object, ...]], homes: dict[object, int], count: int) -> list[int]:
    """Which of `count` processes does each of these pieces of work: the one that knows any of the names it is known as,
    the first name first, if that leaves the work evenly spread. `homes` is who knows what."""
    most, load, chosen = -(-len(known_as) // count), [0] * count, []
    for names in known_as:
        free = [k for k in range(count) if load[k] < most]
        home = next((homes[name] for name in names if homes.get(name) in free), None)
        home = min(free, key=load.__getitem__) if home is None else home
        load[home] += 1
        chosen.append(home)
        homes |= dict.fromkeys(names, home)
    return chosen


def _layouts(searched: Searched, site: int, place: int) -> tuple[object, object]:
    """What candidates that fold alike have in common, and those whose stages have the same programs."""
    one = searched.sites[site].space.candidate(place)
    degrees = one.axis, one.inner, one.dp, one.pp
    return (site, degrees, one.order), (site, degrees, one.strategy, one.vpp, one.micro_batch)


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
