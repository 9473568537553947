"""`piped_groups`: which groups communicate beside the messages of a pipeline that leave the node.

On machines whose profile states `collective_turn_piped` the host takes so much longer per member to issue such a
collective. What is known is the measurement, not its cause: on 16 to 512 H100 with EFA a transformer layer with its
eight collectives takes 10, 16, 26, 50 and 110 ms at tensor-parallel degrees of 2, 4, 8, 16 and 32, whatever the model's
width, and whatever the micro-batch as long as its kernels take less; it takes 4 ms without a pipeline or inside one
node.
"""

from __future__ import annotations

from collections.abc import Mapping

from rtp_sim.hardware.topology import Topology
from rtp_sim.schedule.ir import Group


def piped_groups(groups: Mapping[str, Group], topology: Topology) -> dict[str, int]:
    """The tensor-parallel group of a pipeline whose stages lie on several nodes, with its size; nothing otherwise."""
    if "pp" not in groups or "tp" not in groups:
        return {}
    line = groups["pp"].instances[0]
    nodes = {topology.node_of(rank) for rank in line}
    return {"tp": groups["tp"].size} if len(nodes) > 1 else {}
