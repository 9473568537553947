"""Long pipelines from three short ones: to the nanosecond what going through the whole step gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_compose_estimate import VARIANTS, setting, simulated

from rtp_sim.compose.composition import Composition, composition
from rtp_sim.compose.estimate import by_passes
from rtp_sim.compose.passes import in_passes
from rtp_sim.compose.pipeline import gone_through, walked
from rtp_sim.compose.steady import Gone, continued, in_rounds
from rtp_sim.engine.simulate import simulate
from rtp_sim.experiment import Setting, settle


def slower_host(given: Setting, factor: int) -> Setting:
    """The same with a host that takes `factor` times as long for everything it issues."""
    device = given.cluster.device
    issue = replace(device.host_issue_ns, value=device.host_issue_ns.value * factor)
    return settle(given.request, replace(given.cluster, device=replace(device, host_issue_ns=issue)), given.network)


def whole_end_ns(made: Composition) -> int:
    """When the step ends if all micro-batches are gone through one after another."""
    return gone_through(made, made.micros).end_ns


@pytest.mark.parametrize("factor", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", ["1f1b", "interleaved", "gpipe", "zb-h1", "zb-h2"])
def test_a_long_step_from_short_ones(strategy: str, variant: dict[str, object], factor: int) -> None:
    for micros in (64, 128) if strategy == "interleaved" else (63, 128):
        made = composition(slower_host(setting(strategy, **{**variant, "micro_batches": micros}), factor))
        assert max(stage.end_ns for stage in walked(made).stages) == whole_end_ns(made)


@pytest.mark.parametrize(("strategy", "changes"), [("1f1b", {"nodes": 2, "inner": 2}), ("interleaved", {"gpus": 4})])
def test_a_long_step_is_the_longest_path(strategy: str, changes: dict[str, object]) -> None:
    given = setting(strategy, **changes, micro_batches=64)
    walk = walked(composition(given, shared=False, slowdown=False))
    assert walk.lengths == (12, 16, 20)
    assert max(stage.end_ns for stage in walk.stages) == simulated(given, "longest-path").timeline.step_time_ns


def test_how_many_micro_batches_are_gone_through() -> None:
    assert [walked(composition(setting("1f1b", gpus=4, micro_batches=m))).lengths for m in (48, 52, 66)] == [
        (48,), (12, 16, 20), (14, 18, 22)]  # fmt: skip
    assert walked(composition(setting("gpipe", gpus=4, micro_batches=64))).lengths == (64,)


def test_a_host_that_works_off_a_lead_is_seen() -> None:
    """A host takes longer than the step for a round, from a lead: the short steps are on a straight line, on which the
    whole step is not."""
    made = composition(slower_host(setting("1f1b", nodes=2, inner=2, micro_batches=128), 5))
    steps = [gone_through(made, micros) for micros in (12, 16, 20)]
    growth_ns = steps[2].end_ns - steps[1].end_ns
    assert growth_ns == steps[1].end_ns - steps[0].end_ns
    assert steps[2].end_ns + 27 * growth_ns < whole_end_ns(made)
    assert max(c - b for b, c in zip(steps[1].clocks_ns, steps[2].clocks_ns, strict=True)) > growth_ns
    assert walked(made).lengths == (128,)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [("1f1b", {"nodes": 4, "micro_batch": 4}), ("interleaved", {"nodes": 2, "inner": 2}), ("zb-h1", {"gpus": 4})],
)
def test_the_events_settle_as_well(strategy: str, changes: dict[str, object]) -> None:
    """With messages that share links and slow the kernels beside them."""
    made = composition(setting(strategy, **changes, micro_batches=64))
    found = by_passes(made, walked(made))
    assert round(found.metrics.step_time_s * 1e9) == simulate(*in_passes(made)).step_time_ns
    assert found.how.endswith("; 12, 16 and 20 of 64 micro-batches")


def test_straight_lines() -> None:
    steps = [Gone(10, (9, 2), (5,)), Gone(14, (13, 3), (5,)), Gone(18, (17, 4), (5,))]
    assert continued(steps, 11) == Gone(18 + 11 * 4, (17 + 11 * 4, 4 + 11), (5,))
    assert continued([*steps[:2], Gone(19, (17, 4), (5,))], 11) is None
    assert continued([*steps[:2], Gone(18, (17, 4), (6,))], 11) is None
    leads = [Gone(10, (5,)), Gone(14, (10,)), Gone(18, (15,))]
    assert continued(leads, 11) is None


def test_rounds_until_two_are_alike() -> None:
    """A round takes 7, then 6, then 5 for good; three short steps must be less work than the whole one."""

    def through(micros: int) -> Gone:
        rounds = micros // 4
        return Gone(sum({1: 7, 2: 7, 3: 7, 4: 6}.get(k, 5) for k in range(1, rounds + 1)) + micros % 4)

    assert in_rounds(through, 4, 100) == (through(100), (12, 16, 20, 24))
    assert in_rounds(through, 4, 101) == (through(101), (13, 17, 21, 25))
    assert in_rounds(through, 4, 72) == (through(72), (72,))
    assert in_rounds(through, 4, 73) == (through(73), (73,))
    assert in_rounds(through, 4, 48) == (through(48), (48,))
    assert in_rounds(lambda micros: Gone(micros * micros), 4, 1000) == (Gone(1_000_000), (1000,))
