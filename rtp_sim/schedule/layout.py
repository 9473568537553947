"""`ParallelLayout`: degrees per mesh axis, and the communication groups they give on a cluster.

The inner axis (rtp or tp) takes neighbouring ranks, data parallelism lies across. Members of a group stand in the
order of the best ring that the topology offers, so that position p + 1 is a good neighbour of position p.
"""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.errors import InputError
from rtp_sim.hardware.topology import Topology
from rtp_sim.schedule.ir import Group

INNER_AXIS = {"rtp": "rtp", "rtp-inplace": "rtp", "tp": "tp", "tp-sp": "tp"}


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """`dp` replicas of an inner group of `inner` ranks along `axis` ("" for none)."""

    axis: str
    inner: int
    dp: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.inner * self.dp

    def __str__(self) -> str:
        parts = [f"{self.axis}={self.inner}"] if self.axis else []
        return " ".join([*parts, f"dp={self.dp}"])


def make_layout(strategy: str, world_size: int, inner: int | None, dp: int | None) -> ParallelLayout:
    """The layout of `strategy` on `world_size` ranks; a degree left out takes what the other leaves.

    InputError with the equation if the degrees do not multiply to the number of GPUs.
    """
    axis = INNER_AXIS.get(strategy, "")
    if not axis and inner is not None:
        raise InputError(f"strategy {strategy} has no --rtp or --tp axis: leave the degree {inner} out")
    for flag, value in ((f"--{axis}", inner), ("--dp", dp)):
        if value is not None and value < 1:
            raise InputError(f"{flag} is {value}: expected a whole number of at least 1")
    if inner is None:
        inner = _quotient(world_size, dp or 1, "--dp", f"--{axis}") if axis else 1
    if dp is None:
        dp = _quotient(world_size, inner, f"--{axis}", "--dp") if axis else world_size
    if inner * dp != world_size:
        product = f"{axis} x dp = {inner} x {dp}" if axis else f"dp = {dp}"
        raise InputError(f"{strategy}: {product} = {inner * dp}, but there are {world_size} GPUs; expected the product "
                         f"of the degrees to be the number of GPUs")  # fmt: skip
    if strategy == "single" and world_size != 1:
        raise InputError(f"strategy single runs on 1 GPU, not on {world_size}: give --gpus 1 or another strategy")
    return ParallelLayout(axis, inner, dp)


def _quotient(world_size: int, degree: int, flag: str, other: str) -> int:
    if world_size % degree:
        raise InputError(
            f"{flag} {degree} does not divide {world_size} GPUs: {world_size} / {degree} = {world_size / degree:g}, "
            f"expected a whole {other}"
        )
    return world_size // degree


def make_groups(layout: ParallelLayout, topology: Topology, ring: str = "auto") -> dict[str, Group]:
    """The groups of a layout: the inner axis, and "dp" across it; groups of one member are left out.

    `ring` is "flat", "two-level" or "auto": a two-level ring of (nodes, GPUs of a node) where a group covers whole
    nodes. InputError for "two-level" where it does not.
    """
    base = [tuple(range(k * layout.inner, (k + 1) * layout.inner)) for k in range(layout.dp)]
    inner = [topology.ring(ranks) for ranks in base]
    groups: dict[str, Group] = {}
    if layout.inner > 1:
        dims = _ring_dims(layout, topology, ring)
        groups[layout.axis] = Group(layout.axis, dims, tuple(inner))
    if layout.dp > 1:
        across = tuple(topology.ring(tuple(members[p] for members in inner)) for p in range(layout.inner))
        groups["dp"] = Group("dp", (layout.dp,), across)
    return groups


def _ring_dims(layout: ParallelLayout, topology: Topology, ring: str) -> tuple[int, ...]:
    per_node = topology.gpus_per_node
    whole_nodes = layout.inner > per_node > 1 and layout.inner % per_node == 0
    if layout.axis != "rtp" or ring == "flat" or (ring == "auto" and not whole_nodes):
        return (layout.inner,)
    if not whole_nodes:
        raise InputError(
            f"--rtp-ring two-level needs rings of several whole nodes: --rtp {layout.inner} is no multiple "
            f"(2 or more) of the {per_node} GPUs of a node"
        )
    return (layout.inner // per_node, per_node)
