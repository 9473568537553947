"""Links of a cluster, by name, that reach less of their bandwidth than they should: a worn cable, a port fallen back.

Routes and ring orders stay as they are: a library that built its rings before the link got slow does not know.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from rtp_sim.errors import InputError
from rtp_sim.hardware.spec import Cluster


def degraded(cluster: Cluster, links: Sequence[tuple[str, float]]) -> Cluster:
    """The cluster with each link of that name ("node0/gpu3->nvswitch"; a star stands for any text) at this fraction of
    its bandwidth. InputError for a name that no link has, or a fraction outside (0, 1]."""
    if not links:
        return cluster
    topology = copy.copy(cluster.topology)
    for pattern, fraction in links:
        found = [link.index for link in topology.links if link.name == pattern or fnmatchcase(link.name, pattern)]
        if not found:
            names = [link.name for link in topology.links]
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise InputError(
                f"{cluster.name} has no link {pattern!r} among its {len(names)}; expected for example "
                f"{', '.join(near)}, or a pattern such as node0/nic0*"
            )
        if not 0 < fraction <= 1:
            raise InputError(
                f"link {pattern!r} at {fraction} of its bandwidth: expected more than 0 and at most 1, for example 0.5"
            )
        changed = list(topology.links)
        for index in found:
            link = changed[index]
            changed[index] = replace(
                link, bandwidth_bytes_per_s=max(1, round(link.bandwidth_bytes_per_s * fraction)),
                raw_bandwidth_bytes_per_s=max(1, round(link.raw_bandwidth_bytes_per_s * fraction)),
                provenance=f"assumed: degraded to {fraction:g}; {link.provenance}",
            )  # fmt: skip
        topology.links = tuple(changed)
    return replace(cluster, topology=topology)
