"""The wires of a whole cluster: numbered links, routes between ranks, and the orders in which rings visit
ranks.

A cluster is one `NodeTemplate` repeated `nodes` times plus a fabric of leaf switches under one spine. Link
numbers follow from arithmetic: link i of the template on node k is link k * L + i, and the trunks between
leaves and spine come last. Each rank uses the port nearest to it; several flows through one NIC share that
NIC's link.

A leaf's trunk is one link per direction with the summed rate of the ports below it, divided by the
oversubscription: what many parallel cables carry when traffic spreads evenly over them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rtp_sim.errors import InputError
from rtp_sim.hardware.rings import Order, node_by_node, node_by_node_channels, parallel_rings
from rtp_sim.hardware.spec import Link, Route
from rtp_sim.hardware.wiring import NodeTemplate

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, slots=True)
class Fabric:
    """The switches between nodes. `rails`: port i of every node meets at leaf i; else all ports of a node
    share one.

    `nodes_per_leaf` nodes hang on one leaf (or one set of rail leaves); `oversubscription` >= 1 divides the
    trunks; `trunk_latency_ns` is that of one trunk link.
    """

    rails: bool
    nodes_per_leaf: int
    oversubscription: float
    trunk_latency_ns: int
    provenance: str


class Topology:
    """Links, routes and ring orders of `nodes` equal nodes, of which the first `gpus_per_node` devices are
    used.

    Raises InputError for several nodes that have no NICs, for ranks that do not exist, and for devices that
    no wire connects.
    """

    def __init__(
        self, template: NodeTemplate, fabric: Fabric | None, nodes: int = 1, gpus_per_node: int | None = None
    ) -> None:
        self.template = template
        self.fabric = fabric
        self.nodes = nodes
        self.gpus_per_node = template.gpus if gpus_per_node is None else gpus_per_node
        self.world_size = nodes * self.gpus_per_node
        if nodes < 1 or not 1 <= self.gpus_per_node <= template.gpus:
            raise InputError(
                f"given {nodes} nodes with {self.gpus_per_node} devices each, "
                f"expected nodes >= 1 and 1 to {template.gpus} devices"
            )
        if nodes > 1 and (fabric is None or not template.ports):
            raise InputError(f"given {nodes} nodes, expected 1: this node has no NICs to connect it to others")
        if fabric is not None and not 1 <= fabric.oversubscription < float("inf"):
            raise InputError(f"given oversubscription={fabric.oversubscription}, expected oversubscription >= 1")
        self.links: tuple[Link, ...] = self._instantiate()
        self._routes: dict[tuple[int, int], Route] = {}
        self._orders: dict[tuple[str, tuple[int, ...]], tuple[Order, ...]] = {}

    def node_of(self, rank: int) -> int:
        """The node that `rank` sits on."""
        return rank // self.gpus_per_node

    def route(self, source: int, target: int) -> Route:
        """The links a message from rank to rank takes; no link from a rank to itself. InputError for no
        such rank.
        """
        known = self._routes.get((source, target))
        if known is None:
            self._check((source, target))
            links = self._find(source, target)
            known = Route(links, sum(self.links[i].latency_ns for i in links))
            self._routes[source, target] = known
        return known

    def ring(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """The best order to pass messages around `ranks`: node by node, and inside a node see
        `rings.best_ring`.
        """
        if ("ring", ranks) not in self._orders:
            order = node_by_node(self._by_node(ranks), self.gpus_per_node, self.template)
            self._orders["ring", ranks] = (order,)
        return self._orders["ring", ranks][0]

    def channels(self, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The ring orders that a collective of `ranks` runs at the same time, each with an equal share of
        the data.

        Inside a node: one on a switch or a PCIe tree, several on a mesh (`rings.parallel_rings`). Across
        nodes: as many as there are ports in use on the node with the fewest, so that every one of those
        carries traffic (`rings.node_by_node_channels`).
        """
        if ("channels", ranks) not in self._orders:
            parts = self._by_node(ranks)
            if len(parts) == 1:
                node, members = parts[0]
                base = node * self.gpus_per_node
                local = parallel_rings(self.template, members)
                orders = tuple(tuple(base + g for g in order) for order in local)
            else:
                orders = node_by_node_channels(parts, self.gpus_per_node, self.template)
            self._orders["channels", ranks] = orders
        return self._orders["channels", ranks]

    def bandwidth(self, source: int, target: int) -> int:
        """Bytes/s of the narrowest link between two different ranks when nobody else is there."""
        return min(self.links[i].bandwidth_bytes_per_s for i in self.route(source, target).links)

    def graph(self) -> nx.DiGraph:
        """The whole cluster as a networkx graph, for pictures and tests; edges carry `link`, devices carry
        `rank`.

        A hub with a shared resource has a loop edge for it.
        """
        from rtp_sim.hardware.picture import cluster_graph

        return cluster_graph(self)

    def leaf_of(self, node: int, port: int) -> int:
        """The leaf switch that a node's port is plugged into."""
        assert self.fabric is not None
        group = node // self.fabric.nodes_per_leaf
        return group * len(self.template.ports) + port if self.fabric.rails else group

    def leaf_count(self) -> int:
        """Leaf switches in use; 0 without a fabric."""
        if self.fabric is None or not self.template.ports:
            return 0
        return self.leaf_of(self.nodes - 1, len(self.template.ports) - 1) + 1

    def trunk(self, leaf: int) -> tuple[int, int]:
        """Link numbers leaf -> spine and spine -> leaf. Only where there is more than one leaf."""
        first = self.nodes * len(self.template.links) + 2 * leaf
        return first, first + 1

    def _find(self, source: int, target: int) -> tuple[int, ...]:
        size = len(self.template.links)
        from_node, from_gpu = divmod(source, self.gpus_per_node)
        to_node, to_gpu = divmod(target, self.gpus_per_node)
        if from_node == to_node:
            return tuple(from_node * size + i for i in self.template.route(from_gpu, to_gpu))
        out = [from_node * size + i for i in self.template.egress(from_gpu)]
        back = [to_node * size + i for i in self.template.ingress(to_gpu)]
        from_leaf = self.leaf_of(from_node, self.template.port_of_gpu[from_gpu])
        to_leaf = self.leaf_of(to_node, self.template.port_of_gpu[to_gpu])
        over = [] if from_leaf == to_leaf else [self.trunk(from_leaf)[0], self.trunk(to_leaf)[1]]
        return (*out, *over, *back)

    def _instantiate(self) -> tuple[Link, ...]:
        """The template's links once per node, then two trunk links per leaf if there are several leaves."""
        links: list[Link] = []
        for node in range(self.nodes):
            base = len(links)
            links += [
                Link(
                    base + i,
                    f"node{node}/{t.name}",
                    t.kind,
                    t.bandwidth_bytes_per_s,
                    t.raw_bandwidth_bytes_per_s,
                    t.latency_ns,
                    t.provenance,
                )
                for i, t in enumerate(self.template.links)
            ]
        return (*links, *self._trunks(len(links)))

    def _trunks(self, first: int) -> list[Link]:
        leaves = self.leaf_count()
        if self.fabric is None or leaves < 2:
            return []
        below: list[list[Link]] = [[] for _ in range(leaves)]
        for node in range(self.nodes):
            for number, port in enumerate(self.template.ports):
                below[self.leaf_of(node, number)].append(self.template.links[port.up])
        trunks: list[Link] = []
        for leaf, ups in enumerate(below):
            share = self.fabric.oversubscription
            up = Link(
                index=first + len(trunks),
                name=f"leaf{leaf}->spine",
                kind="fabric",
                bandwidth_bytes_per_s=int(sum(u.bandwidth_bytes_per_s for u in ups) / share),
                raw_bandwidth_bytes_per_s=int(sum(u.raw_bandwidth_bytes_per_s for u in ups) / share),
                latency_ns=self.fabric.trunk_latency_ns,
                provenance=self.fabric.provenance,
            )
            trunks += [up, replace(up, index=up.index + 1, name=f"spine->leaf{leaf}")]
        return trunks

    def _by_node(self, ranks: tuple[int, ...]) -> list[tuple[int, Order]]:
        """The group as (node, devices there), nodes in order of first appearance."""
        self._check(ranks)
        if not ranks or len(set(ranks)) != len(ranks):
            raise InputError(f"given the group {ranks}, expected at least one rank and no rank twice")
        members: dict[int, list[int]] = {}
        for rank in ranks:
            members.setdefault(self.node_of(rank), []).append(rank % self.gpus_per_node)
        return [(node, tuple(local)) for node, local in members.items()]

    def _check(self, ranks: tuple[int, ...]) -> None:
        if min(ranks, default=0) < 0 or max(ranks, default=0) >= self.world_size:
            raise InputError(f"given the ranks {ranks}, expected ranks from 0 to {self.world_size - 1}")
