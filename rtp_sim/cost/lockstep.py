"""Prices for an engine without contention: every group of an axis communicates at the same moment, and pays for it.

The longest-path engine gives each transfer its links to itself. In a training step the sibling groups of a parallel
axis (the eight data-parallel rings of a node, say, over four network adapters) run the same op at the same time, so
their links carry all of it. Here the usage of a phase is the sum over the siblings, which is what the fluid network
arrives at when they start together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rtp_sim.cost.host import NO_HOST_COSTS, HostCosts
from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.costs import Phase
from rtp_sim.hardware.spec import Cluster
from rtp_sim.schedule.ir import Group

Ranks = tuple[int, ...]


class LockstepCost(ClusterCost):
    """A `ClusterCost` in which the groups of each axis communicate together."""

    def __init__(self, cluster: Cluster, groups: Mapping[str, Group], host: HostCosts = NO_HOST_COSTS) -> None:
        super().__init__(cluster, host=host)
        self._siblings: dict[Ranks, tuple[Ranks, ...]] = {}
        self._groups = dict(groups)
        for group in groups.values():
            self._siblings.update(dict.fromkeys(group.instances, group.instances))
        self._summed: dict[tuple[Ranks, int], dict[int, int]] = {}
        self._hops: dict[tuple[str, tuple[int, ...]], Mapping[int, int]] = {}

    def collective(self, kind: str, ranks: Ranks, size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """The phases of a collective, with the links that its siblings load too."""
        phases = super().collective(kind, ranks, size_bytes, dtype)
        siblings = self._siblings.get(ranks, (ranks,))
        if len(siblings) == 1:
            return phases
        found = []
        for phase in phases:
            key = ranks, id(phase.usage)
            if key not in self._summed:
                self._summed[key] = self._together(kind, siblings, size_bytes, dtype, phases.index(phase))
            found.append(replace(phase, usage=self._summed[key]))
        return tuple(found)

    def _together(self, kind: str, siblings: tuple[Ranks, ...], size_bytes: int, dtype: str, at: int) -> dict[int, int]:
        usage: dict[int, int] = {}
        for ranks in siblings:
            phases = super().collective(kind, ranks, size_bytes, dtype)
            for link, weight in phases[min(at, len(phases) - 1)].usage.items():
                usage[link] = usage.get(link, 0) + weight
        return usage

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One hop of a rotation, together with the same hop of all other ranks."""
        phase = super().point_to_point(src_rank, dst_rank, size_bytes, chunk_bytes)
        for name, group in self._groups.items():
            (here, position), (there, other) = group.place[src_rank], group.place[dst_rank]
            if here == there:
                places = zip(at(other, group.dims), at(position, group.dims), group.dims, strict=True)
                hop = tuple((b - a) % n for b, a, n in places)
                return replace(phase, usage=self._hop(name, group, hop))
        return phase

    def _hop(self, name: str, group: Group, hop: tuple[int, ...]) -> Mapping[int, int]:
        """The links of everyone's hop by these offsets, one per dimension of the group."""
        if (name, hop) not in self._hops:
            usage: dict[int, int] = {}
            for rank in group.place:
                target = group.peer(rank, hop)
                for link in self.cluster.topology.route(rank, target).links if target != rank else ():
                    usage[link] = usage.get(link, 0) + 1
            self._hops[name, hop] = usage
        return self._hops[name, hop]


def at(position: int, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The coordinates of a flat position, last dimension fastest."""
    found: list[int] = []
    for n in reversed(dims):
        position, here = divmod(position, n)
        found.append(here)
    return tuple(reversed(found))
