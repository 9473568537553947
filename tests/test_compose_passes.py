"""A pipeline step with each pass in a few ops against the engines' evaluation of every op: the same longest path to the
nanosecond, and with contention nearer to the events than what is composed."""

from __future__ import annotations

import pytest
from test_compose_estimate import VARIANTS, setting

from rtp_sim.compose.composition import composition
from rtp_sim.compose.estimate import PASSES, by_passes
from rtp_sim.compose.passes import PASS, PassCost, in_passes, timed
from rtp_sim.compose.pipeline import walked
from rtp_sim.engine.costs import OpCost
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate
from rtp_sim.experiment import built
from rtp_sim.schedule.ir import Compute, Op
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.pipeline_order import PIPELINES


@pytest.mark.parametrize("strategy", [s for s in PIPELINES if s not in ("zb-1p", "zb-2p")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_longest_path_is_that_of_all_ops(strategy: str, variant: dict[str, object]) -> None:
    given = setting(strategy, **variant)
    schedule, cost = in_passes(composition(given, shared=False, slowdown=False))
    assert longest_path(schedule, cost).step_time_ns == longest_path(built(given).schedule, given.cost).step_time_ns


@pytest.mark.parametrize(
    ("strategy", "changes", "off"),
    [
        # Without tensor parallelism nothing inside a pass is shared: what remains is rounding.
        ("1f1b", {"gpus": 4}, 1e-6),
        ("1f1b", {"nodes": 4, "micro_batch": 4}, 1e-6),
        ("zb-h1", {"gpus": 4}, 1e-6),
        ("zb-v", {"gpus": 4, "options": Options(pp_overlap=False)}, 1e-6),
        # With it, kernels are slowed by messages in proportion to their part of a pass, not one by one.
        ("1f1b", {"nodes": 2, "inner": 2}, 5e-4),
        ("interleaved", {"nodes": 4, "inner": 4, "options": Options(sequence_parallel=True, dp_sync="zero1")}, 2e-3),
        ("gpipe", {"nodes": 2, "inner": 2, "recompute": "full", "options": Options(pp_scatter_gather=True)}, 5e-4),
        ("1f1b", {"nodes": 4, "inner": 4, "options": Options(sequence_parallel=True, dp_sync="zero1")}, 2e-3),
    ],
)
def test_with_contention_it_is_the_step_of_all_ops(strategy: str, changes: dict[str, object], off: float) -> None:
    given = setting(strategy, **changes)
    made = composition(given)
    found = simulate(*in_passes(made)).step_time_ns
    assert found == pytest.approx(simulate(built(given).schedule, given.cost).step_time_ns, rel=off)
    assert by_passes(made, walked(made)).metrics.step_time_s == pytest.approx(found / 1e9)


def test_contention_that_composing_does_not_see() -> None:
    """Messages of four stages and the reductions beside them on few adapters: composed, the step is 0.4 % too short."""
    given = setting("1f1b", nodes=4, micro_batch=4)
    made = composition(given)
    whole, walk = simulate(built(given).schedule, given.cost).step_time_ns, walked(made)
    assert abs(max(stage.end_ns for stage in walk.stages) / whole - 1) > 2e-3
    found = by_passes(made, walk)
    assert found.metrics.step_time_s == pytest.approx(whole / 1e9, rel=1e-6)
    assert found.how == PASSES


def test_the_ops_of_a_pass_do_not_grow_with_its_layers() -> None:
    """First, middle and last stage of 1F1B: forward and send; receive, forward and send; receive and forward; and as
    many backward. The last backward and the end keep their ops."""
    few, many = (in_passes(composition(setting("1f1b", gpus=4, micro_batches=m)))[0] for m in (8, 18))
    assert [len(m.ops) - len(f.ops) for f, m in zip(few.programs, many.programs, strict=True)] == [40, 60, 60, 40]
    passes = [op for op in many.programs[1].ops if isinstance(op.action, Compute) and op.action.kernel == PASS]
    assert len(passes) == 2 * 18 - 1


def test_a_kernel_may_say_itself_how_much_communication_slows_it() -> None:
    """Half of a pass is kernels: beside a message it takes half of the cost model's 12.6 % longer."""
    cost = PassCost(setting("1f1b", gpus=4).cost)
    action = timed(1_000_000, 5_000, 500)
    assert cost.overlap_slowdown_permille == 1126
    assert cost.compute(action.kernel, action.dtype, action.dims) == OpCost(1_000_000, "assumed", 1063)
    assert cost.host_issue_ns(Op(0, "pass", "compute", action)) == 5_000
