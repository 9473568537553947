"""The search: from every candidate of the machines to the few that are shown.

    constraints   what the user wants, on columns
    rules         what strategies refuse, on columns
    memory        the least memory in closed form, on columns
    bounds        lower bounds of the objective, on columns; candidates wait in their order
    estimate      the best of them one after another, until no bound is left below the last plan to be shown

A candidate that is never estimated has a lower bound above the last plan shown, so none of them could be shown: the
plans are those of an exhaustive search. Estimates run on several processes, always in rounds of the same size, so
that the outcome does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from time import perf_counter

import numpy as np
import numpy.typing as npt

from rtp_sim.compose.estimate import estimate
from rtp_sim.errors import InputError
from rtp_sim.experiment import settle
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import StepMetrics
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.planner.bounds import Floats, Model, time_bounds
from rtp_sim.planner.constraints import Limit, check_limits, hold_all
from rtp_sim.planner.memory_bounds import by_category, memory_bounds
from rtp_sim.planner.money import kilowatts, machine_of, require_price, usd_per_second
from rtp_sim.planner.plan import Bounds, Candidate, Machine
from rtp_sim.planner.rules import Broken, broken_rules
from rtp_sim.planner.space import DEFAULT_STRATEGIES, Ints, Space, make_space
from rtp_sim.planner.workload import Workload

OBJECTIVES = ("time", "memory", "gpus", "cost", "energy")
ROUND = 4
"""Candidates that are estimated together before the search looks whether it is done."""

SLACK = 0.003
"""Estimates are composed or continued in straight lines, and can come out this much below what the whole step would
take; the search goes on until the bounds are so far above the last plan."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What to plan: a workload, the machines it may run on (cluster with its nodes and GPUs), the wish. `prices` are
    USD per GPU and hour by cluster ("" for all)."""

    workload: Workload
    clusters: tuple[Cluster, ...]
    objective: str = "time"
    top: int = 10
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    limits: tuple[Limit, ...] = ()
    headroom: float = 0.0
    min_tokens_per_s: float | None = None
    prices: tuple[tuple[str, float], ...] = ()
    front: bool = True
    processes: int = 2


@dataclass(frozen=True)
class Site:
    """One machine of the search with its candidates. `dropped` says which stage dropped each ("" for none)."""

    machine: Machine
    cluster: Cluster
    model: Model
    space: Space
    allowed: npt.NDArray[np.bool_]
    broken: list[Broken]
    sound: Ints
    memory: Ints
    fits: npt.NDArray[np.bool_]
    lower_s: Floats
    upper_s: Floats

    def bounds(self, place: int) -> Bounds:
        """The bounds of the candidate at a place of `sound`."""
        column = self.memory[:, place]
        return Bounds(float(self.lower_s[place]), float(self.upper_s[place]), int(column.sum()), by_category(column))


@dataclass(frozen=True, slots=True)
class Found:
    """An estimated candidate: where it is (site, place among the sound), its metrics, whether it may be shown."""

    site: int
    place: int
    metrics: StepMetrics
    how: str
    fits: bool
    fast_enough: bool

    @property
    def good(self) -> bool:
        """Whether it may be shown."""
        return self.fits and self.fast_enough


@dataclass
class Searched:
    """What a search leaves behind, before it is put into words: `waiting` are candidates by (site, place) that were
    never estimated, best bound first; `best` the good ones by objective."""

    question: Question
    network: Network
    sites: list[Site]
    found: list[Found] = field(default_factory=list)
    best: list[Found] = field(default_factory=list)
    waiting: list[tuple[int, int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    violated: int = 0


def search(question: Question, say: Say = lambda _: None) -> Searched:
    """Looks for the best candidates. InputError for a question that contradicts itself."""
    network = question.workload.network()
    began = perf_counter()
    spaces = [
        make_space(network, c.name, c.nodes, c.world_size, c.gpus_per_node, question.workload.global_batch,
                   question.strategies)
        for c in question.clusters
    ]  # fmt: skip
    check_limits(question.limits, spaces)
    searched = Searched(question, network, [])
    for cluster, space in zip(question.clusters, spaces, strict=True):
        searched.sites.append(_site(question, network, cluster, space, searched.seconds))
    say(f"{sum(map(len, spaces))} candidates, {sum(int(s.fits.sum()) for s in searched.sites)} within memory by their "
        f"bounds ({perf_counter() - began:.1f} s)")  # fmt: skip
    began = perf_counter()
    queue = _queue(searched)
    with estimating(searched) as run:
        _best_first(searched, queue, run)
        searched.seconds["estimate"] = perf_counter() - began
        say(f"{len(searched.found)} estimated ({searched.seconds['estimate']:.1f} s)")
        if question.front and searched.best:
            from rtp_sim.planner.pareto import complete_front

            complete_front(searched, run)
    return searched


def _site(question: Question, network: Network, cluster: Cluster, space: Space, seconds: dict[str, float]) -> Site:
    machine = machine_of(cluster, question.headroom, dict(question.prices))
    if question.objective == "cost":
        require_price(machine)
    clock = [perf_counter()]

    def spent(stage: str) -> None:
        clock.append(perf_counter())
        seconds[stage] = seconds.get(stage, 0.0) + clock[-1] - clock[-2]

    allowed = hold_all(question.limits, space)
    part = space.take(allowed)
    broken = broken_rules(part, network)
    wrong = np.logical_or.reduce([b.who for b in broken]) if broken else np.zeros(len(part), dtype=bool)
    sound = part.take(~wrong)
    spent("rules")
    training = TrainingSpec(1, network.seq, precision=question.workload.precision,
                            optimizer=question.workload.optimizer)  # fmt: skip
    model = Model(network, cluster, training)
    memory = memory_bounds(sound, model)
    fits = memory.sum(axis=0) <= machine.allowed_bytes
    spent("memory")
    lower, upper = np.full(len(sound), np.inf), np.full(len(sound), np.inf)
    lower[fits], upper[fits] = time_bounds(sound.take(fits), model)
    spent("bounds")
    return Site(machine, cluster, model, sound, allowed, broken, np.flatnonzero(~wrong), memory, fits, lower, upper)


def score(objective: str, machine: Machine, step_s: Floats, memory: Floats) -> tuple[Floats, Floats]:
    """What is to be small, and what decides between equals."""
    if objective == "memory":
        return memory, step_s
    if objective == "gpus":
        return np.full_like(step_s, machine.gpus), step_s
    if objective == "cost":
        return step_s * (usd_per_second(machine) or 0.0), step_s
    if objective == "energy":
        power = kilowatts(machine)
        if power is None:
            raise InputError(f"{machine.cluster}: its device profile states no tdp_w; expected it for --objective "
                             f"energy")  # fmt: skip
        return step_s * power, step_s
    return step_s, memory


@dataclass(frozen=True)
class Queue:
    """Candidates that fit by their bounds, best bound first: site, place, and the bound of the objective."""

    site: Ints
    place: Ints
    first: Floats
    second: Floats


def _queue(searched: Searched) -> Queue:
    columns: list[list[npt.NDArray[np.float64]]] = [[], [], [], []]
    slowest_s = slowest(searched)
    for number, one in enumerate(searched.sites):
        places = np.flatnonzero(one.fits & (one.lower_s <= slowest_s))
        first, second = score(searched.question.objective, one.machine, one.lower_s[places],
                              one.memory[:, places].sum(axis=0).astype(np.float64))  # fmt: skip
        for column, values in zip(columns, (np.full(len(places), number), places, first, second), strict=True):
            column.append(np.asarray(values, dtype=np.float64))
    site, place, first, second = (np.concatenate(column) for column in columns)
    order = np.lexsort((place, site, second, first))
    return Queue(site[order].astype(np.int64), place[order].astype(np.int64), first[order], second[order])


def slowest(searched: Searched) -> float:
    """The longest step that still makes the least tokens per second."""
    wanted = searched.question.min_tokens_per_s
    tokens = searched.question.workload.global_batch * searched.network.seq
    return np.inf if wanted is None else tokens / wanted


Run = Callable[[Sequence[tuple[int, int]]], list[Found]]


def _best_first(searched: Searched, queue: Queue, run: Run) -> None:
    """Estimates candidates in the order of their bounds until none that is left could be shown."""
    at, top = 0, searched.question.top
    while at < len(queue.site):
        if len(searched.best) >= top:
            last = score_of(searched, searched.best[top - 1])
            if _out_of_reach(searched.question.objective, queue.first[at], queue.second[at], last):
                break
        round_of = [(int(queue.site[i]), int(queue.place[i])) for i in range(at, min(at + ROUND, len(queue.site)))]
        add(searched, run(round_of))
        at += len(round_of)
    searched.waiting = [(int(s), int(p)) for s, p in zip(queue.site[at:], queue.place[at:], strict=True)]


def _out_of_reach(objective: str, first: float, second: float, last: tuple[float, float]) -> bool:
    """Whether a candidate with this bound, and so all after it, cannot come before the last plan."""
    if objective in ("gpus", "memory"):
        # Not times: these are known exactly.
        return (first, second * (1 - SLACK)) > last
    return first * (1 - SLACK) > last[0]


def add(searched: Searched, found: Sequence[Found]) -> None:
    """Takes up estimated candidates; counts those that are below their bounds."""
    for one in found:
        site = searched.sites[one.site]
        searched.violated += bool(one.metrics.step_time_s < site.lower_s[one.place] * (1 - SLACK))
    searched.found += found
    searched.best = sorted(
        (one for one in searched.found if one.good), key=lambda one: (*score_of(searched, one), one.site, one.place)
    )


def score_of(searched: Searched, one: Found) -> tuple[float, float]:
    """The objective of an estimated candidate."""
    metrics = one.metrics
    first, second = score(
        searched.question.objective, searched.sites[one.site].machine, np.array([metrics.step_time_s]),
        np.array([float(metrics.peak_memory_bytes)]),
    )  # fmt: skip
    return float(first[0]), float(second[0])


# ---- estimates on several processes

_SHARED: Searched | None = None
"""What forked workers inherit: networks, clusters and all prices worked out so far."""


@contextmanager
def estimating(searched: Searched) -> Iterator[Run]:
    """A function that estimates candidates, on as many processes as the question allows."""
    global _SHARED
    _SHARED = searched
    processes = searched.question.processes

    def alone(places: Sequence[tuple[int, int]]) -> list[Found]:
        return [_estimated(*place) for place in places]

    if processes < 2:
        yield alone
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        yield lambda places: list(pool.map(_estimated_at, places)) if len(places) > 1 else alone(places)


def _estimated_at(place: tuple[int, int]) -> Found:
    return _estimated(*place)


def _estimated(number: int, place: int) -> Found:
    assert _SHARED is not None
    site, question = _SHARED.sites[number], _SHARED.question
    candidate = site.space.candidate(place)
    metrics, how = evaluate(question.workload, candidate, site.cluster, _SHARED.network, site.model)
    metrics, how = _at_least(metrics, how, site.bounds(place), site.machine.memory_bytes)
    return Found(
        number, place, metrics, how, metrics.peak_memory_bytes <= site.machine.allowed_bytes,
        metrics.step_time_s <= slowest(_SHARED),
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
    workload: Workload, candidate: Candidate, cluster: Cluster, network: Network, model: Model | None = None
) -> tuple[StepMetrics, str]:
    """The metrics of a candidate as `rtp-sim simulate --engine estimate` gives them, and what they rest on."""
    setting = settle(candidate.request(workload), cluster, network)
    if model is not None:
        # The same cost model for all candidates, so that what is priced once stays priced.
        setting = replace(setting, cost=model.cost)
    found = estimate(setting, folds=None if model is None else model.folds)
    return found.metrics, found.how
