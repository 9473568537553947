"""One row of numbers about one step: where its time goes, what it sends, what memory it needs.

Time is split on the critical rank, the one that ends last (the lowest such rank). Writing C for the union
of its compute spans, M for the union of its communication spans and |.| for their total length:

    compute = |C|    exposed = |M outside C|    overlapped = |M and C|    bubble = step - |C or M|

so compute + exposed + bubble == step, in integer nanoseconds. The bubble is all waiting: for dependencies,
for partners (a communication span starts when every partner is there) and for the host to issue the next
op.

Bytes and messages are those that one rank sends under ring algorithms, whatever algorithm the cost model
priced:

    ============================== ============================ ==================
    op, over a group of n          bytes                        messages
    ============================== ============================ ==================
    shift, each hop of s           s                            1, in place ceil(s / chunk)
    all_gather, reduce_scatter of  (n - 1) / n * S              n - 1
      S in total, and all_to_all
    all_reduce of S                2 (n - 1) / n * S            2 (n - 1)
    broadcast, reduce of S         S (pipelined along a ring)   1
    send of s                      s                            1
    recv                           0                            0
    ============================== ============================ ==================

The factors are those of nccl-tests' bus bandwidth. A quotient that is not whole is rounded up to the next
byte, per op. Nothing is sent in a group of one, by a hop that leads back to the sender, by an empty hop, or
past an end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rtp_sim.errors import InputError
from rtp_sim.schedule.ir import CATEGORIES, Collective, Compute, Op, Recv, Schedule, Send, Shift
from rtp_sim.timeline import RankTimes, Timeline

if TYPE_CHECKING:
    from rtp_sim.engine.memory import MemoryProfile

NS_PER_S = 1_000_000_000
NO_PROVENANCE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The public row of one step. Times are seconds, sizes bytes, `mfu` a fraction of 1.

    The split of the time, bytes and messages are those of the critical rank. Memory is that of the
    represented rank with the highest peak, by category at the moment of that peak. `tokens_per_s` and `mfu`
    are None where the schedule does not say its tokens or model FLOPs, or no peak is known.
    `cost_provenance` gives the share of the predicted busy time by what its cost rests on (measured,
    interpolated, assumed ...).
    """

    strategy: str
    layout: str
    step_time_s: float
    tokens_per_s: float | None
    tokens_per_s_per_gpu: float | None
    mfu: float | None
    peak_memory_bytes: int
    memory_by_category: Mapping[str, int]
    fits: bool
    compute_time_s: float
    exposed_communication_s: float
    overlapped_communication_s: float
    bubble_s: float
    bytes_sent_per_rank: int
    messages_per_rank: int
    cost_provenance: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Where the step of one rank goes, in ns; compute_ns + exposed_ns + bubble_ns == step_ns."""

    step_ns: int
    compute_ns: int
    exposed_ns: int
    overlapped_ns: int
    bubble_ns: int


def metrics_row(metrics: StepMetrics) -> dict[str, object]:
    """The metrics as plain JSON types, keys in the order of the public row."""
    row: dict[str, object] = {f.name: getattr(metrics, f.name) for f in fields(metrics)}
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in row.items()}


def step_metrics(
    timeline: Timeline,
    memory: Mapping[int, MemoryProfile],
    device_memory_bytes: int,
    peak_flops_per_s: float | None,
    cost_provenance: Mapping[str, float] = NO_PROVENANCE,
) -> StepMetrics:
    """The row of one timeline.

    `memory` holds the profile of each represented rank. `device_memory_bytes` is what a rank may use (less
    what the runtime reserves). `peak_flops_per_s` is one device's dense peak, None if there is none to
    compare with. `schedule.meta` gives strategy, layout, tokens and model_flops of the step. InputError if
    a number is not one.
    """
    if not memory:
        raise InputError("step_metrics: no memory profile was given; expected one per represented rank")
    schedule, step_s = timeline.schedule, timeline.step_time_ns / NS_PER_S
    rank = critical_rank(timeline)
    split = time_split(timeline, rank)
    sent_bytes, messages, _ = communication_totals(schedule, rank)
    peak = memory[peak_memory_rank(memory)]
    tokens, model_flops = _meta_number(schedule, "tokens"), _meta_number(schedule, "model_flops")
    tokens_per_s = tokens / step_s if tokens is not None and step_s else None
    available_flops = step_s * schedule.world_size * (peak_flops_per_s or 0.0)
    return StepMetrics(
        strategy=str(schedule.meta.get("strategy", schedule.name)),
        layout=str(schedule.meta.get("layout", "")),
        step_time_s=step_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=None if tokens_per_s is None else tokens_per_s / schedule.world_size,
        mfu=model_flops / available_flops if model_flops is not None and available_flops else None,
        peak_memory_bytes=int(peak.peak_bytes),
        memory_by_category={c: int(peak.by_category_at_peak.get(c, 0)) for c in CATEGORIES},
        fits=int(peak.peak_bytes) <= device_memory_bytes,
        compute_time_s=split.compute_ns / NS_PER_S,
        exposed_communication_s=split.exposed_ns / NS_PER_S,
        overlapped_communication_s=split.overlapped_ns / NS_PER_S,
        bubble_s=split.bubble_ns / NS_PER_S,
        bytes_sent_per_rank=sent_bytes,
        messages_per_rank=messages,
        cost_provenance=dict(cost_provenance),
    )


def critical_rank(timeline: Timeline) -> int:
    """The represented rank that ends last; the lowest of several."""
    return max(sorted(timeline.ranks), key=lambda rank: _end_ns(timeline.ranks[rank]))


def peak_memory_rank(memory: Mapping[int, MemoryProfile]) -> int:
    """The rank with the highest peak; the lowest of several."""
    return max(sorted(memory), key=lambda rank: memory[rank].peak_bytes)


def time_split(timeline: Timeline, rank: int) -> TimeSplit:
    """Where the step goes on one rank, in exact ns (the definitions stand at the top of this file)."""
    times = timeline.times(rank)
    ops = timeline.schedule.program(rank).ops
    is_compute = np.fromiter((isinstance(op.action, Compute) for op in ops), dtype=bool, count=len(ops))
    compute_ns = union_ns(times.start_ns[is_compute], times.end_ns[is_compute])
    communication_ns = union_ns(times.start_ns[~is_compute], times.end_ns[~is_compute])
    busy_ns = union_ns(times.start_ns, times.end_ns)
    step_ns = timeline.step_time_ns
    exposed_ns = busy_ns - compute_ns
    return TimeSplit(step_ns, compute_ns, exposed_ns, communication_ns - exposed_ns, step_ns - busy_ns)


def union_ns(start_ns: npt.NDArray[np.int64], end_ns: npt.NDArray[np.int64]) -> int:
    """Total length of the union of the spans [start, end)."""
    if not start_ns.size:
        return 0
    order = np.argsort(start_ns, kind="stable")
    starts, ends = start_ns[order], np.maximum.accumulate(end_ns[order])
    # A span adds what of it lies behind everything that started before it.
    covered_to = np.concatenate((starts[:1], ends[:-1]))
    return int(np.maximum(ends - np.maximum(starts, covered_to), 0).sum())


def communication_totals(schedule: Schedule, rank: int) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """Bytes and messages that `rank` sends in the step, and both by kind of op (ring accounting, above)."""
    by_kind: dict[str, tuple[int, int]] = {}
    for op in schedule.program(rank).ops:
        if isinstance(op.action, (Compute, Recv)):
            continue
        size, messages = op_traffic(schedule, rank, op)
        before = by_kind.get(op_kind(op), (0, 0))
        by_kind[op_kind(op)] = (before[0] + size, before[1] + messages)
    return sum(b for b, _ in by_kind.values()), sum(m for _, m in by_kind.values()), by_kind


def op_kind(op: Op) -> str:
    """What an op does in one word: its kernel, the collective's kind, or shift, send, recv."""
    action = op.action
    if isinstance(action, Compute):
        return action.kernel
    return action.kind if isinstance(action, Collective) else type(action).__name__.lower()


