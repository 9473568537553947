"""A pipeline step with each pass as one op against the engines' evaluation of every op: the same longest path to the
nanosecond, and with contention nearer to the events than what is composed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_compose_estimate import VARIANTS, setting

from rtp_sim.compose.composition import composition
from rtp_sim.compose.estimate import PASSES, by_passes, estimate
from rtp_sim.compose.passes import PASS, in_passes
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate
from rtp_sim.experiment import built
from rtp_sim.schedule.ir import Compute, Schedule
from rtp_sim.schedule.pipeline_order import PIPELINES


@pytest.mark.parametrize("strategy", [s for s in PIPELINES if s not in ("zb-1p", "zb-2p")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_longest_path_is_that_of_all_ops(strategy: str, variant: dict[str, object]) -> None:
    given = setting(strategy, **variant)
    schedule, cost = in_passes(composition(given, shared=False, slowdown=False))
    assert longest_path(schedule, cost).step_time_ns == longest_path(built(given).schedule, given.cost).step_time_ns


def kinds(schedule: Schedule) -> list[int]:
    return [sum(isinstance(op.action, Compute) and op.action.kernel == PASS for op in p.ops) for p in schedule.programs]
