"""`fsdp`, `hsdp`: weights, gradients and optimizer state in shards; each unit is gathered just before its use (ZeRO-3).

A unit is a block, or the whole model with `fsdp_unit="model"`. Where embedding and head share weights, both blocks
form the root unit, which stays gathered through a pass, as torch's root module does. The next unit is gathered while
the current one computes; its gather waits for the end of the one before, so at most two units are whole at a time.

`hsdp` shards inside groups of neighbouring ranks and keeps a replica of the shards per group: gathers and
reduce-scatters stay in the group, and the last micro-batch's gradient shards are all-reduced across groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rtp_sim.model.layers import Layer
from rtp_sim.model.network import Block
from rtp_sim.schedule.ir import Compute, Holding
from rtp_sim.schedule.step import Step, Work
from rtp_sim.schedule.update import OptimizerShare

DP, FSDP = "dp", "fsdp"


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers whose weights are gathered together; `shard` is one rank's padded share of `numel` parameters
    over `group`."""

    name: str
    numel: int
    shard: int
    holds: tuple[Holding, ...]
    group: str


def fsdp(step: Step) -> None:
    """Forward: gather each unit, compute, drop it. Backward: gather again, compute, reduce-scatter its gradient."""
    _run(step, DP)


def hsdp(step: Step) -> None:
    """As fsdp inside groups of ranks; gradient shards are all-reduced between the groups."""
    _run(step, FSDP)


def _run(step: Step, group: str) -> None:
    units, blocks = _units(step, group), step.network.blocks
    order = [units[b.name] for b in blocks]
    ahead = 1 + step.options.fsdp_prefetch
    for last in step.microbatches():
        gathered: set[tuple[str, str]] = set()
        for i, block in enumerate(blocks):
            _gather(step, [(unit, "F") for unit in order[i : i + ahead]], gathered)
            for layer in block.layers:
                step.forward_layer(layer, _work(step, order[i]))
        visits = [(i, tag) for i in reversed(range(len(blocks))) for tag in _visits(step, blocks[i])]
        for at, (i, tag) in enumerate(visits):
            _gather(step, [(order[j], t) for j, t in visits[at : at + ahead]], gathered)
            _backward(step, blocks[i], order[i], tag)
            if tag == "B" and order[i] not in order[:i]:
                _reduce(step, order[i])
                if group == FSDP and last:
                    _reduce_across(step, order[i])
    owned = [u for u in dict.fromkeys(order) if u.numel]
    step.optimizer([OptimizerShare(u.name, u.shard, (f"g.{u.name}",), (f"w.{u.name}",), u.holds, group) for u in owned])


def _visits(step: Step, block: Block) -> str:
    """What the backward pass gathers a block's weights for, a letter each: R recomputes it, B is its backward, which
    recomputes it first where that is no visit of its own."""
    return "RB" if step.options.fsdp_gather_again and step.recomputes(block) else "B"


def _backward(step: Step, block: Block, unit: Unit, tag: str) -> None:
    work = _work(step, unit, tag)
    if tag == "R":
        for layer in block.layers:
            step.forward_layer(layer, replace(work, tag=tag))
    elif _visits(step, block) == "B":
        for _ in step.backward_block(block, lambda _: work):
            pass
    else:
        for layer in reversed(block.layers):
            step.backward_layer(layer, work)
            step.merge_input_grads(layer)


