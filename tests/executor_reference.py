"""Runs of schedules by the reference interpreter beside plain dense training in fp64, and how far they are apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from strategy_helpers import build

from rtp_sim.executor.batches import random_batch
from rtp_sim.executor.dense import DenseResult, Keep, train_dense
from rtp_sim.executor.dropout import masks_of
from rtp_sim.executor.machine import Batch, replicas
from rtp_sim.executor.optimizer import Hyper
from rtp_sim.executor.parameters import Parameters, executed_network, initial_parameters
from rtp_sim.executor.reference import ReferenceResult, run_reference
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Schedule

EXACT = 1e-10
HYPER = Hyper(lr=0.05, eps=1e-4)
"""Adam divides by the gradient's size plus eps. The bias of attention keys has no gradient but rounding (a constant
added to a row of scores changes no probability), which a small eps would blow up to steps of size lr."""


@dataclass(frozen=True)
class Pair:
    """The same training by a schedule and without one."""

    schedule: Schedule
    reference: ReferenceResult
    dense: DenseResult


def batches_of(schedule: Schedule, network: Network, training: TrainingSpec, steps: int) -> list[list[Batch]]:
    """Different data for every step, replica and micro-batch (or evaluation pass)."""
    micros = int(schedule.meta["num_microbatches"] or 1)
    return [
        [random_batch(network, training.micro_batch, micros, r, s) for r in range(replicas(schedule))]
        for s in range(steps)
    ]


def run_both(
    strategy: str, network: Network, n: int, training: TrainingSpec, steps: int = 2, *, dp: int = 1,
    dims: tuple[int, ...] = (), hyper: Hyper = HYPER, seed: int = 0, **options: object,
) -> Pair:  # fmt: skip
    """`steps` training steps of the schedule of `strategy` over n ranks, and dense."""
    schedule = build(strategy, network, n, training, dp=dp, dims=dims, **options)
    executed = executed_network(schedule, network)
    parameters = initial_parameters(executed, dtype=torch.float64)
    batches = batches_of(schedule, executed, training, steps)
    reference = run_reference(schedule, network, training, parameters, batches, hyper=hyper, seed=seed)
    masks = masks_of(schedule, executed, seed, "cpu")
    if masks.sites:
        return Pair(schedule, reference, _dense(executed, batches, training, hyper, masks.whole))
    micros = int(schedule.meta["num_microbatches"] or 1)
    # Of dense training recomputation changes nothing.
    key = (executed, replace(training, recompute="none"), replicas(schedule), micros, steps, hyper)
    if key not in TRAINED:
        TRAINED[key] = _dense(executed, batches, training, hyper, None)
    return Pair(schedule, reference, TRAINED[key])


TRAINED: dict[tuple[object, ...], DenseResult] = {}
"""Dense training, once for all schedules whose replicas have the same data."""


def _dense(
    network: Network, batches: list[list[Batch]], training: TrainingSpec, hyper: Hyper, keep: Keep | None
) -> DenseResult:
    return train_dense(
        network, initial_parameters(network, dtype=torch.float64), batches, training.micro_batch, training.optimizer,
        hyper.lr, hyper.weight_decay, hyper.momentum, hyper.eps, clip_norm=training.clip_norm, keep=keep,
    )  # fmt: skip


def furthest(a: Parameters, b: Parameters) -> tuple[float, str]:
    """The largest difference between two sets of full tensors, and where it is."""
    assert {(layer, p) for layer in a for p in a[layer]} == {(layer, p) for layer in b for p in b[layer]}
    return max((float((a[layer][p] - b[layer][p]).abs().max()), f"{layer}.{p}") for layer in a for p in a[layer])


def assert_equal(pair: Pair) -> None:
    """Losses, every gradient of the last step, and the parameters after it."""
    for loss, expected in zip(pair.reference.losses, pair.dense.losses, strict=True):
        assert abs(loss - expected) < EXACT, (loss, expected)
    for what, got, wanted in (
        ("gradient", pair.reference.gradients, pair.dense.gradients),
        ("parameter", pair.reference.parameters, pair.dense.parameters),
    ):
        distance, where = furthest(got, wanted)
        assert distance < EXACT, f"{what} of {where} is off by {distance}"
