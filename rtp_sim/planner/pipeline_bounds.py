"""Lower and upper bounds of pipeline steps, vectorised over the candidates that cut the network alike.

With pieces q = 0 ... p v - 1 of forward and backward times f and b, messages t between them, and m micro-batches, a
step is at least

    stage s       sum of (f + t) before s  +  m (f + b) of the stage  +  sum of (b + t) before s
    last stage    sum of all f + t  +  its kernels between its first backward and that of the last micro-batch
                  +  sum of all b + t                                        (1F1B, interleaved)
    1F1B          i f_0 + (k + 1) (sum of f + b + 2 t),  m - 1 = k p + i: stage 0 starts micro-batch j + p after
                  micro-batch j has come back

then the reduction of stage 0's gradients as far as it does not fit beside its last backward, its optimizer, and the
gathering of its weights. The first two are the closed forms at the top of schedule/pipeline_order.py where stages are
equal and messages free.
"""

from __future__ import annotations

import numpy as np

from rtp_sim.model.layers import Extent
from rtp_sim.planner.bounds import Floats, Model, distinct, lookup, way_of
from rtp_sim.planner.layer_times import Pass
from rtp_sim.planner.space import RECOMPUTE_NAMES, SYNCS, Ints, Space
from rtp_sim.schedule.layout import ORDERS
from rtp_sim.schedule.pipeline_order import PIPELINES
from rtp_sim.schedule.stages import Stages, cut

AGAIN = Pass.__slots__.index("recompute_ns")

ORDERED = ("gpipe", "1f1b", "interleaved")
"""Pipelines whose stages end with the backward of the last micro-batch's earliest layers."""


def pipeline_bounds(space: Space, model: Model, name: str) -> tuple[Floats, Floats]:
    """(lower, upper) in ns for candidates of one pipeline strategy."""
    lower, upper = np.zeros(len(space)), np.zeros(len(space))
    shape = PIPELINES[name]
    first, passes = distinct((space.inner, space.sequence, space.micro_batch, space.recompute))
    tables = np.stack([_table(space, model, name, i, False) for i in first.tolist()])
    worst = np.stack([_table(space, model, name, i, True) for i in first.tolist()])
    cuts, where = distinct((space.pp, space.vpp))
    for number, i in enumerate(cuts.tolist()):
        mine = np.flatnonzero(where == number)
        stages = cut(model.network, int(space.pp[i]), shape.chunks or int(space.vpp[i]), shape.v_shape, (), "layers")
        starts = np.cumsum([0, *(len(piece) for piece in stages.pieces)])[:-1]
        # (fields of Pass, pieces, candidates)
        values = np.add.reduceat(tables, starts, axis=1)[passes[mine]].transpose(2, 1, 0)
        # What is recomputed of a piece's last block needs no gradient: the stage does it while it waits for one.
        values[AGAIN] = tables[:, np.append(starts[1:], tables.shape[1]) - 1, AGAIN][passes[mine]].T
        lower[mine], upper[mine] = _cut_alike(space.take(mine), model, name, stages, values)
        # Some stage has the tensor-parallel group whose collectives take longest.
        slow = np.add.reduceat(worst, starts, axis=1)[passes[mine]][:, :, :2].sum(axis=2).T
        least = np.min([sum(slow[q] for q in range(len(slow)) if stages.stage_of(q) == s) for s in range(stages.count)],
                       axis=0)  # fmt: skip
        lower[mine] = np.maximum(lower[mine], space.micro_batches[mine] * least)
    return lower, upper


def _table(space: Space, model: Model, name: str, i: int, worst: bool) -> Floats:
    way = way_of(name, bool(space.sequence[i]), "auto")
    inner, mb, recompute = int(space.inner[i]), int(space.micro_batch[i]), RECOMPUTE_NAMES[space.recompute[i]]
    return model.times.table(way, inner, mb, recompute, worst)


def _cut_alike(space: Space, model: Model, name: str, stages: Stages, values: Floats) -> tuple[Floats, Floats]:
    p, pieces = stages.count, len(stages.pieces)
    f, b, again, kernels_f, kernels_b, issue_f, issue_b, messages = values
    ahead, back = _messages(space, model, stages)
    m = space.micro_batches
    exposed = np.maximum(f - kernels_f, b - kernels_b).max(axis=0)
    sent = _beside_sends(f, b, ahead, back, exposed, model.slowdown)
    before = _ends_of_stage_zero(m, f, b, again, ahead, back, sent, stages, name)
    reduce, update, gather = _end_of_step(space, model, stages, name)
    # Reductions of stage 0 begin in its last backward, where it has one piece.
    overlap = b[0] if stages.chunks == 1 else before - f[0]
    lower = np.maximum(before, before - overlap + reduce) + update + gather
    work, issue = np.zeros((p, len(space))), np.zeros((p, len(space)))
    for q in range(pieces):
        work[stages.stage_of(q)] += kernels_f[q] + kernels_b[q]
        issue[stages.stage_of(q)] += issue_f[q] + issue_b[q]
    lower = np.maximum(lower, (m * issue).max(axis=0) + update)
    through = (f + b).sum(axis=0) + ahead.sum(axis=0) + back.sum(axis=0)
    upper = m * (work.max(axis=0) * model.slowdown + messages.sum(axis=0) / p) + through + reduce + update + gather
    return lower, np.maximum(lower, upper)


