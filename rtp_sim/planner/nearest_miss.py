"""What comes nearest where nothing fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.planner.answer import needs
from rtp_sim.planner.evaluate import evaluate
from rtp_sim.planner.plan import Candidate
from rtp_sim.planner.search import search
from rtp_sim.planner.searched import Question, Searched, slowest

TIMES_MORE_NODES = (2, 4, 8)
TRIED = 3


@dataclass(frozen=True, slots=True)
class Miss:
    """The candidate that comes nearest, in what it fails, and remedies, each tried: "on 4 nodes: ..."."""

    candidate: Candidate | None
    reason: str
    remedies: tuple[str, ...]


def nearest_miss(searched: Searched) -> Miss:
    """For a search without a plan to show."""
    candidate, reason = _nearest(searched)
    return Miss(candidate, reason, tuple(_remedies(searched.question)))


def _nearest(searched: Searched) -> tuple[Candidate | None, str]:
    """The one that is over the memory by least, or, where some fit, the fastest of those."""
    fitting = [one for one in searched.found if one.fits]
    limit_s = slowest(searched)
    if fitting:
        one = min(fitting, key=lambda one: (one.metrics.step_time_s, one.site, one.place))
        site = searched.sites[one.site]
        return site.space.candidate(one.place), (
            f"takes {one.metrics.step_time_s:.4g} s a step where {limit_s:.4g} s are allowed by the least tokens per "
            f"second"
        )
    late = [(float(s.lower_s[s.fits].min()), k) for k, s in enumerate(searched.sites) if s.fits.any()]
    if late and min(late)[0] > limit_s:
        best_s, k = min(late)
        site = searched.sites[k]
        place = int(np.flatnonzero(site.fits)[site.lower_s[site.fits].argmin()])
        return site.space.candidate(place), (
            f"takes at least {best_s:.4g} s a step where {limit_s:.4g} s are allowed by the least tokens per second"
        )
    return _least_over(searched)


def _least_over(searched: Searched) -> tuple[Candidate | None, str]:
    """The smallest candidates by their bounds, of which the few first are estimated."""
    ranked = sorted(
        (int(total) - site.machine.allowed_bytes, k, place)
        for k, site in enumerate(searched.sites)
        for place, total in ((int(p), site.memory[:, p].sum()) for p in _smallest_places(site.memory))
    )
    best = None
    for _, k, place in ranked[:TRIED]:
        site = searched.sites[k]
        candidate = site.space.candidate(place)
        metrics, _ = evaluate(searched.question.workload, candidate, site.cluster, searched.network, site.model)
        over = metrics.peak_memory_bytes - site.machine.allowed_bytes
        if best is None or over < best[0]:
            reason = needs(metrics.peak_memory_bytes, site.machine.allowed_bytes, metrics.memory_by_category, "")
            best = (over, candidate, reason)
    if best is None:
        rules = sorted({b.reason for site in searched.sites for b in site.broken})
        return None, "no candidate keeps the rules of its strategy: " + "; ".join(rules[:3])
    return best[1], best[2]


def _smallest_places(memory: np.ndarray) -> list[int]:
    return [int(p) for p in np.argsort(memory.sum(axis=0), kind="stable")[:TRIED]]


def _remedies(question: Question) -> Iterator[str]:
    """Each limit lifted by itself, then more nodes: what makes something fit."""
    small = replace(question, top=1, front=False, processes=1, simulate=False)
    for number, limit in enumerate(question.limits):
        others = tuple(x for k, x in enumerate(question.limits) if k != number)
        found = _first(replace(small, limits=others))
        if found:
            yield f"without {limit.text}: {found}"
    if question.headroom:
        found = _first(replace(small, headroom=0.0))
        if found:
            yield f"without the memory head-room of {question.headroom * 100:g}%: {found}"
    if question.min_tokens_per_s is not None:
        found = _first(replace(small, min_tokens_per_s=None))
        if found:
            yield f"without the least tokens per second: {found}"
    for times in TIMES_MORE_NODES:
        try:
            more = tuple(load_cluster(c.name, c.nodes * times, c.world_size * times) for c in question.clusters)
        except InputError:
            return
        found = _first(replace(small, clusters=more))
        if found:
            yield f"on {more[0].nodes} nodes: {found}"
            return


def _first(question: Question) -> str:
    """The best plan of a question in words; "" where there is none."""
    try:
        searched = search(question)
    except InputError:
        return ""
    if not searched.best:
        return ""
    one = searched.best[0]
    candidate = searched.sites[one.site].space.candidate(one.place)
    return f"{candidate}, {one.metrics.step_time_s:.4g} s a step, {one.metrics.peak_memory_bytes / (1 << 30):.1f} GiB"
