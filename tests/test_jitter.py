"""A step played again: without noise it is the timeline, to the nanosecond; with it, it spreads as probability says."""

from __future__ import annotations

import json
import math
from statistics import NormalDist, fmean, pvariance

import numpy as np
import pytest
from engine_helpers import Builder, ToyCost, all_reduce, grid, one_ring, recv, ring, rtp_program, send, switch_path
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_engine_oracles import schedules

from rtp_sim import jitter
from rtp_sim.cli import main
from rtp_sim.engine import jitter as engine_jitter
from rtp_sim.engine.costs import OpCost
from rtp_sim.engine.jitter import Noise, Replay
from rtp_sim.engine.simulate import simulate
from rtp_sim.errors import InputError
from rtp_sim.experiment import Request, Result, prepare, run
from rtp_sim.jitter import jittered, nearest_rank, read_noise
from rtp_sim.schedule.ir import Dims, Schedule, Shift
from rtp_sim.schedule.options import Options

NONE = Noise()
TINY = "simulate --model gpt2-tiny --gpus 4 --strategy rtp --quiet --jitter"


def replayed(schedule: Schedule, cost: ToyCost, fold: bool = True) -> tuple[int, Replay]:
    timeline = simulate(schedule, cost, fold=fold)
    return timeline.step_time_ns, Replay(timeline, cost)


def result(**given_: object) -> Result:
    given_ = {"model": "gpt2", "cluster": "dgx-a100-80g", "gpus": 4, "seq_len": 128} | given_
    return run(prepare(Request(**given_)))  # type: ignore[arg-type]


# ---- without noise


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp", "tp", "tp-sp", "rtp", "rtp-inplace"])
def test_without_noise_it_is_the_timeline(strategy: str) -> None:
    for more in ({}, {"slow_gpus": ((2, 1.3),)}, {"degraded_links": (("node0/gpu1->nvswitch", 0.2),)}):
        one = result(strategy=strategy, **more)
        found = Replay(one.timeline, one.prepared.cost).step_times_ns(NONE, 3, 0)
        assert found.tolist() == [one.timeline.step_time_ns] * 3


@pytest.mark.parametrize(
    "more",
    [
        {"strategy": "1f1b", "pp": 2, "inner": 2, "micro_batches": 4},
        {"strategy": "interleaved", "pp": 2, "micro_batches": 4, "options": Options(vpp=2, pp_overlap=False)},
        {"strategy": "zb-v", "pp": 4, "micro_batches": 4},
        {"strategy": "hsdp", "inner": 2},
        {"strategy": "rtp", "gpus": 16},
        {"strategy": "rtp", "gpus": 16, "inner": 8, "options": Options(dp_sync="zero1")},
    ],
    ids=lambda more: str(more["strategy"]),
)
def test_pipelines_and_rings_over_nodes(more: dict[str, object]) -> None:
    one = result(**more)
    assert Replay(one.timeline, one.prepared.cost).step_times_ns(NONE, 1, 0).tolist() == [one.timeline.step_time_ns]


@settings(max_examples=60, deadline=None)
@given(schedules(("kernel", "shift", "collective", "pipe"), 2, False), st.integers(0, 40), st.booleans(), st.booleans())
def test_any_schedule(case: tuple[Schedule, int, int], latency_ns: int, folded: bool, shared: bool) -> None:
    """Also where flows contend, sizes are uneven and ranks differ."""
    schedule, _, _ = case
    path = switch_path(schedule.world_size) if shared else None
    cost = ToyCost(schedule.world_size, path=path, latency_ns=latency_ns, issue_ns=3, slowdown_permille=1126)
    step_ns, replay = replayed(schedule, cost, folded)
    assert replay.step_times_ns(NONE, 2, 0).tolist() == [step_ns] * 2


class Doubled(ToyCost):
    """Kernels take twice as long."""

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        return OpCost(2 * dims[0][1], "assumed")


@settings(max_examples=60, deadline=None)
@given(schedules(("kernel", "shift", "collective"), 1, False), st.integers(0, 40), st.integers(0, 30))
def test_slower_kernels_give_the_engine_s_own_times(
    case: tuple[Schedule, int, int], latency_ns: int, issue_ns: int
) -> None:
    """Where nothing contends, and the two messages of a hop are of one size, playing a step again with all ranks
    stragglers by 2 is simulating it with kernels of twice the time."""
    schedule, _, _ = case
    shifts = [op.action for p in schedule.programs for op in p.ops if isinstance(op.action, Shift)]
    assume(all(isinstance(hop.size_bytes, int) for shift in shifts for hop in shift.hops))
    _, replay = replayed(schedule, ToyCost(schedule.world_size, latency_ns=latency_ns, issue_ns=issue_ns))
    slow = simulate(schedule, Doubled(schedule.world_size, latency_ns=latency_ns, issue_ns=issue_ns)).step_time_ns
    assert replay.step_times_ns(Noise(straggler=1, straggler_factor=2), 1, 0).tolist() == [slow]


