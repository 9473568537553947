"""From a finished search to a `Plan`: rows in order, why the others are not shown, how many each stage dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rtp_sim.planner.evaluate import WHOLE
from rtp_sim.planner.intervals import interval_s, tied
from rtp_sim.planner.money import price_of
from rtp_sim.planner.pareto import MOST, NEAR, front, open_candidates
from rtp_sim.planner.plan import TIGHT, Plan, Row, StageCount, Variants
from rtp_sim.planner.searched import KIND, Found, Searched, Site, slowest
from rtp_sim.planner.space import EVERY_STRATEGY

GIB = 1 << 30


def make_plan(searched: Searched) -> Plan:
    """The plan of a search that found something to show; `shown` is empty where nothing fits."""
    question = searched.question
    shown = [
        replace(row_of(searched, one, rank=k + 1), variants=_variants(searched, one))
        for k, one in enumerate(searched.lines[: question.top])
    ]
    shown = [replace(row, tie=row.rank != 1 and tied(row.interval_s, shown[0].interval_s)) for row in shown]
    return Plan(
        workload=question.workload,
        machines=tuple(site.machine for site in searched.sites),
        objective=question.objective,
        constraints=_constraints(searched),
        candidates=sum(len(site.allowed) for site in searched.sites),
        stages=_stages(searched, len(shown)),
        shown=tuple(shown),
        front=_front(searched),
        others=tuple(_others(searched, {row.candidate.strategy for row in shown})),
        notes=(*_tight(shown), *_notes(searched)),
    )


def _front(searched: Searched) -> tuple[Row, ...]:
    if not searched.question.front:
        return ()
    return tuple(row_of(searched, one, _rank(searched, one)) for one in front(searched))


def _constraints(searched: Searched) -> Mapping[str, object]:
    question = searched.question
    return {
        "strategies": list(question.strategies),
        "limits": [limit.text for limit in question.limits],
        "memory_headroom": question.headroom,
        "min_tokens_per_s": question.min_tokens_per_s,
        "top": question.top,
    }


def _rank(searched: Searched, one: Found) -> int | None:
    shown = searched.lines[: searched.question.top]
    return shown.index(one) + 1 if one in shown else None


def _variants(searched: Searched, one: Found) -> Variants:
    """The others of a plan's kind: those evaluated, and how many of those left could not come before it."""
    if searched.question.variants:
        return Variants()
    kind, space = searched.kind(one.site, one.place), searched.sites[one.site].space
    seen = [other for other in searched.best if other != one and searched.kind(other.site, other.place) == kind]
    alike = searched.sites[one.site].fits.copy()
    for name in KIND:
        column = getattr(space, name)
        alike &= column == column[one.place]
    tried = {other.place for other in searched.found if other.site == one.site}
    unseen = sum(int(place) not in tried for place in np.flatnonzero(alike))
    within = max((_slower(other, one) for other in seen), default=0.0)
    return Variants(tuple((str(space.candidate(o.place)), o.metrics.step_time_s) for o in seen), within, unseen)


def _slower(other: Found, one: Found) -> float:
    """How much longer the other's step is: of simulations, or of estimates if one of them is no more."""
    if other.final and one.final:
        return other.metrics.step_time_s / one.metrics.step_time_s - 1
    times = [found.estimated_s or found.metrics.step_time_s for found in (other, one)]
    return times[0] / times[1] - 1


def row_of(searched: Searched, one: Found, rank: int | None = None, reason: str = "") -> Row:
    """An estimated candidate as a row."""
    site, metrics = searched.sites[one.site], one.metrics
    tokens = searched.question.workload.global_batch * searched.network.seq
    return Row(
        site.space.candidate(one.place), "simulate" if one.final else "estimate", one.fits, reason,
        site.bounds(one.place), metrics, one.how,
        price_of(site.machine, metrics.step_time_s, tokens), interval_s(metrics.step_time_s, site.cluster), rank,
        estimated_s=one.estimated_s, tight=metrics.peak_memory_bytes > TIGHT * site.machine.memory_bytes,
    )  # fmt: skip


# ---- counts


def _stages(searched: Searched, shown: int) -> tuple[StageCount, ...]:
    sites = searched.sites
    asked = sum(len(site.allowed) for site in sites)
    allowed = sum(int(site.allowed.sum()) for site in sites)
    sound = sum(len(site.space) for site in sites)
    fits = sum(int(site.fits.sum()) for site in sites)
    tried = len(searched.found)
    # Without simulations the estimates are the last word.
    final = searched.simulated if searched.question.simulate else tried
    return (
        StageCount("constraints", asked, asked - allowed),
        StageCount("rules", allowed, allowed - sound),
        StageCount("memory", sound, sound - fits),
        StageCount("bounds", fits, fits - tried),
        StageCount("estimate", tried, tried - final),
        StageCount("simulate", final, final - shown),
    )


def _tight(shown: Sequence[Row]) -> list[str]:
    """What is known of runs that come close to the memory."""
    ranks = [str(row.rank) for row in shown if row.tight]
    if not ranks:
        return []
    needs = f"plan {ranks[0]} needs" if len(ranks) == 1 else f"plans {', '.join(ranks)} need"
    return [f"{needs} more than {TIGHT:.0%} of the memory: published runs that held as much took 1.06 to 7.2 times "
            f"as long as predicted (docs/accuracy.md); --memory-headroom {1 - TIGHT:.0%} leaves them out"]  # fmt: skip


