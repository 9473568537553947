"""`Plan`: what a rank needs to know of a kernel launch that is the same in every step, worked out once per op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtp_sim.executor.dropout import probability_of
from rtp_sim.executor.operands import Operands, operands
from rtp_sim.executor.packing import Place, layout
from rtp_sim.model.layers import WHOLE, Experts, Layer, Linear, Split
from rtp_sim.model.network import Network
from rtp_sim.schedule.ir import Buffer, Compute, Op, Schedule, Site


@dataclass(frozen=True, slots=True)
class Plan:
    """Number of the op and roles of its operands; the shard that the launch works on, its number and the kernel's
    sizes; `micro` is the micro-batch as buffers name it ("m0"). `parameters` says where in a flat buffer each of the
    layer's parameters lies, counted from where those of the layer begin. `fills` says whether the kernel is the first
    to write its gradients and writes all that their buffer holds, so that nothing need be zeroed; `loaded` whether an
    input comes from the data loader; `dropout` is the probability that an element is dropped; `routed` says whether
    tokens go to experts."""

    op: int
    site: Site
    roles: Operands
    split: Split
    shard: int
    dims: Mapping[str, int]
    micro: str
    parameters: tuple[Place, ...]
    fills: bool
    loaded: bool
    dropout: float
    routed: bool


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
    given = {i.name for i in network.inputs}
    loaded = any(buffer.partition("/")[2] in given for buffer in roles.x.values())
    drops = probability_of(roles.layer.op) if roles.call.kernel == "dropout" else 0.0
    fills = roles.dw is not None and _fills(schedule.program(rank).buffers[roles.dw], action.kernel, roles, places)
    return Plan(op.index, action.site, roles, split, shard, dict(action.dims_at(shard)), micro, places, fills, loaded,
                drops, isinstance(roles.layer.op, Experts))  # fmt: skip


def _fills(buffer: Buffer, kernel: str, roles: Operands, places: Sequence[Place]) -> bool:
    """Whether a kernel that makes the gradients of all parameters of its layer finds a buffer for these alone."""
    alone = len(buffer.holds) == 1 and not buffer.slice_of and buffer.numel == sum(b - a for _, a, b, _ in places)
    whole = (kernel == "linear.wgrad" and isinstance(roles.layer.op, Linear)) or kernel == "layernorm.bwd"
    return alone and whole and roles.dw not in roles.updated
