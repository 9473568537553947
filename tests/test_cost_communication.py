"""Times of messages and collectives on small clusters, worked out by hand, and bounds that always hold."""

from __future__ import annotations

import pytest
from cost_helpers import BASE_NS, IN_SWITCH_NS, NIC, P2P_NS, PORT, params, switched
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_sim.cost.communication import KINDS, CommunicationCost
from rtp_sim.cost.model import ClusterCost
from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster

# Hops with the library's step: two port links and 1 us inside a node; between nodes two PCIe links and a NIC on each
# side (200 + 200 + 500 ns, twice) and 5 us.
INSIDE, BETWEEN = 200 + 1000, 1800 + 5000
S = 4_000_000


def alone_ns(cluster: Cluster, kind: str, ranks: tuple[int, ...], size_bytes: int) -> float:
    """Time of a collective with the links to itself."""
    cost = CommunicationCost(cluster)
    return cost.alone_ns(cost.collective(kind, ranks, size_bytes, "fp16"))


def test_a_ring_over_two_nodes_shares_their_nic() -> None:
    # Two hops inside and two between nodes; every edge carries 2 x 3/4 S, each NIC direction one edge.
    expected_ns = BASE_NS + 6 * (2 * INSIDE + 2 * BETWEEN) / 4 + 1.5 * S / NIC * 1e9
    assert alone_ns(switched(2, nodes=2), "all_reduce", (0, 1, 2, 3), S) == expected_ns == 634_000


def test_gathers_send_half_of_an_all_reduce() -> None:
    expected_ns = BASE_NS + 3 * 4000 + 0.75 * S / NIC * 1e9
    for kind in ("all_gather", "reduce_scatter"):
        assert alone_ns(switched(2, nodes=2), kind, (0, 1, 2, 3), S) == expected_ns


