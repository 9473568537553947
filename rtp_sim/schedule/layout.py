"""`ParallelLayout`: degrees per mesh axis, and the communication groups they give on a cluster.

The inner axis (rtp, tp, or fsdp of hybrid sharding) takes neighbouring ranks, data parallelism lies across, and the
stages of a pipeline lie farthest apart, as Megatron places them; `order` "tp-pp-dp" puts stages nearer than replicas.
Members of a group stand in the order of the best ring that the topology offers, so that position p + 1 is a good
neighbour of position p. Only stages stand in the order of the pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.errors import InputError
from rtp_sim.hardware.topology import Topology
from rtp_sim.schedule.ir import Group
from rtp_sim.schedule.pipeline_order import PIPELINES

INNER_AXIS = {
    "rtp": "rtp", "rtp-inplace": "rtp", "tp": "tp", "tp-sp": "tp", "hsdp": "fsdp", **dict.fromkeys(PIPELINES, "tp"),
}  # fmt: skip
ORDERS = ("tp-dp-pp", "tp-pp-dp")


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """`dp` replicas of an inner group of `inner` ranks along `axis` ("" for none), in each of `pp` stages."""

    axis: str
    inner: int
    dp: int
    pp: int = 1
    order: str = ORDERS[0]

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.inner * self.dp * self.pp

    def __str__(self) -> str:
        parts = [f"{self.axis}={self.inner}"] if self.axis else []
        return " ".join([*parts, f"dp={self.dp}", *([f"pp={self.pp}"] if self.pp > 1 else [])])


def make_layout(
    strategy: str, world_size: int, inner: int | None, dp: int | None, pp: int | None = None, order: str = ORDERS[0]
) -> ParallelLayout:
    """The layout of `strategy` on `world_size` ranks; a degree left out takes what the others leave. In a pipeline tp
    is 1 unless given, and of dp and pp the first that is left out takes the rest.

    InputError with the equation if the degrees do not multiply to the number of GPUs.
    """
    axis = INNER_AXIS.get(strategy, "")
    if not axis and inner is not None:
        raise InputError(f"strategy {strategy} has no --rtp, --tp or --fsdp axis: leave the degree {inner} out")
    if strategy not in PIPELINES and pp is not None:
        raise InputError(f"strategy {strategy} has no pipeline: leave --pp {pp} out, or choose one of "
                         f"{', '.join(PIPELINES)}")  # fmt: skip
    for flag, value in ((f"--{axis}", inner), ("--dp", dp), ("--pp", pp)):
        if value is not None and value < 1:
            raise InputError(f"{flag} is {value}: expected a whole number of at least 1")
    if strategy in PIPELINES:
        return _pipeline_layout(strategy, world_size, inner or 1, dp, pp, order)
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


def _pipeline_layout(strategy: str, world_size: int, tp: int, dp: int | None, pp: int | None, order: str
                     ) -> ParallelLayout:  # fmt: skip
    if order not in ORDERS:
        raise InputError(f"order of ranks {order!r}: expected one of {', '.join(ORDERS)}")
    if pp is None:
        pp = _quotient(world_size, tp * (dp or 1), "--tp x --dp", "--pp")
    if dp is None:
        dp = _quotient(world_size, tp * pp, "--tp x --pp", "--dp")
    if tp * dp * pp != world_size:
        raise InputError(f"{strategy}: tp x dp x pp = {tp} x {dp} x {pp} = {tp * dp * pp}, but there are {world_size} "
                         f"GPUs; expected the product of the degrees to be the number of GPUs")  # fmt: skip
    return ParallelLayout("tp", tp, dp, pp, order)


def _quotient(world_size: int, degree: int, flag: str, other: str) -> int:
    if world_size % degree:
        raise InputError(
            f"{flag} {degree} does not divide {world_size} GPUs: {world_size} / {degree} = {world_size / degree:g}, "
            f"expected a whole {other}"
        )
    return world_size // degree


def make_groups(
    layout: ParallelLayout, topology: Topology, ring: str = "auto", zero1_size: int = 0
) -> dict[str, Group]:
    """The groups of a layout: the inner axis, and "dp" across it; groups of one member are left out.

    `ring` is "flat", "two-level" or "auto": a two-level ring of (nodes, GPUs of a node) where a group covers whole
    nodes. InputError for "two-level" where it does not. With `zero1_size`, group "zero1" takes so many neighbours of
    every "dp" group.
    """
    groups = _pipeline_groups(layout, topology) if layout.pp > 1 else _flat_groups(layout, topology, ring)
    if zero1_size:
        groups |= _zero1_groups(layout, groups, zero1_size)
    return groups


def _zero1_groups(layout: ParallelLayout, groups: dict[str, Group], size: int) -> dict[str, Group]:
    """The dp groups cut into stretches of `size` neighbours."""
    if layout.dp % size:
        raise InputError(f"--zero1-size {size} does not divide the {layout.dp} data-parallel replicas")
    if size in (1, layout.dp):
        return {}
    parts = tuple(g[i : i + size] for g in groups["dp"].instances for i in range(0, layout.dp, size))
    return {"zero1": Group("zero1", (size,), parts)}


def _flat_groups(layout: ParallelLayout, topology: Topology, ring: str) -> dict[str, Group]:
    """The groups of a layout without a pipeline."""
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


def stage_of_rank(layout: ParallelLayout, rank: int) -> int:
    """The pipeline stage that a rank works on."""
    if layout.order == "tp-dp-pp":
        return rank // (layout.inner * layout.dp)
    return rank // layout.inner % layout.pp


def _pipeline_groups(layout: ParallelLayout, topology: Topology) -> dict[str, Group]:
    """Groups "tp", "dp" and "pp". Positions in tp and dp agree across stages, so
    that a rank's neighbours in the pipeline hold the same shard and work on the same micro-batches."""
    tp, dp, pp = layout.inner, layout.dp, layout.pp
    near, far = (tp, tp * dp) if layout.order == "tp-dp-pp" else (tp * pp, tp)
    # ranks[stage][replica]: the ranks of a tp group in the order of their ring.
    ranks = [[topology.ring(tuple(s * far + d * near + t for t in range(tp))) for d in range(dp)] for s in range(pp)]
    ring = topology.ring(tuple(members[0] for members in ranks[0]))
    replicas = [[members[0] for members in ranks[0]].index(r) for r in ring]
    ranks = [[stage[d] for d in replicas] for stage in ranks]
    groups: dict[str, Group] = {}
    if tp > 1:
        groups["tp"] = Group("tp", (tp,), tuple(members for stage in ranks for members in stage))
    if dp > 1:
        across = tuple(tuple(members[t] for members in stage) for stage in ranks for t in range(tp))
        groups["dp"] = Group("dp", (dp,), across)
    lines = tuple(tuple(stage[d][t] for stage in ranks) for d in range(dp) for t in range(tp))
    groups["pp"] = Group("pp", (pp,), lines)
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
