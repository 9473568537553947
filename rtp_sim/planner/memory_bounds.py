"""The least memory of every candidate, by category, in closed form.

A rank holds at least its weights, its optimizer state, the gradients that are there, and the activations of the
micro-batches under way: at the worst moment of a forward and backward pass, or when the optimizer runs, whichever is
more. docs/planning.md has the formulas; tests/test_planner_memory.py holds them against the engines and hand counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rtp_sim.planner.activations import Kept
from rtp_sim.planner.bounds import Model, distinct, lookup, way_of
from rtp_sim.planner.sizes import BlockSizes
from rtp_sim.planner.space import EVERY_STRATEGY, RECOMPUTE_NAMES, RINGS, SYNCS, Ints, Space
from rtp_sim.schedule.pipeline_order import PIPELINES
from rtp_sim.schedule.stages import Stages, cut

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "communication")
"""Those of schedule.ir that a bound counts, in the order of its rows."""


def memory_bounds(space: Space, model: Model) -> Ints:
    """Bytes per rank, shape (CATEGORIES, candidates)."""
    found = np.zeros((len(CATEGORIES), len(space)), dtype=np.int64)
    for number in np.unique(space.strategy):
        name, mine = EVERY_STRATEGY[number], np.flatnonzero(space.strategy == number)
        part = space.take(mine)
        found[:, mine] = _pipelines(part, model, name) if name in PIPELINES else _flat(part, model, name)
    return found


def by_category(column: Ints) -> Mapping[str, int]:
    """One candidate's bytes as a mapping."""
    return {category: int(value) for category, value in zip(CATEGORIES, column, strict=True)}


def _worse(at_peak: Ints, at_end: Ints) -> Ints:
    """Whichever moment needs more in all."""
    found: Ints = np.where(at_peak.sum(axis=0) >= at_end.sum(axis=0), at_peak, at_end)
    return found


