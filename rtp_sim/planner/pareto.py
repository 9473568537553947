"""The Pareto front of time, memory and cost: plans that no other plan beats in all three.

The search for the best plans has looked at one end of the front only. Here candidates that no estimated plan beats by
their bounds are estimated one after another, until none is left or `MOST` of them were. What is within `NEAR` of a
plan in everything counts as beaten, as near-copies of one plan say nothing new.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rtp_sim.planner.money import usd_per_second
from rtp_sim.planner.search import ROUND, add, simulate_some
from rtp_sim.planner.searched import Found, Searched
from rtp_sim.planner.workers import Run

MOST = 16
NEAR = 0.02

Point = tuple[float, float, float]


def point_of(searched: Searched, one: Found) -> Point:
    """(seconds, bytes, USD) of a step; without a price the GPU-seconds stand for the cost."""
    return _point(searched, one.site, one.metrics.step_time_s, one.metrics.peak_memory_bytes)


def _point(searched: Searched, site: int, step_s: float, memory: float) -> Point:
    machine = searched.sites[site].machine
    return step_s, float(memory), step_s * (usd_per_second(machine) or machine.gpus)


def front_of(points: Iterable[Point]) -> list[int]:
    """Places of the points that no other is at least as good as in everything; of equal ones the first."""
    listed = list(points)
    return [
        i for i, p in enumerate(listed)
        if not any(all(a <= b for a, b in zip(q, p, strict=True)) and (q != p or j < i)
                   for j, q in enumerate(listed) if j != i)
    ]  # fmt: skip


def front(searched: Searched) -> list[Found]:
    """The plans of the front, by time."""
    chosen = _chosen(searched)
    found = [chosen[i] for i in front_of([point_of(searched, one) for one in chosen])]
    return sorted(found, key=lambda one: (point_of(searched, one), one.site, one.place))


def _chosen(searched: Searched) -> list[Found]:
    """The front without near-copies of faster plans: by the estimates, so that simulating some does not change it."""
    points = [_estimated_point(searched, one) for one in searched.best]
    places = sorted(front_of(points), key=lambda i: (points[i], searched.best[i].site, searched.best[i].place))
    return [searched.best[places[k]] for k in apart([points[i] for i in places])]


def _estimated_point(searched: Searched, one: Found) -> Point:
    step_s = one.metrics.step_time_s if one.estimated_s is None else one.estimated_s
    return _point(searched, one.site, step_s, one.metrics.peak_memory_bytes)


def apart(points: Iterable[Point]) -> list[int]:
    """Places of the points that are not within `NEAR` of an earlier one of these in everything."""
    kept: list[tuple[int, Point]] = []
    for place, point in enumerate(points):
        if not any(all(a <= b * (1 + NEAR) for a, b in zip(other, point, strict=True)) for _, other in kept):
            kept.append((place, point))
    return [place for place, _ in kept]


def complete_front(searched: Searched, run: Run) -> None:
    """Estimates candidates that could belong to the front, and simulates what does. What is left over stays in
    `waiting`."""
    _estimate_front(searched, run)
    while simulate_some(searched, [one for one in _chosen(searched) if not one.final], run):
        pass


def _estimate_front(searched: Searched, run: Run) -> None:
    spent = 0
    while spent < MOST:
        open_ones = open_candidates(searched)
        if not open_ones:
            return
        # Spread over the front that the bounds make, its ends among them.
        edge = _edge(searched, open_ones)
        chosen = sorted({edge[round(k * (len(edge) - 1) / (ROUND - 1))] for k in range(ROUND)})
        add(searched, run(chosen, False))
        searched.waiting = [place for place in searched.waiting if place not in set(chosen)]
        spent += len(chosen)


def _edge(searched: Searched, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """By time, the candidates whose bounds no faster one of the same machine undercuts in memory. (On one machine the
    cost follows the time.)"""
    found = []
    for number, site in enumerate(searched.sites):
        mine = [place for k, place in places if k == number]
        mine.sort(key=lambda p, site=site: (float(site.lower_s[p]), int(site.memory[:, p].sum()), p))  # type: ignore[misc]
        least = None
        for place in mine:
            total = int(site.memory[:, place].sum())
            if least is None or total < least:
                least = total
                found.append((float(site.lower_s[place]), number, place))
    return [(number, place) for _, number, place in sorted(found)]


def open_candidates(searched: Searched) -> list[tuple[int, int]]:
    """Waiting candidates that no plan is known to beat, in the order they wait."""
    good = [point_of(searched, one) for one in searched.found if one.good]
    if not searched.waiting or not good:
        return []
    points = np.array([
        _point(searched, s, float(searched.sites[s].lower_s[p]), float(searched.sites[s].memory[:, p].sum()))
        for s, p in searched.waiting
    ])  # fmt: skip
    beaten = np.zeros(len(points), dtype=bool)
    for point in good:
        beaten |= (np.array(point) <= points * (1 + NEAR)).all(axis=1)
    return [place for place, lost in zip(searched.waiting, beaten.tolist(), strict=True) if not lost]
