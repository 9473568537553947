"""Peak memory of published runs: what layers keep by the published formulas, what sources count, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_validation_measured import PLAIN, row

from rtp_sim.compose.memory import Footprint, Memory, StageMemory, sweep
from rtp_sim.compose.pipeline import stage_memories
from rtp_sim.engine.memory import live_intervals
from rtp_sim.experiment import built
from rtp_sim.model.layers import Attention, CrossEntropy, Extent
from rtp_sim.validation.evaluate import evaluate, setting_of
from rtp_sim.validation.frameworks import FRAMEWORKS
from rtp_sim.validation.interpret import interpret
from rtp_sim.validation.reading import FRAGMENTED, IN_FLIGHT, Reading, reading_of

GIB = 1 << 30
SHAPE = {"micro_batch": "2", "seq_len": "512", "hidden_size": "1024", "num_heads": "16"}
PIPED = SHAPE | {"gpus": "4", "dp": "1", "pp": "4", "num_layers": "8", "num_microbatches": "8", "precision": "fp16"}
SCORES = 2 * 16 * 512 * 512
"""Attention scores of a layer: sequences x heads x tokens x tokens."""

SBH = 2 * 512 * 1024


def held(**cells: str) -> list[StageMemory]:
    """Peaks of the stages of a row."""
    return stage_memories(setting_of(interpret(row(**PIPED | cells)).experiment))


# ---- what layers keep


@pytest.mark.parametrize(("attention", "kept_bytes"), [
    # Korthikanti et al., arXiv 2205.05198, eq. 2: 34 sbh + 5 a s^2 b.
    ("materialised", 34 * SBH + 5 * SCORES),
    # Fused attention keeps no scores, but the log-sum of each row in fp32.
    ("flash", 34 * SBH + 4 * 2 * 16 * 512),
])  # fmt: skip
def test_a_block_keeps_what_the_published_formula_says(attention, kept_bytes):
    # Two stages of 1F1B that differ by one micro-batch in flight: stages 1 and 2 of four hold 3 and 2, of 2 blocks.
    _, second, third, _ = held(attention=attention)
    assert second.held["activations"] - third.held["activations"] == 2 * kept_bytes


def test_nanotrons_rotary_keeps_keys_and_values_twice_and_its_loss_two_wide_copies():
    op = Attention(1024, 16, 16, 64, implementation="flash", stacked_kv=True)
    calls = op.lower(Extent(2, 512)).calls
    tensors = op.lower(Extent(2, 512)).tensors
    assert tensors["stacked"].numel == 2 * SBH
    assert [c.inputs for c in calls if c.kernel == "sdpa"] == [("qkv", "stacked")]
    loss = CrossEntropy(1000, upcast=True).lower(Extent(2, 512))
    wide = [t for t in loss.tensors.values() if t.numel == 2 * 512 * 1000]
    assert [t.dtype for t in wide] == ["loss", "loss"]


def test_dropped_probabilities_get_the_gradient_of_the_context():
    network = interpret(row(attention="materialised")).experiment.network()
    op = next(layer.op for layer in network.layers() if isinstance(layer.op, Attention))
    calls = {c.kernel: c for c in op.lower(Extent(2, 512)).calls}
    assert calls["dropout"].inputs == calls["softmax"].outputs == ("probs",)
    assert calls["dropout"].outputs == ("dropped", "mask")
    assert calls["attn.context"].inputs == ("dropped", "qkv")


# ---- parameters, gradients, optimizer per stage


def test_stages_hold_16_bytes_per_parameter_and_zero1_shares_the_12_of_the_optimizer():
    # A block of hidden size h: 12 h^2 weights, and 13 h of biases and norms. Two blocks on a middle stage.
    parameters = 2 * (12 * 1024**2 + 13 * 1024)
    middle = held()[1].held
    assert (middle["weights"], middle["gradients"], middle["optimizer"]) == (
        2 * parameters, 2 * parameters, 12 * parameters,
    )  # fmt: skip
    shared = held(gpus="16", dp="4", strategy="zero1")[1].held
    assert shared["optimizer"] == pytest.approx(3 * parameters, rel=1e-3)
    assert shared["gradients"] == 2 * parameters


@pytest.mark.parametrize(("schedule", "in_flight"), [
    # Micro-batches of the eight that each of four stages holds at once.
    ("1F1B", (4, 3, 2, 1)),
    ("ZB-1p", (4, 4, 4, 4)),
    ("ZB-2p", (7, 7, 7, 7)),
])  # fmt: skip
def test_micro_batches_in_flight(schedule, in_flight):
    several = held(pipeline_schedule=schedule)
    alone = held(pipeline_schedule=schedule, num_microbatches="1")
    block = 34 * SBH + 4 * 2 * 16 * 512
    for stage in (1, 2):
        more = several[stage].held["activations"] - alone[stage].held["activations"]
        # Weight gradients that are put off keep their inputs, not all that a forward kept.
        assert more <= (in_flight[stage] - 1) * 2 * block
        assert more > (in_flight[stage] - 2) * 2 * block
        if schedule == "1F1B":
            assert more == (in_flight[stage] - 1) * 2 * block


# ---- the moment of the peak


def test_sweep_names_the_op_that_makes_the_peak():
    rise = Footprint({"activations": 5}, {"activations": 9}, 9, op=3)
    fall = Footprint({"activations": -5}, {"activations": 2}, 2, op=7)
    memory = Memory({"weights": 10}, {"activations": 1}, {"F": rise, "B": fall}, {})
    # Start: 10 + 3 inputs; F: 13 + 9 = 22, then 18; F: 18 + 9 = 27, then 23; B: 23 + 2.
    found, op = sweep(memory, ["F", "F", "B"], 3)
    assert (sum(found.values()), found["activations"], op) == (27, 17, 3)
    assert sweep(memory, [], 3)[1] is None


def test_the_estimate_says_when_each_stage_is_fullest_and_what_is_largest_then():
    estimate = evaluate(interpret(row(**PIPED)).experiment)
    assert len(estimate.stages) == 4
    assert estimate.fullest == estimate.stages[0]
    assert estimate.peak_bytes == sum(estimate.memory_by_category.values())
    (name, size), *_ = estimate.stages[1].largest
    # Two blocks' optimizer state: the largest tensor is that of an MLP, 8 h^2 weights and 5 h of biases at 12 bytes.
    assert size == 12 * (8 * 1024**2 + 5 * 1024)
    assert name.startswith("opt.")
    assert estimate.stages[1].op
    single = evaluate(interpret(row(**SHAPE)).experiment)
    assert len(single.stages) == 1
    assert single.stages[0].op
    assert single.stages[0].largest


# ---- what sources count


def cells(**changes: str):
    return row(**changes).cells


def reading(framework: str, **changes: str) -> Reading:
    return reading_of(cells(framework=framework, **changes), FRAMEWORKS[framework])


@pytest.mark.parametrize(("metric", "framework", "stages", "unit", "reserved", "outside"), [
    ("torch max allocated, rank 0", "rtp-repo", "first", GIB, False, 0),
    ("torch max reserved", "megatron-lm", "all", GIB, True, 0),
    ("torch max allocated or reserved (source does not say)", "nanotron", "first", GIB, True, 0),
    ("Memory (GB): peak over stages", "megatron-lm", "all", 10**9, False, 0),
    ("nvidia-smi style max over first/last nodes, GB", "megatron-deepspeed", "ends", 10**9, True, 10_300_000_000),
    ("nvidia-smi", "megatron-lm", "all", GIB, True, 1229 << 20),
    ("", "megatron-lm", "all", GIB, False, 0),
])  # fmt: skip
def test_what_a_metric_counts(metric, framework, stages, unit, reserved, outside):
    found = reading(framework, memory_metric=metric)
    assert (found.stages, found.unit_bytes, found.reserved, found.outside_bytes) == (stages, unit, reserved, outside)


STAGES = [
    StageMemory({"weights": 10 * GIB, "activations": 20 * GIB}),
    StageMemory({"weights": 10 * GIB, "activations": 25 * GIB}),
    StageMemory({"weights": 15 * GIB, "activations": 5 * GIB}),
]


def test_readings_by_hand():
    most = 100 * GIB
    assert Reading("all").peak_bytes(STAGES, most) == 35 * GIB
    assert Reading("first").peak_bytes(STAGES, most) == 30 * GIB
    assert Reading("ends").peak_bytes(STAGES, most) == 30 * GIB
    reserved = Reading("first", reserved=True, outside_bytes=GIB)
    assert reserved.peak_bytes(STAGES, most) == round(10 * GIB + (1 + FRAGMENTED) * 20 * GIB) + GIB
    # Whether it fits is up to the fullest stage, whatever the source prints.
    assert Reading("first").needed_bytes(STAGES, most) == 35 * GIB


def test_gathered_copies():
    stage = [StageMemory({"weights": 10 * GIB, "activations": 20 * GIB, "communication": 8 * GIB})]
    most = 100 * GIB
    shared = Reading(kept_share=0.75, spare_share=0.0, least_gathered_bytes=GIB)
    assert shared.peak_bytes(stage, most) == 36 * GIB
    assert replace(shared, kept_share=0.0).peak_bytes(stage, most) == 31 * GIB
    # Kept as long as that fits, else what is in flight.
    spare = replace(shared, kept_share=1.0)
    assert (spare.peak_bytes(stage, 38 * GIB), spare.peak_bytes(stage, 37 * GIB)) == (38 * GIB, 31 * GIB)


@pytest.mark.parametrize(("changes", "share"), [
    ({"tp": "4", "dp": "2"}, 1.0),
    ({"tp": "4", "pp": "2", "dp": "1"}, 0.5),
    ({"tp": "8", "pp": "4", "dp": "1", "gpus": "32"}, 0.75),
    ({"tp": "16", "pp": "2", "dp": "1", "gpus": "32"}, 0.0),
])  # fmt: skip
def test_nanotron_gathers_again_in_pipelines(changes, share):
    found = reading("nanotron", sequence_parallel="True", **SHAPE | changes)
    assert found.kept_share == share
    assert found.least_gathered_bytes == IN_FLIGHT * SBH * 2


def test_bf16_gradients_exist_beside_fp32_ones_only_where_the_dtypes_differ():
    for precision, wanted in (("fp16", False), ("bf16, fp32 grad accumulation", True)):
        changes = {"framework": "megatron-deepspeed", "precision": precision}
        assert interpret(row(**PLAIN | changes)).experiment.options.gradient_local is wanted


def test_the_cast_to_fp32_does_not_keep_the_narrow_logits():
    changes = {"framework": "nanotron", "gated_mlp": "True", "precision": "bf16", "grad_precision": "fp32"}
    setting = setting_of(interpret(row(**PLAIN | changes | {"dp": "1", "gpus": "1"})).experiment)
    program = built(setting).schedule.programs[0]
    upcast = next(op for op in program.ops if op.name.endswith(".upcast"))
    narrow = [v for v in live_intervals(program) if v.buffer == upcast.reads[0]]
    assert [max(v.users) for v in narrow] == [upcast.index]
