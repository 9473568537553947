"""The discrete-event engine on programs whose times can be worked out by hand."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import (
    GB_PER_S,
    Builder,
    ToyCost,
    all_reduce,
    compute,
    grid,
    one_ring,
    recv,
    ring,
    rtp_program,
    send,
    switch_path,
)

import rtp_sim
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate
from rtp_sim.errors import DeadlockError, ScheduleError
from rtp_sim.schedule.ir import Compute, Group, Hop, Part, Program, Schedule, Shift
from rtp_sim.timeline import Timeline

Engine = Callable[[Schedule, ToyCost], Timeline]
ENGINES = [simulate, longest_path]


def spans(timeline: Timeline, rank: int = 0) -> list[tuple[int, int]]:
    return [(s.start_ns, s.end_ns) for s in timeline.spans(rank)]


def one_rank(b: Builder) -> Schedule:
    return one_ring(1, b.program())


@pytest.mark.parametrize("engine", ENGINES)
def test_streams_run_side_by_side_and_in_order(engine: Engine) -> None:
    b = Builder()
    first = b.kernel(100)
    b.kernel(30, stream="other")
    b.kernel(50, (first,), stream="other")
    b.kernel(10)
    assert spans(engine(one_rank(b), ToyCost(1))) == [(0, 100), (0, 30), (100, 150), (100, 110)]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_host_bounds_small_kernels(engine: Engine) -> None:
    """7 ns to issue, 3 ns to run: kernel k starts at 7 (k + 1)."""
    b = Builder()
    for _ in range(4):
        b.kernel(3)
    assert spans(engine(one_rank(b), ToyCost(1, issue_ns=7))) == [(7, 10), (14, 17), (21, 24), (28, 31)]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_op_that_blocks_the_host_delays_what_is_issued_after_it(engine: Engine) -> None:
    """Issue 5 each. Op 0 runs 5-105 and blocks; op 1, on another stream, is issued at 110; op 2 at 115."""
    b = Builder()
    b.kernel(100, blocks=True)
    b.kernel(1, stream="other")
    b.kernel(1)
    assert spans(engine(one_rank(b), ToyCost(1, issue_ns=5))) == [(5, 105), (110, 111), (115, 116)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_ring_shift_takes_latency_plus_bytes_over_bandwidth(engine: Engine) -> None:
    b = Builder()
    b.kernel(40)
    b.add(ring(1000), "shift", (0,))
    timeline = engine(one_ring(4, b.program()), ToyCost(4, latency_ns=25))
    assert spans(timeline, 3) == [(0, 40), (40, 40 + 25 + 1000)]


def test_a_ring_through_a_switch_is_not_paid_twice() -> None:
    """All 8 messages use 8 different ports out and 8 different ports in: the time of one."""
    b = Builder()
    b.add(ring(10**6), "shift")
    timeline = simulate(one_ring(8, b.program()), ToyCost(8, path=switch_path(8)), fold=False)
    assert timeline.step_time_ns == 10**6


def test_two_shifts_on_one_port_share_it() -> None:
    """600 bytes and 1,000 bytes from 0: both at half; at 1,200 the small one is done, the other has 400
    left."""
    b = Builder()
    b.add(ring(600), "weights")
    b.add(ring(1000), "gradients")
    timeline = simulate(one_ring(4, b.program()), ToyCost(4, path=switch_path(4)))
    assert spans(timeline) == [(0, 1200), (0, 1600)]


@pytest.mark.parametrize("engine", ENGINES)
def test_hops_of_one_shift_fly_together_and_it_ends_with_the_last(engine: Engine) -> None:
    shift = Shift("ring", (Hop((1,), 700), Hop((-1,), 200)))
    b = Builder()
    b.add(shift, "shift")
    assert spans(engine(one_ring(4, b.program()), ToyCost(4))) == [(0, 700)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pairwise_flow_starts_when_its_own_two_ranks_are_there(engine: Engine) -> None:
    """Ring of 3, rank 0 comes at 100, the others at 0. Flow 1 -> 2 runs 0-50; 0 -> 1 and 2 -> 0 run
    100-150."""
    late, early = Builder("late"), Builder("early")
    late.kernel(100)
    early.kernel(0)
    for b in (late, early):
        b.add(ring(50), "compute")
    timeline = engine(one_ring(3, late.program(), early.program(), of_rank=(0, 1, 1)), ToyCost(3))
    assert [spans(timeline, r)[1] for r in range(3)] == [(100, 150), (0, 150), (0, 150)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_collective_waits_for_the_last_member_and_all_end_together(engine: Engine) -> None:
    """Toy all-reduce of 4: 2 phases of 3 latencies and 3/4 of 800 bytes: 2 (30 + 600)."""
    slow, fast = Builder("slow"), Builder("fast")
    slow.kernel(500)
    fast.kernel(20)
    for b in (slow, fast):
        b.add(all_reduce(800), "collective", (0,))
    timeline = engine(
        one_ring(4, slow.program(), fast.program(), of_rank=(1, 0, 1, 1)), ToyCost(4, latency_ns=10)
    )
    assert {spans(timeline, r)[1] for r in range(4)} == {(500, 500 + 1260)}


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_an_all_reduce_does_not_beat_the_port_bound(ranks: int) -> None:
    """2 (n - 1) / n x 64 MiB over a port of 50 GB/s, Patarasu & Yuan's bound; the ring reaches it."""
    size, capacity = 64 * 2**20, 50 * GB_PER_S
    b = Builder()
    b.add(all_reduce(size), "collective")
    cost = ToyCost(ranks, path=switch_path(ranks), default_capacity=capacity)
    bound_ns = 2 * (ranks - 1) * size * 10**9 / (ranks * capacity)
    assert bound_ns <= simulate(one_ring(ranks, b.program()), cost).step_time_ns <= bound_ns + 4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_send_meets_its_receive_by_tag(engine: Engine) -> None:
    """Rank 0 sends "a" then "b" on two streams, rank 1 receives them when it likes: "b" at 30, "a" at 100."""
    source, sink = Builder("source"), Builder("sink")
    source.add(send(10, "a"), "s1")
    source.add(send(20, "b"), "s2")
    sink.kernel(30)
    sink.kernel(70)
    sink.add(recv(20, "b"), "r2", (0,))
    sink.add(recv(10, "a"), "r1", (1,))
    timeline = engine(one_ring(2, source.program(), sink.program(), of_rank=(0, 1)), ToyCost(2))
    assert spans(timeline, 0) == [(100, 110), (30, 50)]
    assert spans(timeline, 1)[2:] == [(30, 50), (100, 110)]


