"""Clipping by the norm of all gradients: every strategy against dense training with torch.nn.utils.clip_grad_norm_.

In fp64. The norm is one number for the whole model, the same on every rank; a parameter that is counted twice (a copy
on every rank, a shared bias, tied weights, padding) or not at all (a shard) shows in its first digits.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from executor_reference import EXACT, HYPER, Pair, assert_equal, batches_of, furthest, run_both
from strategy_helpers import EVERY_STRATEGY, build
from test_executor_reference import NETWORKS, VARIANTS, training

from rtp_sim.executor.parameters import executed_network, initial_parameters
from rtp_sim.executor.reference import run_reference
from rtp_sim.schedule.ir import Schedule

CLIP = 0.1
HYPER_SGD = dataclasses.replace(HYPER, lr=0.5)
"""The length of a gradient matters to SGD; Adam divides it out."""


def cases() -> list[tuple[str, str, int]]:
    return [
        (strategy, name, n)
        for strategy in EVERY_STRATEGY
        for name in ("gpt2", "llama", "moe", "image")
        for n in ((1,) if strategy == "single" else (1, 2, 3, 4))
        if not (strategy.startswith("tp") and name == "image")
    ]


def assert_clipped_as_by_torch(pair: Pair) -> None:
    """Norms of every step, the same bits on every rank, and all that follows from them."""
    for norm, expected in zip(pair.reference.grad_norms, pair.dense.grad_norms, strict=True):
        assert norm == pytest.approx(expected, abs=EXACT)
        assert expected > 2 * CLIP, "nothing is clipped"
    assert len({m.watch.norm for m in pair.reference.machines}) == 1
    assert_equal(pair)
    total = math.sqrt(sum(float(g.square().sum()) for t in pair.reference.gradients.values() for g in t.values()))
    assert total == pytest.approx(CLIP, rel=1e-4)


@pytest.mark.parametrize(("strategy", "name", "n"), cases())
def test_every_strategy_clips_as_torch_does(strategy: str, name: str, n: int) -> None:
    spec = training(NETWORKS[name], "sgd", clip_norm=CLIP)
    assert_clipped_as_by_torch(run_both(strategy, NETWORKS[name], n, spec, hyper=HYPER_SGD))


@pytest.mark.parametrize(
    ("strategy", "name", "n", "options"),
    [
        (strategy, name, n, options)
        for strategy, n, options in VARIANTS
        for name in ("gpt2", "uneven", "experts")
        # Tensor parallelism wants a part for every rank.
        if not (strategy.startswith("tp") and name == "experts" and n > 3)
    ],
)  # fmt: skip
def test_with_two_micro_batches_recomputation_and_a_loss_scale(
    strategy: str, name: str, n: int, options: dict[str, object]
) -> None:
    """Rings beside data parallelism, in two levels, buckets, uneven shards, biases on every shard. The scale, a power
    of two, is divided out before the norm is taken."""
    changes: dict[str, object] = {"num_microbatches": 2, "recompute": "full", "loss_scale": "static:1024"}
    spec = training(NETWORKS[name], "sgd", clip_norm=CLIP, **changes)
    assert_clipped_as_by_torch(run_both(strategy, NETWORKS[name], n, spec, hyper=HYPER_SGD, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "rtp", "tp-sp"])
def test_a_norm_below_the_limit_changes_no_bit(strategy: str) -> None:
    found = []
    for clip in (None, 1e6):
        spec = training(NETWORKS["gpt2"], "adamw", clip_norm=clip)
        found.append(run_both(strategy, NETWORKS["gpt2"], 2, spec).reference)
    assert furthest(found[0].parameters, found[1].parameters)[0] == 0


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "fsdp", "rtp", "rtp-inplace", "tp", "tp-sp"])
def test_a_missing_reduction_of_the_norm_shows(strategy: str) -> None:
    """Each rank then clips by the norm of what it holds."""
    network, spec = NETWORKS["gpt2"], training(NETWORKS["gpt2"], "sgd", clip_norm=CLIP)
    schedule = build(strategy, network, 2, spec)
    executed = executed_network(schedule, network)
    parameters = initial_parameters(executed, dtype=torch.float64)
    batches = batches_of(schedule, executed, spec, 1)
    whole, cut = (run_reference(s, network, spec, parameters, batches) for s in (schedule, without_norm(schedule)))
    assert whole.grad_norms[0] is not None
    assert cut.grad_norms[0] is not None
    assert cut.grad_norms[0] < 0.99 * whole.grad_norms[0]


def without_norm(schedule: Schedule) -> Schedule:
    """The schedule without the all-reduce of the norm."""
    (program,) = schedule.programs
    kept = [op for op in program.ops if not op.name.startswith("grad_norm.reduce")]
    assert len(kept) == len(program.ops) - 1
    ops = tuple(dataclasses.replace(op, index=i, after=()) for i, op in enumerate(kept))
    return dataclasses.replace(schedule, programs=(dataclasses.replace(program, ops=ops),))
