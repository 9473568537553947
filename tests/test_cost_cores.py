"""The pool of CPU cores: what computing and transfers take from it, alone and together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cost_helpers import P2P_NS, loopback, number, switched
from engine_helpers import one_ring

from rtp_sim.cost.cores import CORE_NS_PER_KILOBYTE
from rtp_sim.cost.emulated import EmulatedCost
from rtp_sim.cost.model import ClusterCost, handled_bytes
from rtp_sim.engine.simulate import simulate
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import KindParams, MeasuredKernel
from rtp_sim.link import Link
from rtp_sim.schedule.ir import Collective, Compute, Hop, Op, Program, Shift

WORK = (("numel", 10**7),)


def seconds(cost: ClusterCost, ranks: int) -> float:
    """Simulated time of one kernel on every rank."""
    kernel = Op(0, "work", "compute", Compute("gelu", "fp16", WORK))
    timeline = simulate(one_ring(ranks, Program("p", {}, (kernel,))), cost)
    return max(int(times.end_ns[-1] - times.start_ns[-1]) for times in timeline.ranks.values()) / 1e9


def test_ranks_beyond_the_cores_share_them() -> None:
    # Two ranks have a core each; four ranks on two cores compute at half speed, six at a third.
    alone = seconds(ClusterCost(loopback(2), host_cores=2), 2)
    assert alone == ClusterCost(loopback(2)).compute("gelu", "fp16", WORK).duration_ns / 1e9
    assert seconds(ClusterCost(loopback(4), host_cores=2), 4) == 2 * alone
    assert seconds(ClusterCost(loopback(6), host_cores=2), 6) == pytest.approx(3 * alone, abs=2e-9)  # rounded up
    assert seconds(ClusterCost(loopback(4), host_cores=4), 4) == alone


def test_the_pool_is_a_link_after_the_wires() -> None:
    cluster = loopback(4)
    cost = ClusterCost(cluster, host_cores=3)
    pool = len(cluster.topology.links)
    assert cost.compute_pool(0) == cost.compute_pool(3) == pool
    assert cost.link_capacity(pool) == 3 * 10**12
    assert cost.link_capacity(pool - 1) == 10**9


def test_accelerators_have_no_pool() -> None:
    cost = ClusterCost(switched(2))
    assert cost.compute_pool(0) is None
    assert cost.overlap_slowdown_permille == 1250


def test_messages_take_core_time() -> None:
    cluster = loopback(4)
    cost, pool = ClusterCost(cluster, host_cores=2), len(cluster.topology.links)
    assert cost.point_to_point(0, 1, 1000, None).usage[pool] == CORE_NS_PER_KILOBYTE
    # Each of a ring's four edges carries a message; all-to-all has twelve.
    assert cost.collective("all_reduce", (0, 1, 2, 3), 1000, "fp32")[0].usage[pool] == 4 * CORE_NS_PER_KILOBYTE
    assert cost.collective("broadcast", (0, 1, 2, 3), 1000, "fp32")[0].usage[pool] == 3 * CORE_NS_PER_KILOBYTE
    assert cost.collective("all_to_all", (0, 1, 2, 3), 1000, "fp32")[0].usage[pool] == 12 * CORE_NS_PER_KILOBYTE


def test_the_cores_bound_what_many_ranks_can_send() -> None:
    # Six ranks send 1 GB/s each if alone; one core moves 1e6/380 bytes per ms, so 2.63 GB/s for all six together.
    cost = ClusterCost(loopback(6), host_cores=1)
    (phase,) = cost.collective("all_gather", tuple(range(6)), 6 * 10**6, "fp32")
    rate = min(cost.link_capacity(link) // weight for link, weight in phase.usage.items())
    assert rate == 10**12 // (6 * 380)
    (wide,) = ClusterCost(loopback(6), host_cores=64).collective("all_gather", tuple(range(6)), 6 * 10**6, "fp32")
    assert wide.usage == phase.usage
    # The base of 10 us and five steps of 1 us are work as well: bytes that would pass meanwhile.
    assert (phase.latency_ns, phase.work_bytes) == (0, 5 * 10**6 + round(15e-6 * 10**12 / (6 * 380)))
    assert (wide.latency_ns, wide.work_bytes) == (0, 5 * 10**6 + 15_000)


def test_a_kind_with_a_rate_of_its_own_keeps_the_cores_as_busy_as_messages() -> None:
    cluster = loopback(2)
    kinds = {"reduce_scatter": KindParams(number(3_000), number(0.5))}
    cost = ClusterCost(replace(cluster, communication=replace(cluster.communication, kinds=kinds)), host_cores=2)
    (phase,), pool = cost.collective("reduce_scatter", (0, 1), 10**6, "fp32"), len(cluster.topology.links)
    # Half the rate of a message, twice the core time a byte; the step of 3 us as bytes at that rate.
    assert phase.usage[pool] == 2 * 2 * CORE_NS_PER_KILOBYTE
    assert (phase.cap_bytes_per_s, phase.work_bytes) == (5 * 10**8, 5 * 10**5 + 1_500)


def test_a_transfer_slows_computing_on_the_same_cores() -> None:
    # One core, two ranks: each computes 0.5 of it alone. Both sending at 1 GB/s would want 0.76 of it, so
    # computing takes longer than 2 kernels' time, and no longer than that plus the transfers' core time.
    cost = ClusterCost(loopback(2), host_cores=1)
    kernel_ns = cost.compute("gelu", "fp16", WORK).duration_ns
    size = 10**6
    ops = (
        Op(0, "send", "shift", Shift("ring", (Hop((1,), size),))),
        Op(1, "work", "compute", Compute("gelu", "fp16", WORK)),
    )
    timeline = simulate(one_ring(2, Program("p", {}, ops)), cost)
    took_ns = max(int(times.end_ns[1] - times.start_ns[1]) for times in timeline.ranks.values())
    # A message's base is work, too: as many bytes as pass in it at 1 GB/s.
    passed = size + P2P_NS
    assert 2 * kernel_ns < took_ns <= 2 * kernel_ns + 2 * passed * 380 // 1000 + 2


def test_slow_sizes_keep_the_cores_busy_as_well() -> None:
    # Messages of 1 MB pass at half the rate: as much core time as twice the bytes at the full one.
    cluster = loopback(2)
    curve = ((1000, 1.0), (10**6, 0.5))
    cost = ClusterCost(replace(cluster, communication=replace(cluster.communication, size_curve=curve)))
    phase = cost.point_to_point(0, 1, 10**6, None)
    assert (phase.latency_ns, phase.work_bytes, phase.cap_bytes_per_s) == (0, 2 * 10**6 + P2P_NS, None)


def test_an_emulated_link_hides_the_first_copy() -> None:
    # Two copies of 1 MB take 1 ms at 1 GB/s, after a base of 7 us. Over a link of 0.2 ms and 1 GB/s the first half
    # millisecond lies within the link's 1.2 ms; over one of 0.1 ms and 10 GB/s, 0.2 ms, the copies are all there is.
    base = ClusterCost(loopback(2), host_cores=2)
    slow = EmulatedCost(base, Link(200_000, 10**9)).point_to_point(0, 1, 10**6, None)
    assert (slow.latency_ns, slow.work_bytes) == (700_000, 10**6 + P2P_NS)
    fast = EmulatedCost(base, Link(100_000, 10**10)).point_to_point(0, 1, 10**6, None)
    assert (fast.latency_ns, fast.work_bytes) == (0, 10**6 + P2P_NS)
    # An all-gather of two: half an array goes in (2 x 1/2 read and written), all of it comes out (2): a third.
    (gather,) = EmulatedCost(base, Link(200_000, 10**9)).collective("all_gather", (0, 1), 10**6, "fp32")
    assert gather.latency_ns == 200_000 + 500_000 - round(5 * 10**5 / 3)
    # An all-reduce of two: in (2), both read and the sum written (3). 1 MB over an edge, 0.4 of it before they meet.
    (summed,) = EmulatedCost(base, Link(200_000, 10**9)).collective("all_reduce", (0, 1), 10**6, "fp32")
    assert summed.latency_ns == 2 * (200_000 + 500_000) - 400_000
    # Four gather: a quarter in, all of it out, a fifth of it before they meet.
    (four,) = EmulatedCost(ClusterCost(loopback(4), host_cores=4), Link(200_000, 10**9)).collective(
        "all_gather", (0, 1, 2, 3), 10**6, "fp32"
    )
    assert four.latency_ns == 3 * (200_000 + 250_000) - 750_000 // 5


def test_the_local_profile_has_two_cores() -> None:
    cluster = load_cluster("cpu-local", gpus=4)
    cost = ClusterCost(cluster)
    pool = cost.compute_pool(3)
    assert pool is not None
    assert cost.link_capacity(pool) == 2 * 10**12
    # 5.26 GB/s of messages at most: the 5.6 GB/s that were measured over loopback, from the other side.
    assert cost.link_capacity(pool) / CORE_NS_PER_KILOBYTE == pytest.approx(5.6e9, rel=0.07)


@pytest.mark.parametrize(
    ("kind", "reads", "writes", "handled"),
    [
        ("all_reduce", ("bucket",), ("bucket",), 0),  # moves where it lies
        ("all_reduce", ("g0", "g1"), ("g0", "g1"), 2000),  # laid end to end, then cut up
        ("reduce_scatter", ("g0", "g1"), ("share",), 1000),  # laid end to end
        ("reduce_scatter", ("g",), ("share",), 0),
        ("all_gather", ("share",), ("whole",), 0),  # what arrives becomes the buffer
        ("all_gather", ("w0", "w1"), ("w0", "w1"), 1000),  # new weights into the old ones' places
        ("all_gather", ("share",), ("a", "b"), 1000),
        ("all_gather", ("w",), ("w",), 1000),
    ],
)
def test_the_host_copies_what_lies_in_several_buffers(
    kind: str, reads: tuple[str, ...], writes: tuple[str, ...], handled: int
) -> None:
    assert handled_bytes(Op(0, "c", "dp", Collective(kind, "dp", 1000, "fp32"), reads, writes)) == handled  # type: ignore[arg-type]


def test_handling_costs_the_host_of_a_cpu_a_copy() -> None:
    op = Op(0, "c", "dp", Collective("all_gather", "dp", 10**6, "fp32"), ("w0", "w1"), ("w0", "w1"))
    cluster = loopback(2)
    plain = ClusterCost(cluster).host_issue_ns(op)
    # 0.05 ns per byte read or written: a copy of 1 MB is 2 MB of both.
    line = MeasuredKernel(10_000, 0.0, 0.05, cluster.device.host_issue_ns)
    measured = replace(cluster, device=replace(cluster.device, kernels={("copy", "fp32"): line}))
    assert ClusterCost(measured).host_issue_ns(op) == plain + 100_000
