"""Numbers worked out by hand: rotation of one linear on 2 and on 4 ranks, sub-step by sub-step, and a two-level ring.

The network adds a position vector of zeros, whose gradient is the linear's input gradient, before the linear; it ends
without a loss, so that the gradient of its output is given. Each rank has its own input row.
"""

from __future__ import annotations

import pytest
import torch
from strategy_helpers import build, stack

from rtp_sim.executor.machine import Machine
from rtp_sim.executor.reference import run_reference, run_step
from rtp_sim.model.layers import Activation, Linear, Positions
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Compute, Op, Schedule

TRAINING = TrainingSpec(1, 1, precision="fp32", optimizer="sgd")
Held = tuple[int, list[float], float]
"""Shard, gradient of its row, gradient of its bias."""


class Watched(Machine):
    """Notes after each backward sub-step which shard the rank worked on and the content of its gradient buffer."""

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)  # type: ignore[arg-type]
        self.seen: list[Held] = []
        self.output: list[float] = []
        self.input_gradient: list[float] = []

    def run(self, op: Op) -> None:
        super().run(op)
        assert isinstance(op.action, Compute)
        if op.action.kernel == "linear":
            self.output = self.storage[op.writes[0]].tolist()
        if op.action.kernel == "linear.wgrad":
            *row, bias = self.storage[op.writes[0]].tolist()
            self.seen.append((self.schedule.shard_index(self.rank, op.action.part), row, bias))
        if op.action.kernel == "positions.wgrad":
            self.input_gradient = self.storage[op.writes[0]].tolist()


def watched(
    strategy: str, weight: list[list[float]], bias: list[float], inputs: list[list[float]], dy: list[float]
) -> tuple[Schedule, list[Watched]]:
    """One step; the given output gradient counts n times over, because the step takes the mean over n ranks."""
    n = len(inputs)
    network = stack([Positions(1, 2), Linear(2, len(bias))], input_numel=2)
    schedule = build(strategy, network, n, TRAINING)
    parameters = {
        "l0": {"weight": torch.zeros(1, 2)},
        "l1": {"weight": torch.tensor(weight, dtype=torch.float32), "bias": torch.tensor(bias, dtype=torch.float32)},
    }
    machines = [Watched(schedule, r, network, TRAINING, parameters) for r in range(n)]
    batches = [[{"x": torch.tensor(x), "d.l1.y": n * torch.tensor(dy)}] for x in inputs]
    run_step(schedule, machines, batches)
    return schedule, machines


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
def test_one_linear_on_two_ranks(strategy: str) -> None:
    """W = [[1, 2], [3, 4]], b = [10, 20], the loss of a rank is the sum of its outputs."""
    _, machines = watched(strategy, [[1, 2], [3, 4]], [10, 20], [[1, 0], [0, 1]], [1, 1])
    assert [m.output for m in machines] == [[11, 23], [12, 24]]
    assert [m.seen[0] for m in machines] == [(1, [1, 0], 1), (0, [0, 1], 1)]
    assert [m.seen[1] for m in machines] == [(0, [1, 1], 2), (1, [1, 1], 2)]


def test_the_input_gradient_on_two_ranks() -> None:
    """dx = [1, 1] W = [4, 6] on both ranks."""
    _, machines = watched("rtp", [[1, 2], [3, 4]], [10, 20], [[1, 0], [0, 1]], [1, 1])
    assert [m.input_gradient for m in machines] == [[4, 6], [4, 6]]


STEPS: list[list[Held]] = [
    [(1, [2, 2], 2), (2, [6, 3], 3), (3, [12, 4], 4), (0, [4, 1], 1)],
    [(2, [9, 6], 6), (3, [20, 8], 8), (0, [7, 2], 2), (1, [10, 4], 4)],
    [(3, [24, 12], 12), (0, [9, 3], 3), (1, [16, 6], 6), (2, [21, 9], 9)],
    [(0, [10, 4], 4), (1, [20, 8], 8), (2, [30, 12], 12), (3, [40, 16], 16)],
]
"""Per backward sub-step the ranks' travelling sums."""


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
def test_one_linear_on_four_ranks(strategy: str) -> None:
    """Rows [1, 0], [0, 1], [1, 1], [2, -1], no bias; x = [r + 1, 1] on rank r; output gradients 1, 2, 3, 4."""
    inputs = [[r + 1.0, 1.0] for r in range(4)]
    _, machines = watched(strategy, [[1, 0], [0, 1], [1, 1], [2, -1]], [0, 0, 0, 0], inputs, [1, 2, 3, 4])
    assert [m.output for m in machines] == [[1, 1, 2, 1], [2, 1, 3, 3], [3, 1, 4, 5], [4, 1, 5, 7]]
    assert [[m.seen[k] for m in machines] for k in range(4)] == STEPS


def row_split() -> Network:
    """4 inputs divide by the ranks, 3 outputs do not: the linear is split by inputs, its bias lies on every shard."""
    return stack([Activation("relu", 4), Linear(4, 3)], input_numel=4)


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
@pytest.mark.parametrize("n", [2, 4])
def test_a_bias_on_every_shard_counts_once_and_stays_the_same_everywhere(strategy: str, n: int) -> None:
    """All weights 1, bias [1, 2, 3], inputs 1: outputs are 4 + bias. The mean loss of the ranks' output sums has
    gradient 1 for every bias entry and every weight; one step of learning rate 0.001 takes 0.001 from each."""
    network = row_split()
    schedule = build(strategy, network, n, TRAINING)
    parameters = {"l1": {"weight": torch.ones(3, 4), "bias": torch.tensor([1.0, 2, 3])}}
    batch = [[[{"x": torch.ones(4)}] for _ in range(n)]]
    result = run_reference(schedule, network, TRAINING, parameters, batch)
    assert result.losses == [3 * 4 + 6]
    assert result.gradients["l1"]["bias"].tolist() == [1, 1, 1]
    assert torch.equal(result.gradients["l1"]["weight"], torch.ones(3, 4, dtype=torch.float64))
    copies = [m.storage["w.l1"][-3:] for m in result.machines]
    assert all(torch.equal(copies[0], c) for c in copies)
    assert torch.allclose(copies[0], torch.tensor([0.999, 1.999, 2.999], dtype=torch.float64), atol=1e-15)


def test_two_level_ring_visits() -> None:
    """2 nodes x 2 ranks, held in the forward sub-steps: at home, after a hop in the node, one between nodes, one in the
    node; each rank sees each shard once."""
    network = row_split()
    schedule = build("rtp", network, 4, TRAINING, dims=(2, 2))
    visited: list[list[int]] = [[] for _ in range(4)]
    for op in schedule.programs[0].ops:
        if isinstance(op.action, Compute) and op.action.kernel == "linear":
            for r in range(4):
                visited[r].append(schedule.shard_index(r, op.action.part))
    assert [list(held) for held in zip(*visited, strict=True)] == [
        [0, 1, 2, 3],
        [1, 0, 3, 2],
        [3, 2, 1, 0],
        [2, 3, 0, 1],
    ]
