"""The join of a predicted and a measured timeline on (rank, op): every error of a prediction has an address.

Errors are signed, predicted less measured: positive where the prediction is too slow. "Which kernels explain the
difference" is asked of the measured critical rank (the one that ends last). Writing p and m for the durations of its
ops, the contribution of a group of ops is sum(p) - sum(m); all contributions together differ from the error of the
step time by the remainder, which is what overlap and waiting make of them:

    predicted step - measured step == sum of the contributions + remainder

An op that has no times on one side (both -1: a run that was cut short, an op that was not timed) is listed and counts
nowhere else.

What was sent and held comes from `Timeline.meta`: "bytes_sent", "messages" and "peak_memory_bytes", each for all ranks
or, as "bytes_sent.3", for one. A prediction needs none of it: it follows from the schedule and its times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from rtp_sim.engine.memory import memory_profile
from rtp_sim.errors import InputError
from rtp_sim.metrics import TimeSplit, communication_totals, critical_rank, op_kind, time_split
from rtp_sim.schedule.ir import Compute, Op, Program
from rtp_sim.timeline import Timeline
from rtp_sim.validation.same_schedule import require_same_schedule

OTHER = "other"
SEVERAL = "several layers"


@dataclass(frozen=True, slots=True)
class OpDiff:
    """One op on one rank, on both sides; `predicted_rank` is the simulated rank that stands for `rank`."""

    rank: int
    predicted_rank: int
    op: Op
    layer_kind: str
    predicted_start_ns: int
    predicted_ns: int
    measured_start_ns: int
    measured_ns: int

    @property
    def error_ns(self) -> int:
        """Predicted less measured duration."""
        return self.predicted_ns - self.measured_ns

    @property
    def relative_error(self) -> float | None:
        """The error as a fraction of the measured duration; None where that is 0."""
        return relative_error(self.predicted_ns, self.measured_ns)


@dataclass(frozen=True, slots=True)
class Side:
    """What one side says about a rank: where its step goes, when it ends, what it sent and held (None: not known)."""

    split: TimeSplit
    end_ns: int
    bytes_sent: int | None
    messages: int | None
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class RankDiff:
    """One compared rank. `stands_for` lists the ranks with the same representatives on both sides, `rank` first."""

    rank: int
    predicted_rank: int
    stands_for: tuple[int, ...]
    predicted: Side
    measured: Side
    ops: tuple[OpDiff, ...]
    only_predicted: tuple[Op, ...]
    only_measured: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class GroupDiff:
    """Ops of one kind on the critical rank, added up. `step_error_ns` is the error of the whole step."""

    name: str
    ops: int
    predicted_ns: int
    measured_ns: int
    step_error_ns: int

    @property
    def error_ns(self) -> int:
        """Predicted less measured: the group's contribution to the error of the step time."""
        return self.predicted_ns - self.measured_ns

    @property
    def relative_error(self) -> float | None:
        """The error as a fraction of what was measured; None where that is 0."""
        return relative_error(self.predicted_ns, self.measured_ns)

    @property
    def share(self) -> float | None:
        """The contribution as a fraction of the error of the step time; None where the step has no error."""
        return self.error_ns / self.step_error_ns if self.step_error_ns else None


@dataclass(frozen=True)
class TimelineDiff:
    """Both timelines and their differences. Groups are those of `critical_rank`, largest contribution first."""

    predicted: Timeline
    measured: Timeline
    ranks: tuple[RankDiff, ...]
    critical_rank: int
    kernel_classes: tuple[GroupDiff, ...]
    layer_kinds: tuple[GroupDiff, ...]

    @property
    def step_error_ns(self) -> int:
        """Predicted less measured step time."""
        return self.predicted.step_time_ns - self.measured.step_time_ns

    @property
    def remainder_ns(self) -> int:
        """The error of the step time that is in no op: overlap and waiting."""
        return self.step_error_ns - sum(group.error_ns for group in self.kernel_classes)

    def rank(self, rank: int) -> RankDiff:
        """The differences of `rank`, through the compared rank that stands for it."""
        return next(r for r in self.ranks if rank in r.stands_for)

    def worst(self, count: int) -> list[OpDiff]:
        """The ops with the largest errors, either way; the lowest rank and index first among equals."""
        ops = (op for rank in self.ranks for op in rank.ops if op.error_ns)
        return sorted(ops, key=lambda o: (-abs(o.error_ns), o.rank, o.op.index))[:count]


def diff(predicted: Timeline, measured: Timeline, ranks: Iterable[int] | None = None) -> TimelineDiff:
    """Joins two timelines of one schedule. A predicted representative is compared with every measured rank it stands
    for; ranks that are represented alike on both sides are compared once. `ranks` are those to compare (all).

    InputError if the schedules differ (saying what does first) or a rank has not one time per op.
    """
    require_same_schedule(predicted.schedule, measured.schedule)
    for side, timeline in (("predicted", predicted), ("measured", measured)):
        _check_times(side, timeline)
    schedule = measured.schedule
    layer_kinds = [tuple(layer_kind(p, op) for op in p.ops) for p in schedule.programs]
    alike: dict[tuple[int, int], list[int]] = {}
    for rank in range(schedule.world_size) if ranks is None else ranks:
        alike.setdefault((predicted.representative_of[rank], measured.representative_of[rank]), []).append(rank)
    compared = tuple(
        _rank_diff(predicted, measured, tuple(of_pair), layer_kinds[schedule.program_of_rank[of_pair[0]]])
        for of_pair in alike.values()
    )
    last = critical_rank(measured)
    critical = next((r for r in compared if last in r.stands_for), compared[0])
    step_error_ns = predicted.step_time_ns - measured.step_time_ns
    return TimelineDiff(
        predicted, measured, compared, critical.rank,
        grouped(critical.ops, lambda o: op_kind(o.op), step_error_ns),
        grouped(critical.ops, lambda o: o.layer_kind, step_error_ns),
    )  # fmt: skip


