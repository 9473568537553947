"""The ops at the end of a step that clip gradients and scale the loss: which, over which groups, what they cost.

They print, parse, pass the checks and are simulated alike by both engines, folded or not."""

from __future__ import annotations

import pytest
from strategy_helpers import DATA_PARALLEL, EVERY_STRATEGY, INNER, FlatCost, build, gpt2_tiny, updated_parameters

from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate
from rtp_sim.experiment import Request, prepare, run
from rtp_sim.model.kernels import bytes_moved, flops
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.checks import findings
from rtp_sim.schedule.ir import Collective, Compute, Op, Schedule
from rtp_sim.schedule.serialize import from_json, to_json
from rtp_sim.schedule.text import from_text, to_text

BOTH = {"clip_norm": 1.0, "loss_scale": "dynamic"}


def schedule_of(strategy: str, n: int = 2, dp: int = 1, sync: str = "ddp", **changes: object) -> Schedule:
    spec = TrainingSpec(2, 8, 2, precision="fp16", **changes)  # type: ignore[arg-type]
    return build(strategy, gpt2_tiny(), n, spec, dp=dp, **({"dp_sync": sync} if strategy in INNER else {}))


def every_case() -> list[tuple[str, int, int, str]]:
    found = [(s, n, 1, "ddp") for s in EVERY_STRATEGY for n in ((1,) if s == "single" else (1, 3))]
    return found + [(s, 2, 2, sync) for s in INNER for sync in ("ddp", "zero1", "zero2")]


def named(schedule: Schedule, start: str) -> list[Op]:
    return [op for op in schedule.programs[0].ops if op.name.startswith(start)]


@pytest.mark.parametrize(("strategy", "n", "dp", "sync"), every_case())
def test_they_read_back_pass_the_checks_and_both_engines_agree(strategy: str, n: int, dp: int, sync: str) -> None:
    for changes in ({"clip_norm": 1.0}, {"loss_scale": "static:8"}, BOTH):
        schedule = schedule_of(strategy, n, dp, sync, **changes)
        assert findings(schedule) == []
        assert from_text(to_text(schedule)) == schedule == from_json(to_json(schedule))
        cost = FlatCost({}, 5, other_ns=7)
        timeline = simulate(schedule, cost)
        assert timeline.step_time_ns == longest_path(schedule, cost).step_time_ns
        assert timeline.step_time_ns == simulate(schedule, cost, fold=False).step_time_ns


def test_nothing_is_there_that_was_not_asked_for() -> None:
    for strategy in EVERY_STRATEGY:
        schedule = schedule_of(strategy, 1 if strategy == "single" else 2)
        assert named(schedule, "grad_norm") == named(schedule, "loss_scale") == []
        assert not {"clip_norm", "loss_scale", "dropout"} & schedule.meta.keys()
    assert {k: schedule_of("ddp", **BOTH).meta[k] for k in BOTH} == BOTH


OVER = [
    *((s, 2, 1, "ddp", [] if s in ("single", "ddp") else ["dp"]) for s in DATA_PARALLEL),
    *((s, 2, 1, "ddp", [axis]) for s, axis in INNER.items()),
    *((s, 2, 2, "ddp", [axis]) for s, axis in INNER.items()),
    *((s, 2, 2, "zero1", [axis, "dp"]) for s, axis in INNER.items()),
    *((s, 1, 2, "zero2", ["dp"]) for s in INNER),
]


@pytest.mark.parametrize(("strategy", "n", "dp", "sync", "groups"), OVER)
def test_the_norm_is_summed_where_gradients_differ(
    strategy: str, n: int, dp: int, sync: str, groups: list[str]
) -> None:
    """Copies need no communication: data parallelism with whole gradients. One number, or two with a loss scale."""
    for changes, size in (({"clip_norm": 1.0}, 4), (BOTH, 8)):
        schedule = schedule_of(strategy, n, dp, sync, **changes)
        ops = named(schedule, "grad_norm.reduce")
        assert [op.action for op in ops] == [Collective("all_reduce", g, size, "fp32") for g in groups]
        # Only a loss scale lets the host wait for the verdict.
        first, *_ = named(schedule, "grad_norm")
        waits = [op.blocks_host for op in (first, *ops)]
        assert waits == [False] * len(ops) + [changes is BOTH]


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_one_pass_over_the_gradients_and_no_more(strategy: str) -> None:
    """The kernel reads each gradient that the rank updates with once (2 bytes in fp16) and writes two fp32 numbers."""
    schedule = schedule_of(strategy, 1 if strategy == "single" else 3, **BOTH)
    total = 0
    for rank in range(schedule.world_size):
        (op,) = [op for op in schedule.program(rank).ops if op.name == "grad_norm"]
        assert isinstance(op.action, Compute)
        dims = op.action.dims_at(schedule.shard_index(rank, op.action.part))
        assert bytes_moved("grad_norm", dims, op.action.dtype) == 2 * dict(dims)["numel"] + 8
        assert flops("grad_norm", dims) == 0
        total += dict(dims)["numel"]
    assert total == updated_parameters(schedule)
    plain = schedule_of(strategy, 1 if strategy == "single" else 3)
    assert named(plain, "optimizer")[0].action == named(schedule, "optimizer")[0].action


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_no_update_before_every_gradient_is_known(strategy: str) -> None:
    schedule = schedule_of(strategy, 1 if strategy == "single" else 2, **BOTH)
    (norm,), (step,) = (named(schedule, name)[:1] for name in ("grad_norm", "optimizer"))
    assert set(norm.reads) == {b for b in step.reads if b.startswith("g.")}
    assert {"grad_norm", "loss_scale"} <= set(step.reads)
    assert schedule.programs[0].ops[-1].name == "loss_scale" or strategy.startswith("zero")
    starts = [op for op in schedule.programs[0].ops if "loss_scale" in op.reads and "cross_entropy.bwd" in op.name]
    assert [op.name.partition(".")[0] for op in starts] == ["m0", "m1"]


def test_clipping_costs_what_the_pass_takes() -> None:
    """GPT-2 XL in bf16 on one A100: the step is longer by the kernel's floor and 2 bytes per parameter at the rate the
    profile gives memory-bound kernels."""
    plain, clipped = (
        run(prepare(Request("gpt2-xl", "dgx-a100-80g", "single", gpus=1, clip_norm=clip)), engine="longest-path")
        for clip in (None, 1.0)
    )
    device = clipped.prepared.cluster.device
    rate = device.memory_bandwidth_bytes_per_s.value * device.memory_efficiency.value
    bytes_read = 2 * clipped.prepared.network.parameter_count() + 8
    expected_s = device.kernel_floor_ns.value / 1e9 + bytes_read / rate
    longer_s = clipped.metrics.step_time_s - plain.metrics.step_time_s
    assert longer_s == pytest.approx(expected_s, abs=2e-9)