def _flat(space: Space, model: Model, name: str) -> Ints:
    policy, state_bytes = model.training.policy, model.training.optimizer_bytes_per_parameter()
    count = len(model.network.blocks)
    blocks = sum(block.recomputable for block in model.network.blocks)
    assert count >= blocks

    def sizes(inner: int, dp: int, sequence: int, ring: int) -> tuple[int, ...]:
        own = model.sizes.blocks(way_of(name, bool(sequence), RINGS[ring]), inner)
        total = sum(b.owned for b in own)
        if name not in ("fsdp", "hsdp"):
            return total, total, 0
        n = dp if name == "fsdp" else inner
        unit = max((b.owned for b, x in zip(own, model.network.blocks, strict=True) if x.recomputable), default=0)
        return -(-total // n), -(-total // n), unit

    def kept(inner: int, sequence: int, ring: int, recompute: int) -> tuple[int, ...]:
        k = model.activations.kept(
            way_of(name, bool(sequence), RINGS[ring]), 1 if name == "hsdp" else inner, RECOMPUTE_NAMES[recompute]
        )
        return k.first_bytes + blocks * k.block_bytes, k.head_bytes, k.backward_bytes

    held, owned, unit = lookup((space.inner, space.dp, space.sequence, space.ring), sizes).astype(np.int64)
    most, head, backward = lookup((space.inner, space.sequence, space.ring, space.recompute), kept).astype(np.int64)
    m, mb = space.micro_batches, space.micro_batch
    mode = np.full(len(space), SYNCS.index(name)) if name in SYNCS else space.sync
    sharded = (mode > 0) & (space.dp > 1)
    weights, gradients = held * policy.weight_bytes, owned * policy.gradient_bytes
    optimizer = np.where(sharded, owned // space.dp, owned) * state_bytes
    # Gradients that outlive a micro-batch: all, their shards (zero2), or a contiguous buffer from the start (zero1).
    lasting = np.where((mode == SYNCS.index("zero2")) & (space.dp > 1), gradients // space.dp, gradients)
    at_peak = np.where((m > 1) | (name == "zero1"), lasting, 0)
    at_end = lasting
    bucket = gradients if name == "ddp" else np.zeros_like(gradients)
    bucket = np.where(space.dp > 1, bucket, 0)
    extra = np.maximum(mb * head, mb * backward + unit * policy.weight_bytes)
    full = np.where(mb * head >= mb * backward + unit * policy.weight_bytes, 0, unit * policy.weight_bytes)
    acting = mb * most + extra - full
    nothing = np.zeros_like(weights)
    return _worse(
        np.stack([weights, at_peak, optimizer, acting, bucket + full]),
        np.stack([weights, at_end, optimizer, nothing, bucket]),
    )


# ---- pipelines


def _pipelines(space: Space, model: Model, name: str) -> Ints:
    found = np.zeros((len(CATEGORIES), len(space)), dtype=np.int64)
    shape = PIPELINES[name]
    cuts, where = distinct((space.pp, space.vpp))
    for number, i in enumerate(cuts.tolist()):
        mine = np.flatnonzero(where == number)
        stages = cut(model.network, int(space.pp[i]), shape.chunks or int(space.vpp[i]), shape.v_shape, (), "layers")
        part = space.take(mine)
        first, last = (_stage(part, model, name, stages, s) for s in (0, stages.count - 1))
        found[:, mine] = _worse(first, last)
    return found


def _stage(space: Space, model: Model, name: str, stages: Stages, stage: int) -> Ints:
    """The first or the last stage."""
    policy, state_bytes = model.training.policy, model.training.optimizer_bytes_per_parameter()
    place = {block.name: k for k, block in enumerate(model.network.blocks)}
    own = [place[block.name] for block in stages.blocks(stage)]
    counts = [sum(b.recomputable for b in stages.pieces[stages.piece(stage, c)]) for c in range(stages.chunks)]
    is_last = stages.stage_of(len(stages.pieces) - 1) == stage

    def sizes(inner: int, sequence: int) -> tuple[int, ...]:
        blocks: list[BlockSizes] = [model.sizes.blocks(way_of(name, bool(sequence), "auto"), inner)[k] for k in own]
        total = sum(b.owned for b in blocks)
        return (total + (sum(sum(b.shared) for b in blocks) if stage else 0),)

    def kept(inner: int, sequence: int, recompute: int) -> tuple[int, ...]:
        k: Kept = model.activations.kept(way_of(name, bool(sequence), "auto"), inner, RECOMPUTE_NAMES[recompute])
        return k.first_bytes, k.block_bytes, k.head_bytes if is_last else 0, k.backward_bytes

    (held,) = lookup((space.inner, space.sequence), sizes).astype(np.int64)
    first, each, head, backward = lookup((space.inner, space.sequence, space.recompute), kept).astype(np.int64)
    m, mb, p = space.micro_batches, space.micro_batch, stages.count
    # From the third round of p micro-batches on nothing is new.
    few = np.minimum(m, 3 * p)
    found = lookup((few,), lambda micros: _under_way(name, p, stage, micros, counts)).astype(np.int64)
    # Which chunk is at work when most is held is not looked at: with several, only what every backward needs counts.
    extra = mb * (np.maximum(head, backward) if stages.chunks == 1 else backward)
    # Where weight gradients are put off, what a whole backward needs is never needed at once.
    split = any(action.kind == "W" for action in PIPELINES[name].order(p, stage, p, stages.chunks))
    early, late = (
        np.where(blocks > 0, mb * (blocks * each + (firsts * first if stage == 0 else 0)) + (0 if split else extra), 0)
        for blocks, firsts in (found[:2], found[2:])
    )
    weights, gradients = held * policy.weight_bytes, held * policy.gradient_bytes
    optimizer = np.where((space.sync > 0) & (space.dp > 1), held // space.dp, held) * state_bytes
    nothing = np.zeros_like(weights)
    return _worse(
        np.stack([weights, nothing, optimizer, early, nothing]),
        np.stack([weights, gradients, optimizer, late, nothing]),
    )


def _under_way(name: str, p: int, stage: int, micros: int, counts: list[int]) -> tuple[int, int, int, int]:
    """The most blocks whose activations a stage holds at once, and how many of these passes are of its first chunk; the
    same once every chunk has had a backward, when all gradients are there (0 where it never has)."""
    early, late = (0, 0), (0, 0)
    chunks, begun, all_begun = [0] * len(counts), set[int](), False
    for action in PIPELINES[name].order(p, stage, micros, len(counts)):
        if action.kind == "F":
            chunks[action.chunk] += 1
            held = sum(n * c for n, c in zip(chunks, counts, strict=True))
            early = max(early, (held, chunks[0]))
            late = max(late, (held, chunks[0])) if all_begun else late
            continue
        # A backward works on activations that are held until it ends, or until its weight gradients are there.
        held = sum(n * c for n, c in zip(chunks, counts, strict=True))
        late = max(late, (held, chunks[0])) if all_begun else late
        # A backward that puts weight gradients off leaves none behind.
        begun |= {action.chunk} if action.kind in "BW" else set()
        all_begun = len(begun) == len(counts)
        chunks[action.chunk] -= action.kind in "BW"
    return (*early, *late)
