"""The listing of one rank: real shard numbers, real peers, readable sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from schedule_helpers import Row, grid, kernel, program, ring, rotation, schedule

from rtp_sim.errors import InputError
from rtp_sim.schedule.ir import Collective, Compute, Group, Hop, Part, Recv, Schedule, Send, Shift
from rtp_sim.schedule.pretty import program_listing


def uneven() -> Schedule:
    """Eight ranks rotate shards of 100 kB, the last one of 50 kB."""
    sizes = (100_000,) * 7 + (50_000,)
    dims = tuple((("n", size // 2),) for size in sizes)
    linear = Compute("linear", "fp16", dims[0], Part("rtp", (-1,)), dims)
    hop = Shift("rtp", (Hop((1,), sizes, Part("rtp", (0,))),))
    rows = [
        Row("l0.hop", "ring", hop, "w.a", "w.b"),
        Row("l0.f", "compute", linear, "x", "y", blocks_host=True),
        Row("l1.sync", "nccl", Collective("broadcast", "rtp", 512, "fp32", 3), "y", "y", "l0.hop l0.f"),
    ]  # fmt: skip
    return schedule([ring(8)], program("all", rows))


def test_shards_and_peers_are_numbers() -> None:
    """Rank 0 holds shard 0 and sends it to rank 1; from rank 7 comes shard 7, half as large."""
    lines = program_listing(uneven(), 0).split("\n")
    assert lines[0] == "test: rank 0 of 8, program 'all' of ranks 0-7"
    assert lines[1] == "3 ops on streams ring, compute, nccl; 4 buffers"
    assert lines[2] == "group rtp: position 0 of ranks 0-7"
    hop = next(line for line in lines if "%0" in line)
    assert "ring     send shard 0 (100 kB) -> rank 1, receive shard 7 (50 kB) <- rank 7" in hop
    assert hop.endswith("w.a -> w.b  [hop]")
    compute = next(line for line in lines if "%1" in line)
    assert "linear n=25000 fp16, shard 7" in compute
    assert "blocks the host" in compute
    sync = next(line for line in lines if "%2" in line)
    assert "broadcast 512 B fp32 over rtp (ranks 0-7, root rank 3)" in sync
    assert "after %0 %1" in sync
    assert "linear n=50000 fp16, shard 6" in program_listing(uneven(), 7)


def test_sections_follow_names() -> None:
    lines = program_listing(uneven(), 0).split("\n")
    titles = [(i, line.strip("- ")) for i, line in enumerate(lines) if line.startswith("-- ")]
    assert titles == [(3, "l0"), (6, "l1")]


def test_phases_share_the_section_of_their_layer() -> None:
    names = ["m0.h0.mlp.up.F0.hop", "m0.h0.mlp.up.F0.0.linear", "m0.h0.mlp.up.B1.hop", "step"]
    rows = [Row(name, "s", kernel(), "x", "y") for name in names]
    lines = program_listing(schedule([ring(1)], program("all", rows)), 0).split("\n")[3:]
    assert [line.strip("- ").split("[")[-1] for line in lines] == [
        "m0.h0.mlp.up", "F0.hop]", "F0.0.linear]", "B1.hop]", "", "step]", "",
    ]  # fmt: skip


def test_two_dimensions_and_transfers() -> None:
    pair = Shift("grid", (Hop((0, 1), 8, Part("grid", (0, 0))), Hop((1, 0), 8)))
    text = program_listing(schedule([grid(2, 3)], program("all", [Row("p", "s", pair, "a b", "c d")])), 5)
    assert "group grid: position 5 (1, 2) of ranks 0-5" in text
    assert "send shard 5 (1, 2) (8 B) -> rank 3, receive shard 4 (1, 1) (8 B) <- rank 4" in text
    assert "send (8 B) -> rank 2, receive (8 B) <- rank 2" in text
    stages = Group("pp", (2,), ((4, 9),))
    rows = [
        Row("out", "s", Send("pp", (1,), 8, "mb0"), "a"),
        Row("in", "s", Recv("pp", (-1,), 8, "mb0"), "", "a"),
    ]
    s = Schedule("s", 10, {"pp": stages}, (program("p", rows),), (0,) * 10)
    assert "send mb0 (8 B) -> rank 9" in program_listing(s, 4)
    assert "receive mb0 (8 B) <- nobody" in program_listing(s, 4)


def test_limit_and_color() -> None:
    text = program_listing(rotation(4), 1, limit=2)
    assert "%1 " in text
    assert "%2 " not in text
    assert "... 5 more of 7 ops" in text
    assert "\x1b[" not in text
    colored = program_listing(rotation(4), 1, color=True)
    assert "\x1b[36mring   \x1b[0m" in colored


def test_wrong_rank_or_limit() -> None:
    with pytest.raises(InputError, match="rank 4 is not in the schedule; expected 0 to 3"):
        program_listing(rotation(4), 4)
    with pytest.raises(InputError, match="limit is -1"):
        program_listing(rotation(4), 0, limit=-1)


def test_chunks_and_single_rank() -> None:
    in_place = Shift("rtp", (Hop((1,), 512),), 64)
    rows = [Row("hop", "ring", in_place, "w", "w bounce"), Row("f", "s", kernel(), "w", "y")]
    text = program_listing(schedule([ring(1)], program("all", rows)), 0)
    assert "send (512 B) -> rank 0, receive (512 B) <- rank 0 in chunks of 64 B" in text
    assert "of rank 0\n" in text
    empty = replace(rotation(2), programs=(program("none", []),))
    assert "0 ops on streams (none); 0 buffers" in program_listing(empty, 0)