@pytest.mark.parametrize("engine", ENGINES)
def test_sends_with_the_same_tag_meet_in_order(engine: Engine) -> None:
    source, sink = Builder("source"), Builder("sink")
    for size in (10, 20):
        source.add(send(size, "x"), "s")
        sink.add(recv(size, "x"), "r")
    timeline = engine(one_ring(2, source.program(), sink.program(), of_rank=(0, 1)), ToyCost(2))
    assert spans(timeline, 0) == spans(timeline, 1) == [(0, 10), (10, 30)]


@pytest.mark.parametrize("engine", ENGINES)
def test_communication_alone_takes_no_time(engine: Engine) -> None:
    b = Builder()
    b.kernel(10)
    b.add(ring(1000), "shift", (0,))
    b.add(all_reduce(1000), "collective", (1,))
    assert spans(engine(one_rank(b), ToyCost(1, latency_ns=99)))[1:] == [(10, 10), (10, 10)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hop_along_a_dimension_of_one_goes_nowhere(engine: Engine) -> None:
    """Group of shape 1 x 4: the hop along the first dimension stays home, the other is a message."""
    group = Group("ring", (1, 4), ((0, 1, 2, 3),))
    b = Builder()
    b.add(Shift("ring", (Hop((1, 0), 5000),)), "shift")
    b.add(Shift("ring", (Hop((1, 0), 5000), Hop((0, 1), 70))), "shift")
    schedule = Schedule("toy", 4, {"ring": group}, (b.program(),), (0,) * 4)
    assert spans(engine(schedule, ToyCost(4))) == [(0, 0), (0, 70)]


@pytest.mark.parametrize("engine", ENGINES)
def test_uneven_shards_have_their_own_sizes(engine: Engine) -> None:
    """Rank r holds shard r: kernels of 10, 20, 30 ns, messages of 100, 200, 300 bytes. A flow starts when the
    later of its two ranks is there: 0 -> 1 runs 20-120, 1 -> 2 runs 30-230, 2 -> 0 runs 30-330. A rank's
    shift lasts from its first flow's start to its last flow's end."""
    own = Part("ring", (0,))
    variants = tuple((("ns", 10 * (s + 1)),) for s in range(3))
    b = Builder()
    b.add(Compute("linear", "fp32", variants[0], own, variants), "compute")
    b.add(Shift("ring", (Hop((1,), (100, 200, 300), own),)), "shift", (0,))
    timeline = engine(one_ring(3, b.program()), ToyCost(3))
    assert [spans(timeline, r)[0] for r in range(3)] == [(0, 10), (0, 20), (0, 30)]
    assert [spans(timeline, r)[1] for r in range(3)] == [(20, 330), (20, 230), (30, 330)]


def test_compute_is_slowed_beside_a_communication() -> None:
    """12.6 % longer while in flight. Shift 0-1,126. Kernel of 2,000 ns: by 1,126 it has done 1,126 / 1.126 =
    1,000, so it ends 1,000 later, at 2,126."""
    b = Builder()
    b.add(ring(1126), "shift")
    b.kernel(2000)
    b.kernel(500)
    timeline = simulate(one_ring(2, b.program()), ToyCost(2, slowdown_permille=1126))
    assert spans(timeline) == [(0, 1126), (0, 2126), (2126, 2626)]


def test_a_communication_that_starts_later_slows_only_from_then() -> None:
    """Slowdown 2. Kernel of 1,000 from 0; shift of 300 issued at 400 (host): 400 done, 150 in 400-700, 450
    left."""
    b = Builder()
    b.kernel(1000)
    b.add(ring(300), "shift")
    cost = ToyCost(2, slowdown_permille=2000, issue_by_name={"op1": 400})
    assert spans(simulate(one_ring(2, b.program()), cost)) == [(0, 1150), (400, 700)]


def test_a_kernel_issued_after_a_communication_is_not_slowed() -> None:
    """Slowdown 2, shift 0-300, kernel of 100 issued at 400: it must not feel what ended before it began."""
    b = Builder()
    b.add(ring(300), "shift")
    b.kernel(100)
    cost = ToyCost(2, slowdown_permille=2000, issue_by_name={"op1": 400})
    assert spans(simulate(one_ring(2, b.program()), cost)) == [(0, 300), (400, 500)]


def test_two_communications_at_once_slow_no_more_than_one() -> None:
    """Slowdown 2, collectives 0-400 and shift 0-600: 300 done by 600, 700 left."""
    b = Builder()
    b.add(all_reduce(400), "collective")
    b.add(ring(600), "shift")
    b.kernel(1000)
    timeline = simulate(one_ring(2, b.program()), ToyCost(2, slowdown_permille=2000, path=lambda s, d: {}))
    assert timeline.step_time_ns == 1000  # no links: nothing is ever in flight
    dedicated = ToyCost(2, slowdown_permille=2000, cap_bytes_per_s=GB_PER_S, path=lambda s, d: {})
    assert spans(simulate(one_ring(2, b.program()), dedicated)) == [(0, 400), (0, 600), (0, 1300)]


def test_four_ranks_on_two_cores_take_twice_as_long() -> None:
    b = Builder()
    b.kernel(1000)
    cores = ToyCost(4, capacities={99: 2 * 10**12}, pools=dict.fromkeys(range(4), 99))
    for fold in (True, False):
        assert simulate(one_ring(4, b.program()), cores, fold=fold).step_time_ns == 2000


def test_two_ranks_on_two_cores_do_not_notice() -> None:
    b = Builder()
    b.kernel(1000)
    cores = ToyCost(2, capacities={99: 2 * 10**12}, pools=dict.fromkeys(range(2), 99))
    assert simulate(one_ring(2, b.program()), cores).step_time_ns == 1000


def test_transfers_take_what_they_need_of_the_cores_first() -> None:
    """One core for two ranks; a byte costs 1 core-ns. Kernels of 100 ns on both and a shift of 100 bytes each way. At
    equal amounts a second a kernel gets one ps while a byte, 1,000 ps, passes: both ways 2.002 ns a byte, so the shifts
    end after 200.2 ns, rounded up. The kernels have got 100 ps each by then; 99.9 ns at half speed end at 400.8."""
    b = Builder()
    b.kernel(100)
    b.add(ring(100), "shift")
    cost = ToyCost(
        2,
        capacities={99: 10**12},
        pools=dict.fromkeys(range(2), 99),
        path=lambda src, dst: {99: 1000},
    )
    assert spans(simulate(one_ring(2, b.program()), cost)) == [(0, 401), (0, 201)]


@pytest.mark.parametrize("engine", ENGINES)
def test_sends_and_receives_in_the_wrong_order_are_a_deadlock(engine: Engine) -> None:
    left, right = Builder("left"), Builder("right")
    left.add(send(10, "a"), "s", name="send a")
    left.add(recv(10, "b", 1), "s", name="recv b")
    right.add(send(10, "b", -1), "s", name="send b")
    right.add(recv(10, "a", -1), "s", name="recv a")
    schedule = one_ring(2, left.program(), right.program(), of_rank=(0, 1))
    with pytest.raises(DeadlockError) as caught:
        engine(schedule, ToyCost(2))
    message = str(caught.value)
    assert "rank 0: 'send a' on stream 's' waits for rank 1 to receive tag 'a'" in message
    assert "rank 1: 'send b' on stream 's' waits for rank 0 to receive tag 'b'" in message


@pytest.mark.parametrize("engine", ENGINES)
def test_collectives_in_another_order_are_a_deadlock(engine: Engine) -> None:
    one, two = Builder("one"), Builder("two")
    one.add(all_reduce(10), "c", name="first")
    one.add(all_reduce(20), "c", name="second")
    two.add(all_reduce(20), "c", name="second")
    two.add(all_reduce(10), "c", name="first")
    with pytest.raises(DeadlockError) as caught:
        engine(one_ring(2, one.program(), two.program(), of_rank=(0, 1)), ToyCost(2))
    assert "rank 0: 'first' on stream 'c' waits for rank(s) 1 to join all_reduce of 10 bytes" in str(
        caught.value
    )
    assert "rank 1: 'second' on stream 'c' waits for rank(s) 0 to join all_reduce of 20 bytes" in str(
        caught.value
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_deadlock_names_a_missing_shift_and_a_cycle_of_streams(engine: Engine) -> None:
    more, less = Builder("more"), Builder("less")
    more.add(ring(1), "s", name="hop")
    less.kernel(1, (1,), name="waits for the future")
    less.kernel(1, (0,), stream="other", name="future")
    with pytest.raises(DeadlockError) as caught:
        engine(one_ring(2, more.program(), less.program(), of_rank=(0, 1)), ToyCost(2))
    assert "rank 0: 'hop' on stream 's' waits for rank(s) 1 to join shift 0 on group 'ring'" in str(
        caught.value
    )
    assert "rank 1: 'waits for the future' on stream 'compute' waits for 'future' of the same rank" in str(
        caught.value
    )


def test_a_deadlock_lists_eight_ranks_at_most() -> None:
    waits, goes = Builder("waits"), Builder("goes")
    waits.add(all_reduce(10), "c")
    goes.kernel(1)
    of_rank = (1,) + (0,) * 11
    with pytest.raises(DeadlockError) as caught:
        simulate(one_ring(12, waits.program(), goes.program(), of_rank=of_rank), ToyCost(12), fold=False)
    assert str(caught.value).count("waits for rank(s) 0 to join") == 8
    assert str(caught.value).endswith("and 3 more")


@pytest.mark.parametrize("engine", ENGINES)
def test_mistakes_in_a_schedule_are_told(engine: Engine) -> None:
    off_the_end, stranger, lost = Builder("p"), Builder("p"), Builder("p")
    off_the_end.add(send(1, "t"), "s")
    with pytest.raises(ScheduleError, match=r"rank 1 .* past the end"):
        engine(one_ring(2, off_the_end.program()), ToyCost(2))
    stranger.add(all_reduce(1, "inner"), "s")
    with pytest.raises(ScheduleError, match=r"rank 0 .* 'inner', but is in none"):
        engine(one_ring(2, stranger.program()), ToyCost(2))
    lost.kernel(1, (7,))
    with pytest.raises(ScheduleError, match="comes after op 7; there are 1 ops"):
        engine(one_ring(1, lost.program()), ToyCost(1))


@pytest.mark.parametrize(
    "wrong",
    [{"latency_ns": -1}, {"cap_bytes_per_s": 0}, {"default_capacity": 0}, {"path": lambda s, d: {0: 0}}],
)
def test_costs_with_which_time_would_stand_still_are_refused(wrong: dict[str, Any]) -> None:
    b = Builder()
    b.add(ring(1), "s")
    with pytest.raises(ValueError, match=r"negative|at least 1|below 1"):
        simulate(one_ring(2, b.program()), ToyCost(2, **wrong))


def test_an_empty_program_takes_no_time() -> None:
    schedule = one_ring(2, Program("empty", {}, ()))
    assert simulate(schedule, ToyCost(2)).step_time_ns == longest_path(schedule, ToyCost(2)).step_time_ns == 0


def test_two_runs_give_the_same_bytes() -> None:
    schedule = grid(4, 2, rtp_program(2, 4, 100, 90, "inner"))
    cost = ToyCost(8, path=switch_path(8), latency_ns=3, slowdown_permille=1126)
    runs = [simulate(schedule, cost) for _ in range(2)]
    assert all(
        a.start_ns.tobytes() == b.start_ns.tobytes() and a.end_ns.tobytes() == b.end_ns.tobytes()
        for a, b in zip(*(t.ranks.values() for t in runs), strict=True)
    )


def test_rtp_hides_the_smaller_of_kernel_and_hop() -> None:
    """One forward sweep over 4 ranks with kernels of 100 and hops of 60: hop k runs beside kernel k: 400 in
    all; hops of 160 bound it instead: 3 x 160 + 100."""

    def step_ns(size: int) -> int:
        b = Builder()
        held: tuple[int, ...] = ()
        for step in range(4):
            hop = b.add(ring(size), "shift", held) if step < 3 else -1
            kernel = b.kernel(100, held)
            held = (hop, kernel)
        return simulate(one_ring(4, b.program()), ToyCost(4)).step_time_ns

    assert (step_ns(60), step_ns(160)) == (400, 580)


def test_only_the_engine_imports_simpy() -> None:
    package = Path(rtp_sim.__file__).parent
    users = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "simpy" for name in names):
                users.add(path.relative_to(package).as_posix())
    assert users == {"engine/simulate.py"}


def test_compute_helper_is_its_own_price() -> None:
    """The toy cost model's promise, on which the numbers above rest."""
    assert ToyCost(1).compute("linear", "fp32", compute(42).dims).duration_ns == 42
