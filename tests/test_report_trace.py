"""The Chrome trace: valid JSON, exact times, no overlap on a track, paired flows, counters as the profile."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter, defaultdict
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import compute, example, lockstep, ops_of, rotation, schedule_of, sharded, timeline_of

from rtp_sim.errors import InputError
from rtp_sim.report.trace import write_chrome_trace
from rtp_sim.schedule.ir import Group, Hop, Op, Program, Recv, Schedule, Send, Shift
from rtp_sim.timeline import Timeline


def events_of(timeline: Timeline, **kwargs: Any) -> list[dict[str, Any]]:
    out = io.StringIO()
    count = write_chrome_trace(timeline, out, **kwargs)
    document = json.loads(out.getvalue(), parse_float=Decimal)
    assert count == len(document["traceEvents"])
    return list(document["traceEvents"])


def phase(events: list[dict[str, Any]], ph: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == ph]


def assert_no_overlap(events: list[dict[str, Any]]) -> None:
    tracks = defaultdict(list)
    for event in phase(events, "X"):
        tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        assert all(b[0] >= a[1] for a, b in pairwise(spans))


def test_every_op_is_an_event_with_exact_times() -> None:
    timeline, _, _ = example(rotation(), 41_123, 30_007)
    events = phase(events_of(timeline), "X")
    assert len(events) == 4 * 48
    for event in events:
        times = timeline.times(event["pid"])
        index = event["args"]["op"]
        assert event["ts"] * 1000 == int(times.start_ns[index])
        assert event["dur"] * 1000 == int(times.end_ns[index] - times.start_ns[index])
        assert event["name"] == timeline.schedule.program(0).ops[index].name
    linear = next(event for event in events if event["name"] == "linear.0.1")
    assert linear["cat"] == "kernel"
    assert linear["args"] == {
        "op": 3, "stream": "compute", "kind": "linear",
        "dtype": "bf16", "dims": {"m": 4096, "k": 16}, "after": [0],
    }  # fmt: skip
    rotate = next(event for event in events if event["name"] == "rotate.0.1")
    assert rotate["args"] == {
        "op": 2, "stream": "ring", "kind": "shift",
        "group": "ring", "bytes": 2**24, "bytes_sent": 2**24, "after": [1, 0],
    }  # fmt: skip


def test_tracks_have_names_and_no_overlap() -> None:
    timeline, memory, _ = example(sharded(), 170_000, 150_000)
    events = events_of(timeline, memory=memory)
    assert_no_overlap(events)
    names = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in phase(events, "M") if e["name"] == "thread_name"
    }
    assert names == {(rank, tid): name for rank in range(4) for tid, name in enumerate(("gather", "compute"))}
    processes = [e["args"]["name"] for e in phase(events, "M") if e["name"] == "process_name"]
    assert processes == ["rank 0", "rank 1", "rank 2", "rank 3"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=15))
def test_overlapping_measured_spans_get_tracks_of_their_own(entries: list[tuple[int, int]]) -> None:
    ops = ops_of(*((f"op{i}", "stream", compute()) for i in range(len(entries))))
    events = events_of(timeline_of(schedule_of(ops), {0: [(s, s + length) for s, length in entries]}))
    assert_no_overlap(events)
    assert sorted(e["args"]["op"] for e in phase(events, "X")) == list(range(len(entries)))


def test_flows_pair_up_and_point_along_the_ring() -> None:
    timeline, _, _ = example(rotation(), 41_000, 30_000)
    events = events_of(timeline)
    starts, ends = phase(events, "s"), phase(events, "f")
    assert len(starts) == 4 * 24  # one hop per shift, 24 shifts on each of 4 ranks
    assert Counter(e["id"] for e in starts) == Counter(e["id"] for e in ends)
    assert max(Counter(e["id"] for e in starts).values()) == 1
    end_of = {e["id"]: e for e in ends}
    for start in starts:
        assert end_of[start["id"]]["pid"] == (start["pid"] + 1) % 4
        assert end_of[start["id"]]["bp"] == "e"
    spans = defaultdict(list)
    for e in phase(events, "X"):
        spans[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    for e in starts + ends:
        assert any(a <= e["ts"] < b for a, b in spans[e["pid"], e["tid"]])


def pipeline() -> Schedule:
    """Rank 0 sends twice to rank 1 under one tag, rank 1 answers once."""
    first = (
        Op(0, "send a", "out", Send("pp", (1,), 8, "act")),
        Op(1, "send b", "out", Send("pp", (1,), 8, "act")),
        Op(2, "get grad", "in", Recv("pp", (1,), 8, "grad")),
    )
    second = (
        Op(0, "get a", "in", Recv("pp", (-1,), 8, "act")),
        Op(1, "send grad", "out", Send("pp", (-1,), 8, "grad")),
        Op(2, "get b", "in", Recv("pp", (-1,), 8, "act")),
    )
    programs = (Program("first", {}, first), Program("second", {}, second))
    return Schedule("pipe", 2, {"pp": Group("pp", (2,), ((0, 1),))}, programs, (0, 1))


def test_sends_flow_into_the_matching_receives() -> None:
    spans = {0: [(0, 10), (10, 20), (30, 40)], 1: [(0, 10), (30, 40), (50, 60)]}
    events = events_of(timeline_of(pipeline(), spans))
    by_place = {(e["pid"], e["tid"], e["ts"], e["ts"] + e["dur"]): e["name"] for e in phase(events, "X")}

    def op_at(event: dict[str, Any]) -> str:
        (name,) = [
            n
            for (pid, tid, a, b), n in by_place.items()
            if (pid, tid) == (event["pid"], event["tid"]) and a <= event["ts"] < b
        ]
        return name

    ends = {e["id"]: op_at(e) for e in phase(events, "f")}
    arrows = sorted((op_at(e), ends[e["id"]]) for e in phase(events, "s"))
    assert arrows == [("send a", "get a"), ("send b", "get b"), ("send grad", "get grad")]


def test_two_hops_of_one_shift_are_two_flows() -> None:
    torus = Group("torus", (2, 2), ((0, 1, 2, 3),))
    op = Op(0, "both", "ring", Shift("torus", (Hop((1, 0), 8), Hop((0, 1), 8))))
    timeline = lockstep(schedule_of((op,), 4, {"torus": torus}), lambda op: 10)
    events = events_of(timeline)
    end_of = {e["id"]: e["pid"] for e in phase(events, "f")}
    arrows = sorted((e["pid"], end_of[e["id"]]) for e in phase(events, "s"))
    assert arrows == [(0, 1), (0, 2), (1, 0), (1, 3), (2, 0), (2, 3), (3, 1), (3, 2)]


def test_no_arrow_ends_outside_the_ranks_written() -> None:
    timeline, _, _ = example(rotation(), 41_000, 30_000)
    events = events_of(timeline, ranks=[1, 2])
    assert {e["pid"] for e in events} == {1, 2}
    assert len(phase(events, "s")) == len(phase(events, "f")) == 24  # only rank 1 to rank 2
    with pytest.raises(InputError, match="no rank 4: the schedule's ranks are 0 to 3"):
        events_of(timeline, ranks=[4])


def test_folded_ranks_are_written_through_their_representative() -> None:
    timeline = timeline_of(rotation(layers=1), {0: [(i, i + 1) for i in range(8)]})
    assert {e["pid"] for e in events_of(timeline)} == {0}
    label = next(e for e in events_of(timeline, ranks=[2]) if e["name"] == "process_name")
    assert label["args"]["name"] == "rank 2 (one of 4 alike)"


def test_counters_are_the_memory_profile() -> None:
    timeline, memory, _ = example(rotation(), 41_000, 30_000)
    counters = phase(events_of(timeline, memory={1: memory[1]}), "C")
    assert {e["pid"] for e in counters} == {1}
    assert [int(e["ts"] * 1000) for e in counters] == memory[1].time_ns.tolist()
    for category, values in memory[1].bytes_by_category.items():
        assert [e["args"][category] for e in counters] == values.tolist()
    assert max(sum(e["args"].values()) for e in counters) == memory[1].peak_bytes


def test_files_are_deterministic_and_gz_is_the_same_text(tmp_path: Path) -> None:
    timeline, memory, _ = example(rotation(), 41_000, 30_000)
    for name in ("a.json", "b.json", "a.json.gz", "b.json.gz"):
        write_chrome_trace(timeline, tmp_path / name, memory=memory)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == (tmp_path / "a.json").read_bytes()
    with pytest.raises(InputError, match="cannot write the trace"):
        write_chrome_trace(timeline, tmp_path / "missing" / "a.json")


def test_names_that_need_escaping_survive() -> None:
    name = 'a "quoted" \\ <name>\n\u2028 µ'
    events = events_of(timeline_of(schedule_of(ops_of((name, "s", compute()))), {0: [(0, 1)]}))
    assert phase(events, "X")[0]["name"] == name
