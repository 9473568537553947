"""`Swing`: whether another plan wins if one number of the machine is a fifth smaller or larger, and what staying with
the plan would then cost.

For each number and each factor the whole search is done again on the changed machines, so the winner is that of all
candidates, not of those that were shown. Long steps are compared by their estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rtp_sim.hardware.scaled import numbers_of, scaled
from rtp_sim.planner.evaluate import evaluate
from rtp_sim.planner.plan import Candidate
from rtp_sim.planner.search import search
from rtp_sim.planner.searched import Question, Searched

FACTORS = (0.8, 1.2)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Swing:
    """One number times `factor`: the plan that wins then, its step time, and the step time of the plan that wins
    without the change. `winner` and `step_s` are None where nothing fits any more, `kept_s` where that plan does not.
    """

    number: str
    factor: float
    winner: Candidate | None
    step_s: float | None
    kept_s: float | None
    same: bool


def swings(searched: Searched, say: Say = lambda _: None) -> Iterator[Swing]:
    """Every number of the machines of a search, times each factor. Nothing if the search found no plan."""
    if not searched.lines:
        return
    best = searched.lines[0]
    chosen = searched.sites[best.site].space.candidate(best.place)
    names = dict.fromkeys(name for c in searched.question.clusters for name, _ in numbers_of(c))
    for done, name in enumerate(names):
        say(f"sensitivity: {name} ({done + 1} of {len(names)})")
        for factor in FACTORS:
            yield _swing(searched, best.site, chosen, name, factor)


def _swing(searched: Searched, site: int, chosen: Candidate, name: str, factor: float) -> Swing:
    asked = searched.question
    clusters = tuple(scaled(cluster, name, factor) for cluster in asked.clusters)
    question: Question = replace(asked, clusters=clusters, top=1, front=False, simulate=False)
    again = search(question)
    metrics, _ = evaluate(asked.workload, chosen, clusters[site], again.network, again.sites[site].model)
    fits = metrics.peak_memory_bytes <= again.sites[site].machine.allowed_bytes
    kept_s = metrics.step_time_s if fits else None
    if not again.best:
        return Swing(name, factor, None, None, kept_s, False)
    first = again.best[0]
    winner = again.sites[first.site].space.candidate(first.place)
    return Swing(name, factor, winner, first.metrics.step_time_s, kept_s, winner == chosen)
