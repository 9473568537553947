"""A timeline in the compact form the HTML report draws: few ranks, op names once, times as differences.

A page stays responsive with some ten thousand spans per strategy. Whole ranks are left out first, the
shortest spans of the last remaining rank next; either is said in the note the page shows.
"""

from __future__ import annotations

import numpy as np

from rtp_sim.metrics import critical_rank, op_kind, op_traffic
from rtp_sim.report.format import format_bytes, format_seconds
from rtp_sim.report.trace import payload_bytes
from rtp_sim.report.tracks import tracks_of
from rtp_sim.schedule.ir import Compute, Op, Schedule
from rtp_sim.timeline import RankTimes, Timeline

MAX_RANKS = 8
MAX_SPANS = 20_000

Json = dict[str, object]
OpEntry = tuple[str, int, int, int]


def timeline_data(name: str, timeline: Timeline, max_spans: int = MAX_SPANS, max_ranks: int = MAX_RANKS) -> Json:
    """What the page embeds for one strategy: {name, step_ns, summary, note, details, tables, ranks}.

    `tables` holds, once per distinct program, [name, 1 for communication, index into details, op index] of
    the ops drawn; each rank names its table, and each of its tracks has the columns op (index into the
    table), start (ns since the previous start) and dur (ns).
    """
    ranks = chosen_ranks(timeline, max_spans, max_ranks)
    details: dict[str, int] = {}
    tables: dict[tuple[OpEntry, ...], int] = {}
    drawn, spans, thinned = [], 0, ""
    for rank in ranks:
        ops, times = timeline.schedule.program(rank).ops, timeline.times(rank)
        shortest_ns = shortest_drawn_ns(times, max_spans)
        kept = np.flatnonzero(times.end_ns - times.start_ns >= shortest_ns).tolist()
        table = tuple(_op_entry(timeline.schedule, rank, ops[index], details) for index in kept)
        spans += len(kept)
        if len(kept) < len(ops):
            few, limit = f"{len(ops) - len(kept)} of the {len(ops)} spans", format_seconds(shortest_ns / 1e9)
            thinned = f" {few} of rank {rank}, all shorter than {limit}, are left out."
        number = tables.setdefault(table, len(tables))
        label, tracks = _label(timeline, rank), _tracks(timeline, rank, kept)
        drawn.append({"label": label, "table": number, "tracks": tracks})
    step = format_seconds(timeline.step_time_ns / 1e9)
    left_out = len(timeline.ranks) - len(ranks)
    note = f"{len(ranks)} of {len(timeline.ranks)} represented ranks shown." if left_out else ""
    return {
        "name": name,
        "step_ns": timeline.step_time_ns,
        "summary": f"{timeline.kind}, {len(ranks)} ranks, {spans} spans, {step}",
        "note": (note + thinned).strip(),
        "details": list(details),
        "tables": [list(table) for table in tables],
        "ranks": drawn,
    }


def chosen_ranks(timeline: Timeline, max_spans: int, max_ranks: int) -> list[int]:
    """The critical rank, then the lowest others as long as neither limit is passed; ascending."""
    critical = critical_rank(timeline)
    chosen, spans = [critical], len(timeline.schedule.program(critical).ops)
    for rank in sorted(timeline.ranks):
        ops = len(timeline.schedule.program(rank).ops)
        if rank != critical and len(chosen) < max_ranks and spans + ops <= max_spans:
            chosen.append(rank)
            spans += ops
    return sorted(chosen)


def shortest_drawn_ns(times: RankTimes, max_spans: int) -> int:
    """Spans shorter than this are not drawn; 0 where all are. At most `max_spans` spans are as long."""
    if times.start_ns.size <= max_spans:
        return 0
    durations = np.sort(times.end_ns - times.start_ns)[::-1]
    return int(durations[max_spans]) + 1


def _tracks(timeline: Timeline, rank: int, kept: list[int]) -> list[Json]:
    times, place = timeline.times(rank), {index: i for i, index in enumerate(kept)}
    tracks: list[Json] = []
    for track in tracks_of(timeline, rank):
        ops = [index for index in track.ops if index in place]
        starts = times.start_ns[ops]
        tracks.append(
            {
                "name": track.name,
                "op": [place[index] for index in ops],
                "start": np.diff(starts, prepend=0).tolist(),
                "dur": (times.end_ns[ops] - starts).tolist(),
            }
        )
    return tracks


def _op_entry(schedule: Schedule, rank: int, op: Op, details: dict[str, int]) -> OpEntry:
    detail = _detail(schedule, rank, op)
    number = details.setdefault(detail, len(details))
    return op.name, int(not isinstance(op.action, Compute)), number, op.index


def _detail(schedule: Schedule, rank: int, op: Op) -> str:
    action = op.action
    if isinstance(action, Compute):
        dims = action.dims_at(schedule.shard_index(rank, action.part))
        return " ".join([op_kind(op), action.dtype, *(f"{name}={size}" for name, size in dims)])
    sent = format_bytes(op_traffic(schedule, rank, op)[0])
    return f"{op_kind(op)} over {action.group}, {format_bytes(payload_bytes(schedule, rank, op))}, sends {sent}"


def _label(timeline: Timeline, rank: int) -> str:
    population = timeline.population(rank)
    return f"rank {rank}" + (f" (×{population})" if population > 1 else "")
