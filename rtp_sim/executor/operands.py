"""Roles of a kernel's operands: which of an op's reads and writes are inputs, outputs, weights or gradients.

The mirror image of `schedule/step.py`, which writes reads and writes in this order: forward, the call's inputs, the
weights, then the output where it is updated; backward, what the kernel's rule names, then whatever is updated.
No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rtp_sim.errors import ScheduleError
from rtp_sim.model.kernels import BACKWARD, Rule
from rtp_sim.model.layers import Call, Extent, Layer
from rtp_sim.model.network import Network
from rtp_sim.schedule.ir import Compute, Op
from rtp_sim.schedule.sharding import lower

IN_PLACE = frozenset({"rope", "rope.bwd"})
"""Kernels that replace what they read instead of adding to it."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Buffer names by role. `x` and `y` map the number of a call's input or output to its buffer, `dx` that of an input
    to the buffer for its gradient; `dy` is the gradient of the first output (None for a loss). `updated` are the
    written buffers that keep their content and are added to."""

    layer: Layer
    call: Call
    backward: bool
    x: Mapping[int, str] = field(default_factory=dict)
    y: Mapping[int, str] = field(default_factory=dict)
    w: str | None = None
    dy: str | None = None
    dx: Mapping[int, str] = field(default_factory=dict)
    dw: str | None = None
    updated: frozenset[str] = frozenset()


def operands(op: Op, network: Network, layers: Mapping[str, Layer]) -> Operands:
    """The roles of the operands of a compute op with a `site`.

    ScheduleError if the op's layer is not in `layers` (by name), or its reads and writes do not fit its kernel.
    """
    action = op.action
    assert isinstance(action, Compute)
    assert action.site is not None
    layer = layers.get(action.site.layer)
    if layer is None:
        raise ScheduleError(f"{op.name}: the network {network.name} has no layer {action.site.layer!r}")
    call = lower(layer.op, Extent(1, 1), action.site.split, 1).calls[action.site.call]
    updated = frozenset(() if action.kernel in IN_PLACE else set(op.reads) & set(op.writes))
    if action.kernel == call.kernel:
        return _forward(op, layer, call, updated)
    for rule in BACKWARD.get(call.kernel, ()):
        if rule.kernel == action.kernel:
            return _backward(op, layer, call, rule, network, updated)
    raise ScheduleError(f"{op.name}: kernel {action.kernel} is neither {call.kernel} nor a part of its backward")


def _forward(op: Op, layer: Layer, call: Call, updated: frozenset[str]) -> Operands:
    needed = len(call.inputs) + call.weight
    if len(op.reads) < needed or len(op.writes) != len(call.outputs):
        raise _misfit(op, needed, len(call.outputs))
    weight = op.reads[len(call.inputs)] if call.weight else None
    x = dict(enumerate(op.reads[: len(call.inputs)]))
    return Operands(layer, call, False, x, dict(enumerate(op.writes)), weight, updated=updated)


def _backward(op: Op, layer: Layer, call: Call, rule: Rule, network: Network, updated: frozenset[str]) -> Operands:
    reads = list(op.reads)
    x: dict[int, str] = {}
    y: dict[int, str] = {}
    w = dy = None
    try:
        for token in rule.reads:
            if token == "dy":
                dy = None if starts_backward(layer, call, network) else reads.pop(0)
            elif token == "w":
                w = reads.pop(0)
            else:
                names = call.inputs if token[0] == "x" else call.outputs
                numbers = range(len(names)) if not token[1:] else [int(token[1:])]
                roles = x if token[0] == "x" else y
                roles.update({i: reads.pop(0) for i in numbers if i < len(names)})
    except IndexError:
        raise _misfit(op, len(rule.reads), 1) from None
    asked = range(len(call.inputs)) if "dx" in rule.makes else range(1) if "dx0" in rule.makes else range(0)
    wanted = [i for i in asked if differentiable(layer, call.inputs[i], network)]
    if len(op.writes) != len(wanted) + ("dw" in rule.makes):
        raise _misfit(op, len(op.reads), len(wanted) + ("dw" in rule.makes))
    dw = op.writes[-1] if "dw" in rule.makes else None
    return Operands(layer, call, True, x, y, w, dy, dict(zip(wanted, op.writes, strict=False)), dw, updated)


def starts_backward(layer: Layer, call: Call, network: Network) -> bool:
    """Whether the call makes the network's last output, the loss, where the backward pass starts from 1."""
    return call.outputs[0] == "y" and layer.output == network.blocks[-1].layers[-1].output


def differentiable(layer: Layer, name: str, network: Network) -> bool:
    """Whether a call's input has a gradient: all but what the data loader provides."""
    if not (name.startswith("x") and name[1:].isdigit()):
        return True
    return layer.inputs[int(name[1:])] not in {i.name for i in network.inputs}


def _misfit(op: Op, reads: int, writes: int) -> ScheduleError:
    return ScheduleError(
        f"{op.name}: {len(op.reads)} reads and {len(op.writes)} writes do not fit its kernel; "
        f"expected at least {reads} reads and {writes} writes"
    )