def _notes(searched: Searched) -> list[str]:
    found = []
    if searched.question.front and searched.best:
        left = len(open_candidates(searched))
        close = f"plans within {NEAR:.0%} of another in everything are left out"
        unfinished = f"; {left} more candidates may belong to it, {MOST} were tried" if left else ""
        found.append(f"Pareto front of time, memory and cost: {close}{unfinished}")
    shown = searched.lines[: searched.question.top]
    off = [one.metrics.step_time_s / one.estimated_s - 1 for one in shown if one.estimated_s]
    if off:
        found.append(f"simulated step times are {min(off):+.2%} to {max(off):+.2%} from the estimates that chose the "
                     f"plans")  # fmt: skip
    if any(one.final and one.how != WHOLE for one in shown):
        found.append("long steps are not simulated op by op: `how` in the JSON output")
    return found


# ---- reasons


def _others(searched: Searched, shown: set[str]) -> list[Row]:
    """The best candidate of every strategy that is not shown."""
    rows = []
    for name in searched.question.strategies:
        if name in shown:
            continue
        row = _best_of(searched, name)
        if row is not None:
            rows.append(row)
    return rows


def _best_of(searched: Searched, name: str) -> Row | None:
    number = EVERY_STRATEGY.index(name)
    tried = [one for one in searched.found if searched.sites[one.site].space.strategy[one.place] == number]
    good = [one for one in searched.best if one in tried]
    waiting = [at for at in searched.waiting if searched.sites[at[0]].space.strategy[at[1]] == number]
    bound_s = float(searched.sites[waiting[0][0]].lower_s[waiting[0][1]]) if waiting else np.inf
    # Those that were tried for the front need not be the strategy's fastest.
    if good and good[0].metrics.step_time_s <= bound_s:
        return row_of(searched, good[0], _rank(searched, good[0]), _beaten(searched, good[0].metrics.step_time_s, ""))
    if waiting:
        number_of, place = waiting[0]
        site = searched.sites[number_of]
        reason = _beaten(searched, float(site.lower_s[place]), "at least ")
        return _bounded(site, place, "bounds", None, reason)
    if tried:
        one = min(tried, key=lambda one: (one.metrics.peak_memory_bytes, one.site, one.place))
        reason = _too_slow(searched, one.metrics.step_time_s, "") if one.fits else too_large(searched, one)
        return row_of(searched, one, None, reason)
    return _smallest_of(searched, number)


def _smallest_of(searched: Searched, number: int) -> Row | None:
    """The candidate of a strategy that needs least memory, or a rule that all of them break."""
    least: tuple[int, int, int] | None = None
    for k, site in enumerate(searched.sites):
        places = np.flatnonzero(site.space.strategy == number)
        if len(places):
            totals = site.memory[:, places].sum(axis=0)
            best = int(totals.argmin())
            entry = (int(totals[best]), k, int(places[best]))
            least = entry if least is None or entry < least else least
    if least is None:
        return None
    site, place = searched.sites[least[1]], least[2]
    if site.fits[place]:
        reason = _too_slow(searched, float(site.lower_s[place]), "at least ")
        return _bounded(site, place, "bounds", None, reason)
    categories = site.bounds(place).memory_by_category
    reason = needs(least[0], site.machine.allowed_bytes, categories, "at least ")
    return _bounded(site, place, "memory", False, reason)


def _bounded(site: Site, place: int, stage: str, feasible: bool | None, reason: str) -> Row:
    bounds = site.bounds(place)
    return Row(site.space.candidate(place), stage, feasible, reason, bounds, None, "", None)


def too_large(searched: Searched, one: Found) -> str:
    """Why an estimated candidate does not fit."""
    allowed = searched.sites[one.site].machine.allowed_bytes
    return needs(one.metrics.peak_memory_bytes, allowed, one.metrics.memory_by_category, "")


def needs(total: int, allowed: int, categories: Mapping[str, int], prefix: str) -> str:
    """ "needs 97.3 GiB of 78.0: optimizer 52.1, activations 30.2, weights 15.0"."""
    parts = sorted(((v, c) for c, v in categories.items() if v > GIB // 20), reverse=True)
    listed = ", ".join(f"{category} {size / GIB:.1f}" for size, category in parts)
    return f"needs {prefix}{total / GIB:.1f} GiB of {allowed / GIB:.1f}: {listed}"


def _beaten(searched: Searched, step_s: float, prefix: str) -> str:
    objective, top = searched.question.objective, searched.lines[: searched.question.top]
    if objective != "time":
        return f"takes {prefix}{step_s:.4g} s a step; {objective} is no less than that of the last plan shown"
    last = top[-1].metrics.step_time_s
    return f"takes {prefix}{step_s:.4g} s a step, {step_s / top[0].metrics.step_time_s - 1:+.1%} on the best plan" + (
        f" (the last one shown takes {last:.4g} s)" if len(top) > 1 else ""
    )


def _too_slow(searched: Searched, step_s: float, prefix: str) -> str:
    return f"takes {prefix}{step_s:.4g} s a step, {slowest(searched):.4g} s are allowed by the least tokens per second"
