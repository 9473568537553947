"""What strategies ask of a layout, in closed form: the same as their own InputErrors, for all candidates at once.

`tests/test_planner_rules.py` holds these against the strategies themselves, on random layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rtp_sim.errors import InputError
from rtp_sim.model.layers import Conv2d, MaxPool2d
from rtp_sim.model.network import Network
from rtp_sim.planner.space import EVERY_STRATEGY, OWN_SYNC, Space
from rtp_sim.schedule.layout import INNER_AXIS
from rtp_sim.schedule.pipeline_order import PIPELINES
from rtp_sim.schedule.sharding import parts, tensor_kind
from rtp_sim.schedule.stages import cut

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Broken:
    """A rule, in words, and which candidates break it."""

    reason: str
    who: Mask


def broken_rules(space: Space, network: Network) -> list[Broken]:
    """Every rule that some candidate breaks."""
    names = np.array(EVERY_STRATEGY)
    tensor = np.isin(space.strategy, np.flatnonzero([INNER_AXIS.get(s) == "tp" for s in names])) & (space.inner > 1)
    pipeline = np.isin(space.strategy, np.flatnonzero([s in PIPELINES for s in names]))
    found = [Broken("the global batch is no multiple of the replicas", space.micro_batches < 1)]
    found += _splits(space, network, tensor)
    found += _stages(space, network, pipeline)
    interleaved = space.vpp > 1
    whole_rounds = space.micro_batches % np.maximum(space.pp, 1) == 0
    found.append(Broken("interleaved: the micro-batches are no multiple of the stages", interleaved & ~whole_rounds))
    tokens = space.micro_batch * network.seq
    shared = pipeline & (space.sequence > 0) & (tokens % np.maximum(space.inner, 1) > 0)
    found.append(Broken("what stages exchange does not divide by tokens over the tensor-parallel ranks", shared))
    return [b for b in found if b.who.any()]


def _splits(space: Space, network: Network, tensor: Mask) -> list[Broken]:
    """Tensor parallelism: every rank has a part of everything that is split."""
    found = []
    kinds = {parts(x.op, tensor_kind(x.op)) for x in network.layers() if tensor_kind(x.op)}
    if not kinds:
        found.append(Broken("nothing to split over tensor-parallel ranks", tensor))
    for count, what in sorted(kinds):
        found.append(Broken(f"fewer than one of {count} {what} for each tensor-parallel rank",
                            tensor & (space.inner > count)))  # fmt: skip
    if any(isinstance(x.op, Conv2d | MaxPool2d) for x in network.layers()):
        found.append(Broken("sequence parallelism splits tokens, and images have none", tensor & (space.sequence > 0)))
    return found


def _stages(space: Space, network: Network, pipeline: Mask) -> list[Broken]:
    """Pipelines: the network can be cut into so many pieces, one tensor crossing each cut."""
    found = []
    for name, shape in PIPELINES.items():
        if name not in EVERY_STRATEGY:
            continue
        mine = pipeline & (space.strategy == EVERY_STRATEGY.index(name))
        for pp, vpp in sorted({(int(p), int(v)) for p, v in zip(space.pp[mine], space.vpp[mine], strict=True)}):
            chunks = shape.chunks or vpp
            try:
                cut(network, pp, chunks, shape.v_shape, (), "layers")
            except InputError as error:
                found.append(Broken(str(error), mine & (space.pp == pp) & (space.vpp == vpp)))
    return found


def own_sync(strategy: str) -> bool:
    """Whether data parallelism is an option of the strategy's own."""
    return strategy in OWN_SYNC
