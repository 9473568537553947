"""Composed and extrapolated steps against the engines' evaluation of every op.

Composed == longest path to the nanosecond where ranks of a stage do the same; within a part of a percent of the events
with contention and slowdown. Straight lines in blocks and micro-batches: within 1 %.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from rtp_sim.compose.composition import composition
from rtp_sim.compose.estimate import estimate, shortened
from rtp_sim.compose.pipeline import StageResult, walked
from rtp_sim.experiment import Request, Result, Setting, built, find_network, run, settle
from rtp_sim.model.network import transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.pipeline_order import PIPELINES

VARIANTS: list[dict[str, object]] = [
    {"gpus": 4},
    {"nodes": 2, "inner": 2},
    {"nodes": 2, "inner": 2, "options": Options(sequence_parallel=True, dp_sync="zero1")},
    {"nodes": 2, "inner": 2, "recompute": "full", "options": Options(pp_scatter_gather=True, pp_overlap=False)},
    {"gpus": 8, "options": Options(dp_overlap=False), "micro_batches": 16, "clip_norm": 1.0},
    {"nodes": 2, "inner": 2, "options": Options(pp_overlap=False, pp_synchronised=True, tp_overlap=False)},
]


def setting(strategy: str, **changes: object) -> Setting:
    """gpt2-medium cut down to 8 blocks and a vocabulary that divides, on 4 stages."""
    network = transformer_network(find_model("gpt2-medium", num_layers=8, vocab_size=50304), 512)
    given: dict[str, object] = {"pp": 4, "micro_batch": 2, "micro_batches": 8, **changes}
    if strategy == "interleaved":
        given["options"] = replace(given.get("options", Options()), vpp=2)  # type: ignore[type-var]
    request = Request("gpt2-medium", "dgx-a100-80g", strategy, **given)  # type: ignore[arg-type]
    return settle(request, network=network)


def end_ns(stages: list[StageResult]) -> int:
    return max(stage.end_ns for stage in stages)


def simulated(prepared: Setting, engine: str) -> Result:
    return run(built(prepared), engine)


@pytest.mark.parametrize("strategy", [s for s in PIPELINES if s not in ("zb-1p", "zb-2p")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_composed_is_the_longest_path(strategy: str, variant: dict[str, object]) -> None:
    given = setting(strategy, **variant)
    whole = simulated(given, "longest-path")
    stages = walked(composition(given, shared=False, slowdown=False)).stages
    assert end_ns(stages) == pytest.approx(whole.timeline.step_time_ns, rel=2e-4)
    if strategy != "zb-v" or not given.request.options.sequence_parallel:
        # A V under sequence parallelism starts a gather early that the composition lets wait: 0.01 %.
        assert end_ns(stages) == whole.timeline.step_time_ns
    # What arrives before it is needed, or is sent while the next chunk computes, is held a little longer.
    assert max(s.memory.total_bytes for s in stages) == pytest.approx(whole.metrics.peak_memory_bytes, rel=0.01)
    assert max(s.sent_bytes for s in stages) >= whole.metrics.bytes_sent_per_rank


@pytest.mark.parametrize("strategy", ["1f1b", "interleaved", "zb-h1", "zb-v"])
def test_composed_with_contention_is_close_to_the_events(strategy: str) -> None:
    for variant in VARIANTS[1:4]:
        given = setting(strategy, **variant)
        expected = simulated(given, "simpy").timeline.step_time_ns
        assert end_ns(walked(composition(given)).stages) == pytest.approx(expected, rel=5e-3)


def test_the_number_of_micro_batches_is_only_counted() -> None:
    """A hundred times as many: from there on each costs the slowest stage's forward and backward."""
    made = composition(setting("1f1b", gpus=4, micro_batches=800))
    few, more, most = (end_ns(walked(made.of_length(m)).stages) for m in (8, 9, 800))
    assert most - few == 792 * (more - few)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [("ddp", {}), ("zero1", {}), ("fsdp", {}), ("tp-sp", {"inner": 2}), ("rtp", {"inner": 4}), ("fsdp", {"nodes": 2})],
)
def test_straight_lines_in_blocks_and_micro_batches(strategy: str, changes: dict[str, object]) -> None:
    sizes = {} if changes.get("nodes") else {"gpus": 4}
    request = Request("gpt2-medium", "dgx-a100-80g", strategy, micro_batches=5, **sizes, **changes)  # type: ignore[arg-type]
    found, whole = estimate(request), run(built(settle(request))).metrics
    assert found.extrapolated
    assert found.how == "simulated with 6 and 12 blocks, 2 and 3 micro-batches"
    assert found.metrics.step_time_s == pytest.approx(whole.step_time_s, rel=0.01)
    assert found.metrics.peak_memory_bytes == pytest.approx(whole.peak_memory_bytes, rel=0.01)
    assert found.metrics.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.01)
    assert found.metrics.messages_per_rank == pytest.approx(whole.messages_per_rank, rel=0.03)


def test_a_small_step_is_simulated() -> None:
    request = Request("gpt2-tiny", "dgx-a100-80g", "ddp", gpus=2, micro_batches=3)
    found = estimate(request)
    assert (found.extrapolated, found.how) == (False, "simulated")
    assert found.metrics == run(built(settle(request))).metrics


def test_a_pipeline_estimate_says_so() -> None:
    found = estimate(setting("1f1b", gpus=8))
    assert (found.extrapolated, found.how) == (True, "composed")
    m = found.metrics
    assert m.compute_time_s + m.exposed_communication_s + m.bubble_s == pytest.approx(m.step_time_s)
    assert m.tokens_per_s == pytest.approx(2 * 8 * 2 * 512 / m.step_time_s)


def test_a_shortened_network_is_the_smaller_model() -> None:
    whole, small = find_network("gpt2-medium", 64), shortened(find_network("gpt2-medium", 64), 5)
    wanted = transformer_network(find_model("gpt2-medium", num_layers=5), 64)
    assert small.blocks == wanted.blocks
    assert shortened(whole, 24) is whole