def grouped(ops: Iterable[OpDiff], name_of: Callable[[OpDiff], str], step_error_ns: int) -> tuple[GroupDiff, ...]:
    """The ops added up by name, the largest contribution (either way) first, by name among equals."""
    sums: dict[str, tuple[int, int, int]] = {}
    for op in ops:
        count, predicted_ns, measured_ns = sums.get(name_of(op), (0, 0, 0))
        sums[name_of(op)] = count + 1, predicted_ns + op.predicted_ns, measured_ns + op.measured_ns
    groups = [GroupDiff(name, *of_name, step_error_ns) for name, of_name in sums.items()]
    return tuple(sorted(groups, key=lambda g: (-abs(g.error_ns), g.name)))


def layer_kind(program: Program, op: Op) -> str:
    """Which layer of every block an op belongs to ("h*.attn"): that of its kernel, or of the parameters it moves.

    "several layers" for an op that moves the parameters of different ones, "other" where it moves none.
    """
    if isinstance(op.action, Compute) and op.action.site is not None:
        return without_numbers(op.action.site.layer)
    used = (program.buffers[name] for name in (*op.reads, *op.writes) if name in program.buffers)
    kinds = {without_numbers(holding.layer) for buffer in used for holding in buffer.holds}
    return OTHER if not kinds else kinds.pop() if len(kinds) == 1 else SEVERAL


def without_numbers(layer: str) -> str:
    """The layer's name with a star for its block's number: h3.norm1 -> h*.norm1, blocks.3.fc -> blocks.*.fc."""
    *block, last = layer.split(".")
    starred = [re.sub(r"\d+", "*", part) for part in block]
    return ".".join([*starred, last]) if block else re.sub(r"\d+", "*", last)


def relative_error(predicted: float, measured: float) -> float | None:
    """(predicted - measured) / measured; None where nothing was measured to compare with."""
    return (predicted - measured) / measured if measured else None


def with_numbers(timeline: Timeline, key: str, by_rank: Mapping[int, int]) -> Timeline:
    """The timeline with a number per rank in its meta, where `diff` finds it."""
    return replace(timeline, meta={**timeline.meta, **{f"{key}.{rank}": value for rank, value in by_rank.items()}})


def _check_times(side: str, timeline: Timeline) -> None:
    for rank, times in timeline.ranks.items():
        count = len(timeline.schedule.program(rank).ops)
        if len(times.start_ns) != count or len(times.end_ns) != count:
            given = f"{len(times.start_ns)} starts and {len(times.end_ns)} ends"
            raise InputError(f"{side} rank {rank} has {given}; expected {count} of each, one per op")


def _rank_diff(
    predicted: Timeline, measured: Timeline, ranks: tuple[int, ...], layer_kinds: tuple[str, ...]
) -> RankDiff:
    rank, predicted_rank = ranks[0], predicted.representative_of[ranks[0]]
    p, m = predicted.times(rank), measured.times(rank)
    times = zip(p.start_ns.tolist(), p.end_ns.tolist(), m.start_ns.tolist(), m.end_ns.tolist(), strict=True)
    ops: list[OpDiff] = []
    only_predicted: list[Op] = []
    only_measured: list[Op] = []
    for op, kind, (p_start, p_end, m_start, m_end) in zip(
        measured.schedule.program(rank).ops, layer_kinds, times, strict=True
    ):
        if p_end >= 0 and m_end >= 0:
            ops.append(OpDiff(rank, predicted_rank, op, kind, p_start, p_end - p_start, m_start, m_end - m_start))
        elif p_end >= 0:
            only_predicted.append(op)
        elif m_end >= 0:
            only_measured.append(op)
    with_memory = _number(measured, "peak_memory_bytes", rank) is not None
    return RankDiff(
        rank, predicted_rank, ranks, _side(predicted, rank, with_memory), _side(measured, rank, with_memory),
        tuple(ops), tuple(only_predicted), tuple(only_measured),
    )  # fmt: skip


def _side(timeline: Timeline, rank: int, with_memory: bool) -> Side:
    """What a timeline says about a rank; of a prediction, what follows from the schedule and its times."""
    sent, messages = _number(timeline, "bytes_sent", rank), _number(timeline, "messages", rank)
    peak = _number(timeline, "peak_memory_bytes", rank)
    times = timeline.times(rank)
    if timeline.kind == "predicted":
        counted_bytes, counted_messages, _ = communication_totals(timeline.schedule, rank)
        sent = counted_bytes if sent is None else sent
        messages = counted_messages if messages is None else messages
        if peak is None and with_memory:
            peak = memory_profile(timeline.schedule, rank, times).peak_bytes
    end_ns = int(times.end_ns.max()) if times.end_ns.size else 0
    return Side(time_split(timeline, rank), max(end_ns, 0), sent, messages, peak)


def _number(timeline: Timeline, key: str, rank: int) -> int | None:
    """A whole number from the timeline's meta, of this rank or of all."""
    value = timeline.meta.get(f"{key}.{rank}", timeline.meta.get(key))
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise InputError(f"{timeline.kind} timeline: meta {key!r} is {value!r}; expected a whole number, for example 4096")
