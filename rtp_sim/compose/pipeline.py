"""A pipeline step from its stretches (composition.py): walked through for all stages and micro-batches.

What remains per micro-batch is a handful of additions and maxima (walk.py), and of a long step only some of them
(steady.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from rtp_sim.compose.composition import Composition, Short, Table, label_of, shortened
from rtp_sim.compose.memory import Label, Memory, StageMemory, footprints, largest_at, sweep
from rtp_sim.compose.prices import Prices
from rtp_sim.compose.steady import Gone, Stand, in_rounds
from rtp_sim.compose.walk import Progress, Turn, meet, walk
from rtp_sim.experiment import Setting
from rtp_sim.metrics import op_traffic
from rtp_sim.schedule.ir import Collective, Compute, Op, Recv, Schedule, Send
from rtp_sim.schedule.pipeline_order import Action
from rtp_sim.schedule.strategies.pipeline import GROUP, TIED

Traffic = tuple[int, int, int]
"""Bytes, messages and ns of the communication of a stretch."""


@dataclass(frozen=True)
class StageResult:
    """What became of one stage: times in ns, memory in bytes; what one of its ranks sends. `host_ns` is how long its
    kernels waited for the host."""

    end_ns: int
    host_ns: int
    compute_ns: int
    exposed_ns: int
    communication_ns: int
    memory: StageMemory
    sent_bytes: int
    messages: int


@dataclass(frozen=True)
class Walked:
    """The stages of a composed step, and the micro-batches of the steps that were walked through to know them: one with
    all of them, or short ones (steady.py)."""

    stages: list[StageResult]
    lengths: tuple[int, ...]


def walked(made: Composition) -> Walked:
    """The stages of a composed step, each group of ranks moving in lockstep."""
    gone, lengths = _gone(made)
    held = _memories(made.setting, made.short, made.orders)
    sent: dict[object, Mapping[Label, Traffic]] = {}
    found = []
    for s, order in enumerate(made.orders):
        key = made.short.kind_of_stage[s], made.prices.duration_ns[s]
        if key not in sent:
            sent[key] = _traffic_by_label(made, s)
        found.append(_result(made.short, gone.stages[s], s, order, sent[key], held[s]))
    return Walked(found, lengths)


def _gone(made: Composition) -> tuple[Gone, tuple[int, ...]]:
    """The step of all micro-batches, and the micro-batches of the steps that it is known from."""
    if _piles_up(made):
        return gone_through(made, made.micros), (made.micros,)
    return in_rounds(lambda micros: gone_through(made, micros), len(made.orders), made.micros)


def _piles_up(made: Composition) -> bool:
    """Whether the longer the step, the more forward passes wait for their backward, as in GPipe: then it is not one
    round after another."""
    most = set()
    for micros in (3 * made.stages.count, 4 * made.stages.count):
        ways = ([1 if a.kind == "F" else -1 for a in order if a.kind != "I"] for order in made.of_length(micros).orders)
        most.add(tuple(max(accumulate(way)) for way in ways))
    return len(most) > 1


def gone_through(made: Composition, micros: int) -> Gone:
    """The step with this many micro-batches, one after another; spent are the times of each stage."""
    made = made.of_length(micros)
    stages = [Progress() for _ in made.orders]
    walk(stages, [turns_of(made, s) for s in range(len(stages))], made.slowdown_permille, made.paced)
    _finish(stages, made.tables, made.short, made.prices, made.paced)
    return Gone(tuple(_stand(stage) for stage in stages))


def _stand(stage: Progress) -> Stand:
    names = sorted(stage.clocks, key=lambda name: name != "compute")
    clocks = [[clocks.get(name, 0) for name in names] for clocks, _ in stage.marks]
    spent = [spent for _, spent in (*stage.marks, stage.mark())]
    return Stand(np.array(clocks, dtype=np.int64), np.array(spent, dtype=np.int64), stage.end_ns)


def stage_memories(setting: Setting) -> list[StageMemory]:
    """What each stage holds at its peak, without the price of anything. InputError as build_schedule."""
    setting, _, orders, short = shortened(setting)
    return _memories(setting, short, orders)


def turns_of(made: Composition, stage: int) -> list[Turn]:
    """What a stage does up to the end of its last micro-batch."""
    found = []
    order, table, send_ns = made.orders[stage], made.tables[stage], made.prices.send_ns[stage]
    last = max(a.micro for a in order)
    piece = [made.stages.piece(stage, chunk) for chunk in range(made.stages.chunks)]
    for action in order:
        kind, chunk, micro = action
        one, k = table[label_of(action, last)], piece[chunk]
        comes, goes = (("F", k - 1, micro), ("F", k, micro)) if kind == "F" else (("B", k, micro), ("B", k - 1, micro))
        found.append(
            Turn(
                one,
                comes if one.receive is not None else None,
                goes if one.send is not None else None,
                send_ns[one.send.index] if one.send is not None else 0,
                None if kind == "F" else ("I" if kind == "W" else "F", chunk, micro),
                (kind, chunk, micro) if kind in "FI" else None,
                (kind, chunk) == ("F", 0),
            )
        )
    return found


def _finish(
    progress: Sequence[Progress], tables: Sequence[Table], short: Short, prices: Prices, paced: bool
) -> None:
    """The end of the step. Where a stretch ends with a collective of several stages, all of them must be there."""
    at, waiting = [0] * len(tables), dict[int, Op]()
    while True:
        going = [s for s, table in enumerate(tables) if s not in waiting and ("end", at[s]) in table]
        if not going:
            break
        walk(progress, [[Turn(tables[s]["end", at[s]])] if s in going else [] for s in range(len(tables))], paced=paced)
        for s in going:
            kind = short.kind_of_stage[s]
            stop = next(b for label, _, _, b in short.kinds[kind].ranges if label == ("end", at[s]))
            if tables[s]["end", at[s]].meets is not None:
                waiting[s] = short.schedule.programs[kind].ops[stop - 1]
            at[s] += 1
        _meetings(progress, waiting, short, prices)


def _meetings(progress: Sequence[Progress], waiting: dict[int, Op], short: Short, prices: Prices) -> None:
    """The collectives for which all stages of their group wait now."""
    for group in (TIED, GROUP):
        members = [s for s, op in waiting.items() if isinstance(op.action, Collective) and op.action.group == group]
        if members and len(members) == short.schedule.groups[group].size:
            op = waiting[members[0]]
            meet([progress[s] for s in members], op.stream, prices.duration_ns[members[0]][op.index])
            for s in members:
                del waiting[s]


def _labels(short: Short, stage: int, order: Sequence[Action]) -> list[Label]:
    """The stretches of a stage in the order of the step, its end included."""
    last = max(a.micro for a in order)
    ranges = short.kinds[short.kind_of_stage[stage]].ranges
    return [label_of(a, last) for a in order] + [x for x, *_ in ranges if isinstance(x, tuple) and x[0] == "end"]


def _memories(setting: Setting, short: Short, orders: Sequence[Sequence[Action]]) -> list[StageMemory]:
    of_kind: list[Memory] = []
    shards: list[dict[str, int]] = []
    for one, rank in zip(short.kinds, short.first_rank, strict=True):
        buffers = one.program.buffers.items()
        shards.append({n: short.schedule.shard_index(rank, b.part) for n, b in buffers if b.part})
        of_kind.append(footprints(one.program, one.versions, one.ranges, shards[-1]))
    found = []
    largest: dict[tuple[int, int], tuple[tuple[str, int], ...]] = {}
    for s, order in enumerate(orders):
        kind = short.kind_of_stage[s]
        held, op = sweep(of_kind[kind], _labels(short, s, order), setting.training.num_microbatches)
        memory, program = StageMemory(held), short.kinds[kind].program
        if op is not None:
            if (kind, op) not in largest:
                largest[kind, op] = largest_at(program, short.kinds[kind].versions, op, shards[kind])
            memory = StageMemory(held, program.ops[op].name, largest[kind, op])
        found.append(memory)
    return found


def _result(
    short: Short, stand: Stand, stage: int, order: Sequence[Action], traffic: Mapping[Label, Traffic],
    memory: StageMemory,
) -> StageResult:  # fmt: skip
    sent = [traffic.get(label, (0, 0, 0)) for label in _labels(short, stage, order)]
    compute_ns, exposed_ns, host_ns = (int(x) for x in stand.spent_ns[-1])
    return StageResult(
        stand.end_ns, host_ns, compute_ns, exposed_ns, sum(x[2] for x in sent), memory, sum(x[0] for x in sent),
        sum(x[1] for x in sent),
    )  # fmt: skip


def _traffic_by_label(made: Composition, stage: int) -> dict[Label, Traffic]:
    kind, short = made.short.kind_of_stage[stage], made.short
    return {
        label: _traffic(short.schedule, short.first_rank[kind], first, stop, made.prices.duration_ns[stage])
        for label, _, first, stop in reversed(short.kinds[kind].ranges)
    }


def _traffic(schedule: Schedule, rank: int, first: int, stop: int, duration_ns: Sequence[int]) -> Traffic:
    """Bytes, messages and time of the communication of a stretch; messages between stages have no time here."""
    size_bytes = messages = time_ns = 0
    for op in schedule.program(rank).ops[first:stop]:
        if isinstance(op.action, Compute | Recv):
            continue
        more, count = op_traffic(schedule, rank, op)
        size_bytes, messages = size_bytes + more, messages + count
        time_ns += 0 if isinstance(op.action, Send) else duration_ns[op.index]
    return size_bytes, messages, time_ns