def test_a_step_without_ops_takes_no_time() -> None:
    step_ns, replay = replayed(one_ring(2, Builder().program()), ToyCost(2))
    assert replay.step_times_ns(NONE, 2, 0).tolist() == [0, 0] == [step_ns] * 2


def test_ranks_of_one_program_that_send_along_a_chain() -> None:
    """Rank 1 waits for rank 0 in the first op, though both run the same program: every rank is taken by itself."""
    b = Builder()
    got = b.add(recv(1000, "x"), "receive")
    work = b.kernel(500, (got,))
    b.add(send(1000, "x"), "send", (work,))
    first, last = Builder("first"), Builder("last")
    first.add(send(1000, "x"), "send", (first.kernel(500),))
    last.kernel(500, (last.add(recv(1000, "x"), "receive"),))
    schedule = one_ring(4, b.program(), first.program(), last.program(), of_rank=(1, 0, 0, 2))
    step_ns, replay = replayed(schedule, ToyCost(4))
    assert step_ns == 4 * 500 + 3 * 1000
    assert len(replay.order.cells) == 4
    assert replay.step_times_ns(NONE, 1, 0).tolist() == [step_ns]


def test_samples_in_batches_are_the_same_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    step_ns, replay = replayed(grid(2, 2, rtp_program(3, 2, 700_000, 900_000, "inner")), ToyCost(4))
    monkeypatch.setattr(engine_jitter, "ALIVE", replay.order.most_alive * 3)
    assert replay.step_times_ns(NONE, 10, 0).tolist() == [step_ns] * 10
    noisy = replay.step_times_ns(Noise(compute=0.1), 10, 0)
    assert len(set(noisy.tolist())) == 10


# ---- with noise, against what probability says


def chain(kernels: list[int]) -> Schedule:
    b = Builder()
    for ns in kernels:
        b.kernel(ns)
    return one_ring(1, b.program())


def test_kernels_in_a_row_add_up() -> None:
    """Factors of mean 1 and variance exp(s^2) - 1, independent: means and variances of the kernels add up."""
    kernels, sigma, samples = [4_000_000, 1_000_000, 9_000_000], 0.2, 4000
    _, replay = replayed(chain(kernels), ToyCost(1))
    found = replay.step_times_ns(Noise(compute=sigma), samples, 1).tolist()
    variance = sum(ns**2 for ns in kernels) * math.expm1(sigma**2)
    # Four standard errors.
    assert fmean(found) == pytest.approx(sum(kernels), abs=4 * math.sqrt(variance / samples))
    assert pvariance(found) == pytest.approx(variance, rel=0.15)


def test_a_rank_is_slow_in_all_its_kernels_of_a_step() -> None:
    """One factor: the whole chain is log-normal, so its median is the sum times exp(-s^2 / 2)."""
    kernels, sigma = [4_000_000, 1_000_000, 9_000_000], 0.2
    _, replay = replayed(chain(kernels), ToyCost(1))
    found = sorted(replay.step_times_ns(Noise(rank=sigma), 4000, 1).tolist())
    law = NormalDist(math.log(sum(kernels)) - sigma**2 / 2, sigma)
    for share in (0.05, 0.5, 0.95):
        assert math.log(nearest_rank(found, share)) == pytest.approx(law.inv_cdf(share), abs=0.02)


@pytest.mark.parametrize("ranks", [2, 8])
def test_everyone_waits_for_the_slowest(ranks: int) -> None:
    """The largest of n factors is below x with probability F(x)^n."""
    sigma, kernel_ns = 0.1, 10_000_000
    b = Builder()
    b.add(all_reduce(0), "communication", (b.kernel(kernel_ns),))
    step_ns, replay = replayed(one_ring(ranks, b.program()), ToyCost(ranks))
    assert step_ns == kernel_ns
    found = sorted(replay.step_times_ns(Noise(compute=sigma), 4000, 2).tolist())
    law = NormalDist(math.log(kernel_ns) - sigma**2 / 2, sigma)
    for share in (0.5, 0.95):
        expected = law.inv_cdf(share ** (1 / ranks))
        assert math.log(nearest_rank(found, share)) == pytest.approx(expected, abs=0.012)


def test_a_straggler_takes_its_factor_and_comes_as_often_as_it_should() -> None:
    """Of 4 ranks none is one with probability 0.9^4; with one the step is half as long again."""
    b = Builder()
    b.add(all_reduce(0), "communication", (b.kernel(1_000_000),))
    _, replay = replayed(one_ring(4, b.program()), ToyCost(4))
    found = replay.step_times_ns(Noise(straggler=0.1, straggler_factor=1.5), 4000, 3)
    assert set(found.tolist()) == {1_000_000, 1_500_000}
    healthy = float(np.mean(found == 1_000_000))
    expected = 0.9**4
    assert healthy == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))


