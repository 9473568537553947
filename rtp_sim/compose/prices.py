"""`Prices`: what every op of the short programs costs, one number per op, on the slowest of the ranks that run it.

Ranks of a stage differ at most by shards of uneven size and by their place in the cluster. A transfer is priced as all
those of its class at once: the ranks that fold finds to behave alike go in lockstep, and share what they have in
common. What other classes put on the same links is not seen. With `shared` off every transfer has its links to itself,
as in engine/longest_path.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rtp_sim.engine.costs import CostModel, Phase
from rtp_sim.engine.fluid import NS_PER_S
from rtp_sim.engine.fold import Folds
from rtp_sim.engine.longest_path import unshared_ns
from rtp_sim.engine.lowering import Gathering, Kernel, LoweredOp, Plan, Rotation, Sending, Site, lower
from rtp_sim.schedule.ir import Schedule


@dataclass(frozen=True)
class Prices:
    """Per stage: duration of every op of its program and the host's time to issue it, in ns. Sends are apart, by index:
    stages that do the same differ in their neighbours. A receive has no duration of its own."""

    duration_ns: tuple[tuple[int, ...], ...]
    send_ns: tuple[dict[int, int], ...]
    issue_ns: tuple[tuple[int, ...], ...]


def priced(
    schedule: Schedule, cost: CostModel, stage_of_rank: Sequence[int], shared: bool = True, folds: Folds | None = None,
    alike: bool = False,
) -> Prices:  # fmt: skip
    """Prices of all ops of a schedule, on the slowest rank of each stage."""
    plan = lower(schedule, cost, folded=True, folds=folds, alike=alike)
    table = _Table(plan, shared)
    durations, sends, issues = [], [], []
    for stage in range(max(stage_of_rank) + 1):
        sites = [s for s in plan.sites if stage_of_rank[s.rank] == stage]
        # Stages that fold into an earlier one are priced like it.
        sites = sites or [_representative(plan, stage_of_rank.index(stage))]
        prices = [max(each) for each in zip(*(table.prices(site) for site in sites), strict=True)]
        ops = sites[0].lowered.ops
        places = [i for i, op in enumerate(ops) if isinstance(op, Sending)]
        sends.append({i: prices[i] for i in places})
        for i in places:
            prices[i] = 0
        durations.append(tuple(prices))
        issues.append(sites[0].lowered.issue_ns)
    return Prices(tuple(durations), tuple(sends), tuple(issues))


def _representative(plan: Plan, rank: int) -> Site:
    by = plan.quotient.representative_of[rank]
    return next(site for site in plan.sites if site.rank == by)


class _Table:
    def __init__(self, plan: Plan, shared: bool) -> None:
        self.plan, self.shared = plan, shared
        self.known: dict[object, int] = {}
        self.kernels: dict[object, tuple[list[int], list[int]]] = {}

    def prices(self, site: Site) -> list[int]:
        """The price of every op; kernels of sites with the same program and shards are the same."""
        ops, key = site.lowered.ops, (id(site.lowered), site.shards)
        if key not in self.kernels:
            fixed = [self.price(site, op) if isinstance(op, Kernel) else 0 for op in ops]
            self.kernels[key] = fixed, [i for i, op in enumerate(ops) if not isinstance(op, Kernel)]
        fixed, others = self.kernels[key]
        found = fixed[:]
        for i in others:
            found[i] = self.price(site, ops[i])
        return found

    def price(self, site: Site, op: LoweredOp) -> int:
        if isinstance(op, Kernel):
            slot, durations = op.duration_ns
            return durations[0] if slot < 0 else durations[site.shards[slot]]
        key: object
        if isinstance(op, Gathering):
            instance, members = site.instances[op.group]
            if not members:
                return 0
            key = (op.group, instance, op.kind)
            if key not in self.known:
                self.known[key] = sum(self.alone(*both) for both in self.plan.collective(op.group, instance, op.kind))
            return self.known[key]
        if isinstance(op, Sending):
            route = site.routes[op.wire]
            assert route is not None
            key = (site.number, op.wire, op.size_bytes)
            if key not in self.known:
                self.known[key] = self.alone(*self.plan.message(route, op.size_bytes))
            return self.known[key]
        if isinstance(op, Rotation):
            raise ValueError("steps with ring shifts are not composed of stretches")
        return 0

    def alone(self, phase: Phase, usage: tuple[tuple[int, int], ...]) -> int:
        """Time of a phase beside those of its class."""
        if not self.shared:
            return unshared_ns(phase, self.plan.cost)
        capacity = self.plan.quotient.capacity
        rates = [max(1, capacity[link] // weight) for link, weight in usage]
        if phase.cap_bytes_per_s is not None:
            rates.append(phase.cap_bytes_per_s)
        flowing_ns = -(-phase.work_bytes * NS_PER_S // min(rates)) if rates else 0
        return phase.latency_ns + flowing_ns


