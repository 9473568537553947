"""`Composition`: a pipeline step in its stretches. Each kind of stage is built for two micro-batches and priced.

Built and priced is a short program per kind of stage (first, middle, last), whatever the number of stages and
micro-batches. `pipeline.py` walks through the whole step with the stretches, `passes.py` simulates it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rtp_sim.compose.memory import Label
from rtp_sim.compose.prices import Prices, priced
from rtp_sim.compose.stretch import Stretch, stretch
from rtp_sim.engine.costs import CostModel
from rtp_sim.engine.fold import Folds
from rtp_sim.engine.memory import Version, live_intervals
from rtp_sim.experiment import Setting
from rtp_sim.schedule.ir import Collective, Group, Program, Schedule
from rtp_sim.schedule.layout import stage_of_rank
from rtp_sim.schedule.pipeline_order import PIPELINES, Action
from rtp_sim.schedule.stages import Stages
from rtp_sim.schedule.step import Step
from rtp_sim.schedule.strategies.pipeline import GROUP, TIED, stages_of, with_sharing_stages, write_stage

Ranges = list[tuple[Label, int, int, int]]
"""(label, micro-batch, first op, end) of every stretch of a short program."""

Table = Mapping[Label, Stretch]
"""The stretches of a stage."""


@dataclass(frozen=True)
class Kind:
    """A kind of stage: its short program with its stretches."""

    program: Program
    ranges: Ranges

    @cached_property
    def versions(self) -> list[Version]:
        """The live intervals of its buffers."""
        return live_intervals(self.program)


Kinds = dict[object, Kind]
"""Kinds of stages of one network, by what they depend on: for settings that differ in the places of ranks alone."""


@dataclass(frozen=True)
class Short:
    """The short schedule: a program per kind of stage; of each kind its first rank."""

    schedule: Schedule
    kind_of_stage: tuple[int, ...]
    kinds: tuple[Kind, ...]
    first_rank: tuple[int, ...]


@dataclass(frozen=True)
class Composition:
    """A pipeline step: what its stages do in which order, and the stretches of each (`tables`). `slowdown_permille` is
    how much longer kernels take beside communication."""

    setting: Setting
    stages: Stages
    orders: tuple[tuple[Action, ...], ...]
    short: Short
    prices: Prices
    tables: tuple[Table, ...]
    cost: CostModel
    slowdown_permille: int

    @property
    def paced(self) -> bool:
        """Whether kernels wait for the sends before them."""
        return not self.setting.request.options.pp_overlap

    @property
    def micros(self) -> int:
        """Micro-batches of the step."""
        return self.setting.training.num_microbatches

    def of_length(self, micros: int) -> Composition:
        """The same pipeline with this many micro-batches, at least two: its stretches are the same."""
        if micros == self.micros:
            return self
        setting = replace(self.setting, training=replace(self.setting.training, num_microbatches=micros))
        return replace(self, setting=setting, orders=_orders(setting, self.stages))


def composition(
    setting: Setting, cost: CostModel | None = None, *, shared: bool = True, slowdown: bool = True,
    folds: Folds | None = None, alike: bool = False, kinds: Kinds | None = None,
) -> Composition:  # fmt: skip
    """The stretches of the pipeline step that `setting` describes. `folds` and `kinds` spare compositions of one
    network and cost model after each other what they have in common.

    With `shared` off transfers have their links to themselves, with `slowdown` off kernels beside communication are as
    fast as alone: then the times are those of engine/longest_path.py. InputError as build_schedule.
    """
    cost = cost or setting.cost
    permille = cost.overlap_slowdown_permille if slowdown else 1000
    setting, stages, orders, short = shortened(setting, kinds)
    # With a program number per stage, so that the step in passes (passes.py) folds like it.
    stage_of = tuple(stage_of_rank(setting.layout, r) for r in range(setting.layout.world_size))
    programs = tuple(short.kinds[kind].program for kind in short.kind_of_stage)
    by_stage = replace(short.schedule, programs=programs, program_of_rank=stage_of)
    prices = priced(by_stage, cost, stage_of, shared, folds, alike)
    known: dict[object, Stretch] = {}
    tables = tuple(_stretches(short, s, prices, permille, known) for s in range(stages.count))
    return Composition(setting, stages, orders, short, prices, tables, cost, permille)


def shortened(
    setting: Setting, kinds: Kinds | None = None
) -> tuple[Setting, Stages, tuple[tuple[Action, ...], ...], Short]:
    """The setting with the groups of its stages, its stages, what they do in which order, and the short schedule.
    InputError as build_schedule."""
    stages = stages_of(setting.network, setting.request.options, setting.layout.pp, setting.request.strategy)
    setting = replace(setting, groups=with_sharing_stages(setting.groups, stages))
    orders = _orders(setting, stages)
    return setting, stages, orders, _short(setting, stages, orders, {} if kinds is None else kinds)


def _orders(setting: Setting, stages: Stages) -> tuple[tuple[Action, ...], ...]:
    order, micros = PIPELINES[setting.request.strategy].order, setting.training.num_microbatches
    return tuple(tuple(order(stages.count, s, micros, stages.chunks)) for s in range(stages.count))


# ---- the short schedule


def _short(setting: Setting, stages: Stages, orders: Sequence[Sequence[Action]], known: Kinds) -> Short:
    training = replace(setting.training, num_microbatches=min(2, setting.training.num_microbatches))
    split = any(a.kind == "I" for a in orders[0])
    sizes = tuple((name, group.size) for name, group in setting.groups.items())
    numbers: dict[object, int] = {}
    kind_of_stage, kinds, firsts = [], [], []
    for s in range(stages.count):
        signature = _signature(stages, s)
        if signature not in numbers:
            numbers[signature] = len(numbers)
            key = setting.request.strategy, setting.request.options, training, sizes, s
            if key not in known:
                known[key] = _kind(replace(setting, training=training), stages, s, split)
            kinds.append(known[key])
            firsts.append(s)
        kind_of_stage.append(numbers[signature])
    layout = setting.layout
    of_rank = tuple(kind_of_stage[stage_of_rank(layout, r)] for r in range(layout.world_size))
    first_rank = tuple(next(r for r in range(layout.world_size) if stage_of_rank(layout, r) == s) for s in firsts)
    groups: dict[str, Group] = dict(setting.groups)
    programs = tuple(kind.program for kind in kinds)
    schedule = Schedule(setting.request.strategy, layout.world_size, groups, programs, of_rank)
    return Short(schedule, tuple(kind_of_stage), tuple(kinds), first_rank)


def _kind(setting: Setting, stages: Stages, stage: int, split: bool) -> Kind:
    name, micros = f"{setting.request.strategy}.stage{stage}", setting.training.num_microbatches
    step = Step(name, setting.network, setting.training, setting.groups, setting.request.options, stage=stage)
    write_stage(step, stages, _short_order(stages.chunks, micros, split))
    program = step.b.program()
    return Kind(program, _ranges(step, program, micros - 1))


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
            found.append((label_of(action, last), action.micro, first, stop))
            continue
        cuts = [
            op.index + 1
            for op in program.ops[first:stop]
            if isinstance(op.action, Collective) and op.action.group in (TIED, GROUP)
        ]
        for number, (a, b) in enumerate(zip([first, *cuts], [*cuts, stop], strict=True)):
            found.append((("end", number), action.micro, a, b))
    return found


def label_of(action: Action, last: int) -> Label:
    return action.kind, action.chunk, action.kind in "BW" and action.micro == last


def _stretches(short: Short, stage: int, prices: Prices, permille: int, known: dict[object, Stretch]) -> Table:
    """The stretches of a stage; `known` are those of stages before it, many of which are the same."""
    kind = short.kind_of_stage[stage]
    program, ranges = short.kinds[kind].program, short.kinds[kind].ranges
    duration_ns, issue_ns = prices.duration_ns[stage], prices.issue_ns[stage]
    forward = {(label, micro): range(a, b) for label, micro, a, b in ranges}
    # What the end of the step waits for in the last stretches is known op by op.
    end = min(a for label, _, a, _ in ranges if isinstance(label, tuple) and label[0] == "end")
    single = {i for label, _, a, b in ranges if isinstance(label, tuple) and label[-1] is True for i in range(a, b)}
    wanted = frozenset(d for op in program.ops[end:] for d in op.after if d in single)
    found: dict[Label, Stretch] = {}
    for label, micro, first, stop in ranges:
        if label in found:
            continue
        key = kind, label, duration_ns[first:stop]
        if key not in known:
            action, chunk = (label[0], label[1]) if isinstance(label, tuple) else ("", 0)
            before: list[int] = []
            if action in ("B", "I", "W"):
                before += forward[("F", chunk, False), micro]
            if action == "W":
                before += forward[("I", chunk, False), micro]
            known[key] = stretch(program.ops, first, stop, duration_ns, issue_ns, frozenset(before), wanted,
                                 (TIED, GROUP), permille)  # fmt: skip
        found[label] = known[key]
    return found
