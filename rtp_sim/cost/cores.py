"""The pool of CPU cores that the ranks of one host share, for computing and for moving messages.

A rank on a CPU computes on a core, and its messages cost core time too, since gloo copies through sockets. Both are
put on one extra link per node, numbered after the topology's own, whose capacity is the host's cores: so four ranks
on two cores compute at half speed, and a transfer slows computing down, which comes second (`CostModel.compute_pool`).
"""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.hardware.spec import Cluster

PS_PER_S = 10**12
LOCAL_CORES = 2
"""Assumed for a host whose profile does not say ([host]): what the figures of cpu-local were measured on."""
CORE_NS_PER_KILOBYTE = 380
"""Core time of one message per 1000 bytes, sender and receiver together. Measured with gloo ring shifts on a 2-core
host: 0.85 CPU seconds per GB that each of 2 ranks sends, 2.7 with 8 ranks: 0.425 and 0.34 ns per byte; the mean."""


@dataclass(frozen=True, slots=True)
class Cores:
    """`count` cores on each node. Pool links are numbered from `first_link`."""

    first_link: int
    count: int
    core_ns_per_kilobyte: int = CORE_NS_PER_KILOBYTE

    @property
    def capacity(self) -> int:
        """Picoseconds of core time per second of one pool."""
        return self.count * PS_PER_S

    def is_pool(self, link: int) -> bool:
        """Whether the link is a pool and no wire."""
        return link >= self.first_link

    def pool(self, node: int) -> int:
        """The pool's link number."""
        return self.first_link + node

    def message(self, source_node: int, target_node: int) -> tuple[tuple[int, int], ...]:
        """(pool, ps of core time per byte) of a message: between two nodes, each side pays half."""
        if source_node == target_node:
            return ((self.pool(source_node), self.core_ns_per_kilobyte),)
        half = max(1, self.core_ns_per_kilobyte // 2)
        return (self.pool(source_node), half), (self.pool(target_node), half)


def cores_of(cluster: Cluster, count: int | None = None) -> Cores | None:
    """The pools of a cluster whose ranks are on CPUs: those of a node talk over loopback links. None elsewhere."""
    if all(link.kind != "loopback" for link in cluster.topology.template.links):
        return None
    first_link, host = len(cluster.topology.links), cluster.host
    if host is None:
        return Cores(first_link, LOCAL_CORES if count is None else count)
    return Cores(first_link, round(host.cores.value) if count is None else count,
                 max(1, round(host.core_ns_per_megabyte.value / 1000)))  # fmt: skip
