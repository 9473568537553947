"""Every check has a schedule that fails it, made by hand, and its message points at the op."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_helpers import (
    SIZE,
    Row,
    grid,
    kernel,
    program,
    ring,
    rotation,
    schedule,
    shift,
    with_op,
    without_op,
)

from rtp_sim.errors import DeadlockError, ScheduleError
from rtp_sim.schedule.checks import check, findings
from rtp_sim.schedule.deadlock import deadlock_findings
from rtp_sim.schedule.hazards import direct_predecessors
from rtp_sim.schedule.ir import (
    Buffer,
    Collective,
    Compute,
    Group,
    Hop,
    Part,
    Recv,
    Schedule,
    Send,
    Shift,
)
from rtp_sim.schedule.matching import matching_findings


def allreduce(group: str = "rtp", size_bytes: int = SIZE, dtype: str = "fp16", root: int = 0) -> Collective:
    return Collective("all_reduce", group, size_bytes, dtype, root)


def pair(first: list[Row], second: list[Row]) -> Schedule:
    """Rank 0 runs the first program, rank 1 the second, in a group of two."""
    return schedule([ring(2)], program("first", first), program("second", second), of_rank=(0, 1))


def test_different_collectives_do_not_match() -> None:
    common = Row("same", "nccl", allreduce(), "g", "g")
    s = pair(
        [common, Row("sum16", "nccl", allreduce(), "g", "g")],
        [common, Row("sum32", "nccl", allreduce(dtype="fp32"), "g", "g")],
    )
    with pytest.raises(ScheduleError) as error:
        check(s)
    text = str(error.value)
    assert text.startswith(
        "matching: program 'first', %1 'sum16': group 'rtp', collective or shift number 1: rank 0"
    )
    assert "  --> %1 nccl sum16 all_reduce rtp 512 fp16" in text
    assert "and in program 'second':" in text
    assert "  --> %1 nccl sum32 all_reduce rtp 512 fp32" in text


@pytest.mark.parametrize(
    "other",
    [
        replace(allreduce(), size_bytes=SIZE // 2),
        replace(allreduce(), root=1),
        replace(allreduce(), kind="reduce"),
        shift(),
    ],
)
def test_every_field_of_a_collective_must_match(other: Collective | Shift) -> None:
    s = pair([Row("a", "n", allreduce(), "g", "h")], [Row("b", "n", other, "g", "h")])
    assert [f.rule for f in findings(s)] == ["matching"]


OTHER_SHIFTS = [
    shift(-1),
    shift(size_bytes=8),
    Shift("rtp", (Hop((1,), SIZE),) * 2),
    Shift("rtp", (Hop((1,), SIZE, Part("rtp", (0,))),)),
]


@pytest.mark.parametrize("other", OTHER_SHIFTS)
def test_every_field_of_a_shift_must_match(other: Shift) -> None:
    reads, writes = ("a b", "c d") if len(other.hops) == 2 else ("a", "c")
    s = pair([Row("one", "n", shift(), "a", "c")], [Row("two", "n", other, reads, writes)])
    assert [f.rule for f in findings(s)] == ["matching"]


def test_missing_collective_is_found_on_the_longer_side() -> None:
    rows = [Row("one", "n", allreduce(), "g", "g"), Row("two", "n", allreduce(), "g", "g")]
    for s in (pair(rows, rows[:1]), pair(rows[:1], rows)):
        (found,) = findings(s)
        assert found.rule == "matching"
        assert "%1 'two'" in found.message
        assert "issues only 1 on this group" in found.message
        assert "--> %1 n two" in found.message


def transfer(sent: list[Row], received: list[Row]) -> list[str]:
    return [f.message for f in matching_findings(pair(sent, received))]


def test_send_without_receive_and_the_other_way_round() -> None:
    send = Row("out", "pp", Send("rtp", (1,), SIZE, "mb0"), "y")
    receive = Row("in", "pp", Recv("rtp", (-1,), SIZE, "mb1"), "", "y")
    first, second = transfer([send], [receive])
    assert "%0 'out': rank 0 sends to rank 1 with tag 'mb0'" in first
    assert "tags it receives with: mb1" in first
    assert "--> %0 pp out send" in first
    assert "%0 'in': rank 1 receives from rank 0 with tag 'mb1'" in second
    assert transfer([send], [replace(receive, action=Recv("rtp", (-1,), SIZE, "mb0"))]) == []


def test_sizes_of_a_transfer_must_agree() -> None:
    send = Row("out", "pp", Send("rtp", (1,), SIZE, "mb0"), "y")
    receive = Row("in", "pp", Recv("rtp", (-1,), SIZE // 2, "mb0"), "", "y")
    (message,) = transfer([send], [receive])
    assert (
        "rank 0 sends 512 bytes with tag 'mb0', but rank 1 expects 256 in %0 'in' of program 'second'"
        in message
    )


def test_a_tag_used_twice_needs_two_receives() -> None:
    def send(name: str) -> Row:
        return Row(name, "pp", Send("rtp", (1,), SIZE, "mb"), "y")

    receive = Row("in", "pp", Recv("rtp", (-1,), SIZE, "mb"), "", "y")
    (message,) = transfer([send("one"), send("two")], [receive])
    assert "%1 'two'" in message


def test_crossed_receives_deadlock() -> None:
    """Both ranks receive before they send."""

    def rows(offset: int, there: str, back: str) -> list[Row]:
        return [
            Row(f"in.{there}", "pp", Recv("rtp", (offset,), SIZE, there), "", "a"),
            Row(f"out.{back}", "pp", Send("rtp", (offset,), SIZE, back), "b"),
        ]

    s = pair(rows(1, "down", "up"), rows(-1, "up", "down"))
    with pytest.raises(DeadlockError) as error:
        check(s)
    text = str(error.value)
    assert text.startswith("deadlock: no op can go on; 2 of 2 ranks are blocked\n")
    assert (
        "rank 0 is stuck in %0 'in.down' of program 'first' on stream 'pp', "
        "waiting for rank 1 to reach %1 'out.down'"
    ) in text
    assert "rank 1 is stuck in %0 'in.up' of program 'second'" in text
    assert "--> %0 pp in.down recv" in text
    apart = [
        [replace(r, stream=r.name[:2]) for r in rows(*a)] for a in ((1, "down", "up"), (-1, "up", "down"))
    ]
    check(pair(*apart))


def test_streams_and_host_decide() -> None:
    """Two groups of the same ranks, used in opposite order: fatal on one stream or with a blocked host."""

    def both(order: str, streams: str, blocks_host: bool) -> list[Row]:
        return [
            Row(g, stream, allreduce(g), f"x{g}", f"x{g}", "", blocks_host)
            for g, stream in zip(order, streams, strict=True)
        ]

    groups = [ring(2, "a"), ring(2, "b")]
    for streams, blocks_host, stuck in (("ss", False, True), ("st", False, False), ("st", True, True)):
        first = program("first", both("ab", streams, blocks_host))
        second = program("second", both("ba", streams, blocks_host))
        found = findings(schedule(groups, first, second, of_rank=(0, 1)))
        assert [f.rule for f in found] == ["deadlock"] * stuck


def test_symmetric_ranks_are_counted_but_tried_once() -> None:
    """Eight ranks in pairs; the pair partners are crossed, so two kinds of ranks, four of each."""
    group = Group("p", (2,), ((0, 1), (2, 3), (4, 5), (6, 7)))

    def crossed(offset: int, there: str, back: str) -> list[Row]:
        return [
            Row("in", "s", Recv("p", (offset,), 8, there), "", "a"),
            Row("out", "s", Send("p", (offset,), 8, back), "a"),
        ]

    first, second = program("even", crossed(1, "t", "u")), program("odd", crossed(-1, "u", "t"))
    (found,) = findings(schedule([group], first, second, of_rank=(0, 1) * 4))
    assert "8 of 8 ranks are blocked" in found.message
    assert "rank 0 (and 3 alike) is stuck in %0 'in'" in found.message


def brute_force_finishes(s: Schedule) -> bool:
    """Every rank on its own, event by event, until nothing changes: a second, slow implementation."""
    done: set[tuple[int, int]] = set()
    before = [direct_predecessors(p) for p in s.programs]

    def ready(rank: int, op: int) -> bool:
        return all((rank, b) in done for b in before[s.program_of_rank[rank]][op])

    def rounds(rank: int, group: str) -> list[int]:
        ops = s.program(rank).ops
        return [o.index for o in ops if isinstance(o.action, Shift | Collective) and o.action.group == group]

    def partners(rank: int, op: int) -> list[tuple[int, int]]:
        action = s.program(rank).ops[op].action
        if isinstance(action, Compute):
            return []
        group = s.groups[action.group]
        if isinstance(action, Send | Recv):
            peer = group.neighbour(rank, action.offset)
            assert peer is not None
            ops = [(o.index, o.action) for o in s.program(peer).ops if type(o.action) in (Send, Recv)]
            return [(peer, i) for i, a in ops if type(a) is not type(action) and a.tag == action.tag]
        if isinstance(action, Collective):
            peers = list(group.instances[group.place[rank][0]])
        else:
            peers = [group.peer(rank, h.offset, sign) for h in action.hops for sign in (1, -1)]
        k = rounds(rank, group.name).index(op)
        return [(p, rounds(p, group.name)[k]) for p in peers]

    events = [(r, o.index) for r in range(s.world_size) for o in s.program(r).ops]
    while True:
        able = [e for e in events if e not in done and ready(*e)]
        new = {e for e in able if all(ready(*p) or p in done for p in partners(*e))}
        if not new:
            return len(done) == len(events)
        done |= new


@st.composite
def matching_schedules(draw: st.DrawFn) -> Schedule:
    """A chain of pipeline stages, twice, with rings over its copies: all matches, in random order."""
    stages = draw(st.integers(1, 3))
    pipe = Group("pp", (stages,), tuple(tuple(range(c, 2 * stages, 2)) for c in range(2)))
    copies = Group("dp", (2,), tuple((2 * s, 2 * s + 1) for s in range(stages)))
    everyone = Group("all", (2 * stages,), (tuple(range(2 * stages)),))
    order = draw(st.permutations([Collective("all_reduce", "all", 8, "fp16"), shift(1, 8, "all")]))
    programs = []
    for s in range(stages):
        actions: list[tuple[str, object]] = [(f"a{i}", a) for i, a in enumerate(order)]
        loose: list[tuple[str, object]] = [("dp", shift(1, 8, "dp"))]
        for end, peer in ((s - 1, -1), (s + 1, 1)):
            if 0 <= end < stages:
                low = min(s, end)
                up, down = (Recv, Send) if peer < 0 else (Send, Recv)
                loose += [
                    (f"f{low}", up("pp", (peer,), 8, f"f{low}")),
                    (f"b{low}", down("pp", (peer,), 8, f"b{low}")),
                ]
        for item in draw(st.permutations(loose)):
            actions.insert(draw(st.integers(0, len(actions))), item)
        rows = []
        for name, action in actions:
            reads, writes = {Send: ("x", ""), Recv: ("", "x")}.get(type(action), ("x", "y"))
            stream, blocks = draw(st.sampled_from("stuv")), draw(st.integers(0, 4)) == 0
            rows.append(Row(name, stream, action, reads, writes, "", blocks))  # type: ignore[arg-type]
        programs.append(program(f"stage{s}", rows))
    return schedule([pipe, copies, everyone], *programs, of_rank=tuple(r // 2 for r in range(2 * stages)))


@given(matching_schedules())
@settings(max_examples=200, deadline=None)
def test_deadlock_agrees_with_brute_force(s: Schedule) -> None:
    assert list(matching_findings(s)) == []
    assert (list(deadlock_findings(s)) == []) == brute_force_finishes(s)


def buffer(name: str, **flags: bool) -> dict[str, Buffer]:
    return {name: Buffer(name, "activations", "fp16", 256, **flags)}


def test_read_of_nothing() -> None:
    rows = [Row("use", "s", kernel(), "x", "y"), Row("make", "s", kernel(), "y", "x")]
    (found,) = findings(schedule([ring(1)], program("all", rows, buffer("x", live_out=True))))
    assert (found.rule, found.level, found.op) == ("lifetime", "error", 0)
    assert "%0 'use': it reads 'x', which holds nothing yet" in found.message
    assert "--> %0 s use" in found.message


def test_result_that_nobody_uses_is_a_warning() -> None:
    rows = [Row("first", "s", kernel(), "x", "y"), Row("second", "s", kernel(), "x", "y")]
    s = schedule([ring(1)], program("all", rows, buffer("y")))
    found = findings(s)
    assert [(f.level, f.op) for f in found] == [("warning", 0), ("warning", 1)]
    assert "%1 overwrites it" in found[0].message
    assert "the step does not keep it" in found[1].message
    check(s)


def test_superfluous_last_hop_is_a_warning() -> None:
    """A forward rotation needs N-1 hops; the N-th one brings a shard home that nothing reads."""
    s = rotation(4)
    w_a = replace(s.programs[0].buffers["w.a"], live_out=False)
    one = replace(s.programs[0], buffers=dict(s.programs[0].buffers) | {"w.a": w_a})
    assert findings(replace(s, programs=(one,))) == []
    extra = replace(one.ops[0], index=7, name="hop3", reads=("w.b",), writes=("w.a",), after=(5,))
    (found,) = findings(replace(s, programs=(replace(one, ops=(*one.ops, extra)),)))
    assert (found.level, found.op) == ("warning", 7)


def test_live_out_must_be_written_or_live_in() -> None:
    rows = [Row("f", "s", kernel(), "x", "y")]
    (found,) = findings(schedule([ring(1)], program("all", rows, buffer("g", live_out=True))))
    assert found.message == (
        "lifetime: program 'all': buffer 'g' is live-out, but no op writes it and it is not live-in"
    )
    check(schedule([ring(1)], program("all", rows, buffer("g", live_in=True, live_out=True))))


def test_workspace_and_bounce_buffers_need_no_reader() -> None:
    scratch = {
        "s": Buffer("s", "workspace", "fp16", 256),
        "bounce": Buffer("bounce", "communication", "fp16", 256),
    }
    rows = [
        Row("f", "s", kernel(), "x", "y s"),
        Row("hop", "s", Shift("rtp", (Hop((1,), SIZE),), 64), "y", "y bounce"),
    ]
    assert findings(schedule([ring(2)], program("all", rows, scratch))) == []


def test_excerpt_shows_two_ops_either_side() -> None:
    (finding,) = findings(with_op(rotation(), "f1", index=9))
    assert [line[:9] for line in finding.message.split("\n")[1:]] == [
        "      ...", "      %1 ", "      %2 ", "  --> %9 ", "      %4 ", "      %5 ", "      ...",
    ]  # fmt: skip


def test_a_thousand_ranks_pass() -> None:
    """1,024 ranks in rings of eight and data-parallel groups across, 2,000 ops each."""
    rings = Group("rtp", (8,), tuple(tuple(range(i, i + 8)) for i in range(0, 1024, 8)))
    across = Group("dp", (128,), tuple(tuple(range(i, 1024, 8)) for i in range(8)))
    one = rotation(1000).programs[0]
    rows = Row("sync", "nccl", allreduce("dp"), "y0", "y0", "f0")
    last = program("", [Row("f0", "compute", kernel()), rows]).ops[1]
    ops = (*one.ops, replace(last, index=len(one.ops), after=(len(one.ops) - 1,)))
    s = Schedule("big", 1024, {"rtp": rings, "dp": across}, (replace(one, ops=ops),), (0,) * 1024)
    check(s)


def test_a_removed_receive_is_found() -> None:
    s = pair(
        [Row("out", "pp", Send("rtp", (1,), SIZE, "t"), "y")],
        [Row("in", "pp", Recv("rtp", (-1,), SIZE, "t"), "", "y")],
    )
    check(s)
    gone = without_op(s.programs[1], "in")
    assert [f.rule for f in findings(replace(s, programs=(s.programs[0], gone)))] == ["matching", "lifetime"]


def test_two_dimensional_neighbours_match() -> None:
    rows = [Row("pair", "ring", Shift("grid", (Hop((0, 1), SIZE), Hop((1, 0), SIZE))), "i w", "i2 w2")]
    check(schedule([grid(2, 3)], program("all", rows)))
