"""Parameters as full tensors by layer and name, and the same parameters in the flat buffers of ranks.

`initial_parameters` makes them, `buffer_content` cuts out what a rank's buffer holds at rest, `gathered` puts the full
tensors together again from the ranks' buffers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rtp_sim.errors import InputError
from rtp_sim.executor.packing import empty_parameters, packed, put
from rtp_sim.model.layers import Layer, LayerOp, Mlp, Norm, Split
from rtp_sim.model.network import Network, unfused
from rtp_sim.schedule.ir import Buffer, Compute, Holding, Schedule

Parameters = dict[str, dict[str, torch.Tensor]]
"""layer -> parameter name (layers.py) -> full tensor."""


def owners(network: Network) -> dict[str, Layer]:
    """The layers that own parameters, by name."""
    return {layer.name: layer for layer in network.layers() if layer.owned_numel}


def initial_parameters(network: Network, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parameters:
    """Normal numbers scaled by 1 / sqrt(inputs) for weights and by 0.02 for biases, so that no gradient is trivial;
    norms start near 1 and 0. The same seed gives the same numbers, and an MLP the same ones whether it is one layer
    or three (`unfused`)."""
    found: Parameters = {}
    for name, layer in owners(network).items():
        found[name] = {
            p.name: _initial(layer.op, _key(name, p.name), p.name, p.shape, seed).to(dtype) for p in layer.op.params()
        }
    return found


def _key(layer: str, param: str) -> str:
    """What a parameter is called in the network whose MLPs are one layer."""
    for part in ("up", "down"):
        if layer.endswith(f".mlp.{part}"):
            return f"{layer.removesuffix(f'.{part}')}/{part}{'_bias' if param == 'bias' else ''}"
    return f"{layer}/{param}"


def parameter_name(layer: str, param: str) -> str:
    """A parameter's name in checkpoints, the same whether MLPs are one layer or three: h0.mlp.up, h0.mlp.up_bias."""
    return _key(layer, param).replace("/", ".")


def blank_parameters(network: Network) -> Parameters:
    """Zeros in the parameters' shapes that take up no memory, for ranks that read their shards from a checkpoint."""
    return {
        name: {p.name: torch.zeros(()).expand(p.shape) for p in layer.op.params()}
        for name, layer in owners(network).items()
    }


def _initial(op: LayerOp, key: str, param: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    if isinstance(op, Norm):
        return 0.1 * numbers + (1.0 if param == "weight" else 0.0)
    if param.endswith("bias"):
        return 0.02 * numbers
    # The inputs of an output feature: columns of a matrix, channels times window of a convolution.
    inputs = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]
    return numbers / math.sqrt(inputs)


# ---- networks whose MLPs rotate as two layers


def executed_network(schedule: Schedule, network: Network) -> Network:
    """The network whose layers the schedule's ops name: `network`, or the same with its MLPs unfused.

    InputError if the schedule was made from another network.
    """
    sites = {
        op.action.site.layer
        for program in schedule.programs
        for op in program.ops
        if isinstance(op.action, Compute) and op.action.site is not None
    }
    for candidate in (network, unfused(network)):
        if sites <= {layer.name for layer in candidate.layers()}:
            return candidate
    missing = sorted(sites - {layer.name for layer in network.layers()})
    raise InputError(f"the schedule works on layer {missing[0]!r}, which the network {network.name} does not have")


def unfused_parameters(network: Network, parameters: Parameters) -> Parameters:
    """The parameters of `network` under the names of `unfused(network)`."""
    found: Parameters = {}
    for name, tensors in parameters.items():
        if not isinstance(owners(network)[name].op, Mlp):
            found[name] = tensors
            continue
        for part in ("up", "down"):
            bias = {"bias": tensors[f"{part}_bias"]} if f"{part}_bias" in tensors else {}
            found[f"{name}.{part}"] = {"weight": tensors[part], **bias}
    return found


# ---- shards in buffers


@dataclass(frozen=True, slots=True)
class Place:
    """Which shard of split layers a rank has at rest: number `index` of `n`."""

    n: int
    index: int

    def split(self, holding: Holding) -> Split:
        """The shard of a holding that lies in the rank's buffer."""
        return Split(holding.split, self.n, self.index) if holding.split else Split()


