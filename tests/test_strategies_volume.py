"""Bytes and messages of whole models, against closed forms in the model's numbers.

N ranks, W the bytes of a layer's weights. Rotation and FSDP send 3(N-1)/N W per micro-batch, DDP and ZeRO-1/2
2(N-1)/N W per step, tensor parallelism 8(N-1)/N A per block with A = tokens x hidden x bytes.
"""

from __future__ import annotations

from collections import Counter

import pytest
from strategy_helpers import (
    Traffic,
    bert_tiny,
    build,
    collectives,
    gpt2_tiny,
    hop_traffic,
    kinds,
    llama_tiny,
    ring_bytes,
    shifts,
    stack,
)

from rtp_sim.metrics import communication_totals
from rtp_sim.model.layers import Linear
from rtp_sim.model.network import Network, transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec

H, LAYERS, VOCAB, POSITIONS, SEQ, BATCH = 64, 2, 256, 64, 8, 2
"""gpt2-tiny, and what the tests train it with."""

FP32 = 4


def fp32(network: Network, **more: object) -> TrainingSpec:
    return TrainingSpec(BATCH, network.seq, precision="fp32", optimizer="sgd", **more)  # type: ignore[arg-type]


def gpt2_rotating(h: int, layers: int, vocab: int, n: int) -> int:
    """Elements of all rotating shards of a GPT-2 with tied embeddings over n ranks, the head's once more.

    Attention: qkv 3h^2 + 3h and output h^2, whose bias h is on each of the n shards. The MLP's two linears are both
    split by output features, so their biases 4h and h are split too.
    """
    attention = 3 * h * h + 3 * h + h * h + n * h
    mlp = 4 * h * h + 4 * h + 4 * h * h + h
    return layers * (attention + mlp) + 2 * vocab * h


@pytest.mark.parametrize("n", [2, 4])
def test_rotation_of_a_small_gpt2(n: int) -> None:
    schedule = build("rtp", gpt2_tiny(), n)
    shards = gpt2_rotating(H, LAYERS, VOCAB, n) // n * FP32
    units = 3 * LAYERS + 2
    expected = Traffic((units * (n - 1), (n - 1) * shards), (2 * units * (n - 1), 2 * (n - 1) * shards), (0, 0))
    assert all(hop_traffic(schedule, rank) == expected for rank in range(n))
    replicated = POSITIONS * H + (2 * LAYERS + 1) * 2 * H
    assert kinds(collectives(schedule, "rtp")) == Counter({("all_reduce", replicated * FP32): 1})


def test_rotation_of_gpt2_large_on_eight_makes_2310_hops() -> None:
    """36 blocks: 110 units of 21 hops. 20 heads and 50,257 vocabulary rows split unevenly, so only the sum over the
    ranks has a simple form: every shard of a pass makes n-1 hops."""
    network = transformer_network(find_model("gpt2-large"), 16)
    schedule = build("rtp", network, 8, TrainingSpec(1, 16, precision="fp16"))
    counted = [hop_traffic(schedule, rank) for rank in range(8)]
    assert {t.forward[0] + t.backward[0] for t in counted} == {2310}
    total = gpt2_rotating(1280, 36, 50257, 8) * 2
    assert sum(t.forward[1] for t in counted) == 7 * total
    assert sum(t.backward[1] for t in counted) == 2 * 7 * total


