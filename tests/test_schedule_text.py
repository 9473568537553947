"""The text form: round trips, what it looks like, and where its errors point."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_helpers import rotation
from schedule_random import schedules

from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.ir import (
    Buffer,
    Collective,
    Compute,
    Group,
    Hop,
    Op,
    Part,
    Program,
    Recv,
    Schedule,
    Send,
    Shift,
)
from rtp_sim.schedule.text import compact_ranks, from_text, op_line, readable_bytes, to_text

LISTING = """\
schedule "two layers"
world 4
meta tokens = 8192
meta strategy = "rtp"

group rtp dims 4
  instance 0-3

group square dims 2 2
  instance 0 2 1 3

program all ranks 0-3
  buffer w.a weights fp16 (10, 10, 10, 9) part rtp[+0] live-in live-out
  buffer w.b communication fp16 10
  buffer y activations fp16 4096
  %0 compute f0 linear[m=8 k=4 n=3] fp16 part rtp[-1] variants [n=3] [n=2] w.a -> y
  %1 ring hop0 shift rtp hop [+1] (20, 20, 20, 18) part rtp[+0] w.a -> w.b after %0 blocks-host  # 20 B
  %2 ring pair shift square hop [+0,+1] 8 hop [-1,+0] 16 y, w.b -> w.a, z  # 24 B
  %3 ring inplace shift rtp hop [-1] 64 chunk 16 w.a -> w.a, bounce  # 64 B
  %4 nccl sync all_reduce rtp 12300000 fp32 y -> y after %0 %1  # 12.3 MB
  %5 nccl share broadcast rtp 512 bf16 root 2 y -> y  # 512 B
  %6 pp out send rtp [+1] 512 tag "mb 0" y ->  # 512 B
  %7 pp in recv rtp [-1] 512 tag "mb 0" -> y  # 512 B
