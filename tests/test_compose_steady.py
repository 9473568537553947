"""Long pipelines from short ones: to the nanosecond what going through the whole step gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_compose_estimate import VARIANTS, setting, simulated

from rtp_sim.compose.composition import Composition, composition
from rtp_sim.compose.estimate import by_passes
from rtp_sim.compose.passes import in_passes
from rtp_sim.compose.pipeline import gone_through, walked
from rtp_sim.compose.steady import Gone, Stand, alike, in_rounds
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


def test_what_kernels_lose_beside_messages_settles_later_than_the_clocks() -> None:
    """On a V the time of the last stage's kernels still changes when all clocks keep their pace."""
    made = composition(slower_host(setting("zb-v", pp=3, gpus=3, micro_batch=1, micro_batches=62), 3))
    whole = [(s.end_ns, *s.spent_ns[-1].tolist()) for s in gone_through(made, 62).stages]
    assert [(s.end_ns, s.compute_ns, s.exposed_ns, s.host_ns) for s in walked(made).stages] == whole


@pytest.mark.parametrize(("strategy", "changes"), [("1f1b", {"nodes": 2, "inner": 2}), ("interleaved", {"gpus": 4})])
def test_a_long_step_is_the_longest_path(strategy: str, changes: dict[str, object]) -> None:
    given = setting(strategy, **changes, micro_batches=64)
    walk = walked(composition(given, shared=False, slowdown=False))
    assert walk.lengths == (20,)
    assert max(stage.end_ns for stage in walk.stages) == simulated(given, "longest-path").timeline.step_time_ns


def test_how_many_micro_batches_are_gone_through() -> None:
    assert [walked(composition(setting("1f1b", gpus=4, micro_batches=m))).lengths for m in (24, 28, 66)] == [
        (24,), (20,), (22,)]  # fmt: skip
    assert walked(composition(setting("gpipe", gpus=4, micro_batches=64))).lengths == (64,)


def test_a_host_that_works_off_a_lead_is_seen() -> None:
    """A host takes longer than the kernels for a round, from a lead: the whole step is longer than rounds like those of
    a short one."""
    made = composition(slower_host(setting("1f1b", nodes=2, inner=2, micro_batches=128), 5))
    short, longer = (gone_through(made, micros) for micros in (20, 24))
    assert short.end_ns + 27 * (longer.end_ns - short.end_ns) < whole_end_ns(made)
    growth = [stage.clocks_ns[-1] - stage.clocks_ns[-5] for stage in short.stages]
    assert max(g.max() - g[0] for g in growth) > 0
    assert walked(made).lengths[-1] == 128


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [("1f1b", {"nodes": 4, "micro_batch": 4}), ("interleaved", {"nodes": 2, "inner": 2}), ("zb-v", {"gpus": 4})],
)
def test_the_events_settle_as_well(strategy: str, changes: dict[str, object]) -> None:
    """With messages that share links and slow the kernels beside them."""
    made = composition(setting(strategy, **changes, micro_batches=64))
    found = by_passes(made, walked(made))
    assert round(found.metrics.step_time_s * 1e9) == simulate(*in_passes(made)).step_time_ns
    assert found.how.endswith(" (20 of 64 micro-batches)")


def stand(clocks: list[tuple[int, ...]], spent: list[int], end_ns: int) -> Stand:
    return Stand(np.array(clocks), np.array(spent)[:, None], end_ns)


def test_alike_is_a_round_like_the_one_before() -> None:
    """Two stages: of four micro-batches the last two are 10 later than the two before, the host 9."""
    clocks = [(5, 1), (11, 6), (15, 10), (21, 15)]
    one = stand(clocks, [0, 3, 4, 7, 9], 30)
    assert alike(Gone((one, one)), 2)
    other = stand([(7, 0), (8, 0), (17, 0), (18, 0)], [0, 0, 0, 0, 2], 33)
    assert alike(Gone((one, other)), 2)
    assert not alike(Gone((one, replace(other, clocks_ns=other.clocks_ns * 2))), 2)  # stages at another pace
    assert not alike(Gone((replace(one, spent_ns=np.array([[0], [3], [4], [8], [9]])),)), 2)
    assert not alike(Gone((stand([(5, 1), (11, 6), (15, 10), (22, 15)], [0, 3, 4, 7, 9], 30),)), 2)
    assert not alike(Gone((stand([(5, 1), (11, 6), (15, 12), (21, 17)], [0, 3, 4, 7, 9], 30),)), 2)  # the host lags
    earlier = [(-5, -8), (1, -3), *clocks]
    assert alike(Gone((stand(earlier, [-4, -1, 0, 3, 4, 7, 9], 30),)), 2)
    assert not alike(Gone((stand(earlier, [-4, -2, 0, 3, 4, 7, 9], 30),)), 2)


def test_rounds_are_added() -> None:
    """A pace of 7 for the first rounds, then of 5: what is not alike in five rounds is in eight."""

    def through(micros: int, slow: int) -> Gone:
        clocks = np.cumsum([7 if k < slow else 5 for k in range(micros)])[:, None]
        return Gone((Stand(clocks, np.append(clocks, clocks[-1:] + 4, axis=0), int(clocks[-1, 0]) + 100),))

    for slow, micros, lengths in ((0, 99, (23,)), (14, 100, (20, 28)), (14, 60, (20, 60)), (0, 26, (26,))):
        found, tried = in_rounds(lambda n, slow=slow: through(n, slow), 4, micros)  # type: ignore[misc]
        whole = through(micros, slow)
        assert tried == lengths
        assert (found.end_ns, found.stages[0].spent_ns[-1]) == (whole.end_ns, whole.stages[0].spent_ns[-1])