def split_group(schedule: Schedule) -> str | None:
    """The group along which layers are split (rotation or tensor parallelism); None if none are."""
    for program in schedule.programs:
        for op in program.ops:
            a = op.action
            if (
                isinstance(a, Compute)
                and a.part is not None
                and a.site is not None
                and a.site.split not in ("", "rows")
            ):
                return a.part.group
    return None


def place_of(schedule: Schedule, rank: int) -> Place:
    """Which shards the rank has at rest."""
    name = split_group(schedule)
    if name is None:
        return Place(1, 0)
    group = schedule.groups[name]
    return Place(group.size, group.position(rank))


def slice_place(schedule: Schedule, rank: int, group: str) -> Place:
    """This rank's equal slice of a sequence that `group` shares; all of it where the group does not exist."""
    if group not in schedule.groups:
        return Place(1, 0)
    return Place(schedule.groups[group].size, schedule.groups[group].position(rank))


def buffer_content(
    schedule: Schedule, network: Network, rank: int, buffer: Buffer, parameters: Parameters
) -> torch.Tensor:
    """What a weight buffer holds at rest, flat and padded with zeros to its size."""
    layers, place = owners(network), place_of(schedule, rank)
    parts = [packed(layers[h.layer].op, place.split(h), parameters[h.layer]) for h in buffer.holds]
    content = torch.cat(parts) if parts else torch.zeros(0)
    size = buffer.numel if isinstance(buffer.numel, int) else buffer.numel[schedule.shard_index(rank, buffer.part)]
    if buffer.slice_of:
        at = slice_place(schedule, rank, buffer.slice_of)
        content = _padded(content, at.n * size)[at.index * size : (at.index + 1) * size]
    return _padded(content, size).clone()


def _padded(flat: torch.Tensor, size: int) -> torch.Tensor:
    return flat if flat.numel() == size else torch.cat([flat, flat.new_zeros(size - flat.numel())])


@dataclass(frozen=True, slots=True)
class Share:
    """Flat content of a rank with its meaning: `holds` one after another, each taking `widths[i]` elements (its own and
    padding); with `slice_of` only this rank's slice of that sequence."""

    holds: tuple[Holding, ...]
    widths: tuple[int, ...]
    slice_of: str
    content: torch.Tensor


def assembled(schedule: Schedule, network: Network, shares: Sequence[Sequence[Share]]) -> Parameters:
    """Full tensors from the shares of every rank (`shares[rank]`). Where several ranks have the same part, the last
    one's counts."""
    layers = owners(network)
    first = next(s.content for rank in shares for s in rank)
    full = empty_parameters([(n, x.op) for n, x in layers.items()], first.dtype)
    for rank, mine in enumerate(shares):
        place = place_of(schedule, rank)
        for number, share in enumerate(mine):
            offset, content = 0, _whole(schedule, rank, number, share, shares)
            for holding, width in zip(share.holds, share.widths, strict=True):
                op, split = layers[holding.layer].op, place.split(holding)
                put(op, split, content[offset : offset + width].to(first.device), full[holding.layer])
                offset += width
    return full


def _whole(schedule: Schedule, rank: int, number: int, share: Share, shares: Sequence[Sequence[Share]]) -> torch.Tensor:
    """The whole sequence that a share is a slice of."""
    if not share.slice_of or share.slice_of not in schedule.groups:
        return share.content
    group = schedule.groups[share.slice_of]
    members = group.instances[group.place[rank][0]]
    return torch.cat([shares[r][number].content for r in members])


def weight_shares(schedule: Schedule, network: Network, rank: int, buffers: Mapping[str, torch.Tensor]) -> list[Share]:
    """The weights that the rank keeps at the end of the step, from its flat buffers by name."""
    found, place, layers = [], place_of(schedule, rank), owners(network)
    for b in schedule.program(rank).buffers.values():
        if b.category == "weights" and b.live_out and b.name in buffers:
            widths = tuple(layers[h.layer].op.numel(place.split(h)) for h in b.holds)
            found.append(Share(b.holds, widths, b.slice_of, buffers[b.name]))
    return found


def gathered(schedule: Schedule, network: Network, buffers: Sequence[Mapping[str, torch.Tensor]]) -> Parameters:
    """Full parameters from every rank's weight buffers (`buffers[rank][name]`, at rest), for tests and checkpoints."""
    return assembled(schedule, network, [weight_shares(schedule, network, r, b) for r, b in enumerate(buffers)])