def _units(step: Step, group: str) -> dict[str, Unit]:
    """block name -> its unit; declares the sharded weights."""
    shared = {layer.shares for layer in step.network.layers() if layer.shares}

    def key(block: Block) -> str:
        if step.options.fsdp_unit == "model":
            return "model"
        return "root" if any(x.name in shared or x.shares for x in block.layers) else block.name

    owners: dict[str, list[Layer]] = {}
    for block in step.network.blocks:
        owners.setdefault(key(block), []).extend(x for x in block.layers if x.owned_numel)
    n, units = step.group_size(group), {}
    for name, layers in owners.items():
        count = sum(x.owned_numel for x in layers)
        units[name] = Unit(name, count, -(-count // n), tuple(Holding(x.name) for x in layers), group)
    for u in units.values():
        if u.numel:
            _sharded(step, u, f"w.{u.name}", "weights", step.policy.weight_dtype, persistent=True)
    return {block.name: units[key(block)] for block in step.network.blocks}


def _sharded(step: Step, unit: Unit, name: str, category: str, dtype: str, persistent: bool = False) -> str:
    """Declares a buffer for this rank's share of the unit."""
    share = unit.shard
    return step.b.buffer(name, category, dtype, share, persistent=persistent, holds=unit.holds, slice_of=unit.group)


def _work(step: Step, unit: Unit, tag: str = "") -> Work:
    """Where the unit's layers find whole weights and leave whole gradients; the shards themselves in a group of one.
    Weights gathered to recompute (tag R) lie apart, so that those for the backward can be on their way."""
    if step.group_size(unit.group) == 1 or not unit.numel:
        _sharded(step, unit, f"g.{unit.name}", "gradients", step.policy.gradient_dtype)
        return Work(weight=f"w.{unit.name}", grad=f"g.{unit.name}")
    padded = unit.shard * step.group_size(unit.group)
    policy, holds, name = step.policy, unit.holds, f"full.{unit.name}{'.again' if tag == 'R' else ''}"
    weight = step.b.buffer(name, "communication", policy.weight_dtype, padded, holds=holds)
    if step.options.fsdp_split_gradients or tag == "R":
        return Work(weight=weight)
    grad = step.b.buffer(f"gfull.{unit.name}", "communication", policy.gradient_dtype, padded, holds=holds)
    return Work(weight=weight, grad=grad)


def _gather(step: Step, wanted: list[tuple[Unit, str]], gathered: set[tuple[str, str]]) -> None:
    """Gathers the (unit, visit) not gathered yet, no earlier than the compute issued so far has ended."""
    for unit, tag in wanted:
        if (unit.name, tag) in gathered or not unit.numel:
            continue
        gathered.add((unit.name, tag))
        padded = unit.shard * step.group_size(unit.group)
        name, target = f"m{step.micro}.gather.{tag}.{unit.name}", _work(step, unit, tag).weight or ""
        shard, after = (f"w.{unit.name}",), step.b.last("compute")
        step.collective("all_gather", unit.group, "fsdp", name, padded, shard, (target,), after=after)


def _reduce(step: Step, unit: Unit) -> None:
    """Reduce-scatters the unit's gradient into the shard, or adds it to what earlier micro-batches left there."""
    if not unit.numel or step.group_size(unit.group) == 1:
        return
    dtype, padded = step.policy.gradient_dtype, unit.shard * step.group_size(unit.group)
    shard = _sharded(step, unit, f"g.{unit.name}", "gradients", dtype)
    name, source = f"m{step.micro}.reduce.{unit.name}", f"gfull.{unit.name}"
    if step.options.fsdp_split_gradients:
        # The flat parameter's gradient is put together from those of its views, while the whole
        # weights are still there.
        step.b.buffer(source, "communication", dtype, padded, holds=unit.holds)
        pieces = tuple(f"g.{held.layer}" for held in unit.holds)
        copy = Compute("copy", dtype, (("numel", unit.numel),))
        step.b.op(f"{name}.flatten", "compute", copy, (*pieces, f"full.{unit.name}"), (source,))
        for piece in pieces:
            step.b.drop(piece)
    first = step.b.fresh(shard)
    target = shard if first else _sharded(step, unit, f"g.arrived.{unit.name}", "communication", dtype)
    step.collective("reduce_scatter", unit.group, "fsdp", name, padded, (source,), (target,), dtype)
    step.b.drop(source)
    if not first:
        add = Compute("add", dtype, (("numel", unit.shard),))
        step.b.op(f"{name}.add", "compute", add, (shard, target), (shard,))


def _reduce_across(step: Step, unit: Unit) -> None:
    """All-reduces the unit's gradient shard over the replicas of the shards."""
    if not unit.numel:
        return
    grad = (f"g.{unit.name}",)
    step.collective("all_reduce", DP, DP, f"m{step.micro}.reduce_across.{unit.name}", unit.shard, grad, grad,
                    step.policy.gradient_dtype)  # fmt: skip
