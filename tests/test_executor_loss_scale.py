"""Loss scaling: the scale follows torch.amp.GradScaler's, a gradient that is not finite anywhere stops the update
everywhere, and what is trained is what is trained without a scale."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from executor_reference import EXACT, batches_of, furthest, run_both
from strategy_helpers import EVERY_STRATEGY, build, gpt2_tiny, stack
from test_executor_reference import image_tiny

from rtp_sim.errors import InputError
from rtp_sim.executor.dense import dense_loss
from rtp_sim.executor.gradients import LossScaler, factor
from rtp_sim.executor.machine import Batch, Machine
from rtp_sim.executor.optimizer import Hyper
from rtp_sim.executor.parameters import Parameters, assembled, initial_parameters
from rtp_sim.executor.reference import run_reference, run_step
from rtp_sim.model.layers import Linear
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Schedule

# ---- the scale


def grad_scaler_follows(inits: float, interval: int, finite: list[bool]) -> list[float]:
    """The scales of torch's GradScaler over steps whose gradients are finite or not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=inits, growth_interval=interval)
    weight = torch.nn.Parameter(torch.zeros(3))
    rule = torch.optim.SGD([weight], lr=1.0)
    scales = []
    for good in finite:
        weight.grad = torch.tensor([1.0, 1.0 if good else float("nan"), 2.0])
        scaler.scale(torch.zeros(()))
        scaler.step(rule)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize(("start", "interval"), [(65536.0, 3), (1.0, 1), (2.0**125, 2), (3.0, 2)])
def test_the_scale_takes_the_same_way_as_grad_scaler(start: float, interval: int) -> None:
    """300 steps of which a seventh overflow; from 2^125 the scale comes to the largest that fp32 has."""
    draw = random.Random(interval)
    finite = [draw.random() > 1 / 7 for _ in range(300)]
    ours, scales = LossScaler(start, interval=interval), []
    for good in finite:
        ours.update(good)
        scales.append(ours.scale)
    assert scales == grad_scaler_follows(start, interval, finite)


def test_it_starts_and_changes_as_grad_scaler_does_by_default() -> None:
    torchs, ours = torch.amp.GradScaler("cpu"), LossScaler()
    assert (ours.scale, ours.growth, ours.backoff, ours.interval) == (
        torchs.get_scale(), torchs.get_growth_factor(), torchs.get_backoff_factor(), torchs.get_growth_interval(),
    )  # fmt: skip


def test_a_static_scale_stays() -> None:
    ours = LossScaler(1024.0, dynamic=False, interval=1)
    for finite in (True, False, True):
        ours.update(finite)
    assert ours.scale == 1024


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.0, 7.0, float("inf"), float("nan")])
def test_the_factor_is_that_of_clip_grad_norm(norm: float) -> None:
    gradient = torch.nn.Parameter(torch.zeros(1))
    gradient.grad = torch.tensor([norm])
    torch.nn.utils.clip_grad_norm_([gradient], 1.0)
    by = factor(torch.tensor(norm), 1.0, 1.0)
    torch.testing.assert_close(by * torch.tensor([norm]), gradient.grad, rtol=1e-6, atol=0, equal_nan=True)


# ---- training


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_a_scale_changes_nothing_but_the_rounding(strategy: str) -> None:
    """A static scale of 3, no power of two, in fp64: as dense training without one, two AdamW steps of two
    micro-batches each."""
    network = gpt2_tiny(4)
    spec = TrainingSpec(2, 4, 2, precision="fp32", recompute="full", loss_scale="static:3")
    pair = run_both(strategy, network, 1 if strategy == "single" else 2, spec)
    assert pair.reference.losses == pytest.approx(pair.dense.losses, abs=EXACT)
    assert furthest(pair.reference.gradients, pair.dense.gradients)[0] < EXACT
    assert furthest(pair.reference.parameters, pair.dense.parameters)[0] < EXACT
    assert pair.reference.grad_norms == pytest.approx(pair.dense.grad_norms, abs=EXACT)


INFINITE = (0, 3, 4, 9)
"""Steps in which one number of one replica's images is infinite."""


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp", "rtp"])
def test_training_with_overflows_is_that_of_grad_scaler(strategy: str) -> None:
    """Twelve steps of SGD with momentum in fp32, two micro-batches, clipped: the scales, and where the weights are."""
    network, start = image_tiny(), 256.0
    spec = TrainingSpec(
        2, 1, 2, precision="fp32", optimizer="sgd-momentum", clip_norm=0.5, loss_scale=f"dynamic:{start:g}"
    )
    schedule = build(strategy, network, 2, spec)
    batches, parameters = batches_of(schedule, network, spec, 12), initial_parameters(network)
    for number in INFINITE:
        batches[number][1][0]["x"][5] = float("inf")
    machines = [Machine(schedule, r, network, spec, parameters, hyper=Hyper(lr=0.05)) for r in range(2)]
    ours = []
    for m in machines:
        assert m.watch.scaler is not None
        m.watch.scaler.interval = 2
    for number, step in enumerate(batches):
        run_step(schedule, machines, step)
        assert [m.watch.skipped for m in machines] == [number in INFINITE] * 2
        ours.append([m.watch.scale for m in machines])
    expected, weights = dense_with_grad_scaler(network, parameters, batches, start)
    assert ours == [[scale, scale] for scale in expected]
    assert len(set(expected)) == 3
    found = assembled(schedule, network, [m.weights() for m in machines])
    for layer, tensors in weights.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[layer][name], tensor.detach(), rtol=1e-4, atol=1e-5)