def test_a_ring_through_a_switch_pays_every_port_once() -> None:
    cluster = switched(4)
    (phase,) = CommunicationCost(cluster).collective("all_gather", (0, 1, 2, 3), S, "fp16")
    assert list(phase.usage.values()) == [1] * 8
    assert {cluster.topology.links[i].kind for i in phase.usage} == {"nvlink"}
    assert (phase.latency_ns, phase.work_bytes) == (BASE_NS + 3 * INSIDE, 3 * S // 4)


def test_two_ports_double_the_rate_between_nodes() -> None:
    # Two channels, each with half of the bytes and a NIC of its own.
    expected_ns = BASE_NS + 6 * 4000 + 1.5 * S / (2 * NIC) * 1e9
    assert alone_ns(switched(2, nodes=2, nics=2), "all_reduce", (0, 1, 2, 3), S) == expected_ns


def test_a_tree_moves_everything_twice_in_fewer_steps() -> None:
    tree = switched(2, nodes=8, communication=params(("ring", "tree")))
    ranks = tuple(range(16))
    # 2 steps inside, 2 x log2(8) between; the ring needs 30, half of them between nodes.
    assert alone_ns(tree, "all_reduce", ranks, 0) == BASE_NS + 2 * INSIDE + 6 * BETWEEN
    assert alone_ns(switched(2, nodes=8), "all_reduce", ranks, 0) == BASE_NS + 15 * INSIDE + 15 * BETWEEN
    assert alone_ns(tree, "all_reduce", ranks, 8) < alone_ns(switched(2, nodes=8), "all_reduce", ranks, 8)
    # Large messages go round the ring, which moves 2 x 15/16 S per NIC instead of 2 S.
    large = 10**9
    assert alone_ns(tree, "all_reduce", ranks, large) == BASE_NS + 15 * (INSIDE + BETWEEN) + 1.875 * large / NIC * 1e9


def test_a_tree_waits_for_the_fullest_node() -> None:
    # Three ranks on one node, one on the other: 2 x (3 - 1) steps inside, 2 x log2(2) between.
    tree = switched(4, nodes=2, communication=params(("ring", "tree")))
    assert alone_ns(tree, "all_reduce", (0, 1, 2, 4), 0) == BASE_NS + 4 * INSIDE + 2 * BETWEEN


def test_inside_a_node_the_tree_is_a_chain_and_never_chosen() -> None:
    for size in (8, S):
        ring, tree = switched(8), switched(8, communication=params(("ring", "tree")))
        assert alone_ns(tree, "all_reduce", tuple(range(8)), size) == alone_ns(
            ring, "all_reduce", tuple(range(8)), size
        )


def test_hierarchical_phases() -> None:
    cluster = switched(2, nodes=2, communication=params(("ring", "hierarchical")))
    scatter, across, gather = CommunicationCost(cluster).collective("all_reduce", (0, 1, 2, 3), S, "fp16")
    # Inside: half of the array over every port. Between: both shards of S/2 share the NIC, 2 x 1/2 of a shard each.
    assert (
        (scatter.latency_ns, scatter.work_bytes) == (BASE_NS + INSIDE, S // 2) == (gather.latency_ns, gather.work_bytes)
    )
    assert (across.latency_ns, across.work_bytes) == (BASE_NS + 2 * BETWEEN, S // 2)
    nics = {i for i in across.usage if cluster.topology.links[i].kind == "nic"}
    assert len(nics) == 4
    assert {across.usage[i] for i in nics} == {2}
    whole_ns = 2 * (BASE_NS + INSIDE + S / 2 / PORT * 1e9) + BASE_NS + 2 * BETWEEN + S / 2 / (NIC / 2) * 1e9
    assert alone_ns(cluster, "all_reduce", (0, 1, 2, 3), S) == pytest.approx(whole_ns)


def test_uneven_groups_do_not_nest() -> None:
    ring, nesting = switched(4, nodes=2), switched(4, nodes=2, communication=params(("ring", "hierarchical")))
    for ranks in ((0, 1, 2, 4), (0, 4)):
        assert alone_ns(nesting, "all_reduce", ranks, S) == alone_ns(ring, "all_reduce", ranks, S)


def test_reduction_in_the_switch_from_five_ranks_up() -> None:
    cluster = switched(8, nodes=2, communication=params(("ring", "in-switch"), least=5, efficiency=0.75))
    size = 10**9
    # 0.75 of the raw 200 GB/s is more than the 100 GB/s that transfers reach through a port.
    expected_ns = BASE_NS + IN_SWITCH_NS + 2 * INSIDE + size / PORT * 1e9
    assert alone_ns(cluster, "all_reduce", (0, 1, 2, 3, 4), size) == expected_ns
    ring = switched(8, nodes=2)
    for kind, ranks in (("all_reduce", (0, 1, 2, 3)), ("all_gather", tuple(range(8))), ("all_reduce", (0, 1, 2, 3, 8))):
        assert alone_ns(cluster, kind, ranks, size) == alone_ns(ring, kind, ranks, size)


def test_in_switch_reduction_below_the_ports_rate() -> None:
    cluster = switched(8, communication=params(("ring", "in-switch"), least=5, efficiency=0.4))
    expected_ns = BASE_NS + IN_SWITCH_NS + 2 * INSIDE + 10**9 / (0.4 * 2 * PORT) * 1e9
    # The ring takes 1.75 S at 100 GB/s, the switch S at 80.
    assert alone_ns(cluster, "all_reduce", tuple(range(8)), 10**9) == expected_ns


def test_a_broadcast_is_a_chain_from_its_root() -> None:
    cluster = switched(4)
    cost = CommunicationCost(cluster)
    (phase,) = cost.collective("broadcast", (2, 3, 0, 1), S, "fp16")
    names = {cluster.topology.links[i].name for i in phase.usage}
    assert "node0/nvswitch->gpu2" not in names  # nobody sends to the root,
    assert "node0/gpu1->nvswitch" not in names  # and the last one sends to nobody
    assert len(names) == 6
    assert (phase.latency_ns, phase.work_bytes) == (BASE_NS + 3 * INSIDE, S)
    (phase,) = cost.collective("reduce", (2, 3, 0, 1), S, "fp16")
    names = {cluster.topology.links[i].name for i in phase.usage}
    assert "node0/gpu2->nvswitch" not in names
    assert "node0/nvswitch->gpu3" not in names
    assert len(names) == 6


def test_all_to_all_loads_every_port_with_what_leaves_through_it() -> None:
    cluster = switched(2, nodes=3)
    (phase,) = CommunicationCost(cluster).collective("all_to_all", tuple(range(6)), 6 * S, "fp16")
    assert phase.work_bytes == S  # to each peer
    weight = {cluster.topology.links[i].name: w for i, w in phase.usage.items()}
    assert weight["node0/gpu0->nvswitch"] == 1  # one peer on the node
    assert weight["node0/gpu0->pcie0"] == 4  # four elsewhere
    assert weight["node0/nic0->fabric"] == weight["node2/fabric->nic0"] == 8
    # Five peers: steps and hops in the ring's mix (3 of 6 hops cross nodes), bytes of two ranks through one NIC.
    expected_ns = BASE_NS + 5 * (INSIDE + BETWEEN) / 2 + 8 * S / NIC * 1e9
    assert CommunicationCost(cluster).alone_ns((phase,)) == expected_ns


def test_all_to_all_counts_what_walking_every_pair_counts() -> None:
    # Three leaves of two nodes each, so some pairs cross the spine; groups of uneven shape.
    cluster = switched(4, nodes=6, nics=2, nodes_per_leaf=2, oversubscription=2.0)
    for ranks in (tuple(range(24)), (0, 1, 2, 4, 11, 12, 23), (3, 7), (0, 8, 16)):
        walked: dict[int, int] = {}
        for a in ranks:
            for b in ranks:
                for link in cluster.topology.route(a, b).links if a != b else ():
                    walked[link] = walked.get(link, 0) + 1
        (phase,) = CommunicationCost(cluster).collective("all_to_all", ranks, 1000, "fp16")
        assert phase.usage == walked


def test_a_message() -> None:
    cost = CommunicationCost(switched(2, nodes=2))
    phase = cost.point_to_point(0, 1, S, None)
    assert (phase.latency_ns, phase.work_bytes, list(phase.usage.values())) == (P2P_NS + 200, S, [1, 1])
    phase = cost.point_to_point(0, 2, S, None)
    assert cost.alone_ns((phase,)) == P2P_NS + 1800 + S / NIC * 1e9


def test_a_message_in_place_moves_chunk_by_chunk() -> None:
    cost = CommunicationCost(switched(2, communication=params(curve=((500_000, 0.25), (2_000_000, 0.5)))))
    phase = cost.point_to_point(0, 1, S, 1_500_000)
    # Three chunks, each a message and a kernel launch; all bytes are read and written once more at 100 bytes/ns. The
    # curve is taken at the size of a chunk. It doubles over a factor of 4 in size: 3 times 500,000 is 0.25 x 3^(1/2).
    assert phase.latency_ns == 3 * (P2P_NS + 200 + 1000) + 2 * S // 100
    assert phase.cap_bytes_per_s == pytest.approx(PORT * 0.25 * 3**0.5, abs=1)
    assert phase.work_bytes == S
    # A message that fits into the buffer is one chunk; so is an empty one.
    assert cost.point_to_point(0, 1, 1000, 1_500_000).latency_ns == P2P_NS + 200 + 1000 + 20
    assert cost.point_to_point(0, 1, 0, 1_500_000).latency_ns == P2P_NS + 200 + 1000


def test_the_size_curve_applies_to_the_narrowest_link() -> None:
    curve = ((1000, 0.5), (10**6, 1.0))
    cost = CommunicationCost(switched(2, nodes=2, communication=params(curve=curve)))
    assert cost.point_to_point(0, 2, 1000, None).cap_bytes_per_s == NIC // 2
    assert cost.point_to_point(0, 2, 10, None).cap_bytes_per_s == NIC // 2
    assert cost.point_to_point(0, 2, 10**6, None).cap_bytes_per_s is None
    # Eight channels cross every port of a node, but only one of its eight NICs: that NIC is what binds.
    wide = CommunicationCost(switched(8, nodes=2, nics=8, communication=params(curve=curve)))
    (phase,) = wide.collective("all_gather", tuple(range(16)), 1000, "fp16")
    assert max(phase.usage.values()) >= 7
    assert phase.cap_bytes_per_s == NIC // 2


def test_a_curve_that_would_reward_padding_is_lowered() -> None:
    # 1000 bytes take as long as 10,000 would at full rate; 2000 bytes no less, so 0.2 of the rate, not 0.6.
    cost = CommunicationCost(switched(2, communication=params(curve=((1000, 0.1), (2000, 0.6), (20_000, 1.0)))))
    assert cost.point_to_point(0, 1, 1000, None).cap_bytes_per_s == pytest.approx(0.1 * PORT, abs=1)
    assert cost.point_to_point(0, 1, 2000, None).cap_bytes_per_s == pytest.approx(0.2 * PORT, abs=1)
    assert cost.point_to_point(0, 1, 20_000, None).cap_bytes_per_s is None


def test_an_empty_collective_is_latency() -> None:
    for kind in KINDS:
        cost = CommunicationCost(switched(4, communication=params(curve=((1000, 0.5), (2000, 1.0)))))
        (phase,) = cost.collective(kind, (0, 1, 2, 3), 0, "fp16")
        assert phase.work_bytes == 0
        assert cost.alone_ns((phase,)) == BASE_NS + (6 if kind == "all_reduce" else 3) * INSIDE


def test_an_unknown_collective() -> None:
    with pytest.raises(InputError, match=r"given the collective 'gossip', expected one of all_reduce, all_gather"):
        CommunicationCost(switched(2)).collective("gossip", (0, 1), 8, "fp16")


def test_two_levels_beat_a_flat_ring_where_the_nic_is_narrow() -> None:
    # 4 nodes of 4: flat, 2 x 15/16 S pass each NIC; nested 4 shards of S/4, 2 x 3/4 each, so 1.5 S.
    ranks, size = tuple(range(16)), 10**8
    flat = alone_ns(switched(4, nodes=4), "all_reduce", ranks, size)
    nested = alone_ns(switched(4, nodes=4, communication=params(("ring", "hierarchical"))), "all_reduce", ranks, size)
    inside_ns = 2 * (BASE_NS + 3 * INSIDE + 0.75 * size / PORT * 1e9)
    across_ns = BASE_NS + 6 * BETWEEN + 1.5 * size / NIC * 1e9
    assert nested == pytest.approx(inside_ns + across_ns)
    flat_ns = BASE_NS + 30 * (12 * INSIDE + 4 * BETWEEN) / 16 + 1.875 * size / NIC * 1e9
    assert nested < flat == pytest.approx(flat_ns)


ALL = ("ring", "tree", "hierarchical", "in-switch")
CURVE = ((10**4, 0.05), (10**5, 0.7), (10**6, 0.6), (10**8, 1.0))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_collective_beats_the_ports(data: st.DataObject) -> None:
    nodes, gpus = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 4, 8]))
    ranks = data.draw(st.permutations(range(nodes * gpus)))[: max(2, data.draw(st.integers(2, 32)))]
    size = data.draw(st.integers(0, 10**10))
    if len(ranks) < 2:
        return
    n, topology = len(ranks), ALL[: data.draw(st.integers(1, 4))]
    cluster = switched(gpus, nodes, communication=params(topology, CURVE, least=5, efficiency=1.0))
    cost = CommunicationCost(cluster)
    least = {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0, "reduce": 1.0}
    for kind in KINDS:
        phases = cost.collective(kind, tuple(ranks), size, "fp16")
        share = least.get(kind, (n - 1) / n)
        if kind == "all_reduce" and "in-switch" in topology:
            share = 1.0
        assert cost.alone_ns(phases) >= share * size / PORT * 1e9 - 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**9), st.integers(0, 10**9), st.booleans())
