"""`Prices`: what messages and collectives of one cluster take at least, when nothing else is on the links.

Only groups that rank 0 belongs to are priced: it is a rank of every layout, and no step ends before one of its ranks.
Edges of a ring that look alike (the same places in their nodes, in one node or in two) are priced once, between the
first two nodes, which no other pair is nearer than.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.longest_path import unshared_ns
from rtp_sim.hardware.spec import Cluster

Ranks = tuple[int, ...]


class Prices:
    """Times in ns on one cluster, each worked out once."""

    def __init__(self, cluster: Cluster, cost: ClusterCost) -> None:
        self.cluster, self.cost, self.topology = cluster, cost, cluster.topology
        self.collective = cache(self._collective)
        self.hops = cache(self._hops)
        self.strided = cache(self._strided)
        self.groups = cache(self._groups)
        self.stage_hops = cache(self._stage_hops)

    def worst(self, kind: str, n: int, size_bytes: int) -> float:
        """The collective on the slowest of the groups of n neighbours: where n does not divide the ranks of a node some
        lie on two."""
        return max(self.collective(kind, group, size_bytes) for group in self.groups(n))

    def _groups(self, n: int) -> tuple[Ranks, ...]:
        """One group of n neighbours for each way to lie on the nodes, in ring order; the first n ranks come first."""
        per_node, found = self.topology.gpus_per_node, dict[int, Ranks]()
        for first in range(0, self.topology.world_size - n + 1, n):
            if first % per_node not in found:
                found[first % per_node] = self.topology.ring(tuple(range(first, first + n)))
            elif first >= per_node * n:
                break
        return tuple(found.values())

    def aligned(self, n: int) -> bool:
        """Whether all groups of n neighbours lie alike."""
        return len(self.groups(n)) == 1

    def neighbours(self, n: int) -> Ranks:
        """The first n ranks in ring order."""
        return self.strided(n, 1)

    def _strided(self, n: int, stride: int) -> Ranks:
        """Ranks 0, stride, 2 stride, ... n of them, in ring order."""
        return self.topology.ring(tuple(range(0, n * stride, stride)))

    def _collective(self, kind: str, ranks: Ranks, size_bytes: int, dtype: str = "bf16") -> float:
        """One collective of `size_bytes` in all; 0 for a group of one or nothing to send."""
        if len(ranks) < 2 or not size_bytes:
            return 0.0
        return float(sum(unshared_ns(p, self.cost) for p in self.cost.collective(kind, ranks, size_bytes, dtype)))

    def message(self, source: int, target: int, size_bytes: int, chunk_bytes: int | None = None) -> float:
        """One message between ranks that lie like these."""
        return self._message(*self._alike(source, target), size_bytes, chunk_bytes)

    @cache  # noqa: B019 - lives as long as the search
    def _message(self, source: int, target: int, size_bytes: int, chunk_bytes: int | None) -> float:
        return float(unshared_ns(self.cost.point_to_point(source, target, size_bytes, chunk_bytes), self.cost))

    def _alike(self, source: int, target: int) -> tuple[int, int]:
        per_node = self.topology.gpus_per_node
        (a, i), (b, j) = divmod(source, per_node), divmod(target, per_node)
        return i, j if a == b else per_node + j

    def _hops(self, n: int, way: str, size_bytes: int, chunk_bytes: int | None, reverse: bool = False
              ) -> tuple[float, ...]:  # fmt: skip
        """The n - 1 hops of a rotation over n neighbours ("rtp+flat": around one ring), each on its slowest edge, where
        every rank's shards pass."""
        if not size_bytes:
            return (0.0,) * (n - 1)
        ring, per_node = self.neighbours(n), self.topology.gpus_per_node
        rings = self.groups(n)
        two_level = n > per_node > 1 and n % per_node == 0 and not way.endswith("+flat")
        if not two_level:
            slowest = max(self._slowest(one, size_bytes, chunk_bytes, reverse) for one in rings)
            return (slowest,) * (n - 1)
        inner = self._slowest(ring[:per_node], size_bytes, chunk_bytes, reverse)
        outer = self.message(0, per_node, size_bytes, chunk_bytes)
        nodes = n // per_node
        return (inner,) * (nodes * (per_node - 1)) + (outer,) * (nodes - 1)

    def _slowest(self, ring: Ranks, size_bytes: int, chunk_bytes: int | None, reverse: bool) -> float:
        pairs = zip(ring, (*ring[1:], ring[0]), strict=True)
        edges = {self._alike(*(pair[::-1] if reverse else pair)) for pair in pairs}
        return max(self._message(a, b, size_bytes, chunk_bytes) for a, b in edges)

    def _stage_hops(self, stages: int, stride: int, size_bytes: int) -> tuple[float, ...]:
        """Messages from each stage to the next, all of them back, and between last and first, there and back; stage s
        is at rank s x stride."""
        places = [s * stride for s in range(stages)]
        pairs = list(pairwise(places))
        there = [self.message(a, b, size_bytes) for a, b in pairs]
        back = [self.message(b, a, size_bytes) for a, b in pairs]
        return (*there, *back, self.message(places[-1], 0, size_bytes), self.message(0, places[-1], size_bytes))
