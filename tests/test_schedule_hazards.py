"""Happens-before and the races it leaves, against a brute-force reachability search."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_helpers import Row, kernel, program, ring, rotation, schedule, without_dependency

from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.checks import check, findings
from rtp_sim.schedule.hazards import happens_before, unordered_pairs
from rtp_sim.schedule.ir import Op, Program


def test_double_buffered_rotation_passes() -> None:
    check(rotation(4))
    assert findings(rotation(4)) == []


def test_deleted_write_after_read_dependency_is_found_exactly() -> None:
    """hop1 sends w.b and overwrites w.a, which f0 reads; only `hop1 after f0` keeps these apart."""
    broken = without_dependency(rotation(4), "hop1", "f0")
    found = findings(broken)
    assert [(f.rule, f.level, f.op) for f in found] == [("hazard", "error", 2)]
    message = found[0].message
    assert "write-after-read hazard on 'w.a'" in message
    assert "missing dependency: %2 after %1" in message
    assert "  --> %1 compute f0 " in message
    assert "  --> %2 ring hop1 " in message
    with pytest.raises(ScheduleError, match="hop1"):
        check(broken)


def test_deleted_read_after_write_dependency_is_found() -> None:
    """f1 reads w.b, which hop0 receives. hop1 (after f0) still orders hop0 before the later ops."""
    found = findings(without_dependency(rotation(4), "f1", "hop0"))
    assert [f.op for f in found] == [3]
    assert "read-after-write hazard on 'w.b'" in found[0].message
    assert "missing dependency: %3 after %0" in found[0].message


def test_unordered_writes_are_found() -> None:
    rows = [Row("one", "s", kernel(), "", "y", ""), Row("two", "t", kernel(), "", "y", "")]
    races = unordered_pairs(program("all", rows))
    assert races == {(0, 1): [("write-after-write", "y")]}


def test_host_blocking_orders_everything_behind_it() -> None:
    rows = [
        Row("one", "s", kernel(), "", "y", "", blocks_host=True),
        Row("two", "t", kernel(), "y", "z", ""),
        Row("three", "u", kernel(), "z", "a", ""),
    ]
    assert list(unordered_pairs(program("all", rows))) == [(1, 2)]


def test_a_pair_is_reported_once_with_all_its_buffers() -> None:
    rows = [Row("one", "s", kernel(), "", "y z", ""), Row("two", "t", kernel(), "y z", "q", "")]
    found = findings(schedule([ring(1)], program("all", rows)))
    assert [f.rule for f in found if f.level == "error"] == ["hazard"]
    assert "'y', 'z'" in found[0].message


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random ops on three streams and three buffers, with random dependencies."""
    ops = []
    names = st.lists(st.sampled_from("abc"), max_size=2, unique=True)
    for i in range(draw(st.integers(1, 9))):
        after = tuple(draw(st.lists(st.integers(0, i - 1), max_size=2, unique=True))) if i else ()
        stream, blocks = draw(st.sampled_from("xyz")), draw(st.integers(0, 5)) == 0
        reads, writes = tuple(draw(names)), tuple(draw(names))
        ops.append(Op(i, f"op{i}", stream, kernel(), reads, writes, after, blocks))
    buffers = program("", [Row("o", "s", kernel(), "a b c", "")]).buffers
    return Program("random", buffers, tuple(ops))


def reachable(p: Program) -> list[set[int]]:
    """Per op, all ops that end before it starts: by walking every rule over every pair."""
    before: list[set[int]] = []
    for i, op in enumerate(p.ops):
        direct = {j for j in range(i) if p.ops[j].stream == op.stream or p.ops[j].blocks_host} | set(op.after)
        before.append(direct.union(*(before[j] for j in direct)))
    return before


@given(programs())
@settings(max_examples=300, deadline=None)
def test_clocks_agree_with_reachability(p: Program) -> None:
    order, before = happens_before(p), reachable(p)
    for later in range(len(p.ops)):
        for earlier in range(later):
            assert order.orders(earlier, later) == (earlier in before[later])


@given(programs())
@settings(max_examples=300, deadline=None)
def test_races_agree_with_all_pairs(p: Program) -> None:
    """Every reported pair is a race, and where any pair of ops races, one is reported."""
    before = reachable(p)
    races = set()
    for later, b in enumerate(p.ops):
        for earlier, a in enumerate(p.ops[:later]):
            shared = set(a.writes) & {*b.reads, *b.writes} or set(a.reads) & set(b.writes)
            if shared and earlier not in before[later]:
                races.add((earlier, later))
    found = set(unordered_pairs(p))
    assert found <= races
    assert bool(found) == bool(races)


def test_ten_thousand_ops_of_a_rotation_are_ordered() -> None:
    big = rotation(5000)
    assert unordered_pairs(big.programs[0]) == {}
