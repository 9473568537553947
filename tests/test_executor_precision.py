"""Mixed precision: bf16 and fp16 weights, activations and gradients with fp32 master weights, in every strategy.

Against dense training of the same recipe, written with autograd: half-precision copies of fp32 parameters compute, the
optimizer works on the fp32 ones. Compared is how far the masters have moved in three steps, relative, per parameter
tensor: without a master copy bf16 weights would hardly move at all, because a step is smaller than their spacing.
"""

from __future__ import annotations

import pytest
import torch
from executor_reference import batches_of
from strategy_helpers import EVERY_STRATEGY, build, gpt2_tiny, llama_tiny
from test_executor_reference import image_tiny

from rtp_sim.executor.dense import dense_loss
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.optimizer import Hyper
from rtp_sim.executor.parameters import Parameters, Share, assembled, executed_network, initial_parameters
from rtp_sim.executor.reference import run_step
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec

MOVED = {"bf16": 0.12, "fp16": 0.015}
"""Largest relative error of how far a parameter tensor has moved: 30 spacings of the dtype (2^-8, 2^-11), because the
sums of a strategy are rounded in its own order, and the gradient of a bias is a sum of many that nearly cancel."""
NETWORKS = {"gpt2": gpt2_tiny(4), "llama": llama_tiny(4), "image": image_tiny()}
STEPS, HYPER = 3, Hyper(lr=1e-2)


def masters(machine: Machine) -> list[Share]:
    """The rank's master weights in the places of its weights."""
    found = []
    for share, work in zip(machine.gradients, machine.updater.works(), strict=True):
        master = machine.states[work.state.name].master
        assert master is not None
        assert master.dtype == torch.float32
        found.append(Share(share.holds, share.widths, share.slice_of, master))
    return found


def dense(network: Network, start: Parameters, batches: list[list[list[object]]], dtype: torch.dtype, scale: float,
          clip: float | None) -> Parameters:  # fmt: skip
    """SGD with momentum on fp32 parameters, gradients from copies of them in `dtype`."""
    ps = {n: {k: v.float().clone().requires_grad_() for k, v in t.items()} for n, t in start.items()}
    flat = [v for t in ps.values() for v in t.values()]
    rule = torch.optim.SGD(flat, lr=HYPER.lr, momentum=HYPER.momentum)
    for step in batches:
        rule.zero_grad()
        micros = [m for replica in step for m in replica]
        for m in micros:
            half = {n: {k: v.to(dtype) for k, v in t.items()} for n, t in ps.items()}
            (dense_loss(network, half, m, 2, dtype).float() * (scale / len(micros))).backward()  # type: ignore[arg-type]
        for v in flat:
            assert v.grad is not None
            v.grad /= scale
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(flat, clip)
        rule.step()
    return {n: {k: v.detach() for k, v in t.items()} for n, t in ps.items()}


@pytest.mark.parametrize(
    ("strategy", "name"),
    [(s, name) for s in EVERY_STRATEGY for name in NETWORKS if not (s.startswith("tp") and name == "image")],
)
@pytest.mark.parametrize(
    ("precision", "changes"), [("bf16", {}), ("fp16", {"loss_scale": "dynamic:1024", "clip_norm": 0.5})]
)
def test_the_masters_move_as_in_dense_training(
    strategy: str, name: str, precision: str, changes: dict[str, object]
) -> None:
    network, n = NETWORKS[name], 1 if strategy == "single" else 2
    spec = TrainingSpec(2, network.seq, precision=precision, optimizer="sgd-momentum", **changes)  # type: ignore[arg-type]
    schedule = build(strategy, network, n, spec)
    executed = executed_network(schedule, network)
    ranks = range(schedule.world_size)
    start, batches = initial_parameters(executed), batches_of(schedule, executed, spec, STEPS)
    machines = [Machine(schedule, r, executed, spec, start, hyper=HYPER, keep_gradients=True) for r in ranks]
    for step in batches:
        run_step(schedule, machines, step)
    assert [m.updates for m in machines] == [STEPS] * len(machines)
    ours = assembled(schedule, executed, [masters(m) for m in machines])
    scale = machines[0].watch.scale
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    theirs = dense(executed, start, batches, half, scale, spec.clip_norm)
    errors = {}
    for layer, tensors in start.items():
        for k, was in tensors.items():
            if layer.endswith("attn") and k == "qkv_bias":
                # The bias of keys has no gradient but rounding.
                continue
            moved, expected = ours[layer][k] - was, theirs[layer][k] - was
            errors[f"{layer}.{k}"] = float((moved - expected).norm() / expected.norm())
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < MOVED[precision], (worst, errors[worst])
    weights = assembled(schedule, executed, [m.weights() for m in machines])
    for layer, tensors in ours.items():
        assert all(torch.equal(weights[layer][k], master.to(half)) for k, master in tensors.items()), layer
