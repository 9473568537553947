"""The structure check: every rule broken once by hand; the message names the op, the rule, and points at the
line.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from schedule_helpers import SIZE, Row, kernel, program, ring, rotation, schedule, shift, with_op

from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.checks import check, findings
from rtp_sim.schedule.ir import (
    Action,
    Buffer,
    Collective,
    Compute,
    Dims,
    Group,
    Hop,
    Part,
    Recv,
    Schedule,
    Send,
    Shift,
)

RTP0 = Part("rtp", (0,))
N1: Dims = (("n", 1),)


def bad(
    action: Action, reads: str = "x", writes: str = "y", buffers: dict[str, Buffer] | None = None
) -> Schedule:
    """Four ranks in one ring, each with one op."""
    return schedule([ring(4)], program("all", [Row("bad", "s", action, reads, writes)], buffers))


def gelu(dims: Dims = N1, part: Part | None = None, variants: tuple[Dims, ...] | None = None) -> Compute:
    return Compute("gelu", "fp16", dims, part, variants)


def collective(
    kind: str = "all_reduce", size_bytes: int = SIZE, dtype: str = "fp16", root: int = 0
) -> Collective:
    return Collective(kind, "rtp", size_bytes, dtype, root)


def hop(offset: tuple[int, ...] = (1,), size: int | tuple[int, ...] = 8, part: Part | None = None) -> Shift:
    return Shift("rtp", (Hop(offset, size, part),))


def two_hops(writes: str, chunk_bytes: int | None = None, reads: str = "a b") -> Schedule:
    return bad(Shift("rtp", (Hop((1,), SIZE), Hop((-1,), SIZE)), chunk_bytes), reads, writes)


@pytest.mark.parametrize(
    ("wrong", "op", "message"),
    [
        (with_op(rotation(), "f1", index=9), "f1", "its index is 9; expected its place in the program, 3"),
        (with_op(rotation(), "f1", name="f0"), "f0", "2 ops are called 'f0'"),
        (with_op(rotation(), "f1", after=(3,)), "f1", "it comes after %3; expected earlier ops"),
        (with_op(rotation(), "f1", after=(-1,)), "f1", "it comes after %-1; expected earlier ops"),
        (with_op(rotation(), "f1", reads=("no",)), "f1", "buffer 'no' is unknown; the program declares w.a"),
    ],
)
def test_program(wrong: Schedule, op: str, message: str) -> None:
    points_at(wrong, op, message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (bad(kernel(part=Part("rtp", (0, 1)))), "offset [0, 1] has 2 entries; group 'rtp' has 1 dimensions"),
        (bad(kernel(part=Part("tp", (0,)))), "group 'tp' is unknown; the schedule has rtp"),
        (bad(gelu((("n", -1),))), "dimension n is -1; expected at least 0"),
        (bad(gelu(N1, None, (N1,) * 4)), "it has variants but no part"),
        (bad(gelu(N1, RTP0, (N1,) * 3)), "it has 3 variants; group 'rtp' has 4 shards"),
        (bad(gelu(N1, RTP0, ((("m", 1),),) * 4)), "its variants name other dimensions than ['n']"),
        (bad(replace(gelu(), dtype="half")), "data type 'half' is unknown; expected one of fp64"),
        (bad(shift(group="tp")), "group 'tp' is unknown; the schedule has rtp"),
        (bad(hop((0, 1))), "offset [0, 1] has 2 entries"),
        (bad(Shift("rtp", ()), ""), "it has no hop"),
        (bad(hop(size=0)), "size is 0; expected at least 1"),
        (bad(hop(size=2 * SIZE)), "it moves 1024 bytes, but buffer 'x' has 512"),
        (bad(hop(size=(8, 8, 8), part=RTP0)), "size has 3 numbers; group 'rtp' has 4 shards"),
        (bad(hop(size=(8, 8, 8, 8))), "size has one number per shard but no part to choose one"),
        (bad(hop(size=(0, 0, 0, 0), part=RTP0)), "at least one that is positive"),
        (two_hops("c"), "it writes 1 buffers; expected 2, the one each hop receives into"),
        (two_hops("c d", reads="a"), "it reads 1 buffers; expected 2 or more, first the one that each hop sends"),
        (two_hops("a d", 64), "the one each hop receives into and, as it moves 'a' in place, a bounce"),
        (two_hops("a d bounce"), "it moves 'a' in place; expected a positive chunk_bytes, got None"),
        (two_hops("a d bounce", 2 * SIZE), "it moves 1024 bytes, but buffer 'bounce' has 512"),
        (two_hops("c d", 64), "it has chunks of 64 bytes but is not in place"),
        (two_hops("c c"), "it receives into 'c', which another hop sends or receives"),
        (two_hops("b c"), "it receives into 'b', which another hop sends or receives"),
        (bad(collective("all_magic")), "collective 'all_magic' is unknown; expected one of all_reduce"),
        (bad(collective(dtype="fp17")), "data type 'fp17' is unknown"),
        (bad(collective(size_bytes=0)), "its size is 0 bytes"),
        (bad(collective(root=4)), "its root is position 4; group 'rtp' has positions 0 to 3"),
        (bad(collective(), writes=""), "it reads 1 and writes 0 buffers; expected at least one of each"),
        (bad(Send("rtp", (1,), 8, "t"), writes=""), "rank 3 has no neighbour at [1] in group 'rtp'"),
        (bad(Send("rtp", (0,), 8, "t")), "expected that it reads what it sends and writes none"),
        (bad(Recv("rtp", (0,), 8, "t")), "expected that it reads none and writes what it receives"),
        (bad(Recv("rtp", (0,), 0, "t"), reads=""), "its size is 0 bytes"),
        (bad(Recv("rtp", (0,), 2 * SIZE, "t"), reads=""), "it moves 1024 bytes, but buffer 'y' has 512"),
    ],
)  # fmt: skip
def test_op(wrong: Schedule, message: str) -> None:
    points_at(wrong, "bad", message)


def points_at(wrong: Schedule, op: str, message: str) -> None:
    """`check` raises with the message in the first line and one arrow, at the op."""
    with pytest.raises(ScheduleError) as error:
        check(wrong)
    first, *listing = str(error.value).split("\n")
    assert first.startswith("structure: program 'all', %")
    assert f" '{op}': " in first
    assert message in first
    (arrow,) = [line for line in listing if line.startswith("  --> ")]
    assert f" {op} " in arrow


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 0, "program_of_rank": ()}, "world size is 0"),
        ({"program_of_rank": (0, 0)}, "program_of_rank has 2 entries; expected one per rank, 4"),
        ({"program_of_rank": (0, 0, 0, 1)}, "rank 3 runs program number 1; expected 0 to 0"),
        ({"programs": rotation().programs * 2}, "program 'all' is run by no rank"),
        ({"groups": {"rtp": Group("tp", (4,), ((0, 1, 2, 3),))}}, "group 'rtp' calls itself 'tp'"),
        ({"groups": {"rtp": Group("rtp", (2, 3), ((0, 1, 2, 3),))}}, "has 4 members; dims (2, 3) need 6"),
        ({"groups": {"rtp": Group("rtp", (4,), ((0, 1, 2, 4),))}}, "names rank 4; expected 0 to 3"),
        ({"groups": {"rtp": Group("rtp", (2,), ((0, 1), (1, 2)))}}, "has rank 1 2 times"),
        ({"groups": {"rtp": Group("rtp", (2,), ())}}, "0 instances; expected one of each"),
        (
            {"groups": {"rtp": Group("rtp", (2,), ((0, 1),))}},
            "rank 2 runs it but is in no instance of group 'rtp'",
        ),
    ],
)
def test_ranks_and_groups(changes: dict[str, object], message: str) -> None:
    found = findings(replace(rotation(), **changes))  # type: ignore[arg-type]
    assert any(message in f.message for f in found)
    assert {f.rule for f in found} == {"structure"}


X = Buffer("x", "weights", "fp16", 8, None, True, True)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (replace(X, numel=0), "numel is 0; expected at least 1"),
        (replace(X, category="weight"), "category 'weight' is unknown; expected one of weights, gradients"),
        (replace(X, dtype="half"), "data type 'half' is unknown; expected one of fp64"),
        (replace(X, numel=(8, 8)), "numel has one number per shard but no part"),
        (replace(X, numel=(8, 8), part=RTP0), "numel has 2 numbers; group 'rtp' has 4 shards"),
        (replace(X, numel=(8, 8, 8, -1), part=RTP0), "expected no negative number"),
        (replace(X, name="z"), "it calls itself 'z'"),
    ],
)
def test_buffers(buffer: Buffer, message: str) -> None:
    (found,) = findings(bad(kernel(), buffers={"x": buffer}))
    assert found.message.startswith("structure: program 'all': buffer 'x': ")
    assert message in found.message


def test_shards_may_be_empty_but_not_all() -> None:
    """Three experts on four ranks: one rank's shard is empty."""
    buffers = {n: Buffer(n, "weights", "fp16", (8, 8, 8, 0), RTP0, True, True) for n in ("w.a", "w.b")}
    check(bad(hop(size=(16, 16, 16, 0), part=RTP0), "w.a", "w.b", buffers))