def op_traffic(schedule: Schedule, rank: int, op: Op) -> tuple[int, int]:
    """Bytes and messages that `rank` sends for one op; (0, 0) for compute."""
    action = op.action
    if isinstance(action, Shift):
        return _shift_traffic(schedule, rank, op, action)
    if isinstance(action, Collective):
        return _collective_traffic(action, schedule.groups[action.group].size)
    if isinstance(action, Send) and schedule.groups[action.group].neighbour(rank, action.offset) is not None:
        return action.size_bytes, 1
    return 0, 0


def _shift_traffic(schedule: Schedule, rank: int, op: Op, shift: Shift) -> tuple[int, int]:
    group = schedule.groups[shift.group]
    size_bytes = messages = 0
    for j, hop in enumerate(shift.hops):
        hop_bytes = hop.bytes_at(schedule.shard_index(rank, hop.part))
        if not hop_bytes or group.peer(rank, hop.offset) == rank:
            continue
        in_place = j < min(len(op.reads), len(op.writes)) and op.reads[j] == op.writes[j]
        size_bytes += hop_bytes
        messages += _ceil_div(hop_bytes, shift.chunk_bytes) if in_place and shift.chunk_bytes else 1
    return size_bytes, messages


def _collective_traffic(collective: Collective, n: int) -> tuple[int, int]:
    if n <= 1:
        return 0, 0
    if collective.kind in ("broadcast", "reduce"):
        return collective.size_bytes, 1
    rounds = 2 * (n - 1) if collective.kind == "all_reduce" else n - 1
    return _ceil_div(rounds * collective.size_bytes, n), rounds


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _end_ns(times: RankTimes) -> int:
    return int(times.end_ns.max()) if times.end_ns.size else 0


def _meta_number(schedule: Schedule, key: str) -> int | float | None:
    value = schedule.meta.get(key)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise InputError(f'schedule.meta["{key}"] is {value!r}; expected a number, for example 4096')
