"""Memory of the strategies on simulated runs, against the published tables, tensor by tensor.

Psi is the number of parameters. Snapshots are taken where a named op starts, so that what is counted is what that op
finds alive.
"""

from __future__ import annotations

import numpy as np
import pytest
from strategy_helpers import FlatCost, build, gpt2_tiny, stack

from rtp_sim.engine.memory import MemoryProfile, memory_profile
from rtp_sim.engine.simulate import simulate
from rtp_sim.model.layers import Linear
from rtp_sim.model.network import Block, Input, Network, transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Schedule
from rtp_sim.timeline import Timeline

WIDTH, DEPTH, RANKS = 64, 3, 4
STACK = stack([Linear(WIDTH, WIDTH, bias=False)] * DEPTH, input_numel=WIDTH)
PSI = DEPTH * WIDTH * WIDTH
W = PSI * 4
S = WIDTH * WIDTH // RANKS * 4
"""Bytes of all weights, and of one shard of one layer, in fp32."""

SGD = TrainingSpec(2, 1, precision="fp32", optimizer="sgd")
ADAM = TrainingSpec(2, 1, precision="fp16", optimizer="adam")


def run(schedule: Schedule, message_ns: int = 40) -> tuple[Timeline, MemoryProfile]:
    """Every kernel takes 100 ns."""
    timeline = simulate(schedule, FlatCost({}, message_ns, other_ns=100))
    return timeline, memory_profile(schedule, 0, timeline.times(0))


def at(profile: MemoryProfile, time_ns: int) -> dict[str, int]:
    """Bytes by category at a time."""
    k = int(np.searchsorted(profile.time_ns, time_ns, side="right")) - 1
    return {c: int(held[k]) for c, held in profile.bytes_by_category.items()}


def start_of(timeline: Timeline, name: str) -> int:
    return next(s.start_ns for s in timeline.spans(0) if s.op.name == name)


def most(profile: MemoryProfile, categories: tuple[str, ...], before_ns: int | None = None) -> int:
    """Largest sum over the categories, up to a time."""
    total = np.zeros(len(profile.time_ns), dtype=np.int64)
    for category in categories:
        total += profile.bytes_by_category.get(category, 0)
    end = len(profile.time_ns) if before_ns is None else int(np.searchsorted(profile.time_ns, before_ns))
    return int(np.max(total[:end]))


STATE = ("weights", "gradients", "communication")


