"""Metrics: the split of a step by hand and by counting single nanoseconds, traffic by hand for each op."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import compute, ops_of, profile_of, schedule_of, timeline_of

from rtp_sim.errors import InputError
from rtp_sim.metrics import (
    communication_totals,
    critical_rank,
    metrics_row,
    op_traffic,
    peak_memory_rank,
    step_metrics,
    time_split,
)
from rtp_sim.schedule.ir import Action, Collective, Group, Hop, Op, Part, Recv, Schedule, Send, Shift

ROW_KEYS = [
    "strategy", "layout", "step_time_s", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "peak_memory_bytes",
    "memory_by_category", "fits", "compute_time_s", "exposed_communication_s", "overlapped_communication_s",
    "bubble_s", "bytes_sent_per_rank", "messages_per_rank", "cost_provenance",
]  # fmt: skip


def three_ops() -> Schedule:
    ops = ops_of(
        ("forward", "compute", compute()),
        ("rotate", "ring", Shift("ring", (Hop((1,), 1000),))),
        ("backward", "compute", compute()),
    )
    return schedule_of(ops, strategy="rtp", layout="dp=1 rtp=2", tokens=4, model_flops=1200)


def test_split_of_three_ops_by_hand() -> None:
    # compute 0-100 and 170-200, transfer 60-160: 40 ns of it hidden, 60 exposed, 160-170 nothing runs.
    timeline = timeline_of(
        three_ops(), {0: [(0, 100), (60, 160), (170, 200)], 1: [(0, 90), (60, 160), (170, 199)]}
    )
    split = time_split(timeline, 0)
    assert (split.step_ns, split.compute_ns, split.exposed_ns, split.overlapped_ns, split.bubble_ns) == (
        200,
        130,
        60,
        40,
        10,
    )
    # Rank 1 ends one ns earlier: compute 0-90 and 170-199, exposed 90-160, nothing in 160-170 and 199-200.
    split = time_split(timeline, 1)
    assert (split.step_ns, split.compute_ns, split.exposed_ns, split.overlapped_ns, split.bubble_ns) == (
        200,
        119,
        70,
        30,
        11,
    )


def test_row_of_three_ops_by_hand() -> None:
    timeline = timeline_of(
        three_ops(), {0: [(0, 100), (60, 160), (170, 200)], 1: [(0, 90), (60, 160), (170, 199)]}
    )
    memory = {0: profile_of(700), 1: profile_of(900, "activations")}
    m = step_metrics(timeline, memory, 900, 1e12, {"measured": 0.25, "assumed": 0.75})
    assert (m.strategy, m.layout, m.step_time_s) == ("rtp", "dp=1 rtp=2", 200e-9)
    assert m.tokens_per_s == pytest.approx(2e7)  # 4 tokens in 200 ns
    assert m.tokens_per_s_per_gpu == pytest.approx(1e7)
    assert m.mfu == pytest.approx(0.003)  # 1200 FLOP of 200 ns x 2 ranks x 1e12 FLOP/s
    assert (m.compute_time_s, m.exposed_communication_s) == (130e-9, 60e-9)
    assert (m.overlapped_communication_s, m.bubble_s) == (40e-9, 10e-9)
    assert (m.bytes_sent_per_rank, m.messages_per_rank) == (1000, 1)
    assert (m.peak_memory_bytes, m.fits) == (900, True)
    assert m.memory_by_category["activations"] == 900
    assert sum(m.memory_by_category.values()) == 900
    assert not step_metrics(timeline, memory, 899, 1e12).fits
    row = metrics_row(m)
    assert list(row) == ROW_KEYS
    assert json.loads(json.dumps(row))["cost_provenance"] == {"measured": 0.25, "assumed": 0.75}


def test_critical_rank_is_the_last_to_end_and_the_lowest_of_several() -> None:
    ops = ops_of(("a", "compute", compute()))
    timeline = timeline_of(schedule_of(ops, 3), {2: [(0, 9)], 0: [(0, 5)], 1: [(0, 9)]})
    assert critical_rank(timeline) == 1
    assert peak_memory_rank({2: profile_of(5), 1: profile_of(5), 0: profile_of(4)}) == 1


def test_unknown_tokens_flops_or_peak_give_none() -> None:
    timeline = timeline_of(schedule_of(ops_of(("a", "compute", compute()))), {0: [(0, 5)]})
    m = step_metrics(timeline, {0: profile_of(1)}, 1, None)
    assert (m.strategy, m.layout) == ("toy", "")
    assert (m.tokens_per_s, m.tokens_per_s_per_gpu, m.mfu) == (None, None, None)
    known = timeline_of(three_ops(), {0: [(0, 1), (0, 1), (1, 2)]})
    assert step_metrics(known, {0: profile_of(1)}, 1, None).mfu is None


def test_empty_step_has_no_rates() -> None:
    m = step_metrics(timeline_of(schedule_of((), tokens=3), {0: []}), {0: profile_of(1)}, 1, 1e12)
    assert (m.step_time_s, m.tokens_per_s, m.bubble_s, m.bytes_sent_per_rank) == (0.0, None, 0.0, 0)


def test_input_errors_name_what_is_wrong() -> None:
    timeline = timeline_of(schedule_of(ops_of(("a", "compute", compute())), tokens="many"), {0: [(0, 5)]})
    with pytest.raises(InputError, match=r"meta\[\"tokens\"\] is 'many'; expected a number"):
        step_metrics(timeline, {0: profile_of(1)}, 1, None)
    with pytest.raises(InputError, match="no memory profile"):
        step_metrics(timeline, {}, 1, None)


spans = st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 15))


@settings(max_examples=200, deadline=None)
@given(st.lists(spans, min_size=1, max_size=12))
def test_split_equals_counting_every_nanosecond(entries: list[tuple[bool, int, int]]) -> None:
    shift = Shift("ring", (Hop((1,), 8),))
    ops = ops_of(*((f"op{i}", f"s{i}", compute() if c else shift) for i, (c, _, _) in enumerate(entries)))
    timeline = timeline_of(schedule_of(ops), {0: [(start, start + length) for _, start, length in entries]})
    split = time_split(timeline, 0)
    computing = {t for c, start, length in entries if c for t in range(start, start + length)}
    sending = {t for c, start, length in entries if not c for t in range(start, start + length)}
    step = max(start + length for _, start, length in entries)
    assert split.compute_ns == len(computing)
    assert split.exposed_ns == len(sending - computing)
    assert split.overlapped_ns == len(sending & computing)
    assert split.bubble_ns == len(set(range(step)) - computing - sending)
    assert split.compute_ns + split.exposed_ns + split.bubble_ns == split.step_ns == step


GROUPS = {
    "ring": Group("ring", (4,), ((0, 1, 2, 3),)),
    "torus": Group("torus", (2, 2), ((0, 1, 2, 3),)),
    "row": Group("row", (1, 4), ((0, 1, 2, 3),)),
    "alone": Group("alone", (1,), ((0,), (1,), (2,), (3,))),
}
IN_PLACE = Shift("ring", (Hop((1,), 1001),), chunk_bytes=256)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (compute(), (0, 0)),
        (Shift("ring", (Hop((1,), 1000),)), (1000, 1)),
        (Shift("torus", (Hop((1, 0), 1000), Hop((0, 1), 50))), (1050, 2)),
        (Shift("row", (Hop((1, 0), 1000), Hop((0, 1), 50))), (50, 1)),  # the first hop leads home
        (Shift("ring", (Hop((4,), 1000),)), (0, 0)),
        (Shift("ring", (Hop((1,), 0),)), (0, 0)),
        (Collective("all_gather", "ring", 1000, "bf16"), (750, 3)),
        (Collective("reduce_scatter", "ring", 1000, "bf16"), (750, 3)),
        (Collective("all_to_all", "ring", 1000, "bf16"), (750, 3)),
        (Collective("all_gather", "ring", 1002, "bf16"), (752, 3)),  # 751.5 rounded up
        (Collective("all_reduce", "ring", 1000, "fp32"), (1500, 6)),
        (Collective("all_reduce", "ring", 1001, "fp32"), (1502, 6)),  # 1501.5 rounded up
        (Collective("broadcast", "ring", 1000, "bf16"), (1000, 1)),
        (Collective("reduce", "ring", 1000, "bf16", root=2), (1000, 1)),
        (Collective("all_reduce", "alone", 1000, "bf16"), (0, 0)),
        (Collective("broadcast", "alone", 1000, "bf16"), (0, 0)),
        (Send("ring", (1,), 300, "x"), (300, 1)),
        (Send("ring", (-1,), 300, "x"), (0, 0)),  # rank 0 has nobody before it
        (Recv("ring", (1,), 300, "x"), (0, 0)),
    ],
)
def test_traffic_of_each_kind_of_op(action: Action, expected: tuple[int, int]) -> None:
    op = Op(0, "op", "s", action)
    assert op_traffic(schedule_of((op,), 4, GROUPS), 0, op) == expected


def test_in_place_shift_is_cut_into_chunks() -> None:
    in_place = Op(0, "rotate", "ring", IN_PLACE, ("w",), ("w", "bounce"))
    out_of_place = Op(1, "rotate again", "ring", IN_PLACE, ("w",), ("v",))
    schedule = schedule_of((in_place, out_of_place), 4, GROUPS)
    assert op_traffic(schedule, 0, in_place) == (1001, 4)  # 256 + 256 + 256 + 233
    assert op_traffic(schedule, 0, out_of_place) == (1001, 1)


def test_uneven_shards_are_counted_by_the_shard_each_rank_sends() -> None:
    # Rank r sends shard r - 1, so ranks 0 to 3 send shards 3, 0, 1, 2.
    hop = Hop((1,), (10, 20, 30, 40), Part("ring", (-1,)))
    schedule = schedule_of((Op(0, "rotate", "ring", Shift("ring", (hop,))),), 4, GROUPS)
    assert [communication_totals(schedule, rank)[0] for rank in range(4)] == [40, 10, 20, 30]


def test_totals_by_kind() -> None:
    ops = ops_of(
        ("f", "compute", compute()),
        ("g1", "c", Collective("all_gather", "ring", 1000, "bf16")),
        ("g2", "c", Collective("all_gather", "ring", 400, "bf16")),
        ("r", "ring", Shift("ring", (Hop((1,), 64),))),
        ("s", "p2p", Send("ring", (1,), 5, "t")),
        ("v", "p2p", Recv("ring", (1,), 5, "u")),
    )
    total = communication_totals(schedule_of(ops, 4, GROUPS), 0)
    assert total == (1119, 8, {"all_gather": (1050, 6), "shift": (64, 1), "send": (5, 1)})


def test_rotation_sends_what_the_closed_form_says() -> None:
    # A rotation of N shards of s bytes takes N - 1 hops and sends (N - 1) s, as an all_gather of N s does.
    n, size = 4, 3000
    rotate = tuple(Op(i, f"r{i}", "ring", Shift("ring", (Hop((1,), size),))) for i in range(n - 1))
    gather = Op(0, "g", "c", Collective("all_gather", "ring", n * size, "bf16"))
    rotated = communication_totals(schedule_of(rotate, n, GROUPS), 1)
    gathered = communication_totals(schedule_of((gather,), n, GROUPS), 1)
    assert rotated[:2] == gathered[:2] == ((n - 1) * size, n - 1)
