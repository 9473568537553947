"""Step times of one rotating linear layer in closed form, on a cost model with one price per kind of op.

t_c is the forward kernel of a sub-step, t_b its two backward kernels together, t_m one hop; host and everything else
cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from strategy_helpers import FlatCost, between_linears, build, gpt2_tiny, phase_of

from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate
from rtp_sim.model.layers import Linear
from rtp_sim.schedule.ir import Schedule
from rtp_sim.timeline import Timeline

ENGINES: list[Callable[[Schedule, FlatCost], Timeline]] = [simulate, longest_path]
TIMES = [(100, 250, 30), (100, 250, 100), (100, 250, 170), (100, 250, 400), (7, 12, 5)]
"""t_c, t_b, t_m in ns: hops hidden by both passes, equal to the forward, hidden by the backward only, by neither."""


def times(strategy: str, n: int, t_c: int, t_b: int, t_m: int, hide: bool = False) -> list[tuple[int, int]]:
    """Per engine, when the forward of the linear ends, and how long its backward takes from there."""
    schedule = build(strategy, between_linears([Linear(60, 60)], 60), n, rtp_hide_gradient_hop=hide)
    dgrad = t_b // 3
    cost = FlatCost({"linear": t_c, "linear.dgrad": dgrad, "linear.wgrad": t_b - dgrad}, t_m)
    found = []
    for engine in ENGINES:
        spans = [s for s in engine(schedule, cost).spans(0) if ".l1." in s.op.name]
        forward = max(s.end_ns for s in spans if phase_of(s.op) == "F")
        assert min(s.start_ns for s in spans) == 0
        found.append((forward, max(s.end_ns for s in spans) - forward))
    return found


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize(("t_c", "t_b", "t_m"), TIMES)
def test_out_of_place(n: int, t_c: int, t_b: int, t_m: int) -> None:
    """The next shard arrives behind the kernel; the gradient hop waits for the kernel and is waited for."""
    forward = (n - 1) * max(t_c, t_m) + t_c
    # Weight and gradient hops share a stream: a weight hop longer than the kernel delays the gradient hop.
    backward = (n - 1) * (max(t_b, t_m) + t_m) + t_b
    assert times("rtp", n, t_c, t_b, t_m) == [(forward, backward)] * 2


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize(("t_c", "t_b", "t_m"), TIMES)
def test_in_place(n: int, t_c: int, t_b: int, t_m: int) -> None:
    """Nothing overlaps."""
    forward, backward = (n - 1) * (t_c + t_m) + t_c, (n - 1) * (t_b + 2 * t_m) + t_b
    assert times("rtp-inplace", n, t_c, t_b, t_m) == [(forward, backward)] * 2


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize(("t_c", "t_b", "t_m"), [t for t in TIMES if t[1] >= t[2]])
def test_hiding_the_gradient_hop_saves_one_hop_per_sub_step(n: int, t_c: int, t_b: int, t_m: int) -> None:
    """Where the kernels are longer than a hop, both hops disappear behind them: (n-1) t_m less than above."""
    forward = (n - 1) * max(t_c, t_m) + t_c
    plain = (n - 1) * (t_b + t_m) + t_b
    hidden = times("rtp", n, t_c, t_b, t_m, hide=True)
    assert hidden == [(forward, plain - (n - 1) * t_m)] * 2 == [(forward, n * t_b)] * 2


@pytest.mark.parametrize("n", [2, 4])
def test_prefetch_hides_the_first_hop_of_the_next_unit(n: int) -> None:
    """Two layers, t_c < t_m < 2 t_c: the second layer's first hop is exposed for t_m - t_c, unless it starts during
    the first layer's last kernel; the hops after it wait for their buffer as before."""
    t_c, t_m = 100, 170
    ends = {}
    for prefetch in (False, True):
        schedule = build("rtp", between_linears([Linear(60, 60)] * 2, 60), n, rtp_prefetch=prefetch)
        timeline = longest_path(schedule, FlatCost({"linear": t_c}, t_m))
        ends[prefetch] = max(s.end_ns for s in timeline.spans(0) if phase_of(s.op) == "F")
    one = (n - 1) * t_m + t_c
    assert ends[False] == 2 * one
    assert ends[True] == 2 * one - (t_m - t_c)


def test_an_exposed_collective_of_tensor_parallelism_adds_up() -> None:
    """Forward of one rank: embedding, then blocks of 2 linears each side; every all-reduce waits and is waited for."""
    schedule = build("tp", gpt2_tiny(), 2)
    cost = FlatCost({"linear": 10, "sdpa": 5}, 100)
    timeline = simulate(schedule, cost)
    start = {s.op.name: s.start_ns for s in timeline.spans(0)}
    # The embedding's all-reduce; two blocks of 2 linears, attention, all-reduce, 2 linears, all-reduce; the head.
    assert start["m0.head.loss.F.0.cross_entropy"] == 100 + 2 * (25 + 100 + 20 + 100) + 10


@pytest.mark.parametrize("strategy", ["tp", "tp-sp"])
def test_the_backward_starts_when_the_loss_statistics_are_there(strategy: str) -> None:
    """The log-probabilities of a vocabulary shard need the maximum and the sum over all shards."""
    timeline = simulate(build(strategy, gpt2_tiny(), 2), FlatCost({}, 100))
    spans = {s.op.name: s for s in timeline.spans(0)}
    reduced = max(spans[f"m0.head.loss.F.{what}"].end_ns for what in ("max", "sum"))
    assert spans["m0.head.loss.B.0.cross_entropy.bwd"].start_ns >= reduced
