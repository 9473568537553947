"""What a group of ranks looks like from its links: the ways its messages take and how long their hops are.

All of it depends on the ranks alone, so it is worked out once per group and every size is priced from it. Weights say
how often a link is crossed: while w bytes of a phase's work pass, link l carries w * usage[l] bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from rtp_sim.cost.cores import Cores
from rtp_sim.hardware.spec import CommunicationParams
from rtp_sim.hardware.topology import Topology

Ranks = tuple[int, ...]
Usage = dict[int, int]


@dataclass(frozen=True, slots=True)
class Hops:
    """Mean time of a hop inside a node and between nodes (0 if there is none), library step included, and how many."""

    inside_ns: float
    between_ns: float
    inside: int
    between: int

    @property
    def mean_ns(self) -> float:
        """Mean time of a hop of the ring."""
        return (self.inside * self.inside_ns + self.between * self.between_ns) / (self.inside + self.between)


@dataclass(frozen=True, slots=True)
class Way:
    """Links that a collective crosses while each of `channels` rings carries its share of every edge's bytes.

    `rate_bytes_per_s` is what the work then flows at if nothing else is on the links.
    """

    usage: Usage
    channels: int
    rate_bytes_per_s: int


class Group:
    """One group on one topology. The first rank is the root where a collective has one."""

    def __init__(self, ranks: Ranks, topology: Topology, params: CommunicationParams, cores: Cores | None) -> None:
        self.ranks, self.topology, self.cores = ranks, topology, cores
        by_node: dict[int, list[int]] = {}
        for rank in ranks:
            by_node.setdefault(topology.node_of(rank), []).append(rank)
        self.members = tuple(tuple(local) for local in by_node.values())
        self._orders = topology.channels(ranks)[: params.most_rings]
        self._steps = params.collective_step_intra_ns.value, params.collective_step_inter_ns.value
        self._ways: dict[str, Way] = {}
        self.hops = self._hops()

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def nodes(self) -> int:
        """Nodes that the group touches."""
        return len(self.members)

    @property
    def nests(self) -> bool:
        """Whether it has the same number, two or more, of ranks on each of several nodes."""
        counts = {len(local) for local in self.members}
        return self.nodes > 1 and len(counts) == 1 and min(counts) > 1

    def way(self, kind: str) -> Way:
        """The links of "ring" (all edges), "from root" or "to root" (chains), or "pairs" (everyone to everyone)."""
        if kind not in self._ways:
            usage: Usage = {}
            if kind == "pairs":
                self._add_pairs(usage)
            else:
                for order in self._orders:
                    for source, target in self._edges(order, kind):
                        self._add_edge(usage, source, target)
            self._ways[kind] = self.measured(usage, 1 if kind == "pairs" else len(self._orders))
        return self._ways[kind]

    def measured(self, usage: Usage, channels: int) -> Way:
        """The way with the rate that its narrowest link allows."""
        capacities = ((self._capacity(link), weight) for link, weight in usage.items())
        return Way(usage, channels, max(1, min(capacity // weight for capacity, weight in capacities)))

    def _capacity(self, link: int) -> int:
        if self.cores is not None and self.cores.is_pool(link):
            return self.cores.capacity
        return self.topology.links[link].bandwidth_bytes_per_s

    def _edges(self, order: Ranks, kind: str) -> Iterator[tuple[int, int]]:
        """Hops around the ring; of a chain, without the hop that would return to the root or start from it."""
        if kind == "ring":
            return pairwise((*order, order[0]))
        root = order.index(self.ranks[0])
        away = (*order[root:], *order[:root])
        return pairwise(away if kind == "from root" else (*away[1:], away[0]))

    def _add_edge(self, usage: Usage, source: int, target: int) -> None:
        for link in self.topology.route(source, target).links:
            usage[link] = usage.get(link, 0) + 1
        if self.cores is not None:
            for pool, weight in self.cores.message(self.topology.node_of(source), self.topology.node_of(target)):
                usage[pool] = usage.get(pool, 0) + weight

    def _add_pairs(self, usage: Usage) -> None:
        """Every ordered pair of ranks. Those of different nodes are not walked one by one but counted: all use the
        sender's way out and the receiver's way in, and the trunks of their leaves if these differ."""
        for local in self.members:
            for source in local:
                for target in local:
                    if source != target:
                        self._add_edge(usage, source, target)
        if self.nodes > 1:
            self._add_pairs_between_nodes(usage)

    def _add_pairs_between_nodes(self, usage: Usage) -> None:
        topology, template = self.topology, self.topology.template
        size, per_node = len(template.links), topology.gpus_per_node
        leaf_of = {
            rank: topology.leaf_of(rank // per_node, template.port_of_gpu[rank % per_node]) for rank in self.ranks
        }
        on_leaf: dict[int, int] = {}
        for leaf in leaf_of.values():
            on_leaf[leaf] = on_leaf.get(leaf, 0) + 1
        for local in self.members:
            peers = self.size - len(local)
            here: dict[int, int] = {}
            for rank in local:
                here[leaf_of[rank]] = here.get(leaf_of[rank], 0) + 1
            for rank in local:
                leaf = leaf_of[rank]
                node, gpu = divmod(rank, per_node)
                for link in (*template.egress(gpu), *template.ingress(gpu)):
                    usage[node * size + link] = usage.get(node * size + link, 0) + peers
                through_spine = peers - (on_leaf[leaf] - here[leaf])
                for trunk in topology.trunk(leaf) if through_spine else ():
                    usage[trunk] = usage.get(trunk, 0) + through_spine
                if self.cores is not None:
                    ((pool, _), (_, received)) = self.cores.message(node, node + 1)
                    usage[pool] = usage.get(pool, 0) + 2 * received * peers

    def _hops(self) -> Hops:
        """Mean hops of the first channel."""
        order = self._orders[0]
        step_inside_ns, step_between_ns = self._steps
        inside: list[float] = []
        between: list[float] = []
        for source, target in pairwise((*order, order[0])):
            wire_ns = self.topology.route(source, target).latency_ns
            if self.topology.node_of(source) == self.topology.node_of(target):
                inside.append(wire_ns + step_inside_ns)
            else:
                between.append(wire_ns + step_between_ns)
        return Hops(
            sum(inside) / len(inside) if inside else 0.0,
            sum(between) / len(between) if between else 0.0,
            len(inside),
            len(between),
        )