"""


def listed() -> Schedule:
    """The schedule of LISTING, by hand."""
    rtp, w, y = Part("rtp", (0,)), ("w.a",), ("y",)
    linear = Compute(
        "linear", "fp16", (("m", 8), ("k", 4), ("n", 3)), Part("rtp", (-1,)), ((("n", 3),), (("n", 2),))
    )
    ops = (
        Op(0, "f0", "compute", linear, w, y),
        Op(1, "hop0", "ring", Shift("rtp", (Hop((1,), (20, 20, 20, 18), rtp),)), w, ("w.b",), (0,), True),
        Op(
            2, "pair", "ring", Shift("square", (Hop((0, 1), 8), Hop((-1, 0), 16))), ("y", "w.b"), ("w.a", "z")
        ),
        Op(3, "inplace", "ring", Shift("rtp", (Hop((-1,), 64),), 16), w, ("w.a", "bounce")),
        Op(4, "sync", "nccl", Collective("all_reduce", "rtp", 12_300_000, "fp32"), y, y, (0, 1)),
        Op(5, "share", "nccl", Collective("broadcast", "rtp", 512, "bf16", 2), y, y),
        Op(6, "out", "pp", Send("rtp", (1,), 512, "mb 0"), y),
        Op(7, "in", "pp", Recv("rtp", (-1,), 512, "mb 0"), (), y),
    )
    buffers = (
        Buffer("w.a", "weights", "fp16", (10, 10, 10, 9), rtp, True, True),
        Buffer("w.b", "communication", "fp16", 10),
        Buffer("y", "activations", "fp16", 4096),
    )
    groups = (Group("rtp", (4,), ((0, 1, 2, 3),)), Group("square", (2, 2), ((0, 2, 1, 3),)))
    return Schedule(
        "two layers",
        4,
        {g.name: g for g in groups},
        (Program("all", {b.name: b for b in buffers}, ops),),
        (0, 0, 0, 0),
        {"tokens": 8192, "strategy": "rtp"},
    )


def test_listing_reads_like_a_program() -> None:
    assert to_text(listed()) == LISTING
    assert from_text(LISTING) == listed()


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_round_trip(s: Schedule) -> None:
    text = to_text(s)
    assert from_text(text) == s
    assert to_text(from_text(text)) == text


def test_hand_written_text_may_be_loose() -> None:
    loose = """
    world 2   # ranks
    schedule x
    program p ranks 0 1
      %0 s a gelu[n=4] fp16 x->y   # no spaces needed around the arrow
    """
    assert from_text(loose).programs[0].ops[0].reads == ("x",)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], ""),
        ([7], "7"),
        ([0, 1], "0 1"),
        ([0, 1, 2, 5, 9, 13], "0-2 5-13:4"),
        ([3, 2, 1, 0], "3 2 1 0"),
        ([0, 4, 8, 1, 5, 9], "0-8:4 1-9:4"),
    ],
)
def test_ranks_are_compact(ranks: list[int], text: str) -> None:
    assert compact_ranks(ranks) == text


@given(st.lists(st.integers(0, 30)))
def test_ranks_keep_their_order(ranks: list[int]) -> None:
    text = f"schedule s\nworld 1\ngroup g dims 1\ninstance {compact_ranks(ranks)}\nprogram p ranks 0\n"
    assert from_text(text).groups["g"].instances == (tuple(ranks),)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_300_000, "12.3 MB"),
        (999_600, "1 MB"),
        (2 * 10**9, "2 GB"),
    ],
)
def test_readable_bytes(size_bytes: int, text: str) -> None:
    assert readable_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("old", "new", "token", "expected"),
    [
        ("all_reduce rtp", "all_recude rtp", "rtp 12300000", "'[' behind the kernel 'all_recude'"),
        ("after %0 %1", "after 0", "0  #", "an op number such as %3"),
        ("dims 2 2", "dims 2 x", "x", "a dimension of the group (a whole number)"),
        ("hop [+1] (20, 20, 20, 18)", "hop [+1] (20, 20 20, 18)", "20, 18)", "','"),
        ("tokens = 8192", "tokens = 8k", "k", "the end of the line"),
        ("tokens = 8192", "tokens = many", "many", "a JSON value"),
        ('send rtp [+1] 512 tag "mb 0"', "send rtp [+1] 512", "y ->", "'tag'"),
        ("buffer y activations", "bufer y activations", "bufer", "one of schedule, world, meta"),
        ("buffer w.b communication", "buffer w.a communication", "w.a comm", "a new name"),
        ("[m=8 k=4 n=3]", "[m=8 k n=3]", "n=3]", "'='"),
        ("blocks-host", "blocks-host !", "!", "a word, a number"),
        (
            "program all ranks 0-3",
            "program a ranks 0 1\nprogram all ranks 0-3",
            "0-3",
            "already in program 'a'",
        ),
    ],
)
def test_error_points_at_the_place(old: str, new: str, token: str, expected: str) -> None:
    """The arrow stands under the first character of `token` in the changed line, whose number is given."""
    assert LISTING.count(old) == 1
    broken = LISTING.replace(old, new)
    line_number = broken[: broken.index(new) + len(new)].count("\n") + 1
    with pytest.raises(ScheduleError) as error:
        from_text(broken)
    first, line, arrow = str(error.value).split("\n")
    assert first.startswith(f"schedule text, line {line_number}: expected ")
    assert expected in first
    assert line.strip() == broken.split("\n")[line_number - 1].strip()
    assert line[arrow.index("^") :].startswith(token)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the line 'schedule \"my schedule\"' is missing"),
        ("schedule x", "the line 'world 8' is missing"),
        ("schedule x\nworld 3\nprogram p ranks 0 1", "no program names rank 2"),
        ("schedule x\nworld 1\nprogram p ranks 0 1", "names rank 1"),
        ("%0 s a f[] fp16", "a program line before the first op"),
        ("instance 0", "a group line before the first instance"),
    ],
)
def test_error_of_the_whole(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        from_text(text)
    assert message in str(error.value)


def test_cut_off_text_raises_nothing_but_schedule_errors() -> None:
    """Cut between lines it may parse, to fewer ops (the JSON form is the one that shows every cut)."""
    text = to_text(rotation(3))
    for end in range(len(text)):
        with suppress(ScheduleError):
            assert len(from_text(text[:end]).programs[0].ops) <= 5


def test_nan_has_no_text() -> None:
    s = listed()
    with pytest.raises(ScheduleError, match="meta 'loss' is nan"):
        to_text(Schedule(s.name, 4, s.groups, s.programs, s.program_of_rank, {"loss": float("nan")}))


def test_op_line_is_one_line() -> None:
    assert op_line(listed().programs[0].ops[0]) == (
        "%0 compute f0 linear[m=8 k=4 n=3] fp16 part rtp[-1] variants [n=3] [n=2] w.a -> y"
    )
