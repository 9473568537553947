"""Joining a predicted and a measured timeline: numbers by hand, identities on random timelines, words of errors."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_helpers import compute, ops_of, rotation, schedule_of, timeline_of

from rtp_sim.errors import InputError
from rtp_sim.experiment import Request, prepare
from rtp_sim.metrics import op_kind
from rtp_sim.report.diff_html import drawn_ranks, pair_data
from rtp_sim.report.diff_tables import REMAINDER, diff_grids, diff_json
from rtp_sim.report.scatter import BOTTOM, LEFT, TOP, duration_scatter
from rtp_sim.schedule.ir import Collective, Group, Hop, Schedule, Shift
from rtp_sim.timeline import Timeline
from rtp_sim.validation.diff import diff, layer_kind, with_numbers, without_numbers
from rtp_sim.validation.same_schedule import first_difference

SHIFT = Shift("ring", (Hop((1,), 1000),))
OPS = ops_of(
    ("m0.a", "compute", compute("linear")),
    ("m0.hop", "ring", SHIFT),
    ("m0.b", "compute", compute("linear")),
    ("m0.c", "compute", compute("gelu")),
)
PREDICTED = [(0, 100), (0, 300), (100, 200), (300, 340)]
"""Compute 0-200 and 300-340, communication 0-300: exposed 100, overlapped 200, no bubble; the step is 340."""
RANK_0 = [(5, 135), (10, 250), (140, 260), (270, 320)]
RANK_1 = [(0, 110), (10, 410), (120, 230), (450, 500)]
"""Compute 110 + 110 + 50, communication 10-410: busy 0-410 and 450-500, so exposed 190, overlapped 210, bubble 40."""


def both() -> tuple[Timeline, Timeline]:
    schedule = schedule_of(OPS)
    return timeline_of(schedule, {0: PREDICTED}), measured_of(schedule, {0: RANK_0, 1: RANK_1})


def measured_of(schedule: Schedule, spans: dict[int, list[tuple[int, int]]]) -> Timeline:
    return replace(timeline_of(schedule, spans), kind="measured")


# ---- exact numbers


def test_every_op_is_compared_on_every_measured_rank():
    joined = diff(*both())
    assert [(r.rank, r.predicted_rank, r.stands_for) for r in joined.ranks] == [(0, 0, (0,)), (1, 0, (1,))]
    found = [
        (o.predicted_start_ns, o.predicted_ns, o.measured_start_ns, o.measured_ns, o.error_ns)
        for o in joined.rank(1).ops
    ]
    assert found == [(0, 100, 0, 110, -10), (0, 300, 10, 400, -100), (100, 100, 120, 110, -10), (300, 40, 450, 50, -10)]
    assert joined.rank(0).ops[2].relative_error == pytest.approx(-20 / 120)
    assert joined.step_error_ns == 340 - 500


def test_the_split_of_each_rank():
    rank = diff(*both()).rank(1)
    assert (rank.predicted.end_ns, rank.measured.end_ns) == (340, 500)
    predicted, measured = rank.predicted.split, rank.measured.split
    assert (predicted.compute_ns, predicted.exposed_ns, predicted.overlapped_ns, predicted.bubble_ns) == (
        240,
        100,
        200,
        0,
    )
    assert (measured.compute_ns, measured.exposed_ns, measured.overlapped_ns, measured.bubble_ns) == (270, 190, 210, 40)


def test_groups_explain_the_step_on_the_rank_that_ends_last():
    joined = diff(*both())
    assert joined.critical_rank == 1
    groups = [(g.name, g.ops, g.predicted_ns, g.measured_ns, g.error_ns) for g in joined.kernel_classes]
    assert groups == [("shift", 1, 300, 400, -100), ("linear", 2, 200, 220, -20), ("gelu", 1, 40, 50, -10)]
    assert [g.share for g in joined.kernel_classes] == [100 / 160, 20 / 160, 10 / 160]
    assert joined.kernel_classes[0].relative_error == pytest.approx(-0.25)
    assert joined.remainder_ns == -160 + 130


def test_the_worst_ops_are_the_largest_errors_either_way():
    joined = diff(*both())
    # Rank 0: -30, +60, -20, -10. Rank 1: -10, -100, -10, -10.
    assert [(o.rank, o.op.index, o.error_ns) for o in joined.worst(5)] == [
        (1, 1, -100), (0, 1, 60), (0, 0, -30), (0, 2, -20), (0, 3, -10),
    ]  # fmt: skip
    assert len(joined.worst(100)) == 8


def test_ranks_that_both_sides_represent_alike_are_compared_once():
    schedule = schedule_of(OPS, world_size=4)
    predicted = replace(timeline_of(schedule, {0: PREDICTED, 2: RANK_1}), representative_of=(0, 0, 2, 2))
    measured = replace(measured_of(schedule, {0: RANK_0, 3: RANK_1}), representative_of=(0, 0, 0, 3))
    joined = diff(predicted, measured)
    assert [(r.rank, r.predicted_rank, r.stands_for) for r in joined.ranks] == [
        (0, 0, (0, 1)), (2, 2, (2,)), (3, 2, (3,)),
    ]  # fmt: skip
    assert joined.critical_rank == 3
    assert joined.rank(1) is joined.ranks[0]
    assert joined.remainder_ns == 0


def test_an_op_without_times_is_listed_and_counts_nowhere():
    schedule = schedule_of(OPS)
    predicted = timeline_of(schedule, {0: [*PREDICTED[:2], (-1, -1), PREDICTED[3]]})
    measured = measured_of(schedule, {0: [*RANK_0[:3], (-1, -1)], 1: RANK_1})
    joined = diff(predicted, measured)
    first, second = joined.ranks
    assert [op.name for op in first.only_predicted] == ["m0.c"]
    assert [op.name for op in first.only_measured] == [op.name for op in second.only_measured] == ["m0.b"]
    assert [o.op.name for o in first.ops] == ["m0.a", "m0.hop"]
    assert first.measured.end_ns == 260
    assert first.measured.split.compute_ns == 250
    assert {g.name: g.ops for g in joined.kernel_classes} == {"linear": 1, "shift": 1, "gelu": 1}
    lacking = diff_grids(joined, 3)[-1]
    assert lacking.rows == (("0", "%3 m0.c", "predicted"), ("0", "%2 m0.b", "measured"), ("1", "%2 m0.b", "measured"))


def test_a_rank_without_any_times_ends_at_once():
    schedule = schedule_of(OPS)
    measured = measured_of(schedule, {0: [(-1, -1)] * 4, 1: RANK_1})
    rank = diff(timeline_of(schedule, {0: PREDICTED}), measured).rank(0)
    assert (rank.ops, len(rank.only_predicted), rank.measured.end_ns) == ((), 4, 0)


def test_a_perfect_prediction_has_no_errors_and_no_shares():
    schedule = schedule_of(OPS)
    joined = diff(timeline_of(schedule, {0: PREDICTED}), measured_of(schedule, {0: PREDICTED, 1: PREDICTED}))
    assert joined.worst(3) == []
    assert [g.share for g in joined.kernel_classes] == [None] * 3
    assert joined.remainder_ns == joined.step_error_ns == 0


def test_an_empty_schedule_has_an_empty_diff():
    schedule = schedule_of(())
    joined = diff(timeline_of(schedule, {0: []}), measured_of(schedule, {0: [], 1: []}))
    assert (joined.step_error_ns, joined.kernel_classes, joined.worst(1)) == (0, (), [])
    assert diff_json(joined, 1)["relative_error"] is None


# ---- what was sent and held


def test_traffic_is_counted_for_the_prediction_and_read_for_the_measurement():
    predicted, measured = both()
    measured = replace(measured, meta={"bytes_sent.1": 999, "messages": 1})
    first, second = diff(predicted, measured).ranks
    # The one hop sends 1000 bytes in one message.
    assert (first.predicted.bytes_sent, first.predicted.messages) == (1000, 1)
    assert (first.measured.bytes_sent, first.measured.messages) == (None, 1)
    assert (second.measured.bytes_sent, second.measured.messages) == (999, 1)
    assert second.predicted.peak_memory_bytes is None


def test_memory_is_predicted_where_it_was_measured():
    schedule = rotation(world_size=2, layers=1, shard_bytes=1 << 20)
    spans = [(10 * i, 10 * i + 10) for i in range(len(schedule.program(0).ops))]
    measured = with_numbers(measured_of(schedule, {0: spans, 1: spans}), "peak_memory_bytes", {0: 7, 1: 9})
    joined = diff(timeline_of(schedule, {0: spans}), measured)
    # w0, w1 and x of 1 MiB, m of 4, y0 of a half: all of them while a linear runs beside a hop.
    assert [rank.predicted.peak_memory_bytes for rank in joined.ranks] == [7.5 * 2**20] * 2
    assert [rank.measured.peak_memory_bytes for rank in joined.ranks] == [7, 9]


def test_numbers_in_meta_must_be_numbers():
    predicted, measured = both()
    with pytest.raises(InputError, match="meta 'messages' is 'many'; expected a whole number"):
        diff(predicted, replace(measured, meta={"messages": "many"}))


# ---- only timelines of one schedule


def changed(index: int, **fields: Any) -> Schedule:
    ops = list(OPS)
    ops[index] = replace(ops[index], **fields)
    return schedule_of(ops)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (schedule_of(OPS, world_size=3), "one has 2 ranks, two 3"),
        (schedule_of(OPS[:3]), "on rank 0, one has 4 ops, two 3; 'm0.c' is the first that only one has"),
        (changed(2, name="m0.x"), "on rank 0, op 2 is 'm0.b' in one, 'm0.x' in two"),
        (changed(1, stream="hops"), "on rank 0, op 1 (m0.hop): stream is 'ring' in one, 'hops' in two"),
        (changed(3, after=(1,)), "on rank 0, op 3 (m0.c): after is () in one, (1,) in two"),
        (
            schedule_of(OPS, groups={"ring": Group("ring", (2,), ((1, 0),))}),
            "the group 'ring' is 2 (0 1) in one, 2 (1 0) in two",
        ),
    ],
)
def test_the_first_difference_of_two_schedules(other: Schedule, words: str):
    assert first_difference(schedule_of(OPS), other, "one", "two") == words


def test_a_missing_group_and_another_buffer_are_differences():
    one = rotation(world_size=2, layers=1)
    assert first_difference(one, replace(one, groups={}), "a", "b") == "the group 'ring' is in a only"
    bigger = rotation(world_size=2, layers=1, shard_bytes=1 << 10)
    assert "op 0 (rotate.0.0): action is" in first_difference(one, bigger, "a", "b")
    program = one.programs[0]
    fewer = replace(one, programs=(replace(program, buffers={k: b for k, b in program.buffers.items() if k != "m"}),))
    assert first_difference(one, fewer, "a", "b") == "on rank 0, the buffer 'm' is not the same"
    assert first_difference(one, replace(one, name="other", meta={}), "a", "b") == ""


def test_other_schedules_and_other_numbers_of_times_are_refused():
    predicted, measured = both()
    other = measured_of(schedule_of(OPS[:3]), {0: RANK_0[:3], 1: RANK_1[:3]})
    with pytest.raises(InputError, match=r"schedule differ: on rank 0, predicted has 4 ops, measured 3"):
        diff(predicted, other)
    short = timeline_of(measured.schedule, {0: RANK_0[:3], 1: RANK_1})
    with pytest.raises(InputError, match="measured rank 0 has 3 starts and 3 ends; expected 4 of each, one per op"):
        diff(predicted, replace(short, kind="measured"))


# ---- identities


@st.composite
def timelines(draw: st.DrawFn) -> tuple[Timeline, Timeline]:
    kinds = (compute("linear"), compute("gelu"), SHIFT, Collective("all_reduce", "ring", 64, "bf16"))
    actions = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=8))
    schedule = schedule_of(ops_of(*((f"op{i}", f"s{i % 3}", a) for i, a in enumerate(actions))), world_size=3)
    spans = st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(lambda p: (min(p), max(p))),
        min_size=len(actions), max_size=len(actions),
    )  # fmt: skip
    representative = draw(st.sampled_from([(0, 0, 0), (0, 0, 2), (0, 1, 2), (0, 1, 1)]))
    predicted = timeline_of(schedule, {r: draw(spans) for r in set(representative)})
    measured = measured_of(schedule, {r: draw(spans) for r in range(3)})
    return replace(predicted, representative_of=representative), measured


@given(timelines())
def test_contributions_add_up_to_the_difference(pair: tuple[Timeline, Timeline]):
    predicted, measured = pair
    joined = diff(predicted, measured)
    p, m = predicted.times(joined.critical_rank), measured.times(joined.critical_rank)
    busy_ns = int((p.end_ns - p.start_ns).sum() - (m.end_ns - m.start_ns).sum())
    for groups in (joined.kernel_classes, joined.layer_kinds):
        assert sum(g.error_ns for g in groups) == busy_ns
        assert sum(g.ops for g in groups) == len(p.start_ns)
        assert [abs(g.error_ns) for g in groups] == sorted((abs(g.error_ns) for g in groups), reverse=True)
    assert busy_ns + joined.remainder_ns == joined.step_error_ns == predicted.step_time_ns - measured.step_time_ns
    assert measured.times(joined.critical_rank).end_ns.max() == measured.step_time_ns


@given(timelines())
def test_every_rank_is_compared_with_its_representative(pair: tuple[Timeline, Timeline]):
    predicted, measured = pair
    joined = diff(predicted, measured)
    assert sorted(r for rank in joined.ranks for r in rank.stands_for) == [0, 1, 2]
    for rank in joined.ranks:
        p, m = predicted.ranks[predicted.representative_of[rank.rank]], measured.times(rank.rank)
        assert [o.predicted_ns for o in rank.ops] == (p.end_ns - p.start_ns).tolist()
        assert [o.measured_start_ns for o in rank.ops] == m.start_ns.tolist()
        for side in (rank.predicted, rank.measured):
            split = side.split
            assert split.compute_ns + split.exposed_ns + split.bubble_ns == split.step_ns


@given(timelines())
def test_swapping_the_sides_changes_every_sign(pair: tuple[Timeline, Timeline]):
    predicted, measured = pair
    there, back = diff(predicted, measured), diff(measured, predicted)
    assert there.step_error_ns == -back.step_error_ns
    errors = {(o.rank, o.op.index): o.error_ns for rank in back.ranks for o in rank.ops}
    assert all(errors[o.rank, o.op.index] == -o.error_ns for rank in there.ranks for o in rank.ops)


# ---- layers


@pytest.mark.parametrize(
    ("layer", "kind"),
    [("h3.attn", "h*.attn"), ("h12.norm1", "h*.norm1"), ("blocks.3.fc", "blocks.*.fc"),
     ("embed.tokens", "embed.tokens"), ("fc2", "fc*"), ("head", "head")],
)  # fmt: skip
def test_blocks_of_a_layer_are_one_kind(layer: str, kind: str):
    assert without_numbers(layer) == kind


def test_ops_belong_to_the_layer_they_compute_or_move():
    schedule = prepare(
        Request(model="gpt2-tiny", cluster="dgx-a100-80g", gpus=4, inner=2, strategy="rtp", seq_len=64)
    ).schedule
    program = schedule.program(0)
    kinds = {op.name: layer_kind(program, op) for op in program.ops}
    assert kinds["m0.h1.attn.F0.0.linear"] == kinds["m0.h1.attn.F0.hop"] == "h*.attn"
    assert kinds["m0.h0.mlp.up.B0.0.linear.wgrad"] == "h*.mlp.up"
    assert kinds["optimizer"] == "several layers"
    # Adding two gradients of one tensor moves no parameters.
    assert {layer_kind(program, op) for op in program.ops if op.name.endswith(".B.add")} == {"other"}


# ---- drawn and printed


def test_the_columns_of_the_group_tables_add_up():
    kernels = diff_grids(diff(*both()), 3)[1]
    assert kernels.rows[0] == ("shift", "1", "300 ns", "400 ns", "-100 ns", "-25.0 %", "62.5 %")
    assert kernels.rows[-2] == (REMAINDER, "", "", "", "-30 ns", "", "18.8 %")
    assert kernels.rows[-1] == ("step", "", "340 ns", "500 ns", "-160 ns", "-32.0 %", "")


def test_points_lie_where_the_durations_say():
    ops = diff(*both()).rank(1).ops
    # Durations from 40 to 400 ns: axes from 10 to 1000, two decades of 229 each.
    drawn = re.findall(r'<circle class="point" cx="([\d.]+)" cy="([\d.]+)"', duration_scatter(ops))
    side = (BOTTOM - TOP) / 2
    # The two linears (100 predicted, 110 measured) are one point.
    expected = [(110, 100), (400, 300), (50, 40)]
    assert len(drawn) == len(expected)
    for (x, y), (measured, predicted) in zip(drawn, expected, strict=True):
        assert float(x) == pytest.approx(LEFT + (np.log10(measured) - 1) * side, abs=0.06)
        assert float(y) == pytest.approx(BOTTOM - (np.log10(predicted) - 1) * side, abs=0.06)
    assert "(and 1 more here)" in duration_scatter(ops)


def test_ops_that_take_no_time_are_counted_not_drawn():
    schedule = schedule_of(OPS)
    predicted = timeline_of(schedule, {0: [(0, 0), *PREDICTED[1:]]})
    chart = duration_scatter(diff(predicted, measured_of(schedule, {0: RANK_0, 1: RANK_1})).rank(0).ops)
    assert "1 of 4 ops take no time on one side and are not shown." in chart
    assert chart.count("<circle") == 3
    assert duration_scatter([]).count("<circle") == 0


def spans_of(pair: dict[str, Any], side: int) -> dict[int, tuple[int, int]]:
    """The drawn spans of one side by op, each with the words of its own kernel."""
    rank, found = pair["ranks"][side], {}
    table = pair["tables"][rank["table"]]
    for track in rank["tracks"]:
        starts = np.cumsum(track["start"]).tolist()
        for place, start, dur in zip(track["op"], starts, track["dur"], strict=True):
            name, _, detail, op = table[place]
            found[op] = (start, start + dur)
            assert name == OPS[op].name
            assert pair["details"][detail].startswith(op_kind(OPS[op]))
    return found


def test_a_pair_of_timelines_lies_on_one_axis():
    joined = diff(*both())
    pair = pair_data(joined, 1)
    assert [rank["label"] for rank in pair["ranks"]] == ["predicted, rank 1", "measured, rank 1"]
    assert pair["step_ns"] == 500
    assert spans_of(pair, 0) == dict(enumerate(PREDICTED))
    assert spans_of(pair, 1) == dict(enumerate(RANK_1))
    assert drawn_ranks(joined) == [1, 0]


def test_either_side_of_a_pair_may_be_thinned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rtp_sim.report.diff_html.MAX_SPANS", 4)
    pair = pair_data(diff(*both()), 0)
    # At most two of each side: of 100, 300, 100 and 40 ns the 300, of 130, 240, 120 and 50 ns the first two.
    assert spans_of(pair, 0) == {1: (0, 300)}
    assert spans_of(pair, 1) == {0: (5, 135), 1: (10, 250)}
    assert pair["note"].count("are left out") == 2
