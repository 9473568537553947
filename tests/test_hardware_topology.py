"""Routes and ring orders, worked out by hand or checked against networkx as a second implementation."""

from __future__ import annotations

from itertools import pairwise, permutations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.hardware.topology import Fabric, Topology
from rtp_sim.hardware.wiring import LinkClass, Nics, NodeTemplate, Wire, Wiring, assign_nics

# NVLinks between each pair of a DGX-1's GPUs, as nvidia-smi prints them (0: none, traffic goes over PCIe).
CUBE_MESH = [
    [0, 1, 1, 2, 2, 0, 0, 0],
    [1, 0, 2, 1, 0, 2, 0, 0],
    [1, 2, 0, 2, 0, 0, 1, 0],
    [2, 1, 2, 0, 0, 0, 0, 1],
    [2, 0, 0, 0, 0, 1, 1, 2],
    [0, 2, 0, 0, 1, 0, 2, 1],
    [0, 0, 1, 0, 1, 2, 0, 2],
    [0, 0, 0, 1, 2, 1, 2, 0],
]


def names(cluster: Cluster, source: int, target: int) -> list[str]:
    """The names of the links on a route."""
    return [cluster.topology.links[i].name for i in cluster.topology.route(source, target).links]


def hops(order: tuple[int, ...]) -> list[tuple[int, int]]:
    """The neighbouring pairs of a closed ring."""
    return list(pairwise((*order, order[0])))


def test_the_cube_mesh_is_the_printed_matrix() -> None:
    cluster = load_cluster("dgx-1-v100")
    for a, b in permutations(range(8), 2):
        route = cluster.topology.route(a, b)
        kinds = {cluster.topology.links[i].kind for i in route.links}
        if CUBE_MESH[a][b]:
            (link,) = (cluster.topology.links[i] for i in route.links)
            assert link.kind == "nvlink"
            assert link.raw_bandwidth_bytes_per_s == CUBE_MESH[a][b] * 25 * 10**9
        else:
            assert "nvlink" not in kinds


def test_the_cube_mesh_ring_uses_double_links_only() -> None:
    # The double links 0-3, 3-2, 2-1, 1-5, 5-6, 6-7, 7-4, 4-0 close one ring through all eight; of its two
    # directions the one over the lower neighbour is found first.
    ring = load_cluster("dgx-1-v100").topology.ring(tuple(range(8)))
    assert ring == (0, 3, 2, 1, 5, 6, 7, 4)
    assert all(CUBE_MESH[a][b] == 2 for a, b in hops(ring))


def test_the_cube_mesh_ring_of_four_prefers_double_links() -> None:
    # Each of the three rings through 0..3 holds a single link; 0-3-2-1 has three double ones (7, not 5 or 6).
    ring = load_cluster("dgx-1-v100").topology.ring((0, 1, 2, 3))
    assert sum(CUBE_MESH[a][b] for a, b in hops(ring)) == 7


def test_the_cube_mesh_rings_use_every_nvlink_exactly_once_per_direction() -> None:
    topology = load_cluster("dgx-1-v100").topology
    used = [[0] * 8 for _ in range(8)]
    for ring in topology.channels(tuple(range(8))):
        assert sorted(ring) == list(range(8))
        for a, b in hops(ring):
            used[a][b] += 1
    assert used == CUBE_MESH  # 6 rings x 25 GB/s: all of a GPU's 150 GB/s


def test_the_full_mesh_rings_share_no_link() -> None:
    # 8 GPUs, 28 links: three rings of 8 links fit (24), each in both directions.
    channels = load_cluster("mi300x-8x").topology.channels(tuple(range(8)))
    used = [hop for ring in channels for hop in hops(ring)]
    assert len(channels) == 6
    assert len(set(used)) == len(used) == 48


def test_a_distant_pair_of_the_cube_mesh_goes_over_both_sockets() -> None:
    assert names(load_cluster("dgx-1-v100"), 0, 5) == [
        "node0/gpu0->pcie0",
        "node0/pcie0->host0",
        "node0/host0->host1",
        "node0/host1->pcie2",
        "node0/pcie2->gpu5",
    ]


