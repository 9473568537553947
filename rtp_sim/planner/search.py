"""The search: from every candidate of the machines to the few that are shown.

    constraints   what the user wants, on columns
    rules         what strategies refuse, on columns
    memory        the least memory in closed form, on columns
    bounds        lower bounds of the objective, on columns; candidates wait in their order
    estimate      the best of them one after another, until no bound is left below the last plan to be shown
    simulate      the best of these by the events (evaluate.py), until the plans to be shown are all simulated
                  and no estimate is left below the last of them

Candidates of one kind (searched.py, KIND) have the same partition counts; the best of a kind is shown for all of them,
and a candidate whose bound is above the best of its kind is not looked at. A candidate that is never estimated has a
lower bound above the last plan shown, or above one of its kind that is better: the plans are those of an exhaustive
search. Work is done on several processes, always in rounds of the same size, so that the outcome does not depend on how
many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import numpy.typing as npt

from rtp_sim.hardware.spec import Cluster
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.planner.bounds import Floats, Model, time_bounds
from rtp_sim.planner.constraints import check_limits, hold_all
from rtp_sim.planner.memory_bounds import memory_bounds
from rtp_sim.planner.money import machine_of, require_price
from rtp_sim.planner.rules import broken_rules
from rtp_sim.planner.searched import Found, Question, Searched, Site, score, score_of, slowest
from rtp_sim.planner.space import Ints, Space, make_space
from rtp_sim.planner.workers import Places, Run, evaluating

ROUND = 4
"""Candidates that are evaluated together before the search looks whether it is done."""

Say = Callable[[str], None]


def search(question: Question, say: Say = lambda _: None) -> Searched:
    """Looks for the best candidates. InputError for a question that contradicts itself."""
    network = question.network or question.workload.network()
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
    queue = _queue(searched)
    with evaluating(searched) as run:
        run = _timed(run, searched.seconds)
        _best_first(searched, queue, run)
        say(f"{len(searched.found)} estimated ({searched.seconds['estimate']:.1f} s), {searched.simulated} simulated "
            f"({searched.seconds['simulate']:.1f} s)")  # fmt: skip
        if question.front and searched.best:
            from rtp_sim.planner.pareto import complete_front

            complete_front(searched, run)
    return searched


def _timed(run: Run, seconds: dict[str, float]) -> Run:
    """The same, with its time added up by what was done."""
    seconds |= {"estimate": 0.0, "simulate": 0.0}

    def timed(places: Places, whole: bool) -> list[Found]:
        began = perf_counter()
        found = run(places, whole)
        seconds["simulate" if whole else "estimate"] += perf_counter() - began
        return found

    return timed


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


def _best_first(searched: Searched, queue: Queue, run: Run) -> None:
    """Estimates candidates in the order of their bounds, and simulates the best, until none that is left could be
    shown."""
    pending = list(range(len(queue.site)))
    while True:
        chosen = _next_round(searched, queue, pending)
        if chosen:
            add(searched, run([(int(queue.site[i]), int(queue.place[i])) for i in chosen], False))
            pending = [i for i in pending if i not in chosen]
            continue
        if not simulate_some(searched, _finalists(searched), run):
            break
    searched.waiting = [(int(queue.site[i]), int(queue.place[i])) for i in pending]


def _next_round(searched: Searched, queue: Queue, pending: Sequence[int]) -> list[int]:
    """The next candidates that could be shown by their bounds, each of another kind."""
    top, chosen, kinds = searched.question.top, list[int](), set[object]()
    last = score_of(searched, searched.lines[top - 1]) if len(searched.lines) >= top else None
    best = {searched.kind(one.site, one.place): _to_beat(searched, one) for one in searched.lines}
    for i in pending:
        bound = float(queue.first[i]), float(queue.second[i])
        if len(chosen) == ROUND or (last is not None and bound > last):
            break
        kind = searched.kind(int(queue.site[i]), int(queue.place[i]))
        if kind not in kinds and (kind not in best or bound < best[kind]):
            chosen.append(i)
            kinds.add(kind)
    return chosen


def _to_beat(searched: Searched, one: Found) -> tuple[float, float]:
    """What the bound of another candidate of its kind must be below, to be estimated."""
    if one.estimated_s is None or one.short:
        return score_of(searched, one)
    return score_of(searched, replace(one, metrics=replace(one.metrics, step_time_s=one.estimated_s)))


def _finalists(searched: Searched) -> list[Found]:
    """What is to be simulated next: lines that are shown and still estimates; then what may come before the last line,
    or before the best of its kind if that is cheap. An estimate may be above the simulation by as much as one was so
    far."""
    lines = searched.lines[: searched.question.top]
    chosen = [one for one in lines if not one.final]
    if chosen or not lines:
        return chosen
    trust = 1 + max((one.above for one in searched.found), default=0.0)
    best = {searched.kind(one.site, one.place): score_of(searched, one) for one in searched.lines if one.final}
    last = score_of(searched, lines[-1]) if len(lines) == searched.question.top else (np.inf, np.inf)
    for one in searched.best:
        kind = searched.kind(one.site, one.place)
        # Long variants of a kind are left to their estimates.
        if not one.final and (kind not in best or one.short):
            value = tuple(v / trust for v in score_of(searched, one))
            chosen += [one] if value <= min(best.get(kind, last), last) else []
            best.setdefault(kind, (0.0, 0.0))
    return chosen


def simulate_some(searched: Searched, wanted: Sequence[Found], run: Run) -> bool:
    """Simulates these; False if there is nothing to do."""
    places = [(one.site, one.place) for one in wanted]
    if not places or not searched.question.simulate:
        return False
    estimated_s = {(one.site, one.place): one.metrics.step_time_s for one in wanted}
    searched.found = [one for one in searched.found if (one.site, one.place) not in places]
    add(searched, [replace(one, estimated_s=estimated_s[one.site, one.place]) for one in run(places, True)])
    return True


def add(searched: Searched, found: Sequence[Found]) -> None:
    """Takes up evaluated candidates."""
    searched.found += found
    searched.best = sorted(
        (one for one in searched.found if one.good), key=lambda one: (*score_of(searched, one), one.site, one.place)
    )
    lines: dict[object, Found] = {}
    for one in searched.best:
        first = lines.setdefault(searched.kind(one.site, one.place), one)
        if one.final and not first.final and not first.short:
            # Of long steps of a kind the best by estimate is simulated, and stands for all.
            lines[searched.kind(one.site, one.place)] = one
    searched.lines = sorted(lines.values(), key=searched.best.index)


