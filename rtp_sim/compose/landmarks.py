"""Memory at landmarks of a step: at every kernel of the first and last micro-batch in the first and last of the blocks
that repeat, in what stands before and behind them, and at the optimizer.

The peak of a step is the largest of many moments, each of which grows in a straight line with blocks and micro-batches.
The peak itself does not: in a short step another moment may be the highest than in a long one. So each landmark is
continued by itself, and the largest is the peak; between the landmarks blocks only add or free the same again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rtp_sim.engine.memory import MemoryProfile
from rtp_sim.model.network import Block, Network
from rtp_sim.schedule.ir import CATEGORIES, Compute, Program
from rtp_sim.timeline import RankTimes

Held = npt.NDArray[np.float64]
"""Bytes by category, in the order of CATEGORIES."""


def landmarks(
    program: Program, times: RankTimes, profile: MemoryProfile, repeated: Sequence[Block], micros: int
) -> dict[str, Held]:
    """What a rank holds when the kernel of that name starts; names say "first" and "last" of blocks and micro-batches,
    so that those of a longer step have the same ones."""
    block_of = {layer.name: place for place, block in enumerate(repeated) for layer in block.layers}
    # Layers that a strategy takes apart are found by the name of their block.
    by_name = {block.name: place for place, block in enumerate(repeated)}
    names, starts = [], []
    for op in program.ops:
        if not isinstance(op.action, Compute):
            continue
        if op.action.site is None:
            if op.name == "optimizer":
                names.append(op.name)
                starts.append(op.index)
            continue
        micro, _, text = op.name.partition(".")
        layer, block = op.action.site.layer, ""
        place = block_of.get(layer, by_name.get(layer.partition(".")[0]))
        if micro not in ("m0", f"m{micros - 1}") or place not in (None, 0, len(repeated) - 1):
            continue
        if place is not None:
            block = "first" if place == 0 else "last"
            text = text.replace(layer, layer.removeprefix(repeated[place].name), 1)
        names.append(f"{'first' if micro == 'm0' else 'last'} {block} {text}")
        starts.append(op.index)
    at = np.searchsorted(profile.time_ns, times.start_ns[starts], side="right") - 1
    nothing = np.zeros(len(profile.time_ns), dtype=np.int64)
    held = np.stack([profile.bytes_by_category.get(c, nothing)[at] for c in CATEGORIES], axis=1).astype(np.float64)
    return dict(zip(names, held, strict=True))


def repeated(network: Network) -> tuple[Block, ...]:
    """The blocks from the first to the last that may be recomputed."""
    places = [i for i, block in enumerate(network.blocks) if block.recomputable]
    return network.blocks[places[0] : places[-1] + 1] if places else ()


def highest(found: Mapping[str, Held]) -> dict[str, int]:
    """The landmark at which most is held, by category."""
    most = max(found.values(), key=lambda held: float(held.sum()))
    return {c: max(0, round(v)) for c, v in zip(CATEGORIES, most.tolist(), strict=True)}
