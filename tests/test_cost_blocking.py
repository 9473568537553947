"""Launches that block the host, and heads that miss the matrix units, against times worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from rtp_sim.cost.compute import ComputeCost
from rtp_sim.hardware.profiles import load_device
from rtp_sim.hardware.spec import Number

A100 = load_device("a100-sxm-80gb")
ADD = (("numel", 1 << 20),)


def scores(width: int) -> tuple[tuple[str, int], ...]:
    return (("batch", 4), ("heads", 16), ("kv_heads", 16), ("q", 2048), ("kv", 2048), ("head_dim", width))


def test_every_launch_of_a_kernel_costs_its_blocking_time() -> None:
    plain, blocking = ComputeCost(A100), ComputeCost(replace(A100, blocking_issue_ns=Number(7000, "assumed", "test")))
    assert blocking.cost("add", "fp16", ADD).duration_ns - plain.cost("add", "fp16", ADD).duration_ns == 7000
    # The backward of a batched product is two launches.
    both = [c.cost("attn.scores.bwd", "fp16", scores(128)).duration_ns for c in (blocking, plain)]
    assert both[0] - both[1] == 14000


def test_heads_of_108_run_at_the_rate_of_fp32_and_heads_of_112_do_not() -> None:
    cost = ComputeCost(A100)
    # 64 copies of 2048 x 108 x 2048 in tiles of 256 x 128: 64 * 8 * 16 = 8192, 76 waves of 108; each tile
    # 2 * 256 * 128 * (108 + 96) FLOPs at 19.5 TFLOP/s * 0.869 / 108 a unit: 85.2 us, all 6.475 ms.
    found = cost.cost("attn.scores", "fp16", scores(108)).duration_ns
    assert abs(found - 76 * 2 * 256 * 128 * 204 / (19.5e3 * 0.869 / 108)) < 2
    # On matrix units memory decides: nowhere near.
    assert cost.cost("attn.scores", "fp16", scores(112)).duration_ns < found / 5
    assert cost.cost("attn.scores", "fp32", scores(108)).duration_ns >= found