def _ends_of_stage_zero(m: Ints, f: Floats, b: Floats, again: Floats, ahead: Floats, back: Floats, sent: Floats,
                        stages: Stages, name: str) -> Floats:  # fmt: skip
    """The earliest end of stage 0's last backward, or of any stage's kernels where the order says no more."""
    p, v, nothing = stages.count, stages.chunks, np.zeros((1, f.shape[1]))
    own = np.zeros((p, f.shape[1]))
    for q in range(len(stages.pieces)):
        own[stages.stage_of(q)] += f[q] + b[q] + sent[q]
    # Nothing may run beside the very last message of a stage.
    own -= np.maximum(ahead.max(axis=0, initial=0.0), back.max(axis=0, initial=0.0)) / np.maximum(m, 1)
    arrive = np.concatenate([nothing, np.cumsum(f[: p - 1] + ahead[: p - 1], axis=0)])
    if name not in ORDERED:
        best: Floats = (arrive + m * own).max(axis=0)
        return best
    waits = b - again
    leave = np.concatenate([nothing, np.cumsum(waits[: p - 1] + back[: p - 1], axis=0)])
    best = (arrive + m * own + leave).max(axis=0)
    there, home = f.sum(axis=0) + ahead.sum(axis=0), waits.sum(axis=0) + again[-1] + back.sum(axis=0)
    if name != "gpipe":
        lasts = [c * p + p - 1 for c in range(v)]
        # Of the last stage, what comes neither before its first backward nor after the last micro-batch's.
        busy = f + b + sent
        inner = (m - p) * busy[lasts[:-1]].sum(axis=0) + (m - 1) * busy[lasts[-1]]
        best = np.maximum(best, there + np.maximum(inner, 0.0) + home)
    if name == "1f1b":
        rounds, rest = np.divmod(m - 1, p)
        best = np.maximum(best, rest * f[0] + (rounds + 1) * (there + home))
    return best


def _beside_sends(f: Floats, b: Floats, ahead: Floats, back: Floats, exposed: Floats, slowdown: float) -> Floats:
    """What a piece's messages cost its stage per micro-batch: while one is under way, kernels advance at 1 / slowdown,
    or wait; only what the stage waits for within a piece, `exposed` at most, is not slower for it. Both directions
    count only where no message can still be under way when the next one leaves."""
    there, home = np.zeros_like(f), np.zeros_like(b)
    there[:-1], home[1:] = np.maximum(0.0, ahead - exposed), np.maximum(0.0, back - exposed)
    short = np.minimum(f.min(axis=0), b.min(axis=0)) >= np.maximum(there.max(axis=0), home.max(axis=0))
    found: Floats = np.where(short, there + home, np.maximum(there, home)) * (1 - 1 / slowdown)
    return found


def _messages(space: Space, model: Model, stages: Stages) -> tuple[Floats, Floats]:
    """Times of the messages from each piece to the next and back, (pieces - 1, candidates)."""
    p, seq = stages.count, model.network.seq
    producer = {x.output: x for x in model.network.layers()}
    width = min(producer[t].op.lower(Extent(1, seq)).tensors["y"].numel // seq for t in stages.crossing)

    def of(inner: int, dp: int, order: int, sequence: int, mb: int) -> tuple[float, ...]:
        stride = inner * dp if ORDERS[order] == "tp-dp-pp" else inner
        tokens = mb * seq // (inner if sequence else 1)
        return model.prices.stage_hops(p, stride, tokens * width * model.training.policy.weight_bytes)

    table = lookup((space.inner, space.dp, space.order, space.sequence, space.micro_batch), of)
    ahead, back = table[: p - 1], table[p - 1 : 2 * p - 2]
    if stages.v_shape:
        turn = np.zeros((1, len(space)))
        return np.concatenate([ahead, turn, ahead[::-1]]), np.concatenate([back, turn, back[::-1]])
    around = [np.concatenate([ahead, table[-2:-1]]), np.concatenate([back, table[-1:]])]
    ahead, back = (np.tile(one, (stages.chunks, 1))[:-1] for one in around)
    return ahead, back


def _end_of_step(space: Space, model: Model, stages: Stages, name: str) -> Floats:
    """Reduction, optimizer and gathering of stage 0."""
    place = {block.name: k for k, block in enumerate(model.network.blocks)}
    mine = tuple(place[block.name] for block in stages.blocks(0))

    def of(inner: int, dp: int, order: int, sequence: int, sync: int) -> tuple[float, float, float]:
        stride = inner if ORDERS[order] == "tp-dp-pp" else inner * stages.count
        end = model.end_of_step(way_of(name, bool(sequence), "auto"), inner, mine, dp, stride, SYNCS[sync])
        return end.reduce_ns, end.update_ns, end.gather_ns

    return lookup((space.inner, space.dp, space.order, space.sequence, space.sync), of)
