"""Where every shard is at every sub-step of a rotation: flat rings by table, two-level rings by enumeration."""

from __future__ import annotations

import pytest
from strategy_helpers import build, gpt2_tiny, llama_tiny, phase_of, shifts, stack
from strategy_meaning import interpret

from rtp_sim.model.layers import Linear
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Compute, Schedule

LINEAR = stack([Linear(64, 64)], input_numel=64)


def shards_worked_on(schedule: Schedule, phase: str) -> list[list[int]]:
    """Per sub-step of a pass of a lone linear (one kernel each), the shard of every rank, from the kernel's part."""
    return [
        [schedule.shard_index(rank, op.action.part) for rank in range(schedule.world_size)]
        for op in schedule.programs[0].ops
        if isinstance(op.action, Compute) and op.action.kernel != "optimizer" and phase_of(op) == phase
    ]


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
@pytest.mark.parametrize(
    ("n", "forward"),
    [(2, [[0, 1], [1, 0]]), (4, [[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1], [1, 2, 3, 0]])],
)
def test_flat_ring_by_table(strategy: str, n: int, forward: list[list[int]]) -> None:
    schedule = build(strategy, LINEAR, n)
    assert shards_worked_on(schedule, "F") == forward
    assert shards_worked_on(schedule, "B") == forward[::-1]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_flat_ring_sends_to_the_next_rank_forward_and_to_the_one_before_backward(n: int) -> None:
    """Forward: n-1 hops to r+1. Backward: n-1 of weights and n-1 of gradients to r-1. None in the last sub-step."""
    hops = [(phase_of(op), op.name.rsplit(".", 1)[1], hop.offset[0] % n) for op, hop in shifts(build("rtp", LINEAR, n))]
    back = [("B", kind, n - 1) for _ in range(n - 1) for kind in ("hop", "grad")]
    assert hops == [("F", "hop", 1)] * (n - 1) + back


def test_two_level_ring_of_two_by_two_by_table() -> None:
    """Ranks 0, 1 on one node and 2, 3 on the other: a hop inside, one across, one inside."""
    schedule = build("rtp", LINEAR, 4, dims=(2, 2))
    forward = [[0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0], [2, 3, 0, 1]]
    assert shards_worked_on(schedule, "F") == forward
    assert shards_worked_on(schedule, "B") == forward[::-1]
    assert crossings(schedule, "F", 2) == [0, 4, 0]


def crossings(schedule: Schedule, phase: str, per_node: int, kind: str = "hop") -> list[int]:
    """Per hop of a pass, how many ranks send to another node."""
    group = schedule.groups["rtp"]
    return [
        sum(group.peer(r, hop.offset) // per_node != r // per_node for r in range(schedule.world_size))
        for op, hop in shifts(schedule)
        if phase_of(op) == phase and op.name.endswith(kind)
    ]


@pytest.mark.parametrize(("nodes", "per_node"), [(4, 8), (8, 4), (2, 3), (3, 2), (3, 5)])
def test_two_level_ring_by_enumeration(nodes: int, per_node: int) -> None:
    n = nodes * per_node
    schedule = build("rtp", LINEAR, n, dims=(nodes, per_node))
    forward, backward = shards_worked_on(schedule, "F"), shards_worked_on(schedule, "B")
    for step, held in enumerate(forward):
        outer, inner = divmod(step, per_node)
        assert held == [
            (a - outer) % nodes * per_node + (b + outer - inner) % per_node
            for a in range(nodes)
            for b in range(per_node)
        ]
    assert all(sorted(held[r] for held in forward) == list(range(n)) for r in range(n))
    assert backward == forward[::-1]
    across = [n if step % per_node == 0 else 0 for step in range(1, n)]
    assert sum(c > 0 for c in across) == nodes - 1
    assert crossings(schedule, "F", per_node) == across
    assert crossings(schedule, "B", per_node) == across[::-1]
    assert crossings(schedule, "B", per_node, "grad") == across[::-1]


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
@pytest.mark.parametrize(("n", "dims"), [(2, ()), (3, ()), (4, ()), (4, (2, 2))])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("hide", [False, True])
def test_every_kernel_finds_the_shard_it_names_and_all_shards_come_home(
    strategy: str, n: int, dims: tuple[int, ...], recompute: str, hide: bool
) -> None:
    for network in (gpt2_tiny(), llama_tiny()):
        training = TrainingSpec(2, network.seq, 2, recompute=recompute)
        schedule = build(strategy, network, n, training, dims=dims, rtp_hide_gradient_hop=hide)
        meaning = interpret(schedule, "rtp")
        assert meaning.wrong == []
        buffers = schedule.programs[0].buffers
        for rank, held in enumerate(meaning.weights):
            assert {shard for b, shard in held.items() if buffers[b].live_out} == {rank}


@pytest.mark.parametrize(("n", "dims"), [(2, ()), (3, ()), (4, ()), (4, (2, 2)), (6, (2, 3))])
def test_evaluation_passes_visit_every_shard_once_and_alternate(n: int, dims: tuple[int, ...]) -> None:
    for passes in range(1, n + 2):
        schedule = build("rtp", LINEAR, n, dims=dims, eval_passes=passes)
        worked = shards_worked_on(schedule, "F")
        assert len(worked) == passes * n
        for k in range(passes):
            steps = worked[k * n : (k + 1) * n]
            assert steps == (worked[:n] if k % 2 == 0 else worked[:n][::-1])
            assert all(sorted(s[r] for s in steps) == list(range(n)) for r in range(n))
        # The last of an odd number of passes goes once more, to where the first began.
        assert len(shifts(schedule)) == passes * (n - 1) + passes % 2
        meaning = interpret(schedule, "rtp")
        assert meaning.wrong == []
        kept = [b for b, x in schedule.programs[0].buffers.items() if x.live_out and b.startswith("w.")]
        assert kept == [b for b, x in schedule.programs[0].buffers.items() if x.live_in and b.startswith("w.")]
        assert [meaning.weights[r][kept[0]] for r in range(n)] == list(range(n))