def test_a_message_takes_as_long_at_both_ends() -> None:
    """Two ranks swap: each has sent and received at the later of two messages."""
    sigma, size = 0.1, 10_000_000
    b = Builder()
    b.add(ring(size), "shift")
    step_ns, replay = replayed(one_ring(2, b.program()), ToyCost(2))
    assert step_ns == size
    found = sorted(replay.step_times_ns(Noise(link=sigma), 4000, 4).tolist())
    law = NormalDist(math.log(size) - sigma**2 / 2, sigma)
    assert math.log(nearest_rank(found, 0.5)) == pytest.approx(law.inv_cdf(0.5 ** (1 / 2)), abs=0.012)
    # A collective has one factor for all its ranks.
    b = Builder()
    b.add(all_reduce(size), "communication")
    step_ns, replay = replayed(one_ring(8, b.program()), ToyCost(8))
    found = sorted(replay.step_times_ns(Noise(link=sigma), 4000, 4).tolist())
    assert nearest_rank(found, 0.5) / step_ns == pytest.approx(math.exp(-(sigma**2) / 2), abs=0.012)
    # So has a message between two that do not swap.
    first, second = Builder("a"), Builder("b")
    first.add(send(size, "x"), "send")
    second.add(recv(size, "x"), "receive")
    schedule = one_ring(2, first.program(), second.program(), of_rank=(0, 1))
    step_ns, replay = replayed(schedule, ToyCost(2))
    found = sorted(replay.step_times_ns(Noise(link=sigma), 4000, 4).tolist())
    assert nearest_rank(found, 0.5) / step_ns == pytest.approx(math.exp(-(sigma**2) / 2), abs=0.012)


def test_a_slow_gpu_hides_the_noise_of_the_others() -> None:
    """Rank 2 is so slow that nobody else is ever waited for: the step spreads as one rank does."""
    one = result(strategy="fsdp", slow_gpus=((2, 3.0),))
    noise = Noise(rank=0.01)
    found = sorted(Replay(one.timeline, one.prepared.cost).step_times_ns(noise, 2000, 5).tolist())
    median = nearest_rank(found, 0.5) / one.timeline.step_time_ns
    assert median == pytest.approx(math.exp(-(0.01**2) / 2), abs=1e-3)


# ---- what it is called with


def test_the_same_seed_gives_the_same_numbers() -> None:
    one = result(strategy="rtp")
    noise = Noise(0.03, 0.1, 0.01, 0.05, 1.2)
    first, again, other = (jittered(one, noise, 50, seed) for seed in (7, 7, 8))
    assert first == again
    assert first.p50_ns != other.p50_ns
    assert first.least_ns <= first.p50_ns <= first.p95_ns <= first.most_ns
    assert (first.samples, first.asked, first.base_ns) == (50, 50, one.timeline.step_time_ns)


def test_percentiles_are_samples() -> None:
    assert [nearest_rank(list(range(1, 21)), share) for share in (0.5, 0.95, 1.0)] == [10, 19, 20]
    assert nearest_rank([5], 0.5) == 5


def test_large_steps_get_fewer_samples_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    one = result(strategy="ddp")
    size = Replay(one.timeline, one.prepared.cost).size
    monkeypatch.setattr(jitter, "MOST_WORK", 30 * size)
    found = jittered(one, samples=100)
    assert (found.samples, found.asked) == (30, 100)
    monkeypatch.setattr(jitter, "MOST_WORK", 19 * size)
    with pytest.raises(InputError, match=f"{size:,} ops of all ranks are too many"):
        jittered(one, samples=100)


def test_noise_as_it_is_written() -> None:
    assert read_noise("") == Noise(0.03, 0.1, 0.01)
    assert read_noise("link=0.2") == Noise(0, 0.2, 0)
    assert read_noise("compute=0.1, straggler=0.001x1.5") == Noise(0.1, 0, 0, 0.001, 1.5)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{TINY} --samples 30 --seed 5".split()) == 0
    table = capsys.readouterr().out
    assert main(f"{TINY} --samples 30 --seed 5".split()) == 0
    assert capsys.readouterr().out == table
    assert "step with jitter, p95" in table
    assert "seed 5" in table
    assert main(f"{TINY} compute=0.05 --samples 30 --format json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["jitter"]["noise"] == {
        "compute": 0.05, "link": 0.0, "rank": 0.0, "straggler": 0.0, "straggler_factor": 1.0
    }  # fmt: skip
    assert found["jitter"]["base_s"] == found["row"]["step_time_s"]
    assert (found["jitter"]["samples"], found["jitter"]["seed"]) == (30, 0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compute", "compute=0.03"),
        ("noise=0.1", "expected some of compute, link, rank, straggler"),
        ("compute=x", "'x'"),
        ("compute=-1", "at least 0"),
        ("compute=3", "at most 2"),
        ("straggler=0.1", "a probability and a factor"),
        ("straggler=2x1.5", "no probability"),
        ("--seed -1", "--seed"),
        ("--samples 0", "--samples"),
        ("--engine estimate", "no timeline for --jitter"),
        ("--format csv", "--jitter"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    assert main(f"{TINY} {line}".split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (message,) = captured.err.splitlines()
    assert words in message
