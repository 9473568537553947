"""Two ways to the same times: longest path against events where nothing contends, folded against unfolded
anywhere.

Random programs share a skeleton: op number k of the skeleton is the same communication on every rank, and
depends on earlier ones only, so that no schedule here can deadlock. What differs from rank to rank are kernel
times, shard sizes, stages of a pipeline and the links.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from engine_helpers import (
    GB_PER_S,
    Builder,
    ToyCost,
    all_reduce,
    grid,
    node_path,
    recv,
    ring,
    rtp_program,
    send,
    switch_path,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_sim.engine.costs import Phase
from rtp_sim.engine.fold import fold
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate
from rtp_sim.schedule.ir import Collective, Compute, Hop, Op, Part, Program, Schedule, Shift
from rtp_sim.timeline import Timeline


@dataclass(frozen=True)
class Step:
    """One line of a skeleton. `after` are earlier lines."""

    kind: str
    group: str
    stream: str
    offset: int
    sizes: tuple[int, ...]
    after: tuple[int, ...]
    blocks: bool


@st.composite
def steps(draw: st.DrawFn, inner: int, kinds: tuple[str, ...], streams: int) -> list[Step]:
    found: list[Step] = []
    for k in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(kinds))
        even = draw(st.booleans())
        size = st.integers(0, 3000)
        sizes = (draw(size),) if even else tuple(draw(st.lists(size, min_size=inner, max_size=inner)))
        number = draw(st.integers(0, streams - 1))
        stream = f"compute{draw(st.integers(0, 1))}" if kind == "kernel" else f"communication{number}"
        after = draw(st.lists(st.integers(0, k - 1), max_size=2)) if k else []
        group = draw(st.sampled_from(["inner", "outer"]))
        found.append(
            Step(kind, group, stream, draw(st.integers(-2, 2)), sizes, tuple(after), draw(st.booleans()))
        )
    return found


def program(skeleton: list[Step], stage: int, stages: int, stretch: int) -> Program:
    """The skeleton as stage `stage` of a pipeline runs it, kernels `stretch` times as long."""
    b = Builder(f"stage{stage}x{stretch}")
    made: list[tuple[int, ...]] = []
    own = Part("inner", (0,))
    for k, s in enumerate(skeleton):
        after = tuple(i for line in s.after for i in made[line])
        whole = s.sizes[0]
        if s.kind == "kernel":
            variants = tuple((("ns", stretch * n),) for n in s.sizes)
            uneven = len(variants) > 1
            action = Compute("k", "fp32", variants[0], own if uneven else None, variants if uneven else None)
            made.append((b.add(action, s.stream, after, s.blocks),))
        elif s.kind == "shift":
            uneven = len(s.sizes) > 1
            hop = Hop((s.offset,), s.sizes if uneven else whole, own if uneven else None)
            made.append((b.add(Shift(s.group, (hop,)), s.stream, after, s.blocks),))
        elif s.kind == "collective":
            made.append((b.add(all_reduce(whole, s.group), s.stream, after, s.blocks),))
        else:
            halves = []
            if stage < stages - 1:
                halves.append(b.add(send(whole, f"t{k}", 1, "outer"), "send", after))
            if stage > 0:
                halves.append(b.add(recv(whole, f"t{k}", -1, "outer"), "receive", after))
            made.append(tuple(halves))
    return b.program()


@st.composite
def schedules(
    draw: st.DrawFn, kinds: tuple[str, ...], streams: int, even_ranks: bool
) -> tuple[Schedule, int, int]:
    inner, outer = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    skeleton = draw(steps(inner, kinds, streams))
    world = inner * outer
    piped = any(s.kind == "pipe" for s in skeleton)
    limit = 0 if even_ranks else 2
    stretches = draw(st.lists(st.integers(0, limit), min_size=world, max_size=world))
    keys = [((r // inner) if piped else 0, 1 + stretches[r]) for r in range(world)]
    distinct = list(dict.fromkeys(keys))
    programs = [program(skeleton, stage, outer, stretch) for stage, stretch in distinct]
    return grid(inner, outer, *programs, of_rank=tuple(distinct.index(k) for k in keys)), inner, outer


def times(timeline: Timeline, rank: int) -> tuple[list[int], list[int]]:
    found = timeline.times(rank)
    return found.start_ns.tolist(), found.end_ns.tolist()


def assert_same(schedule: Schedule, one: Timeline, other: Timeline) -> None:
    for rank in range(schedule.world_size):
        assert times(one, rank) == times(other, rank), f"rank {rank}"


@settings(max_examples=120, deadline=None)
@given(
    schedules(("kernel", "shift", "collective"), 1, False),
    st.integers(0, 40),
    st.integers(0, 30),
    st.booleans(),
)
def test_longest_path_equals_events_where_nothing_contends(
    case: tuple[Schedule, int, int], latency_ns: int, issue_ns: int, folded: bool
) -> None:
    """One communication stream a rank and a link for each pair of ranks: no two flows ever share a link."""
    schedule, _, _ = case
    cost = ToyCost(schedule.world_size, latency_ns=latency_ns, issue_ns=issue_ns)
    assert_same(
        schedule, simulate(schedule, cost, fold=folded), longest_path(schedule, cost, fold=not folded)
    )


@settings(max_examples=60, deadline=None)
@given(schedules(("kernel", "pipe"), 1, False), st.integers(0, 40), st.integers(0, 30))
def test_longest_path_equals_events_in_pipelines(
    case: tuple[Schedule, int, int], latency_ns: int, issue_ns: int
) -> None:
    schedule, _, _ = case
    cost = ToyCost(schedule.world_size, latency_ns=latency_ns, issue_ns=issue_ns)
    assert_same(schedule, simulate(schedule, cost), longest_path(schedule, cost))


@st.composite
def costs(draw: st.DrawFn, inner: int, outer: int) -> ToyCost:
    """Shared ports and uplinks, some of them odd; latencies, issue times, slowdown; sometimes a pool of
    cores."""
    world = inner * outer
    slow = draw(st.lists(st.integers(0, 2 * world + 2 * outer - 1), max_size=2))
    pools: Mapping[int, int] = {}
    capacities = dict.fromkeys(slow, GB_PER_S // 3)
    if draw(st.booleans()):
        pools = {r: 1000 + r // inner for r in range(world)}
        capacities |= {1000 + o: 2 * 10**12 for o in range(outer)}
    path = draw(st.sampled_from([switch_path(world), node_path(inner, world)]))
    return ToyCost(
        world,
        capacities,
        path,
        latency_ns=draw(st.integers(0, 30)),
        issue_ns=draw(st.integers(0, 20)),
        slowdown_permille=draw(st.sampled_from([1000, 1126, 2000])),
        cap_bytes_per_s=draw(st.sampled_from([None, GB_PER_S // 2])),
        pools=pools,
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_folded_equals_unfolded(data: st.DataObject) -> None:
    """To the nanosecond, for every op of every rank, with contention, uneven shards, odd links and stages;
    and no op ends earlier than it would without contention."""
    schedule, inner, outer = data.draw(
        schedules(("kernel", "shift", "collective", "pipe"), 3, data.draw(st.booleans()))
    )
    cost = data.draw(costs(inner, outer))
    folded, unfolded = simulate(schedule, cost), simulate(schedule, cost, fold=False)
    assert len(unfolded.ranks) == schedule.world_size
    assert_same(schedule, folded, unfolded)
    free = longest_path(schedule, cost)
    for rank in range(schedule.world_size):
        assert (free.times(rank).end_ns <= folded.times(rank).end_ns).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_stream_and_no_link_does_more_than_fits(data: st.DataObject) -> None:
    """max(compute, communication) <= simulated: each stream's kernels and each link's bytes fit into the
    step."""
    schedule, inner, outer = data.draw(schedules(("kernel", "shift", "pipe"), 2, False))
    cost = replace(data.draw(costs(inner, outer)), latency_ns=0)
    step_ns = simulate(schedule, cost).step_time_ns
    busy: dict[tuple[int, str], int] = {}
    carried: dict[int, int] = {}
    for rank in range(schedule.world_size):
        for op in schedule.program(rank).ops:
            action = op.action
            if isinstance(action, Compute):
                ns = action.dims_at(schedule.shard_index(rank, action.part))[0][1]
                busy[rank, op.stream] = busy.get((rank, op.stream), 0) + ns
            for to, size in messages(schedule, rank, op):
                for link in cost.links(rank, to):
                    carried[link] = carried.get(link, 0) + size
    assert max(busy.values(), default=0) <= step_ns
    assert all(size * 10**9 <= step_ns * cost.link_capacity(link) for link, size in carried.items())


def messages(schedule: Schedule, rank: int, op: Op) -> list[tuple[int, int]]:
    """(receiver, bytes) of what an op sends."""
    action = op.action
    if isinstance(action, Shift):
        group = schedule.groups[action.group]
        sent = [
            (group.peer(rank, h.offset), h.bytes_at(schedule.shard_index(rank, h.part))) for h in action.hops
        ]
        return [(to, size) for to, size in sent if to != rank]
    if type(action).__name__ == "Send":
        to = schedule.groups[action.group].neighbour(rank, action.offset)
        return [(to, action.size_bytes)]
    return []


def two_rings(inner: int, outer: int) -> Schedule:
    """RTP inside a node, a ring and an all-reduce across nodes."""
    b = Builder()
    last = ()
    for op in rtp_program(1, inner, 100, 80, "inner").ops:
        last = (b.add(op.action, op.stream, op.after),)
    b.add(ring(500, 1, "outer"), "across", last)
    b.add(all_reduce(900, "outer"), "across")
    return grid(inner, outer, b.program())


def test_symmetric_nodes_fold_into_one_rank() -> None:
    schedule = two_rings(8, 16)
    cost = ToyCost(128, path=node_path(8, 128), latency_ns=7, slowdown_permille=1126)
    folded = simulate(schedule, cost)
    assert len(folded.ranks) == 1
    assert_same(schedule, folded, simulate(schedule, cost, fold=False))


def test_the_shared_uplink_is_shared_in_the_fold_too() -> None:
    """8 ranks of a node send across at once over one uplink of 1 byte/ns: 8 x 500 ns."""
    b = Builder()
    b.add(ring(500, 1, "outer"), "across")
    schedule = grid(8, 16, b.program())
    folded = simulate(schedule, ToyCost(128, path=node_path(8, 128)))
    assert (len(folded.ranks), folded.step_time_ns) == (1, 4000)


def test_a_flat_ring_over_nodes_folds_by_place_in_the_node() -> None:
    b = Builder()
    b.add(ring(500, 1, "inner"), "s")
    schedule = grid(32, 1, b.program())
    cost = ToyCost(32, path=node_path(4, 32))
    quotient = fold(schedule, cost)
    assert quotient.representative_of == (0, 1, 2, 3) * 8
    assert_same(schedule, simulate(schedule, cost), simulate(schedule, cost, fold=False))


def test_one_slow_link_splits_the_ranks_it_matters_to() -> None:
    """A slow port out of rank 5: in a ring of 8 each rank's distance from it differs, so all stand for
    themselves."""
    b = Builder()
    b.add(ring(500, 1, "inner"), "s")
    b.kernel(10, (0,))
    schedule = grid(8, 1, b.program())
    cost = ToyCost(8, {5: GB_PER_S // 4}, switch_path(8))
    assert len(fold(schedule, cost).representatives) == 8
    assert_same(schedule, simulate(schedule, cost), simulate(schedule, cost, fold=False))


def test_a_slow_node_leaves_the_others_folded() -> None:
    """No traffic between nodes: the ranks of the slow node are one class, all the others another."""
    b = Builder()
    b.add(ring(500, 1, "inner"), "s")
    schedule = grid(4, 4, b.program())
    cost = ToyCost(16, dict.fromkeys(range(4, 8), GB_PER_S // 2), switch_path(16))
    assert len(fold(schedule, cost).representatives) == 2
    folded = simulate(schedule, cost)
    assert [folded.times(r).end_ns[0] for r in (0, 5, 15)] == [500, 1000, 500]


def test_a_long_chain_of_differences_gives_up_folding_but_stays_right() -> None:
    """A ring of 200 with one slow link needs more rounds than are allowed: every rank stands for itself."""
    b = Builder()
    b.add(ring(500, 1, "inner"), "s")
    schedule = grid(200, 1, b.program())
    cost = ToyCost(200, {0: GB_PER_S // 2}, switch_path(200))
    assert fold(schedule, cost).representative_of == tuple(range(200))
    assert simulate(schedule, cost).step_time_ns == 1000


def test_a_thousand_ranks_fold_to_one() -> None:
    """Ring of 8 inside nodes, ring of 128 across."""
    b = Builder()
    b.add(ring(500, 1, "inner"), "s")
    b.add(ring(900, 1, "outer"), "s")
    schedule = grid(8, 128, b.program())
    cost = ToyCost(1024, path=node_path(8, 1024))
    quotient = fold(schedule, cost)
    assert quotient.representatives == (0,)


def test_a_broadcast_from_another_root_has_its_own_usage() -> None:
    """The engine hands the cost model the ring order with the root first."""
    seen = []

    class Noting(ToyCost):
        def collective(
            self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str
        ) -> tuple[Phase, ...]:
            seen.append(ranks)
            return super().collective(kind, ranks, size_bytes, dtype)

    b = Builder()
    b.add(Collective("broadcast", "inner", 100, "fp32", root=2), "c")
    simulate(grid(4, 1, b.program()), Noting(4))
    assert set(seen) == {(2, 3, 0, 1)}


def test_a_message_whose_links_depend_on_its_size_is_refused() -> None:
    """More than four sizes are sampled at both ends only: a route that changes between is noticed later."""

    class Fickle(ToyCost):
        def point_to_point(
            self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None
        ) -> Phase:
            return Phase(0, size_bytes, {7 if size_bytes == 3 else 8: 1})

    b = Builder()
    for size in range(1, 6):
        b.add(ring(size, 1, "inner"), "s")
    with pytest.raises(ValueError, match="must not depend on its size"):
        simulate(grid(4, 1, b.program()), Fickle(4))