def test_a_switch_is_two_links_and_keeps_the_given_order() -> None:
    cluster = load_cluster("dgx-h100")
    assert names(cluster, 2, 6) == ["node0/gpu2->nvswitch", "node0/nvswitch->gpu6"]
    assert cluster.topology.route(2, 6).latency_ns == 2 * 185
    assert cluster.topology.ring((0, 5, 2, 7)) == (0, 5, 2, 7)
    assert cluster.topology.channels((0, 5, 2, 7)) == ((0, 5, 2, 7),)


def test_pcie_pairs_share_their_switch_uplink() -> None:
    topology = load_cluster("l40s-pcie-4x").topology
    inside = topology.route(0, 1).links
    across = [set(topology.route(a, b).links) for a, b in ((0, 2), (1, 3))]
    assert len(inside) == 2
    # Both cross host0 over pcie0's one uplink and pcie1's one downlink, and share nothing else.
    shared = {topology.links[i].name for i in across[0] & across[1]}
    assert shared == {"node0/pcie0->host0", "node0/host0->pcie1"}
    assert not across[0] & set(topology.route(2, 0).links)  # full duplex: the way back is other links


def test_a_pcie_ring_crosses_the_host_once_per_direction() -> None:
    # Given 0 2 1 3, every hop would cross the host bridge; 0 2 3 1 crosses twice, once each way.
    topology = load_cluster("l40s-pcie-4x").topology
    ring = topology.ring((0, 2, 1, 3))
    uplinks = [
        i
        for a, b in hops(ring)
        for i in topology.route(a, b).links
        if topology.links[i].name.endswith("host0")
    ]
    assert len(uplinks) == len(set(uplinks)) == 2


def test_without_peer_access_both_directions_share_the_staging_memory() -> None:
    cluster = load_cluster("pcie-4x3090")
    there, back = cluster.topology.route(0, 1), cluster.topology.route(1, 0)
    (shared,) = set(there.links) & set(back.links)
    assert cluster.topology.links[shared].bandwidth_bytes_per_s == 8_750_000_000
    assert cluster.topology.bandwidth(0, 1) == 5_890_000_000
    assert names(cluster, 0, 3)[1::2] == [
        "node0/host0",
        "node0/host1",
    ]  # two stagings, two plain links around


def test_a_route_between_nodes_by_hand() -> None:
    cluster = load_cluster("dgx-a100-80g", nodes=2)
    assert names(cluster, 1, 9) == [  # the same rail: no spine
        "node0/gpu1->pcie0",
        "node0/pcie0->nic1",
        "node0/nic1->fabric",
        "node1/fabric->nic1",
        "node1/nic1->pcie0",
        "node1/pcie0->gpu1",
    ]
    assert cluster.topology.route(1, 9).latency_ns == 4 * 250 + 2 * 650
    assert names(cluster, 1, 14)[3:5] == ["leaf1->spine", "spine->leaf6"]
    assert cluster.topology.route(3, 3).links == ()


def test_two_gpus_share_a_nic_where_there_are_fewer_nics() -> None:
    topology = load_cluster("aws-p4d", nodes=2).topology
    assert topology.template.port_of_gpu == (0, 0, 1, 1, 2, 2, 3, 3)
    uplinks = [
        next(i for i in topology.route(g, g + 8).links if topology.links[i].kind == "nic") for g in range(8)
    ]
    assert [uplinks.index(u) for u in uplinks] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_gpu_with_four_nics_uses_them_as_one_port() -> None:
    topology = load_cluster("aws-p5", nodes=2).topology
    nic = next(topology.links[i] for i in topology.route(5, 13).links if topology.links[i].kind == "nic")
    assert nic.name == "node0/nic20-23->fabric"
    assert nic.raw_bandwidth_bytes_per_s == 4 * 12_500_000_000


def test_the_trunk_carries_what_hangs_below_it() -> None:
    # Rails of 20 nodes: 40 nodes make 2 x 8 leaves; 20 adapters of 25 GB/s hang on each.
    topology = load_cluster("dgx-a100-80g", nodes=40).topology
    assert topology.leaf_count() == 16
    trunk = topology.links[topology.trunk(11)[0]]
    assert trunk.name == "leaf11->spine"
    assert trunk.raw_bandwidth_bytes_per_s == 20 * 25 * 10**9
    half = load_cluster("generic:a100-sxm-80gb,nics=8,nic=200Gb/s,oversubscription=2", nodes=32).topology
    assert half.links[half.trunk(0)[0]].raw_bandwidth_bytes_per_s == 32 * 25 * 10**9 // 2


