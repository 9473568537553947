"""A cluster's wiring as one networkx graph, for display and for tests of the routes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from rtp_sim.hardware.topology import Topology


def cluster_graph(topology: Topology) -> nx.DiGraph:
    """Vertices node<k>/gpu<i>, node<k>/<hub>, node<k>/nic<i>, leaf<l> and spine; each edge's `link` is its
    number.

    Vertices have a `kind` (gpu, switch, pcie, host, nic, leaf, spine, hub), devices in use also their
    `rank`. A hub whose through traffic shares one resource has a loop edge with that link.
    """
    graph = nx.DiGraph()
    template, size = topology.template, len(topology.template.links)
    for node in range(topology.nodes):
        base = node * size
        for gpu in range(topology.template.gpus):
            used = gpu < topology.gpus_per_node
            rank = {"rank": node * topology.gpus_per_node + gpu} if used else {}
            graph.add_node(f"node{node}/gpu{gpu}", kind="gpu", **rank)
        for (a, b), link in template.edges.items():
            for vertex in (a, b):
                graph.add_node(f"node{node}/{vertex}", kind=vertex_kind(vertex))
            graph.add_edge(f"node{node}/{a}", f"node{node}/{b}", link=base + link)
        for hub, link in template.shared.items():
            graph.add_edge(f"node{node}/{hub}", f"node{node}/{hub}", link=base + link)
        if topology.fabric is not None:
            for number, port in enumerate(template.ports):
                leaf, name = f"leaf{topology.leaf_of(node, number)}", f"node{node}/{port.name}"
                graph.add_node(leaf, kind="leaf")
                graph.add_edge(name, leaf, link=base + port.up)
                graph.add_edge(leaf, name, link=base + port.down)
    if topology.leaf_count() > 1:
        graph.add_node("spine", kind="spine")
        for leaf_number in range(topology.leaf_count()):
            up, down = topology.trunk(leaf_number)
            graph.add_edge(f"leaf{leaf_number}", "spine", link=up)
            graph.add_edge("spine", f"leaf{leaf_number}", link=down)
    return graph


def vertex_kind(vertex: str) -> str:
    """What a vertex of a node is, told by its name."""
    kinds = {
        "gpu": "gpu",
        "nic": "nic",
        "pcie": "pcie",
        "host": "host",
        "nvswitch": "switch",
        "switch": "switch",
    }
    return next((kind for prefix, kind in kinds.items() if vertex.startswith(prefix)), "hub")
