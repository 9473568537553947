"""Sizes that do not divide: heads, vocabulary rows, experts; shards worked out by hand, larger ones first."""

from __future__ import annotations

import pytest
from strategy_helpers import Traffic, build, hop_traffic, shifts, stack

from rtp_sim.model.layers import Attention, Embedding, Experts, Layer, Linear
from rtp_sim.model.network import Block, Input, Network, transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.checks import check
from rtp_sim.schedule.ir import Compute, Schedule

ROWS = [50257 // 8 + 1] + [50257 // 8] * 7
"""50,257 = 8 x 6,282 + 1."""


def hop_sizes(schedule: Schedule, rank: int) -> list[int]:
    """Bytes that a rank sends, hop by hop: weights forward, then weights and gradients backward."""
    return [hop.bytes_at(schedule.shard_index(rank, hop.part)) for _, hop in shifts(schedule)]


def uneven_traffic(shards: list[int], rank: int) -> Traffic:
    """Forward a rank sends every shard but the one after its own; backward, twice, every shard but its own."""
    n, total = len(shards), sum(shards)
    return Traffic((n - 1, total - shards[(rank + 1) % n]), (2 * (n - 1), 2 * (total - shards[rank])), (0, 0))


def test_25_heads_over_8() -> None:
    """gpt2-xl's attention, width 1,600, heads of 64: 4 heads on the first rank, 3 on the others."""
    network = stack([Attention(1600, 25, 25, 64)], seq=4, input_numel=4 * 1600)
    schedule = build("rtp", network, 8)
    heads = [4, 3, 3, 3, 3, 3, 3, 3]
    shards = [4 * (3 * 64 * a * (1600 + 1) + 1600 * 64 * a + 1600) for a in heads]
    assert [hop_traffic(schedule, r) for r in range(8)] == [uneven_traffic(shards, r) for r in range(8)]
    # Rank 0 starts with its own shard of 4 heads, then gets those of ranks 7, 6, ...; rank 1 gets rank 0's second.
    assert hop_sizes(schedule, 0)[:7] == [shards[0]] + [shards[1]] * 6
    assert hop_sizes(schedule, 1)[:7] == [shards[1], shards[0]] + [shards[1]] * 5
    widths = [
        dict(op.action.dims_at(schedule.shard_index(1, op.action.part)))["n"]
        for op in schedule.programs[0].ops
        if isinstance(op.action, Compute) and op.name.startswith("m0.l0.F") and op.name.endswith("0.linear")
    ]
    assert widths == [3 * 64 * a for a in (3, 4, 3, 3, 3, 3, 3, 3)]
    check(schedule)


@pytest.mark.parametrize("tied", [False, True])
def test_50257_vocabulary_rows_over_8(tied: bool) -> None:
    assert sum(ROWS) == 50257
    model = find_model("gpt2-tiny", vocab_size=50257, tied_embeddings=tied)
    schedule = build("rtp", transformer_network(model, 4), 4, TrainingSpec(1, 4, precision="fp16"))
    rows = [12565, 12564, 12564, 12564]
    head = [2 * 64 * r for r in rows]
    sent = [
        hop.bytes_at(schedule.shard_index(0, hop.part))
        for op, hop in shifts(schedule)
        if op.name.startswith("m0.head.logits.F")
    ]
    # Tied, the embedding's pass left rank 0 with shard 1, and the head goes on from there: 1, 0, 3.
    assert sent == ([head[1], head[0], head[3]] if tied else [head[0], head[3], head[2]])
    buffer = schedule.programs[0].buffers["w.embed.tokens" if tied else "w.head.logits"]
    assert buffer.numel == 64 * 12565
    check(schedule)


def test_the_head_of_gpt2_over_8() -> None:
    schedule = build("rtp", stack([Linear(768, 50257, bias=False, vocab=True)], input_numel=768), 8)
    shards = [4 * 768 * rows for rows in ROWS]
    assert [hop_traffic(schedule, r) for r in range(8)] == [uneven_traffic(shards, r) for r in range(8)]


def test_an_embedding_goes_by_vocabulary_where_its_width_does_not_divide() -> None:
    schedule = build("rtp", stack([Embedding(10, 7)], seq=4, input_numel=4, input_dtype="int64"), 4)
    shards = [4 * 7 * rows for rows in (3, 3, 2, 2)]
    assert [hop_traffic(schedule, r) for r in range(4)] == [uneven_traffic(shards, r) for r in range(4)]


def test_ten_experts_over_four() -> None:
    """Experts of 8-16-8 with biases: 280 parameters each; 3, 3, 2 and 2 of them."""
    layer = Layer("experts", Experts(8, 16, 10, 1, "relu", gated=False, bias=True), ("x", "routing"), "y")
    inputs = (Input("x", 160, "fp32"), Input("routing", 60, "fp32"))
    network = Network("experts", 20, inputs, (Block("experts", (layer,)),))
    schedule = build("rtp", network, 4)
    shards = [1120 * e for e in (3, 3, 2, 2)]
    assert [hop_traffic(schedule, r) for r in range(4)] == [uneven_traffic(shards, r) for r in range(4)]
    # 2 x 20 tokens, one expert each: 4 per expert.
    rows = [
        dict(op.action.dims_at(schedule.shard_index(0, op.action.part)))["m"]
        for op in schedule.programs[0].ops
        if isinstance(op.action, Compute) and op.name.endswith(".1.linear") and ".F" in op.name
    ]
    assert rows == [12, 8, 8, 12]
    check(schedule)


def test_a_linear_prefers_the_side_that_divides() -> None:
    """8 -> 5 on 4 ranks goes by inputs; 7 -> 5 by outputs, 2 + 1 + 1 + 1."""
    schedule = build("rtp", stack([Linear(7, 5)], input_numel=7), 4)
    shards = [4 * (o * 7 + o) for o in (2, 1, 1, 1)]
    assert [hop_traffic(schedule, r) for r in range(4)] == [uneven_traffic(shards, r) for r in range(4)]


def test_a_rank_may_have_no_head() -> None:
    """4 heads of 16 over 5 ranks: the last shard is nothing but the output bias of 64, which every shard has."""
    schedule = build("rtp", stack([Attention(64, 4, 4, 16)], seq=4, input_numel=4 * 64), 5)
    head = 4 * (3 * 16 * (64 + 1) + 64 * 16 + 64)
    shards = [head, head, head, head, 4 * 64]
    assert [hop_traffic(schedule, r) for r in range(5)] == [uneven_traffic(shards, r) for r in range(5)]
    check(schedule)