@pytest.mark.parametrize(
    "name", ["dgx-1-v100", "dgx-a100-80g", "aws-p5", "mi250x-8gcd", "generic:h100-sxm,nics=4"]
)
def test_routes_are_walks_of_the_graph_with_the_fewest_hops(name: str) -> None:
    topology = load_cluster(name, nodes=3).topology
    graph = topology.graph()
    vertex = {graph.nodes[v]["rank"]: v for v in graph if "rank" in graph.nodes[v]}
    target_of = {data["link"]: (a, b) for a, b, data in graph.edges(data=True)}
    assert sorted(target_of) == list(range(len(topology.links)))
    for source in range(topology.gpus_per_node):
        for target in range(topology.world_size):
            place = vertex[source]
            for link in topology.route(source, target).links:
                assert target_of[link][0] == place
                place = target_of[link][1]
            assert place == vertex[target]
            if topology.node_of(target) == 0 and graph.has_edge(vertex[source], vertex[target]):
                assert len(topology.route(source, target).links) == 1
            direct = nx.shortest_path_length(graph, vertex[source], vertex[target])
            assert len(topology.route(source, target).links) >= direct


def test_a_ring_over_nodes_goes_node_by_node() -> None:
    topology = load_cluster("dgx-h100", nodes=3).topology
    assert topology.ring(tuple(range(24))) == tuple(range(24))
    assert topology.ring((0, 8, 16, 1, 9, 17)) == (0, 1, 8, 9, 16, 17)
    mesh = load_cluster("dgx-1-v100", nodes=2).topology
    assert mesh.ring(tuple(range(16))) == (0, 3, 2, 1, 5, 6, 7, 4, 8, 11, 10, 9, 13, 14, 15, 12)


@pytest.mark.parametrize(
    ("name", "nodes", "count"),
    [("dgx-a100-80g", 4, 8), ("aws-p4d", 4, 4), ("dgx-1-v100", 2, 4), ("aws-p5", 2, 8)],
)
def test_channels_cross_every_nic_once_each_way(name: str, nodes: int, count: int) -> None:
    topology = load_cluster(name, nodes=nodes).topology
    channels = topology.channels(tuple(range(topology.world_size)))
    assert len(channels) == count
    crossed: list[int] = []
    for ring in channels:
        assert sorted(ring) == list(range(topology.world_size))
        for a, b in hops(ring):
            if topology.node_of(a) != topology.node_of(b):
                links = topology.route(a, b).links
                crossed += [i for i in links if topology.links[i].kind == "nic"]
    every = [link.index for link in topology.links if link.kind == "nic"]
    assert sorted(crossed) == every


def test_channels_stay_on_their_rail_for_an_even_number_of_nodes() -> None:
    topology = load_cluster("dgx-h100", nodes=4).topology
    for ring in topology.channels(tuple(range(32))):
        for a, b in hops(ring):
            assert not any(topology.links[i].kind == "fabric" for i in topology.route(a, b).links)


def test_one_member_per_node_makes_one_channel() -> None:
    topology = load_cluster("dgx-h100", nodes=4).topology
    assert topology.channels((3, 11, 19, 27)) == ((3, 11, 19, 27),)
    assert len(topology.channels((0, 1, 8, 9))) == 2
    assert len(topology.channels((0, 1, 2, 8))) == 1  # the second node has one member, so one NIC in use


def test_using_part_of_a_node_numbers_ranks_without_gaps() -> None:
    topology = load_cluster("dgx-h100", nodes=2, gpus=4).topology
    assert (topology.world_size, topology.gpus_per_node, topology.node_of(2)) == (4, 2, 1)
    first = topology.links[topology.route(1, 3).links[0]]
    assert first.name == "node0/gpu1->pcie1"


