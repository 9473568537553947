"""Phases of transfers on a cluster: point-to-point messages and collectives as ring, tree, hierarchical or in-switch.

A phase has a latency and a flow over the links of the real topology; the engine shares links among flows. Bytes per
rank follow the algorithms' textbook formulas: a ring all-reduce of S bytes over n ranks sends 2(n-1)/n*S over every
edge in 2(n-1) steps, all-gather, reduce-scatter and all-to-all (n-1)/n*S of the total array in n-1 steps; a broadcast
or reduce S, pipelined; a tree moves what a ring does in 2*log2(n) steps; reduction in the switch (NVLink SHARP) moves S
up and S down each port at once. The library is taken to pick the algorithm that is fastest when alone.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from math import ceil, log, log2

from rtp_sim.engine.costs import Phase
from rtp_sim.hardware.spec import Cluster

Ranks = tuple[int, ...]
Usage = dict[int, int]

_RING_STEPS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1, "reduce": 1}


class CommunicationCost:
    """Prices of messages and collectives on one cluster. Usage depends on ranks and algorithm, never on size."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.params, self.topology = cluster, cluster.communication, cluster.topology
        self._usages: dict[tuple[str, Ranks], tuple[Usage, int]] = {}
        self.point_to_point = lru_cache(maxsize=None)(self._point_to_point)
        self.collective = lru_cache(maxsize=None)(self._collective)
        kinds = [self.params.size_curve_provenance or self.params.collective_base_ns, self.params.collective_step_intra_ns]
        self.basis = "interpolated" if all(n.kind == "measured" for n in kinds) else "assumed"

    # ---- point to point

    def _point_to_point(self, source: int, target: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One message; `chunk_bytes` moves it in pieces through a bounce buffer, each copied out of it afterwards."""
        route = self.topology.route(source, target)
        usage: Usage = {}
        for link in route.links:
            usage[link] = usage.get(link, 0) + 1
        once = round(self.params.p2p_base_ns.value) + route.latency_ns
        rate = self._capped(usage, size_bytes)
        if chunk_bytes is None or chunk_bytes <= 0:
            return Phase(once, size_bytes, usage, rate)
        device = self.cluster.device
        copy_rate = device.memory_bandwidth_bytes_per_s.value * device.memory_efficiency.value / 2
        chunks = -(-size_bytes // chunk_bytes)
        latency = chunks * (once + round(device.kernel_floor_ns.value)) + round(size_bytes / copy_rate * 1e9)
        return Phase(latency, size_bytes, usage, self._capped(usage, min(size_bytes, chunk_bytes)))

    def _capped(self, usage: Usage, size_bytes: int) -> int | None:
        """The rate that a message of this size reaches where the measured size curve says less than full bandwidth."""
        fraction = self._size_fraction(size_bytes)
        if fraction >= 1.0 or not usage:
            return None
        return max(1, int(min(self.topology.links[i].bandwidth_bytes_per_s for i in usage) * fraction))

    def _size_fraction(self, size_bytes: int) -> float:
        """Interpolates the size curve in log(bytes)."""
        curve = self.params.size_curve
        if not curve or size_bytes >= curve[-1][0]:
            return curve[-1][1] if curve else 1.0
        i = bisect_left([c[0] for c in curve], size_bytes)
        if i == 0:
            return curve[0][1]
        (low, f0), (high, f1) = curve[i - 1], curve[i]
        share = (log(max(size_bytes, 1)) - log(low)) / (log(high) - log(low))
        return f0 + (f1 - f0) * share

    # ---- collectives

    def _collective(self, kind: str, ranks: Ranks, size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """The phases of the fastest algorithm on offer for this kind, group and size."""
        options = [self._ring(kind, ranks, size_bytes)]
        names = self.params.algorithms
        if kind == "all_reduce":
            if "tree" in names:
                options.append(self._tree(ranks, size_bytes))
            if "in-switch" in names and self._in_switch_fits(ranks):
                options.append(self._in_switch(ranks, size_bytes))
            if "hierarchical" in names and self._nests(ranks):
                options.append(self._hierarchical(ranks, size_bytes))
        return min(options, key=self.alone_ns)

    def alone_ns(self, phases: tuple[Phase, ...]) -> float:
        """Time of the phases when nothing else uses the links."""
        total = 0.0
        for p in phases:
            rates = [self.topology.links[i].bandwidth_bytes_per_s / w for i, w in p.usage.items()]
            rates += [p.cap_bytes_per_s] if p.cap_bytes_per_s else []
            total += p.latency_ns + (p.work_bytes / min(rates) * 1e9 if p.work_bytes and rates else 0.0)
        return total

    def _channels(self, ranks: Ranks) -> tuple[Usage, int, int]:
        """Links of all channels' rings with how often they are crossed, number of channels, and the latency of one
        round of the first ring's wires."""
        key = ("ring", ranks)
        if key not in self._usages:
            usage: Usage = {}
            channels = self.topology.channels(ranks)
            for order in channels:
                for a, b in zip(order, order[1:] + order[:1], strict=True):
                    for link in self.topology.route(a, b).links:
                        usage[link] = usage.get(link, 0) + 1
            self._usages[key] = (usage, len(channels))
        usage, count = self._usages[key]
        first = self.topology.channels(ranks)[0]
        return usage, count, max(self._wire_ns(a, b) for a, b in zip(first, first[1:] + first[:1], strict=True))

    def _wire_ns(self, a: int, b: int) -> int:
        return self.topology.route(a, b).latency_ns

    def _nodes(self, ranks: Ranks) -> int:
        return len({self.topology.node_of(r) for r in ranks})

    def _step_ns(self, ranks: Ranks, hops: int) -> float:
        """Latency of `hops` steps around the ring: those that cross nodes and those that do not, in proportion."""
        n, nodes = len(ranks), self._nodes(ranks)
        between = nodes if nodes > 1 else 0
        inside, across = self.params.collective_step_intra_ns.value, self.params.collective_step_inter_ns.value
        return hops * ((n - between) * inside + between * across) / n

    def _flow(self, latency: float, per_edge_bytes: float, usage: Usage, channels: int, message_bytes: int) -> Phase:
        """A phase that moves `per_edge_bytes` over every ring edge, spread over the channels."""
        cap = self._capped(usage, message_bytes)
        most = max(usage.values(), default=1)
        return Phase(round(latency), ceil(per_edge_bytes / channels), usage, None if cap is None else max(1, cap // most))

    def _ring(self, kind: str, ranks: Ranks, size_bytes: int) -> tuple[Phase, ...]:
        n, rounds = len(ranks), _RING_STEPS[kind]
        usage, channels, wire_ns = self._channels(ranks)
        base = self.params.collective_base_ns.value
        steps = rounds * (n - 1)
        edge_bytes = size_bytes * rounds * (n - 1) / n if kind not in ("broadcast", "reduce") else size_bytes
        latency = base + self._step_ns(ranks, steps) + steps * wire_ns
        return (self._flow(latency, edge_bytes, usage, channels, size_bytes),)

    def _tree(self, ranks: Ranks, size_bytes: int) -> tuple[Phase, ...]:
        """Chains inside nodes, a double binary tree between them: the ring's bytes, logarithmic latency."""
        n, nodes = len(ranks), self._nodes(ranks)
        usage, channels, wire_ns = self._channels(ranks)
        inside = 2 * (ceil(n / nodes) - 1) if nodes > 1 else 2 * ceil(log2(n))
        across = 2 * ceil(log2(nodes))
        p = self.params
        latency = p.collective_base_ns.value + inside * p.collective_step_intra_ns.value
        latency += across * p.collective_step_inter_ns.value + (inside + across) * wire_ns
        return (self._flow(latency, 2 * size_bytes * (n - 1) / n, usage, channels, size_bytes),)

    def _in_switch_fits(self, ranks: Ranks) -> bool:
        least = self.params.in_switch_reduction_min_ranks
        return least is not None and len(ranks) >= least.value and self._nodes(ranks) == 1

    def _in_switch(self, ranks: Ranks, size_bytes: int) -> tuple[Phase, ...]:
        """Each port carries the data up once and down once, at the measured fraction of its raw rate."""
        usage, _, wire_ns = self._channels(ranks)
        efficiency = self.params.in_switch_efficiency
        raw = min(self.topology.links[i].raw_bandwidth_bytes_per_s for i in usage)
        cap = int(raw * (efficiency.value if efficiency else 1.0) * self._size_fraction(size_bytes))
        latency = self.params.collective_base_ns.value + 2 * (self.params.collective_step_intra_ns.value + wire_ns)
        return (Phase(round(latency), size_bytes, dict.fromkeys(usage, 1), max(1, cap)),)

    def _nests(self, ranks: Ranks) -> bool:
        """Whether the group has the same number, two or more, of members on each of several nodes."""
        counts: dict[int, int] = {}
        for r in ranks:
            counts[self.topology.node_of(r)] = counts.get(self.topology.node_of(r), 0) + 1
        return len(counts) > 1 and len(set(counts.values())) == 1 and min(counts.values()) > 1

    def _hierarchical(self, ranks: Ranks, size_bytes: int) -> tuple[Phase, ...]:
        """Reduce-scatter inside each node, all-reduce of the shards between nodes, all-gather inside."""
        by_node: dict[int, list[int]] = {}
        for r in ranks:
            by_node.setdefault(self.topology.node_of(r), []).append(r)
        insides = [tuple(members) for members in by_node.values()]
        betweens = [tuple(members[i] for members in insides) for i in range(len(insides[0]))]
        shard = ceil(size_bytes / len(insides[0]))
        return (
            self._together("reduce_scatter", insides, size_bytes),
            self._together("all_reduce", betweens, shard),
            self._together("all_gather", insides, size_bytes),
        )

    def _together(self, kind: str, groups: list[Ranks], size_bytes: int) -> Phase:
        """The same ring collective in several groups at once, in lockstep, as one phase."""
        phases = [self._ring(kind, g, size_bytes)[0] for g in groups]
        usage: Usage = {}
        for p in phases:
            for link, weight in p.usage.items():
                usage[link] = usage.get(link, 0) + weight
        caps = [p.cap_bytes_per_s for p in phases if p.cap_bytes_per_s]
        return Phase(
            max(p.latency_ns for p in phases), max(p.work_bytes for p in phases), usage, min(caps) if caps else None
        )
