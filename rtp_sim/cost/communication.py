"""Phases of transfers on a cluster: point-to-point messages and collectives as ring, tree, hierarchical or in-switch.

A phase has a latency and a flow over the links of the real topology; the engine shares links among flows. With S
bytes (the whole array of the operation) and n ranks, every edge of the ring carries

    all-reduce            2 (n-1)/n S in 2 (n-1) steps
    all-gather, reduce-scatter  (n-1)/n S in n-1 steps
    broadcast, reduce     S in n-1 steps, pipelined down a chain from or to the root

a tree all-reduce 2 S (chains inside the nodes, a double binary tree between them) in the steps of NCCL's tuning model,
2 (ranks per node - 1) inside and 2 log2(nodes) between; reduction in the switch (NVLink SHARP) S up and S down each
port at once. All-to-all sends S/n straight from everyone to everyone else. The library is taken to pick the algorithm
that is fastest when alone. Latencies are the library's steps plus those of the links on the way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil, log

from rtp_sim.cost.cores import Cores
from rtp_sim.cost.groups import Group, Ranks, Usage, Way
from rtp_sim.engine.costs import Phase
from rtp_sim.errors import InputError
from rtp_sim.hardware.spec import Cluster, Number

_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
_CHAINS = {"broadcast": "from root", "reduce": "to root"}
KINDS = (*_ROUNDS, *_CHAINS, "all_to_all")


class CommunicationCost:
    """Prices of messages and collectives on one cluster. Usage depends on ranks and algorithm, never on size."""

    def __init__(self, cluster: Cluster, cores: Cores | None = None) -> None:
        self.cluster, self.params, self.topology, self.cores = cluster, cluster.communication, cluster.topology, cores
        self._curve = _monotone(self.params.size_curve)
        self._groups: dict[Ranks, Group] = {}
        self._pairs: dict[tuple[int, int], Way] = {}
        self._nested: dict[Ranks, tuple[Way, Way, float, float]] = {}
        self.point_to_point = lru_cache(maxsize=None)(self._point_to_point)
        self.collective = lru_cache(maxsize=None)(self._collective)
        p = self.params
        curve = [p.size_curve_provenance] if p.size_curve_provenance else []
        self.message_basis = _basis([p.p2p_base_ns, p.p2p_efficiency, *curve])
        self.collective_basis = _basis([p.collective_base_ns, p.collective_step_intra_ns, *curve])

    # ---- point to point

    def _point_to_point(self, source: int, target: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One message; `chunk_bytes` moves it in pieces through a bounce buffer, each copied out of it afterwards."""
        way = self._pair(source, target)
        once_ns = self.params.p2p_base_ns.value + self.topology.route(source, target).latency_ns
        once_ns += self._stall_ns(source, target)
        if chunk_bytes is None or chunk_bytes <= 0:
            cap = self._message_cap(way, size_bytes)
            return self._phase(once_ns, size_bytes, way, way.usage, cap, self._size_fraction(size_bytes))
        device = self.cluster.device
        copy_bytes_per_s = device.memory_bandwidth_bytes_per_s.value * device.memory_efficiency.value / 2
        chunks = max(1, -(-size_bytes // chunk_bytes))
        latency_ns = chunks * (once_ns + device.kernel_floor_ns.value) + size_bytes / copy_bytes_per_s * 1e9
        return Phase(round(latency_ns), size_bytes, way.usage, self._message_cap(way, min(size_bytes, chunk_bytes)))

    def _stall_ns(self, source: int, target: int) -> float:
        """What a message between nodes waits for on a cluster of as many nodes as the profile says."""
        stall, least = self.params.message_stall_ns, self.params.message_stall_nodes
        if stall is None or least is None or self.topology.nodes < least.value:
            return 0.0
        return 0.0 if self.topology.node_of(source) == self.topology.node_of(target) else stall.value

    def _pair(self, source: int, target: int) -> Way:
        """The links of one message."""
        way = self._pairs.get((source, target))
        if way is None:
            links = self.topology.route(source, target).links
            usage: Usage = {}
            for link in links:
                usage[link] = usage.get(link, 0) + 1
            rate = min(self.topology.links[link].bandwidth_bytes_per_s // weight for link, weight in usage.items())
            if self.cores is not None:
                nodes = self.topology.node_of(source), self.topology.node_of(target)
                for pool, weight in self.cores.message(*nodes):
                    usage[pool] = usage.get(pool, 0) + weight
                rate = min(rate, *(self.cores.capacity // usage[self.cores.pool(node)] for node in nodes))
            way = self._pairs[source, target] = Way(usage, 1, max(1, rate))
        return way

    def _phase(
        self, latency_ns: float, work_bytes: int, way: Way, usage: Usage, cap: int | None, fraction: float
    ) -> Phase:  # fmt: skip
        """Latency, then bytes at the rate of the way or the cap, of which the size allows `fraction`. Where ranks are
        on CPUs the cores are busy from the first moment to the last, with waking up, handing over and slow copies of
        what no cache holds: there all of the time is work, as many bytes as would pass in it at the best size."""
        if self.cores is None:
            return Phase(round(latency_ns), work_bytes, usage, cap)
        rate = way.rate_bytes_per_s if cap is None else min(cap, way.rate_bytes_per_s)
        best = min(way.rate_bytes_per_s, round(rate / fraction))
        took_ns = latency_ns + work_bytes / rate * 1e9
        return Phase(0, round(took_ns * best / 1e9), usage, None if best == way.rate_bytes_per_s else best)

    def _message_cap(self, way: Way, size_bytes: int) -> int | None:
        """The rate of a message: what a collective of this size reaches, times the library's efficiency between two."""
        efficiency = self.params.p2p_efficiency.value
        cap = self._cap(way, size_bytes)
        if efficiency == 1.0:
            return cap
        return max(1, int((way.rate_bytes_per_s if cap is None else cap) * efficiency))

    def _cap(self, way: Way, size_bytes: int) -> int | None:
        """The rate of the work for a message of this size, where the measured size curve says less than all."""
        fraction = self._size_fraction(size_bytes)
        return None if fraction >= 1.0 else max(1, int(way.rate_bytes_per_s * fraction))

    def _size_fraction(self, size_bytes: int) -> float:
        """The size curve at this size: a power of the size between two points, constant outside them."""
        return _on_curve(self._curve, size_bytes)

    # ---- collectives

    def _collective(self, kind: str, ranks: Ranks, size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """The phases of the fastest algorithm on offer for this kind, group and size. InputError for no such kind."""
        group = self._group(ranks)
        if kind == "all_to_all":
            return self._all_to_all(group, size_bytes)
        if kind in _CHAINS:
            return self._chain(_CHAINS[kind], group, size_bytes)
        if kind not in _ROUNDS:
            raise InputError(f"given the collective {kind!r}, expected one of {', '.join(KINDS)}")
        if kind in self.params.kinds:
            return self._measured_kind(kind, _ROUNDS[kind], group, size_bytes)
        ring = self._ring(_ROUNDS[kind], group, size_bytes)
        if kind != "all_reduce":
            return ring
        return min((ring, *self._instead_of_ring(group, size_bytes)), key=self.alone_ns)

    def _instead_of_ring(self, group: Group, size_bytes: int) -> list[tuple[Phase, ...]]:
        """An all-reduce by the other algorithms that the library has and that this group can use."""
        names, least = self.params.algorithms, self.params.in_switch_reduction_min_ranks
        options = []
        if "tree" in names and group.nodes > 1:
            options.append(self._tree(group, size_bytes))
        if "hierarchical" in names and group.nests:
            options.append(self._hierarchical(group, size_bytes))
        if "in-switch" in names and group.nodes == 1 and least is not None and group.size >= least.value:
            options.append(self._in_switch(group, size_bytes))
        return options

    def alone_ns(self, phases: tuple[Phase, ...]) -> float:
        """Time of the phases when nothing else uses the links."""
        total_ns = 0.0
        for p in phases:
            rates = [self.capacity(link) / weight for link, weight in p.usage.items()]
            rates += [p.cap_bytes_per_s] if p.cap_bytes_per_s else []
            total_ns += p.latency_ns + (p.work_bytes / min(rates) * 1e9 if p.work_bytes and rates else 0.0)
        return total_ns

    def capacity(self, link: int) -> int:
        """Bytes/s of a wire, or the units per second of a pool of cores."""
        if self.cores is not None and self.cores.is_pool(link):
            return self.cores.capacity
        return self.topology.links[link].bandwidth_bytes_per_s

    def _group(self, ranks: Ranks) -> Group:
        if ranks not in self._groups:
            self._groups[ranks] = Group(ranks, self.topology, self.params, self.cores)
        return self._groups[ranks]

    def _measured_kind(self, kind: str, rounds: int, group: Group, size_bytes: int) -> tuple[Phase, ...]:
        """A ring of a kind that has been measured by itself."""
        params, way = self.params.kinds[kind], group.way("ring")
        steps = rounds * (group.size - 1)
        work_bytes = ceil(size_bytes * steps / group.size / way.channels)
        wires = [link for link in way.usage if self.cores is None or not self.cores.is_pool(link)]
        rate = min(self.topology.links[link].bandwidth_bytes_per_s / way.usage[link] for link in wires)
        cap = max(1, int(rate * params.efficiency.value * self._size_fraction(size_bytes)))
        usage = way.usage if self.cores is None else self._kept_busy(way.usage, params.efficiency.value)
        fraction = self._size_fraction(size_bytes)
        return (self._phase(steps * params.step_ns.value, work_bytes, way, usage, cap, fraction),)

    def _kept_busy(self, usage: Usage, efficiency: float) -> Usage:
        """The usage of a kind with an efficiency of its own: cores are as busy as with messages while it lasts, so a
        slower kind costs more core time per byte."""
        assert self.cores is not None
        slower = self.params.p2p_efficiency.value / efficiency
        return {link: max(1, round(w * slower)) if self.cores.is_pool(link) else w for link, w in usage.items()}

    def _flow(self, latency_ns: float, edge_bytes: float, way: Way, message_bytes: int) -> Phase:
        """A phase that moves `edge_bytes` over every edge, spread over the channels."""
        base_ns = self.params.collective_base_ns.value
        work_bytes = ceil(edge_bytes / way.channels)
        cap, fraction = self._cap(way, message_bytes), self._size_fraction(message_bytes)
        return self._phase(base_ns + latency_ns, work_bytes, way, way.usage, cap, fraction)

    def _ring(self, rounds: int, group: Group, size_bytes: int) -> tuple[Phase, ...]:
        steps = rounds * (group.size - 1)
        edge_bytes = size_bytes * steps / group.size
        chunk = self.params.collective_chunk_inter_ns
        paced_ns = chunk.value if chunk is not None and group.nodes > 1 else 0.0
        return (self._flow(steps * max(group.hops.mean_ns, paced_ns), edge_bytes, group.way("ring"), size_bytes),)

    def _chain(self, way: str, group: Group, size_bytes: int) -> tuple[Phase, ...]:
        steps = group.size - 1
        return (self._flow(steps * group.hops.mean_ns, size_bytes, group.way(way), size_bytes),)

    def _all_to_all(self, group: Group, size_bytes: int) -> tuple[Phase, ...]:
        """Each pair's S/n bytes at once; the library takes a step per peer, and all wires are waited for together."""
        steps = group.size - 1
        share = ceil(size_bytes / group.size)
        return (self._flow(steps * group.hops.mean_ns, share, group.way("pairs"), size_bytes),)

    def _tree(self, group: Group, size_bytes: int) -> tuple[Phase, ...]:
        """Up and down: the whole array passes every edge twice."""
        inside = 2 * (max(len(local) for local in group.members) - 1)
        between = 2 * (group.nodes - 1).bit_length()
        latency_ns = inside * group.hops.inside_ns + between * group.hops.between_ns
        return (self._between(group, self._flow(latency_ns, 2 * size_bytes, group.way("ring"), size_bytes)),)

    def _between(self, group: Group, phase: Phase) -> Phase:
        """The phase of an all-reduce, no faster than was measured over so many nodes."""
        if group.nodes == 1 or not self.params.all_reduce_nodes:
            return phase
        raw = min(self.topology.links[link].raw_bandwidth_bytes_per_s // weight for link, weight in phase.usage.items())
        most = max(1, int(raw * _on_curve(self.params.all_reduce_nodes, group.nodes)))
        return replace(phase, cap_bytes_per_s=min(most, phase.cap_bytes_per_s or most))

    def _in_switch(self, group: Group, size_bytes: int) -> tuple[Phase, ...]:
        """Each port carries the array up once and down once, at the measured fraction of its raw rate."""
        usage = dict.fromkeys(group.way("ring").usage, 1)
        efficiency = self.params.in_switch_efficiency
        raw = min(self.topology.links[link].raw_bandwidth_bytes_per_s for link in usage)
        cap = int(raw * (efficiency.value if efficiency else 1.0) * self._size_fraction(size_bytes))
        start = self.params.in_switch_base_ns
        base_ns = self.params.collective_base_ns.value + (start.value if start else 0.0)
        latency_ns = base_ns + 2 * group.hops.mean_ns
        return (Phase(round(latency_ns), size_bytes, usage, max(1, cap)),)

    def _hierarchical(self, group: Group, size_bytes: int) -> tuple[Phase, ...]:
        """Reduce-scatter inside each node, all-reduce of the shards between nodes, all-gather inside."""
        inside, between, inside_ns, between_ns = self._nest(group)
        local, nodes = len(group.members[0]), group.nodes
        inside_bytes = size_bytes * (local - 1) / local
        shard_bytes = ceil(size_bytes / local)
        across_bytes = shard_bytes * 2 * (nodes - 1) / nodes
        scatter = self._flow((local - 1) * inside_ns, inside_bytes, inside, size_bytes)
        across = self._flow(2 * (nodes - 1) * between_ns, across_bytes, between, shard_bytes)
        return scatter, across, scatter

    def _nest(self, group: Group) -> tuple[Way, Way, float, float]:
        """The rings inside all nodes together, those between nodes together, and the hops of each."""
        if group.ranks not in self._nested:
            insides = [self._group(local) for local in group.members]
            betweens = [self._group(shard) for shard in zip(*group.members, strict=True)]
            self._nested[group.ranks] = (
                self._together(group, insides),
                self._together(group, betweens),
                max(g.hops.mean_ns for g in insides),
                max(g.hops.mean_ns for g in betweens),
            )
        return self._nested[group.ranks]

    def _together(self, whole: Group, parts: list[Group]) -> Way:
        """The rings of several groups of one size in lockstep, as one way."""
        usage: Usage = {}
        for part in parts:
            for link, weight in part.way("ring").usage.items():
                usage[link] = usage.get(link, 0) + weight
        return whole.measured(usage, min(part.way("ring").channels for part in parts))


def _on_curve(curve: Sequence[tuple[int, float]], at: int) -> float:
    """The value of a curve: a power between two points, constant outside them, 1 of an empty one."""
    if not curve or at >= curve[-1][0]:
        return curve[-1][1] if curve else 1.0
    i = bisect_left([c[0] for c in curve], at)
    if i == 0:
        return curve[0][1]
    (low, f0), (high, f1) = curve[i - 1], curve[i]
    return float(f0 * (f1 / f0) ** (log(at / low) / log(high / low)))


def _monotone(curve: tuple[tuple[int, float], ...]) -> list[tuple[int, float]]:
    """The size curve, lowered where a larger message took less time than a smaller one, so that no message is priced
    above a larger one. Lowered and not raised: on the other machines measured, such sizes were slower still."""
    lowered = list(curve[:1])
    for size, fraction in curve[1:]:
        smaller, reached = lowered[-1]
        lowered.append((size, min(fraction, reached * size / smaller)))
    return lowered


def _basis(numbers: list[Number]) -> str:
    """ "interpolated" between measurements if all numbers are measured, else "assumed"."""
    return "interpolated" if all(number.kind == "measured" for number in numbers) else "assumed"
