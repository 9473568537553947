"""A pipeline step from its stretches: each kind of stage is built for two micro-batches, and composed for all of them.

Built and priced is a short program per kind of stage (first, middle, last), whatever the number of stages and
micro-batches; what remains per micro-batch is a handful of additions and maxima (walk.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rtp_sim.compose.memory import Label, Memory, StageMemory, footprints, largest_at, sweep
from rtp_sim.compose.prices import Prices, priced
from rtp_sim.compose.stretch import Stretch, stretch
from rtp_sim.compose.walk import Progress, Turn, meet, walk
from rtp_sim.engine.costs import CostModel
from rtp_sim.engine.fold import Folds
from rtp_sim.experiment import Setting
from rtp_sim.metrics import op_traffic
from rtp_sim.schedule.ir import Collective, Compute, Group, Op, Program, Recv, Schedule, Send
from rtp_sim.schedule.layout import stage_of_rank
from rtp_sim.schedule.pipeline_order import PIPELINES, Action
from rtp_sim.schedule.stages import Stages
from rtp_sim.schedule.step import Step
from rtp_sim.schedule.strategies.pipeline import GROUP, TIED, stages_of, with_sharing_stages, write_stage

Ranges = list[tuple[Label, int, int, int]]
"""(label, micro-batch, first op, end) of every stretch of a short program."""


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
class _Short:
    """The short schedule: a program per kind of stage."""

    schedule: Schedule
    kind_of_stage: tuple[int, ...]
    ranges: tuple[Ranges, ...]
    first_rank: tuple[int, ...]


def compose_pipeline(
    setting: Setting, cost: CostModel | None = None, *, shared: bool = True, slowdown: bool = True,
    folds: Folds | None = None, alike: bool = False,
) -> list[StageResult]:
    """The stages of the pipeline step that `setting` describes.

    With `shared` off transfers have their links to themselves, with `slowdown` off kernels beside communication are as
    fast as alone: then the times are those of engine/longest_path.py. InputError as build_schedule.
    """
    cost = cost or setting.cost
    permille = cost.overlap_slowdown_permille if slowdown else 1000
    stages = stages_of(setting.network, setting.request.options, setting.layout.pp, setting.request.strategy)
    setting = replace(setting, groups=with_sharing_stages(setting.groups, stages))
    orders = _orders(setting, stages)
    short = _short(setting, stages, orders)
    prices = priced(short.schedule, cost, [stage_of_rank(setting.layout, r) for r in range(setting.layout.world_size)],
                    shared, folds, alike)  # fmt: skip
    made: dict[object, dict[Label, Stretch]] = {}
    tables = []
    for s in range(stages.count):
        kind = short.kind_of_stage[s]
        key = (kind, prices.duration_ns[s])
        if key not in made:
            made[key] = _stretches(short.schedule.programs[kind], short.ranges[kind], prices, s, permille)
        tables.append(made[key])
    progress = [Progress() for _ in range(stages.count)]
    turns = [_turns(stages, s, orders[s], tables[s], prices) for s in range(stages.count)]
    paced = not setting.request.options.pp_overlap
    walk(progress, turns, permille, paced)
    _finish(progress, tables, short, prices, paced)
    held = _memories(setting, short, orders)
    return [_result(short, progress[s], s, orders[s], prices, held[s]) for s in range(stages.count)]


def stage_memories(setting: Setting) -> list[StageMemory]:
    """What each stage holds at its peak, without the price of anything. InputError as build_schedule."""
    stages = stages_of(setting.network, setting.request.options, setting.layout.pp, setting.request.strategy)
    setting = replace(setting, groups=with_sharing_stages(setting.groups, stages))
    orders = _orders(setting, stages)
    return _memories(setting, _short(setting, stages, orders), orders)


def _orders(setting: Setting, stages: Stages) -> list[list[Action]]:
    order, micros = PIPELINES[setting.request.strategy].order, setting.training.num_microbatches
    return [order(stages.count, s, micros, stages.chunks) for s in range(stages.count)]


# ---- the short schedule


def _step(setting: Setting, stage: int, micros: int) -> Step:
    training = replace(setting.training, num_microbatches=micros)
    name = f"{setting.request.strategy}.stage{stage}"
    return Step(name, setting.network, training, setting.groups, setting.request.options, stage=stage)


def _short(setting: Setting, stages: Stages, orders: Sequence[Sequence[Action]]) -> _Short:
    micros = min(2, setting.training.num_microbatches)
    split = any(a.kind == "I" for a in orders[0])
    kinds: dict[object, int] = {}
    kind_of_stage, ranges, programs, firsts = [], [], [], []
    for s in range(stages.count):
        signature = _signature(stages, s)
        if signature not in kinds:
            kinds[signature] = len(kinds)
            step = _step(setting, s, micros)
            write_stage(step, stages, _short_order(stages.chunks, micros, split))
            programs.append(step.b.program())
            ranges.append(_ranges(step, programs[-1], micros - 1))
            firsts.append(s)
        kind_of_stage.append(kinds[signature])
    layout = setting.layout
    of_rank = tuple(kind_of_stage[stage_of_rank(layout, r)] for r in range(layout.world_size))
    first_rank = tuple(next(r for r in range(layout.world_size) if stage_of_rank(layout, r) == s) for s in firsts)
    groups: dict[str, Group] = dict(setting.groups)
    schedule = Schedule(setting.request.strategy, layout.world_size, groups, tuple(programs), of_rank)
    return _Short(schedule, tuple(kind_of_stage), tuple(ranges), first_rank)


def _signature(stages: Stages, stage: int) -> object:
    """Two stages with the same signature do the same, whatever their layers are called."""
    found: list[object] = []
    for chunk in range(stages.chunks):
        k = stages.piece(stage, chunk)
        ends = [stages.stage_of(j) - stage if 0 <= j < len(stages.pieces) else None for j in (k - 1, k + 1)]
        ops = tuple((x.op, x.shares is None) for block in stages.pieces[k] for x in block.layers)
        found.append((tuple(ends), tuple(len(block.layers) for block in stages.pieces[k]), ops))
    return tuple(found)


def _short_order(chunks: int, micros: int, split: bool) -> list[Action]:
    """One micro-batch after another through the stage's chunks and back: stretches that continue each other are
    neighbours, so that no dependency between them goes without saying."""
    found = []
    for i in range(micros):
        found += [Action("F", c, i) for c in range(chunks)]
        for kind in "IW" if split else "B":
            found += [Action(kind, c, i) for c in reversed(range(chunks))]
    return found


def _ranges(step: Step, program: Program, last: int) -> Ranges:
    """The stretches of a short program; the end is cut behind each collective with another stage."""
    stops = [first for _, first in step.actions[1:]] + [len(program.ops)]
    found: Ranges = []
    for (action, first), stop in zip(step.actions, stops, strict=True):
        if action.kind != "end":
            found.append((_label(action, last), action.micro, first, stop))
            continue
        cuts = [
            op.index + 1
            for op in program.ops[first:stop]
            if isinstance(op.action, Collective) and op.action.group in (TIED, GROUP)
        ]
        for number, (a, b) in enumerate(zip([first, *cuts], [*cuts, stop], strict=True)):
            found.append((("end", number), action.micro, a, b))
    return found


def _label(action: Action, last: int) -> Label:
    return action.kind, action.chunk, action.kind in "BW" and action.micro == last


# ---- from the short schedule to the whole step


def _stretches(program: Program, ranges: Ranges, prices: Prices, stage: int, permille: int) -> dict[Label, Stretch]:
    found: dict[Label, Stretch] = {}
    forward = {(label, micro): range(a, b) for label, micro, a, b in ranges}
    # What the end of the step waits for in the last stretches is known op by op.
    end = min(a for label, _, a, _ in ranges if isinstance(label, tuple) and label[0] == "end")
    single = {i for label, _, a, b in ranges if isinstance(label, tuple) and label[-1] is True for i in range(a, b)}
    wanted = frozenset(d for op in program.ops[end:] for d in op.after if d in single)
    for label, micro, first, stop in ranges:
        if label in found:
            continue
        kind, chunk = (label[0], label[1]) if isinstance(label, tuple) else ("", 0)
        before: list[int] = []
        if kind in ("B", "I", "W"):
            before += forward[("F", chunk, False), micro]
        if kind == "W":
            before += forward[("I", chunk, False), micro]
        found[label] = stretch(
            program.ops, first, stop, prices.duration_ns[stage], prices.issue_ns[stage], frozenset(before), wanted,
            (TIED, GROUP), permille,
        )  # fmt: skip
    return found


def _turns(
    stages: Stages, stage: int, order: Sequence[Action], made: Mapping[Label, Stretch], prices: Prices
) -> list[Turn]:
    found, last = [], order[-1].micro if order else 0
    last = max(a.micro for a in order)
    for action in order:
        one = made[_label(action, last)]
        k, kind, micro = stages.piece(stage, action.chunk), action.kind, action.micro
        comes, goes = (("F", k - 1, micro), ("F", k, micro)) if kind == "F" else (("B", k, micro), ("B", k - 1, micro))
        found.append(
            Turn(
                one,
                comes if one.receive is not None else None,
                goes if one.send is not None else None,
                prices.send_ns[stage][one.send.index] if one.send is not None else 0,
                None if kind == "F" else ("I" if kind == "W" else "F", action.chunk, micro),
                (kind, action.chunk, micro) if kind in "FI" else None,
            )
        )
    return found


def _finish(
    progress: Sequence[Progress], tables: Sequence[Mapping[Label, Stretch]], short: _Short, prices: Prices, paced: bool
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
            stop = next(b for label, _, _, b in short.ranges[kind] if label == ("end", at[s]))
            if tables[s]["end", at[s]].meets is not None:
                waiting[s] = short.schedule.programs[kind].ops[stop - 1]
            at[s] += 1
        _meetings(progress, waiting, short, prices)


def _meetings(progress: Sequence[Progress], waiting: dict[int, Op], short: _Short, prices: Prices) -> None:
    """The collectives for which all stages of their group wait now."""
    for group in (TIED, GROUP):
        members = [s for s, op in waiting.items() if isinstance(op.action, Collective) and op.action.group == group]
        if members and len(members) == short.schedule.groups[group].size:
            op = waiting[members[0]]
            meet([progress[s] for s in members], op.stream, prices.duration_ns[members[0]][op.index])
            for s in members:
                del waiting[s]


def _labels(short: _Short, stage: int, order: Sequence[Action]) -> list[Label]:
    """The stretches of a stage in the order of the step, its end included."""
    last = max(a.micro for a in order)
    ranges = short.ranges[short.kind_of_stage[stage]]
    return [_label(a, last) for a in order] + [x for x, *_ in ranges if isinstance(x, tuple) and x[0] == "end"]


def _memories(setting: Setting, short: _Short, orders: Sequence[Sequence[Action]]) -> list[StageMemory]:
    of_kind: list[Memory] = []
    shards: list[dict[str, int]] = []
    for program, ranges, rank in zip(short.schedule.programs, short.ranges, short.first_rank, strict=True):
        shards.append({n: short.schedule.shard_index(rank, b.part) for n, b in program.buffers.items() if b.part})
        of_kind.append(footprints(program, ranges, shards[-1]))
    found = []
    for s, order in enumerate(orders):
        kind = short.kind_of_stage[s]
        held, op = sweep(of_kind[kind], _labels(short, s, order), setting.training.num_microbatches)
        memory, program = StageMemory(held), short.schedule.programs[kind]
        if op is not None:
            memory = StageMemory(held, program.ops[op].name, largest_at(program, op, shards[kind]))
        found.append(memory)
    return found


def _result(
    short: _Short, progress: Progress, stage: int, order: Sequence[Action], prices: Prices, memory: StageMemory
) -> StageResult:
    kind = short.kind_of_stage[stage]
    ranges, rank = short.ranges[kind], short.first_rank[kind]
    labels = _labels(short, stage, order)
    totals = dict.fromkeys(labels, (0, 0, 0))
    for label, _, first, stop in reversed(ranges):
        totals[label] = _traffic(short.schedule, rank, first, stop, prices.duration_ns[stage])
    sent = [totals[label] for label in labels]
    return StageResult(
        progress.end_ns, progress.host_ns, progress.compute_ns, progress.exposed_ns, sum(x[2] for x in sent), memory,
        sum(x[0] for x in sent), sum(x[1] for x in sent),
    )  # fmt: skip


def _traffic(
    schedule: Schedule, rank: int, first: int, stop: int, duration_ns: Sequence[int]
) -> tuple[int, int, int]:
    """Bytes, messages and time of the communication of a stretch; messages between stages have no time here."""
    size_bytes = messages = time_ns = 0
    for op in schedule.program(rank).ops[first:stop]:
        if isinstance(op.action, Compute | Recv):
            continue
        more, count = op_traffic(schedule, rank, op)
        size_bytes, messages = size_bytes + more, messages + count
        time_ns += 0 if isinstance(op.action, Send) else duration_ns[op.index]
    return size_bytes, messages, time_ns