@pytest.mark.parametrize(("n", "dims"), [(2, ()), (4, ()), (4, (2, 2))])
def test_rotation_of_grouped_query_attention_and_a_gated_mlp(n: int, dims: tuple[int, ...]) -> None:
    """Width 32, 8 query and 4 key/value heads of 4 features, gated MLP of 48, no biases, vocabulary 48 twice."""
    h, qkv, f, vocab = 32, (8 + 2 * 4) * 4, 48, 48
    total = (2 * (qkv * h + h * 32 + 2 * f * h + f * h) + 2 * vocab * h) * FP32
    counted = hop_traffic(build("rtp", llama_tiny(), n, dims=dims), n - 1)
    assert counted.forward == (8 * (n - 1), (n - 1) * total // n)
    assert counted.backward == (16 * (n - 1), 2 * (n - 1) * total // n)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_fused_mlp_is_one_unit_and_its_output_bias_is_on_every_shard(n: int) -> None:
    schedule = build("rtp", gpt2_tiny(), n, rtp_fuse_mlp=True)
    counted = [hop_traffic(schedule, rank) for rank in range(n)]
    assert {t.forward[0] for t in counted} == {(2 * LAYERS + 2) * (n - 1)}
    total = (gpt2_rotating(H, LAYERS, VOCAB, n) + LAYERS * (n - 1) * H) * FP32
    assert sum(t.forward[1] for t in counted) == (n - 1) * total


# ---- data parallelism

GPT2_PARAMETERS = VOCAB * H + POSITIONS * H + LAYERS * (12 * H * H + 13 * H) + 2 * H


@pytest.mark.parametrize("n", [2, 4])
def test_fsdp_gathers_twice_and_scatters_once(n: int) -> None:
    """Every unit's parameters divide by n, so nothing is padded; root unit (embedding, positions, final norm, head)."""
    schedule = build("fsdp", gpt2_tiny(), n)
    block, root = 12 * H * H + 13 * H, VOCAB * H + POSITIONS * H + 2 * H
    units = Counter({block * FP32: LAYERS, root * FP32: 1})
    found = kinds(collectives(schedule, "dp"))
    assert found == Counter(
        {("all_gather", s): 2 * k for s, k in units.items()} | {("reduce_scatter", s): k for s, k in units.items()}
    )
    sent, messages, _ = communication_totals(schedule, 0)
    assert sent == 3 * (n - 1) * GPT2_PARAMETERS * FP32 // n
    assert messages == 3 * (n - 1) * (LAYERS + 1)


def test_fsdp_pads_each_unit_to_a_multiple_of_the_ranks() -> None:
    """n = 3: a block of 49,984 parameters is padded by 2, the root unit of 20,608 by 2."""
    schedule = build("fsdp", gpt2_tiny(), 3)
    assert (12 * H * H + 13 * H, VOCAB * H + POSITIONS * H + 2 * H) == (49_984, 20_608)
    padded = (2 * 49_986 + 20_610) * FP32
    assert communication_totals(schedule, 1)[0] == 3 * 2 * padded // 3


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
def test_whole_weights_move_two_thirds_of_what_sharded_ones_do(strategy: str, n: int) -> None:
    """All parameters fit one bucket here and divide by n."""
    whole = communication_totals(build(strategy, gpt2_tiny(), n, fp32(gpt2_tiny())), 0)[0]
    assert whole == 2 * (n - 1) * GPT2_PARAMETERS * FP32 // n
    assert 2 * communication_totals(build("fsdp", gpt2_tiny(), n), 0)[0] == 3 * whole


@pytest.mark.parametrize(("strategy", "first"), [("ddp", "all_reduce"), ("zero1", "reduce_scatter")])
def test_buckets_close_when_they_reach_their_limit(strategy: str, first: str) -> None:
    """Six layers of 1,024 B with a first bucket of 1,000 B and others of 2,000 B: 1, 2, 2 and the last alone."""
    network = stack([Linear(16, 16, bias=False)] * 6, input_numel=16)
    schedule = build(strategy, network, 2, ddp_first_bucket_bytes=1000, ddp_bucket_bytes=2000)
    reduced = [size for kind, _, size in collectives(schedule, "dp") if kind == first]
    assert reduced == [1024, 2048, 2048, 1024]


@pytest.mark.parametrize(("strategy", "times"), [("ddp", 1), ("zero1", 1), ("fsdp", 3), ("rtp", 3), ("rtp-inplace", 3)])
def test_accumulation_multiplies_what_is_sent_per_micro_batch(strategy: str, times: int) -> None:
    """Three micro-batches: DDP and ZeRO-1 reduce once per step, FSDP and rotation move weights in each."""
    network = stack([Linear(16, 16, bias=False)] * 2, input_numel=16)
    once = communication_totals(build(strategy, network, 4), 0)[:2]
    thrice = communication_totals(build(strategy, network, 4, fp32(network, num_microbatches=3)), 0)[:2]
    assert thrice == (times * once[0], times * once[1])


def test_zero2_scatters_each_micro_batch_and_gathers_once() -> None:
    network = stack([Linear(16, 16, bias=False)] * 2, input_numel=16)
    found = kinds(collectives(build("zero2", network, 4, fp32(network, num_microbatches=3)), "dp"))
    assert found == Counter({("reduce_scatter", 2048): 3, ("all_gather", 2048): 1})


# ---- recomputation


@pytest.mark.parametrize("n", [2, 3, 4])
def test_recomputing_a_rotating_unit_adds_a_full_cycle(n: int) -> None:
    """(n-1) + n + 2(n-1) = 4n-3 hops per unit of a block; embedding and head are not recomputed."""
    schedule = build("rtp", gpt2_tiny(), n, fp32(gpt2_tiny(), recompute="full"))
    recomputed = Counter(op.name.rsplit(".", 2)[0].removeprefix("m0.") for op, _ in shifts(schedule))
    units = [f"h{i}.{name}" for i in range(LAYERS) for name in ("attn", "mlp.up", "mlp.down")]
    outside = dict.fromkeys(("embed.tokens", "head.logits"), 3 * (n - 1))
    assert recomputed == Counter(dict.fromkeys(units, 4 * n - 3) | outside)
    assert hop_traffic(schedule, 0).recompute[0] == 3 * LAYERS * n


def test_recomputing_leaves_fsdp_unchanged() -> None:
    plain = build("fsdp", gpt2_tiny(), 4)
    full = build("fsdp", gpt2_tiny(), 4, fp32(gpt2_tiny(), recompute="full"))
    assert collectives(full, "dp") == collectives(plain, "dp")


@pytest.mark.parametrize("n", [2, 3, 4])
def test_evaluation_moves_each_unit_n_minus_1_hops_per_pass(n: int) -> None:
    """And once more at the end of an odd number of passes, which would leave the weights one hop from home."""
    for passes in range(1, n + 2):
        schedule = build("rtp", gpt2_tiny(), n, eval_passes=passes)
        signs = Counter((op.name[: op.name.index(".")], hop.offset[0] % n) for op, hop in shifts(schedule))
        expected = {(k, 1 if k % 2 == 0 else n - 1): (n - 1) * (3 * LAYERS + 2) for k in range(passes)}
        if passes % 2:
            expected[passes - 1, 1] += 3 * LAYERS + 2
        assert signs == Counter({(f"m{k}", sign): hops for (k, sign), hops in expected.items()})


# ---- tensor parallelism

A = BATCH * SEQ * H * FP32
"""Bytes of the activations between layers."""

TOKENS = BATCH * SEQ


def by_block(found: list[tuple[str, str, int]], block: str) -> list[tuple[str, str, int]]:
    return [c for c in found if c[1].startswith(f"m0.{block}.")]


@pytest.mark.parametrize("n", [2, 4])
def test_tensor_parallel_all_reduces_four_times_per_block(n: int) -> None:
    found = collectives(build("tp", gpt2_tiny(), n), "tp")
    for i in range(LAYERS):
        block = by_block(found, f"h{i}")
        assert kinds(block) == Counter({("all_reduce", A): 4})
        assert sum(".F." in name for _, name, _ in block) == sum(".B." in name for _, name, _ in block) == 2
        assert ring_bytes(block, n) == 8 * (n - 1) * A // n
    # Around the blocks: the embedding's output, the head's input gradient, three numbers per token for the loss.
    assert kinds(by_block(found, "embed")) == Counter({("all_reduce", A): 1})
    assert kinds(by_block(found, "head")) == Counter({("all_reduce", A): 1, ("all_reduce", TOKENS * 4): 3})
    assert len(found) == 4 * LAYERS + 1 + 4


@pytest.mark.parametrize("n", [2, 4])
def test_sequence_parallel_gathers_and_scatters(n: int) -> None:
    """Per block forward 2 AG + 2 RS; backward 2 AG (output gradients) + 2 RS, and 2 AG of saved inputs again."""
    found = collectives(build("tp-sp", gpt2_tiny(), n), "tp")
    for i in range(LAYERS):
        block = by_block(found, f"h{i}")
        forward = [c for c in block if ".F." in c[1]]
        backward = [c for c in block if ".B." in c[1]]
        assert kinds(forward) == Counter({("all_gather", A): 2, ("reduce_scatter", A): 2})
        assert kinds(backward) == Counter({("all_gather", A): 4, ("reduce_scatter", A): 2})
        assert len(forward) + len(backward) == len(block)
        assert ring_bytes(block, n) == 10 * (n - 1) * A // n
    assert kinds(by_block(found, "embed")) == Counter({("reduce_scatter", A): 1, ("all_gather", A): 1})
    assert kinds(by_block(found, "head")) == Counter(
        {("all_gather", A): 2, ("reduce_scatter", A): 1, ("all_reduce", TOKENS * 4): 3}
    )
    norms = POSITIONS * H + (2 * LAYERS + 1) * 2 * H
    rest = [c for c in found if not c[1].startswith(("m0.h", "m0.embed"))]
    assert kinds(rest) == Counter({("all_reduce", norms * FP32): 1})


def test_sequence_parallelism_gathers_nothing_for_layers_that_work_on_their_own_tokens() -> None:
    """The dense layer before an encoder's head is whole on every rank and sees that rank's tokens only."""
    found = collectives(build("tp-sp", bert_tiny(), 2), "tp")
    assert [name for _, name, _ in found if ".head.dense." in name] == []


@pytest.mark.parametrize(("strategy", "forward"), [("tp", 2), ("tp-sp", 4)])
def test_recomputing_repeats_the_forward_collectives_of_blocks(strategy: str, forward: int) -> None:
    plain = collectives(build(strategy, gpt2_tiny(), 2), "tp")
    full = collectives(build(strategy, gpt2_tiny(), 2, fp32(gpt2_tiny(), recompute="full")), "tp")
    again = [c for c in full if ".R." in c[1]]
    assert len(again) == forward * LAYERS
    assert Counter(c for c in full if ".R." not in c[1]) == Counter(plain)