@pytest.mark.parametrize("message_ns", [40, 150])
@pytest.mark.parametrize(
    ("strategy", "hide", "forward", "backward"),
    [("rtp", False, S, 2 * S), ("rtp", True, S, 3 * S), ("rtp-inplace", False, 512, 512)],
)
def test_rotation_needs_a_shard_forward_and_two_backward(
    strategy: str, hide: bool, forward: int, backward: int, message_ns: int
) -> None:
    """Beyond 1/N of weights and gradients: out of place one arriving shard forward, one of weights and one of gradients
    backward, a third when the gradient hop is hidden; in place one chunk of 512 B."""
    schedule = build(strategy, STACK, RANKS, SGD, rtp_hide_gradient_hop=hide, rtp_chunk_bytes=512)
    timeline, profile = run(schedule, message_ns)
    turn = start_of(timeline, "m0.l2.B0.0.linear.dgrad")
    assert most(profile, STATE, turn) == W // RANKS + forward
    # The last layer of the backward is in progress when all gradient shards are there.
    assert most(profile, STATE) == 2 * W // RANKS + backward
    final = at(profile, start_of(timeline, "optimizer"))
    assert {c: final.get(c, 0) for c in STATE} == {
        "weights": W // RANKS,
        "gradients": W // RANKS,
        "communication": 0,
    }


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace", "fsdp"])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_state_scales_with_one_over_n(strategy: str, n: int) -> None:
    """16 B per parameter under fp16 Adam, divided by the ranks, with no remainder here."""
    timeline, profile = run(build(strategy, STACK, n, ADAM))
    held = at(profile, start_of(timeline, "optimizer"))
    assert (held["weights"], held["gradients"], held["optimizer"]) == (
        2 * PSI // n,
        2 * PSI // n,
        12 * PSI // n,
    )


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        ("ddp", 2 * PSI, 2 * PSI, 12 * PSI),
        ("zero1", 2 * PSI, 2 * PSI, 12 * PSI // RANKS),
        ("zero2", 2 * PSI, 2 * PSI // RANKS, 12 * PSI // RANKS),
        ("fsdp", 2 * PSI // RANKS, 2 * PSI // RANKS, 12 * PSI // RANKS),
    ],
)
def test_the_zero_table(strategy: str, weights: int, gradients: int, optimizer: int) -> None:
    """16 Psi -> 4 Psi + 12 Psi/N -> 2 Psi + 14 Psi/N -> 16 Psi/N, where the optimizer step finds it."""
    timeline, profile = run(build(strategy, STACK, RANKS, ADAM))
    held = at(profile, start_of(timeline, "optimizer"))
    assert (held["weights"], held["gradients"], held["optimizer"]) == (weights, gradients, optimizer)


def test_ddp_needs_its_gradient_buckets_beyond_what_a_single_rank_does() -> None:
    """Buckets are kept from step to step beside the gradients: 4 B per parameter."""
    _, single = run(build("single", STACK, 1, SGD))
    _, ddp = run(build("ddp", STACK, RANKS, SGD))
    assert ddp.peak_bytes - single.peak_bytes == W
    assert ddp.by_category_at_peak["communication"] == W


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_zero_frees_its_buckets_between_micro_batches(strategy: str) -> None:
    schedule = build(strategy, STACK, RANKS, TrainingSpec(2, 1, 2, precision="fp16", optimizer="adam"))
    timeline, profile = run(schedule)
    assert at(profile, start_of(timeline, "m1.l2.F.0.linear"))["communication"] == 0


def test_fsdp_with_one_unit_makes_everything_whole() -> None:
    """W + G transient beside the weight shard; the gradient shard comes to be when the whole weights are gone."""
    timeline, profile = run(build("fsdp", STACK, RANKS, SGD, fsdp_unit="model"))
    assert most(profile, ("communication",)) == 2 * W
    assert most(profile, STATE) == 2 * W + W // RANKS
    assert at(profile, start_of(timeline, "optimizer"))["communication"] == 0


@pytest.mark.parametrize(("prefetch", "whole"), [(True, 3), (False, 2)])
def test_fsdp_by_blocks_holds_two_units_and_a_gradient(prefetch: bool, whole: int) -> None:
    """The unit in use, with prefetch the next one too, and the whole gradient of one unit; two linears per unit, so
    that the first gradient is there while weights of the same unit are still needed."""
    layers = list(stack([Linear(WIDTH, WIDTH, bias=False)] * 6, input_numel=WIDTH).layers())
    blocks = tuple(Block(f"b{i}", tuple(layers[2 * i : 2 * i + 2])) for i in range(3))
    network = Network("pairs", 1, (Input("x", WIDTH, "fp32"),), blocks)
    _, profile = run(build("fsdp", network, RANKS, SGD, fsdp_prefetch=prefetch), message_ns=10)
    assert most(profile, ("communication",)) == whole * 2 * WIDTH * WIDTH * 4


def gpt2(layers: int, seq: int) -> Network:
    return transformer_network(find_model("gpt2-tiny", num_layers=layers), seq)


def activations_at_turn(layers: int, strategy: str = "single", n: int = 1, **more: object) -> int:
    """Bytes of activations when the backward starts, batch 2, 16 tokens, bf16."""
    network = gpt2(layers, 16)
    training = TrainingSpec(2, 16, precision="bf16", **more)  # type: ignore[arg-type]
    timeline, profile = run(build(strategy, network, n, training))
    return at(profile, start_of(timeline, "m0.head.loss.B.0.cross_entropy.bwd"))["activations"]


TH, B, HEADS, SEQ = 2 * 16 * 64, 2, 4, 16


def kept_by_a_block(t_h: int = TH) -> int:
    """Without dropout, per token and hidden feature, bf16: input of the first norm 2, its output 2, qkv 6, context 2,
    input of the second norm 2, its output 2, MLP before 8 and after 8 the activation: 32 (34 with two byte masks of
    dropout). Flash attention adds the fp32 log-sum-exp of every head and token."""
    return (2 + 2 + 6 + 2 + 2 + 2 + 8 + 8) * t_h + 4 * B * HEADS * SEQ


def test_activations_of_one_transformer_block() -> None:
    assert activations_at_turn(2) - activations_at_turn(1) == kept_by_a_block() == 32 * TH + 512


def test_rotation_keeps_the_same_activations_in_pieces() -> None:
    for strategy in ("rtp", "rtp-inplace", "fsdp", "ddp"):
        assert activations_at_turn(2, strategy, 2) - activations_at_turn(1, strategy, 2) == kept_by_a_block()


def test_full_recompute_keeps_the_input_of_a_block() -> None:
    assert activations_at_turn(3, recompute="full") - activations_at_turn(2, recompute="full") == 2 * TH


def test_materialised_attention_keeps_two_score_matrices() -> None:
    """Scores are dead after the softmax; probabilities stay (2 B each), and the log-sum-exp of flash goes away."""

    def kept(layers: int, recompute: str) -> int:
        network = transformer_network(find_model("gpt2-tiny", num_layers=layers), 16, "materialised")
        training = TrainingSpec(2, 16, precision="bf16", attention="materialised", recompute=recompute)
        timeline, profile = run(build("single", network, 1, training))
        return at(profile, start_of(timeline, "m0.head.loss.B.0.cross_entropy.bwd"))["activations"]

    probabilities = 2 * B * HEADS * SEQ * SEQ
    assert kept(2, "none") - kept(1, "none") == 32 * TH + probabilities
    assert kept(2, "selective") - kept(1, "selective") == 32 * TH


def test_tensor_parallelism_divides_what_lies_between_the_linears() -> None:
    """tp: norms' inputs and outputs (8 TH) whole, qkv, context and MLP (24 TH) and the statistics halved. tp-sp: all
    halved, the inputs of split layers are gathered again in the backward."""
    n = 2
    lse = 4 * B * HEADS * SEQ // n
    assert activations_at_turn(2, "tp", n) - activations_at_turn(1, "tp", n) == 8 * TH + 24 * TH // n + lse
    assert activations_at_turn(2, "tp-sp", n) - activations_at_turn(1, "tp-sp", n) == 32 * TH // n + lse


def test_a_small_gpt2_of_one_rank_holds_sixteen_bytes_per_parameter() -> None:
    network = gpt2_tiny()
    timeline, profile = run(build("single", network, 1, TrainingSpec(2, 8, precision="bf16", optimizer="adamw")))
    held = at(profile, start_of(timeline, "optimizer"))
    assert held["weights"] + held["gradients"] + held["optimizer"] == 16 * 120_576