def test_more_bytes_never_take_less_time(kind: str, one: int, other: int, across: bool) -> None:
    cost = CommunicationCost(switched(8, nodes=2, nics=2, communication=params(ALL, CURVE, least=5)))
    ranks = tuple(range(16 if across else 8))
    less, more = (cost.collective(kind, ranks, size, "fp16") for size in sorted((one, other)))
    # Work is rounded up to whole bytes.
    byte_ns = sum(1e9 / p.cap_bytes_per_s for p in less if p.cap_bytes_per_s)
    assert cost.alone_ns(less) <= cost.alone_ns(more) + 16 + byte_ns
    less_p2p, more_p2p = (cost.point_to_point(0, 9, size, 10**6) for size in sorted((one, other)))
    assert cost.alone_ns((less_p2p,)) <= cost.alone_ns((more_p2p,)) + 16


def test_usage_does_not_depend_on_the_size_of_an_algorithm() -> None:
    cost = CommunicationCost(load_cluster("dgx-a100-80g", nodes=4))
    ranks = tuple(range(32))
    seen = {
        tuple(sorted(p.usage.items()))
        for s in (8, 2**20, 2**34)
        for p in cost.collective("all_gather", ranks, s, "bf16")
    }
    assert len(seen) == 1
    messages = {tuple(sorted(cost.point_to_point(0, 9, s, None).usage.items())) for s in (8, 2**20, 2**34)}
    assert len(messages) == 1


