"""Chrome trace JSON of a timeline, laid out as PyTorch's Kineto does, so both open alike in Perfetto.

pid is the rank, tid the stream; `ts` and `dur` are microseconds with three decimals, that is, exact
nanoseconds. Compute and communication are complete events ("X"), memory by category is a counter ("C"), and
each shift or send is tied to the receiving rank's op by a flow ("s" to "f"). Events are written as they are
made, in time linear in the ops, and the same timeline gives the same bytes. Predicted and measured
timelines are treated alike.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TYPE_CHECKING, TextIO

from rtp_sim.errors import InputError
from rtp_sim.metrics import op_kind, op_traffic
from rtp_sim.report.flows import Flow, FlowTables, flow_tables, flows_from, flows_into
from rtp_sim.report.tracks import Track, tracks_of
from rtp_sim.schedule.ir import Compute, Op, Schedule, Shift
from rtp_sim.timeline import Timeline

if TYPE_CHECKING:
    from rtp_sim.engine.memory import MemoryProfile

Json = dict[str, object]
Target = str | PathLike[str] | TextIO


def write_chrome_trace(
    timeline: Timeline,
    target: Target,
    *,
    ranks: Sequence[int] | None = None,
    memory: Mapping[int, MemoryProfile] | None = None,
) -> int:
    """Write the trace of `ranks` (all represented ranks by default) and return how many events it holds.

    `target` is a text stream or a path, compressed if it ends in .gz. `memory` adds the counters of the
    ranks it names. InputError if a rank is not in the schedule.
    """
    schedule = timeline.schedule
    chosen = sorted(timeline.ranks) if ranks is None else list(dict.fromkeys(ranks))
    for rank in chosen:
        if not 0 <= rank < schedule.world_size:
            raise InputError(f"no rank {rank}: the schedule's ranks are 0 to {schedule.world_size - 1}")
    head = {"schemaVersion": 1, "displayTimeUnit": "ns", "traceName": schedule.name, "kind": timeline.kind}
    head["rtp_sim"] = {"schedule": dict(schedule.meta), "timeline": dict(timeline.meta)}
    count = 0
    with _opened(target) as out:
        out.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "traceEvents": [')
        for event in _events(timeline, chosen, memory or {}):
            out.write(("\n" if count == 0 else ",\n") + event)
            count += 1
        out.write("\n]}\n")
    return count


@contextmanager
def _opened(target: Target) -> Iterator[TextIO]:
    """A text stream to write to. Compressed files carry no name and no time: equal traces, equal files."""
    if not isinstance(target, (str, PathLike)):
        yield target
        return
    path = fspath(target)
    try:
        raw = open(path, "wb")  # noqa: SIM115 -- closed by the with statement below
    except OSError as error:
        raise InputError(f"cannot write the trace to {path!r}: {error.strerror}") from error
    with raw:
        if path.endswith(".gz"):
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)
            with packed, io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text:
                yield text
        else:
            with io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as text:
                yield text


def _events(timeline: Timeline, ranks: list[int], memory: Mapping[int, MemoryProfile]) -> Iterator[str]:
    tables = flow_tables(timeline.schedule)
    stride = max((len(program.ops) for program in timeline.schedule.programs), default=1) or 1
    drawn = frozenset(ranks)
    for rank in ranks:
        tracks = tracks_of(timeline, rank)
        yield from map(_dumps, _metadata(timeline, rank, tracks))
        for tid, track in enumerate(tracks):
            yield from _track_events(timeline, rank, tid, track, tables, drawn, stride)
        if rank in memory:
            yield from _counters(rank, memory[rank])


def _metadata(timeline: Timeline, rank: int, tracks: Sequence[Track]) -> Iterator[Json]:
    population = timeline.population(timeline.representative_of[rank])
    label = f"rank {rank}" + (f" (one of {population} alike)" if population > 1 else "")
    program = timeline.schedule.program(rank).name
    yield _metadatum(rank, 0, "process_name", {"name": label})
    yield _metadatum(rank, 0, "process_labels", {"labels": f"{timeline.kind}, {program}"})
    yield _metadatum(rank, 0, "process_sort_index", {"sort_index": rank})
    for tid, track in enumerate(tracks):
        yield _metadatum(rank, tid, "thread_name", {"name": track.name})
        yield _metadatum(rank, tid, "thread_sort_index", {"sort_index": tid})


def _metadatum(rank: int, tid: int, name: str, args: Json) -> Json:
    return {"ph": "M", "name": name, "pid": rank, "tid": tid, "ts": 0, "args": args}


def _track_events(
    timeline: Timeline,
    rank: int,
    tid: int,
    track: Track,
    tables: FlowTables,
    drawn: frozenset[int],
    stride: int,
) -> Iterator[str]:
    schedule, times = timeline.schedule, timeline.times(rank)
    ops = schedule.program(rank).ops
    for index in track.ops:
        op, start_ns, end_ns = ops[index], int(times.start_ns[index]), int(times.end_ns[index])
        category = "kernel" if isinstance(op.action, Compute) else "communication"
        yield (
            f'{{"ph": "X", "cat": "{category}", "name": {_dumps(op.name)}, "pid": {rank}, "tid": {tid}, '
            f'"ts": {_us(start_ns)}, "dur": {_us(end_ns - start_ns)}, '
            f'"args": {_dumps(op_args(schedule, rank, op))}}}'
        )
        for flow in flows_from(schedule, tables, rank, op):
            if flow.receiver in drawn:
                yield _flow_event("s", flow, rank, tid, start_ns, stride)
        for flow in flows_into(schedule, tables, rank, op):
            if flow.sender in drawn:
                # Ties to the span around it: the last ns inside the receiving op, where the data has arrived.
                yield _flow_event("f", flow, rank, tid, max(start_ns, end_ns - 1), stride)


def _flow_event(phase: str, flow: Flow, rank: int, tid: int, at_ns: int, stride: int) -> str:
    # Both ends work out the same number from the sender, its op and the hop (fewer than 2^6 per shift).
    flow_id = ((flow.sender * stride + flow.sender_op) << 6) + flow.hop
    binding = ', "bp": "e"' if phase == "f" else ""
    return (
        f'{{"ph": "{phase}", "cat": "flow", "name": "message", "id": {flow_id}, "pid": {rank}, "tid": {tid}, '
        f'"ts": {_us(at_ns)}{binding}}}'
    )


def _counters(rank: int, profile: MemoryProfile) -> Iterator[str]:
    columns = {category: values.tolist() for category, values in profile.bytes_by_category.items()}
    for i, time_ns in enumerate(profile.time_ns.tolist()):
        values = _dumps({category: column[i] for category, column in columns.items()})
        head = f'{{"ph": "C", "name": "memory (bytes)", "pid": {rank}, "tid": 0, "ts": {_us(time_ns)}'
        yield f'{head}, "args": {values}}}'


def op_args(schedule: Schedule, rank: int, op: Op) -> Json:
    """What a trace shows of a selected op: sizes are bytes, `bytes_sent` by the ring accounting."""
    action = op.action
    args: Json = {"op": op.index, "stream": op.stream, "kind": op_kind(op)}
    if isinstance(action, Compute):
        args["dtype"] = action.dtype
        args["dims"] = dict(action.dims_at(schedule.shard_index(rank, action.part)))
    else:
        args["group"] = action.group
        args["bytes"] = payload_bytes(schedule, rank, op)
        args["bytes_sent"] = op_traffic(schedule, rank, op)[0]
    if op.after:
        args["after"] = list(op.after)
    return args


def payload_bytes(schedule: Schedule, rank: int, op: Op) -> int:
    """The size a communication op states: all hops of a shift, else its `size_bytes`; 0 for compute."""
    action = op.action
    if isinstance(action, Shift):
        return sum(hop.bytes_at(schedule.shard_index(rank, hop.part)) for hop in action.hops)
    return 0 if isinstance(action, Compute) else action.size_bytes


def _us(time_ns: int) -> str:
    sign, magnitude = ("-", -time_ns) if time_ns < 0 else ("", time_ns)
    return f"{sign}{magnitude // 1000}.{magnitude % 1000:03d}"


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