def test_a_thousand_ranks_have_the_routes_of_sixteen() -> None:
    """Neighbours on a node are two links apart. The same place on the next node is as far as between two nodes alone,
    plus two trunks where the next node hangs on another leaf."""
    small = load_cluster("dgx-a100-80g", nodes=2).topology
    large = load_cluster("dgx-a100-80g", nodes=128).topology
    for rank in range(0, 1016, 8):
        assert len(large.route(rank, rank + 1).links) == 2
        node = rank // 8
        trunks = 0 if large.leaf_of(node, 0) == large.leaf_of(node + 1, 0) else 2 * large.fabric.trunk_latency_ns
        assert large.route(rank, rank + 8).latency_ns == small.route(0, 8).latency_ns + trunks


def plain(kind: str, duplex: bool = True) -> LinkClass:
    """A link class of 1 GB/s for little machines."""
    return LinkClass("wire", kind, 10**9, 10**9, 100, duplex, "assumed: a test")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(min_value=1, max_value=4), min_size=15, max_size=15))
def test_rings_of_random_meshes_are_as_wide_as_brute_force_finds(counts: list[int]) -> None:
    pairs = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    width = dict(zip(pairs, counts, strict=True))
    wires = tuple(Wire(f"gpu{a}", f"gpu{b}", plain("xgmi"), width[a, b]) for a, b in pairs)
    topology = Topology(NodeTemplate(Wiring(6, wires)), None)

    def worth(order: tuple[int, ...]) -> tuple[int, int]:
        each = [width[min(hop), max(hop)] for hop in hops(order)]
        return min(each), sum(each)

    best = max(worth((0, *rest)) for rest in permutations(range(1, 6)))
    assert worth(topology.ring(tuple(range(6)))) == best
    channels = topology.channels(tuple(range(6)))
    crossings = [hop for ring in channels for hop in hops(ring)]
    assert all(crossings.count(hop) <= width[min(hop), max(hop)] for hop in crossings)
    assert len(channels) >= 2 * best[0]


def test_a_half_duplex_wire_is_one_link() -> None:
    wire = Wire("gpu0", "gpu1", plain("pcie", duplex=False))
    topology = Topology(NodeTemplate(Wiring(2, (wire,))), None)
    assert topology.route(0, 1) == topology.route(1, 0)
    assert len(topology.links) == 1


def test_devices_that_no_wire_connects_are_reported() -> None:
    topology = Topology(NodeTemplate(Wiring(2, ())), None)
    with pytest.raises(InputError, match="gpu0 and gpu1 of a node are not connected"):
        topology.route(0, 1)


def test_several_nodes_need_nics() -> None:
    with pytest.raises(InputError, match="2 nodes, expected 1: this node has no NICs"):
        load_cluster("pcie-4x3090", nodes=2)


@pytest.mark.parametrize("ranks", [(0, 0), (), (0, 8), (-1, 0)])
def test_groups_that_make_no_sense_are_refused(ranks: tuple[int, ...]) -> None:
    topology = load_cluster("dgx-h100").topology
    with pytest.raises(InputError, match="given the"):
        topology.channels(ranks)


def test_nics_are_dealt_out_evenly() -> None:
    assert assign_nics([(0, 1), (0, 1)]) == [(0,), (1,)]
    assert assign_nics([(0, 1, 2, 3), (0, 1, 2, 3)]) == [(0, 1), (2, 3)]
    assert assign_nics([(0,), (0,), (1,), (1,)]) == [(0,), (0,), (1,), (1,)]
    assert assign_nics([(0, 1)] * 4) == [(0,), (0,), (1,), (1,)]
    # Overlapping sets: one NIC each, the least used of the nearest.
    assert assign_nics([(0,), (0, 1), (0, 1)]) == [(0,), (1,), (0,)]


def test_a_gpu_without_a_nic_nearby_goes_through_its_neighbour() -> None:
    nics = Nics(("gpu0",), plain("pcie"), plain("nic"))
    template = NodeTemplate(Wiring(2, (Wire("gpu0", "gpu1", plain("xgmi")),), nics=nics))
    topology = Topology(template, Fabric(True, 8, 1.0, 0, "assumed: a test"), nodes=2)
    assert [topology.links[i].name for i in topology.route(1, 2).links][:2] == [
        "node0/gpu1->gpu0",
        "node0/gpu0->nic0",
    ]