def test_the_basis_of_transfers() -> None:
    cost = CommunicationCost(switched(2))
    assert (cost.message_basis, cost.collective_basis) == ("interpolated", "interpolated")
    cost = CommunicationCost(switched(2, communication=params(kind="assumed")))
    assert (cost.message_basis, cost.collective_basis) == ("assumed", "interpolated")


def test_a_thousand_ranks_in_symmetric_groups_are_priced_alike() -> None:
    cost = ClusterCost(load_cluster("dgx-a100-80g", nodes=128))
    for size in (2**10, 2**20, 2**28):
        phases = [cost.collective("all_reduce", tuple(range(k, 1024, 8)), size, "bf16") for k in range(8)]
        assert {tuple((p.latency_ns, p.work_bytes, p.cap_bytes_per_s) for p in found) for found in phases} == {
            tuple((p.latency_ns, p.work_bytes, p.cap_bytes_per_s) for p in phases[0])
        }
    hops = [cost.point_to_point(r, r // 8 * 8 + (r + 1) % 8, 2**26, None) for r in range(1024)]
    assert {(p.latency_ns, p.work_bytes, p.cap_bytes_per_s) for p in hops} == {
        (hops[0].latency_ns, 2**26, hops[0].cap_bytes_per_s)
    }


def test_messages_reach_their_share_of_what_collectives_reach() -> None:
    cost = CommunicationCost(switched(4, communication=params(p2p_efficiency=0.8)))
    assert cost.point_to_point(0, 1, 10**9, None).cap_bytes_per_s == int(0.8 * PORT)
    # A curve that gives half the bandwidth at this size multiplies.
    curved = CommunicationCost(switched(4, communication=params(p2p_efficiency=0.8, curve=((10**9, 0.5),))))
    assert curved.point_to_point(0, 1, 10**9, None).cap_bytes_per_s == int(int(0.5 * PORT) * 0.8)
    assert curved.collective("all_gather", (0, 1), 10**9, "fp16")[0].cap_bytes_per_s == int(0.5 * PORT)


def test_messages_between_many_nodes_stall_where_the_profile_says_so() -> None:
    """From so many nodes on, and only on the way from node to node."""
    stalls = {"communication.message_stall": "280 ms", "communication.message_stall_nodes": 4}

    def latencies(nodes: int) -> list[int]:
        plain, stalled = (
            CommunicationCost(load_cluster("dgx-h100", nodes=nodes, changes=changes)) for changes in ({}, stalls)
        )
        ways = ((0, 1), (0, 8))
        return [stalled.point_to_point(*w, 64, None).latency_ns - plain.point_to_point(*w, 64, None).latency_ns
                for w in ways]  # fmt: skip

    assert latencies(3) == [0, 0]
    assert latencies(4) == [0, 280_000_000]