def dense_with_grad_scaler(
    network: Network, parameters: Parameters, batches: Sequence[Sequence[Batch]], start: float
) -> tuple[list[float], Parameters]:
    """The scale after each step, and the parameters at the end."""
    ps = {n: {k: v.clone().requires_grad_() for k, v in t.items()} for n, t in parameters.items()}
    flat = [v for t in ps.values() for v in t.values()]
    rule = torch.optim.SGD(flat, lr=0.05, momentum=0.9)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=2), []
    for step in batches:
        rule.zero_grad()
        losses = [dense_loss(network, ps, m, 2, torch.float32) for replica in step for m in replica]
        scaler.scale(torch.stack(losses).mean()).backward()
        scaler.unscale_(rule)
        torch.nn.utils.clip_grad_norm_(flat, 0.5)
        scaler.step(rule)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, ps


# ---- an overflow on one rank


Step = list[list[dict[str, torch.Tensor]]]


def spoiled(schedule: Schedule, network: Network, spec: TrainingSpec, huge: bool) -> Step:
    """Batches whose start gradient is zero but for output feature 5; `huge` makes one of its weight gradients overflow
    in fp16: half of 65536 x 0.9 x 4 > 65504, while half of 65536 x 0.9 is not."""
    batches = batches_of(schedule, network, spec, 1)[0]
    for replica in batches:
        x, dy = torch.full((8,), 0.25), torch.zeros(12)
        x[2] = 4.0 if huge else 1.0
        dy[5] = 0.9
        replica[0] |= {"x": x, "d.l0.y": dy}
    return batches  # type: ignore[return-value]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "fsdp", "rtp", "rtp-inplace"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_overflow_on_one_rank_stops_the_update_on_all(strategy: str, clip: float | None) -> None:
    """Weight (5, 2) of a linear of 12 x 8 on 3 ranks: with shards only one rank has it."""
    network = stack([Linear(8, 12)])
    spec = TrainingSpec(1, 1, precision="fp16", loss_scale="dynamic", clip_norm=clip)
    schedule = build(strategy, network, 3, spec)
    machines = [Machine(schedule, r, network, spec, initial_parameters(network), keep_gradients=True) for r in range(3)]
    before = [[share.content.clone() for share in m.weights()] for m in machines]
    run_step(schedule, machines, spoiled(schedule, network, spec, huge=True))
    overflowed = [not all(bool(torch.isfinite(s.content).all()) for s in m.gradients) for m in machines]
    assert sum(overflowed) == (3 if strategy == "ddp" else 1)
    for m, old in zip(machines, before, strict=True):
        assert (m.watch.skipped, m.updates, m.watch.scale) == (True, 0, 32768)
        assert all(torch.equal(share.content, was) for share, was in zip(m.weights(), old, strict=True))
        assert all(not moment.any() for s in m.states.values() for moment in s.moments)
    run_step(schedule, machines, spoiled(schedule, network, spec, huge=False))
    for m in machines:
        assert (m.watch.skipped, m.updates, m.watch.scale) == (False, 1, 32768)
    assert any(not torch.equal(machines[r].weights()[0].content, before[r][0]) for r in range(3))
    # As if the step that was left out had never been: moments, and Adam's number of the step.
    later = dataclasses.replace(spec, loss_scale="dynamic:32768")
    others = [Machine(schedule, r, network, later, initial_parameters(network)) for r in range(3)]
    run_step(schedule, others, spoiled(schedule, network, spec, huge=False))
    for m, other in zip(machines, others, strict=True):
        pairs = zip(m.weights(), other.weights(), strict=True)
        assert all(torch.equal(a.content, b.content) for a, b in pairs)


def test_small_gradients_survive_in_fp16_with_a_scale_only() -> None:
    """A start gradient of 2^-30 is zero in fp16, whose smallest number is 2^-24; times 65536 it is 2^-14."""
    found = []
    for scale in ("none", "dynamic"):
        network, spec = stack([Linear(8, 12)]), TrainingSpec(1, 1, precision="fp16", loss_scale=scale)
        schedule = build("ddp", network, 1, spec)
        batches = batches_of(schedule, network, spec, 1)
        batches[0][0][0] |= {"x": torch.ones(8), "d.l0.y": torch.full((12,), 2.0**-30)}
        result = run_reference(schedule, network, spec, initial_parameters(network), batches, float64=False)
        found.append(result.gradients["l0"]["weight"])
    assert not found[0].any()
    assert torch.equal(found[1], torch.full((12, 8), 2.0**-30))


def test_a_schedule_with_a_loss_scale_wants_to_know_which() -> None:
    network, spec = stack([Linear(8, 12)]), TrainingSpec(1, 1, precision="fp16", loss_scale="dynamic")
    schedule = build("ddp", network, 1, spec)
    with pytest.raises(InputError, match="loss_scale is 'none', but the schedule scales the loss"):
        Machine(schedule, 0, network, TrainingSpec(1, 1, precision="fp16"), initial_parameters(network))
