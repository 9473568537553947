"""A cluster with one of its numbers multiplied: what would be if the matrix units, the NICs, a latency were better or
worse than the profile says.

Numbers go by the words of profiles: device.NAME, communication.NAME, link.KIND.bandwidth. Fractions end at 1, and what
`overlap_slowdown` is scaled by is what it adds to 1. Routes and ring orders stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rtp_sim.hardware.spec import Cluster, Number

DEVICE = {
    "matmul_efficiency": "matmul_efficiency",
    "attention_efficiency": "attention_efficiency",
    "memory_bandwidth": "memory_bandwidth_bytes_per_s",
    "memory": "memory_bytes",
    "kernel_floor": "kernel_floor_ns",
    "host_issue": "host_issue_ns",
    "overlap_slowdown": "overlap_slowdown",
}
"""Name in a profile -> field of `Device`."""
COMMUNICATION = {
    "p2p_base": "p2p_base_ns",
    "p2p_efficiency": "p2p_efficiency",
    "collective_base": "collective_base_ns",
    "collective_step_intra": "collective_step_intra_ns",
    "collective_step_inter": "collective_step_inter_ns",
}
FRACTIONS = frozenset({"matmul_efficiency", "attention_efficiency", "p2p_efficiency"})


def numbers_of(cluster: Cluster) -> Iterator[tuple[str, Number]]:
    """The numbers that can be scaled and are not 0, by name; of links the bandwidth of each kind's fastest."""
    for name, field in DEVICE.items():
        yield f"device.{name}", getattr(cluster.device, field)
    for name, field in COMMUNICATION.items():
        if getattr(cluster.communication, field).value:
            yield f"communication.{name}", getattr(cluster.communication, field)
    for kind in sorted({link.kind for link in cluster.topology.links}):
        fastest = max(x.bandwidth_bytes_per_s for x in cluster.topology.links if x.kind == kind)
        yield f"link.{kind}.bandwidth", Number(fastest, "assumed", "the fastest link of this kind")


def scaled(cluster: Cluster, name: str, factor: float) -> Cluster:
    """The cluster with the number of that name times `factor`; as it is where it has no such number."""
    room, _, rest = name.partition(".")
    if room == "device":
        change: dict[str, Any] = {DEVICE[rest]: _times(getattr(cluster.device, DEVICE[rest]), rest, factor)}
        return replace(cluster, device=replace(cluster.device, **change))
    if room == "communication":
        field = COMMUNICATION[rest]
        change = {field: _times(getattr(cluster.communication, field), rest, factor)}
        return replace(cluster, communication=replace(cluster.communication, **change))
    kind = rest.removesuffix(".bandwidth")
    topology = copy.copy(cluster.topology)
    topology.links = tuple(
        replace(
            link,
            bandwidth_bytes_per_s=max(1, round(link.bandwidth_bytes_per_s * factor)),
            raw_bandwidth_bytes_per_s=max(1, round(link.raw_bandwidth_bytes_per_s * factor)),
        )
        if link.kind == kind
        else link
        for link in topology.links
    )
    return replace(cluster, topology=topology)


def _times(number: Number, name: str, factor: float) -> Number:
    value = 1 + (number.value - 1) * factor if name == "overlap_slowdown" else number.value * factor
    if name in FRACTIONS:
        value = min(value, 1.0)
    return Number(value, "assumed", f"{number.source}, times {factor:g}")
