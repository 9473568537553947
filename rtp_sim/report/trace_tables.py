"""Summaries of profiler traces as grids of text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rtp_sim.metrics import NS_PER_S
from rtp_sim.report.diff_tables import Grid
from rtp_sim.report.format import format_percent, format_seconds
from rtp_sim.traces.classes import CLASSES
from rtp_sim.traces.summary import Busy, RankSummary

SCHEMA = "rtp-sim/trace/1"
LONGEST_NAME = 70

Json = dict[str, object]


def trace_grids(ranks: Sequence[RankSummary], worst: int) -> list[Grid]:
    """Ranks, streams, collectives, and of the first rank what took most."""
    grids = [_rank_grid(ranks), _stream_grid(ranks)]
    if any(r.collectives for r in ranks):
        rows = [(str(r.rank), name, str(busy.count), _time(busy.busy_ns)) for r in ranks
                for name, busy in r.collectives.items()]  # fmt: skip
        grids.append(Grid("collectives", "Communication", ("rank", "kind", "spans", "busy"), tuple(rows), 2))
    first = ranks[0]
    longest = [
        (name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "...", of_class, str(count), _time(ns))
        for name, of_class, count, ns in first.kernels[:worst]
    ]
    title = f"What takes most on rank {first.rank}"
    grids.append(Grid("longest", title, ("name", "class", "spans", "time"), tuple(longest), 2))
    return grids


def _rank_grid(ranks: Sequence[RankSummary]) -> Grid:
    header = ("rank", "from", "window", *CLASSES, "exposed comm.", "hidden", "idle")
    rows = [
        (
            str(r.rank), r.kind, _time(r.window_ns), *(_busy(r.classes, c) for c in CLASSES),
            f"{_time(r.exposed_ns)} {_share(r.exposed_ns, r.window_ns)}", format_percent(r.hidden),
            f"{_time(r.idle_ns)} {_share(r.idle_ns, r.window_ns)}",
        )
        for r in ranks
    ]  # fmt: skip
    return Grid("ranks", "Ranks: busy time by kernel class", header, tuple(rows), 2)


def _stream_grid(ranks: Sequence[RankSummary]) -> Grid:
    rows = [
        (str(r.rank), s.device, s.stream, _time(s.busy_ns), *(_busy(s.classes, c) for c in CLASSES))
        for r in ranks
        for s in r.streams
    ]
    where = (
        "device and stream" if all(r.kind == "device" for r in ranks) else "process and thread, or device and stream"
    )
    return Grid("streams", f"Streams ({where})", ("rank", "of", "stream", "busy", *CLASSES), tuple(rows), 3)


def trace_json(ranks: Sequence[RankSummary]) -> Json:
    """The document: times in seconds."""
    return {"schema": SCHEMA, "ranks": [_rank_json(r) for r in ranks]}


def _rank_json(r: RankSummary) -> Json:
    return {
        "rank": r.rank,
        "path": r.path,
        "kind": r.kind,
        "window_s": r.window_ns / NS_PER_S,
        "computing_s": r.computing_ns / NS_PER_S,
        "communication_s": r.communication_ns / NS_PER_S,
        "exposed_communication_s": r.exposed_ns / NS_PER_S,
        "hidden_share": r.hidden,
        "idle_s": r.idle_ns / NS_PER_S,
        "classes": _classes_json(r.classes),
        "collectives": _classes_json(r.collectives),
        "streams": [
            {
                "device": s.device,
                "stream": s.stream,
                "busy_s": s.busy_ns / NS_PER_S,
                "classes": _classes_json(s.classes),
            }
            for s in r.streams
        ],
        "longest": [
            {"name": name, "class": of_class, "spans": count, "time_s": ns / NS_PER_S}
            for name, of_class, count, ns in r.kernels
        ],
    }


def _classes_json(classes: Mapping[str, Busy]) -> Json:
    return {name: {"spans": busy.count, "busy_s": busy.busy_ns / NS_PER_S} for name, busy in classes.items()}


def _busy(classes: Mapping[str, Busy], name: str) -> str:
    return _time(classes[name].busy_ns) if name in classes else ""


def _time(ns: int) -> str:
    return format_seconds(ns / NS_PER_S)


def _share(part_ns: int, of_ns: int) -> str:
    return f"({format_percent(part_ns / of_ns)})" if of_ns else ""
