"""`Plan`: what a rank needs to know of a kernel launch that is the same in every step, worked out once per op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rtp_sim.executor.operands import Operands, operands
from rtp_sim.executor.packing import Place, layout
from rtp_sim.model.layers import WHOLE, Layer, Split
from rtp_sim.model.network import Network
from rtp_sim.schedule.ir import Compute, Op, Schedule, Site


@dataclass(frozen=True, slots=True)
class Plan:
    """Number of the op and roles of its operands; the shard that the launch works on, its number and the kernel's
    sizes; `micro` is the micro-batch as buffers name it ("m0"). `parameters` says where in a flat buffer each of the
    layer's parameters lies, counted from where those of the layer begin."""

    op: int
    site: Site
    roles: Operands
    split: Split
    shard: int
    dims: Mapping[str, int]
    micro: str
    parameters: tuple[Place, ...]


def make_plan(op: Op, schedule: Schedule, rank: int, network: Network, layers: Mapping[str, Layer]) -> Plan:
    """The plan of a compute op with a site. ScheduleError if its operands do not fit its kernel."""
    action = op.action
    assert isinstance(action, Compute)
    assert action.site is not None
    shard = schedule.shard_index(rank, action.part)
    n = schedule.groups[action.part.group].size if action.part is not None else 1
    split = Split(action.site.split, n, shard) if action.site.split else Split()
    micro = next(name.partition("/")[0] for name in (*op.reads, *op.writes) if "/" in name)
    roles = operands(op, network, layers)
    # Rows are shares of the tokens: parameters are whole then.
    places = layout(roles.layer.op, WHOLE if split.kind == "rows" else split)
    return Plan(op.index, action.site, roles, split, shard, dict(action.dims_at(shard)), micro, places)
