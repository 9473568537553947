"""Messages and bytes of single rotating layers, against numbers counted on RTP's own code or worked out by hand.

S is the bytes of one fp32 shard: the forward sends N-1 messages of S, the backward N-1 of weights and N-1 of gradients.
"""

from __future__ import annotations

import pytest
from strategy_helpers import Traffic, build, collectives, hop_traffic, image_network, stack

from rtp_sim.metrics import communication_totals
from rtp_sim.model.layers import Attention, Conv2d, Embedding, Experts, Layer, LayerOp, Linear
from rtp_sim.model.network import Block, Input, Network, transformer_network
from rtp_sim.model.spec import ModelSpec

LINEAR = stack([Linear(8, 8)])
ODD_LINEAR = stack([Linear(8, 5)])
EMBEDDING = stack([Embedding(10, 8)], seq=4, input_numel=4, input_dtype="int64")
CONVOLUTION = stack([Conv2d(3, 8, 3, 6, 6)], input_numel=3 * 36)
ATTENTION = stack([Attention(8, 4, 4, 2, causal=False)], seq=4, input_numel=32)
WIDE_LINEAR = stack([Linear(4096, 1024)], input_numel=4096)
LANGUAGE_MODEL = transformer_network(
    ModelSpec("lm", 2, 8, 4, vocab_size=16, max_positions=8, ffn_hidden_size=16, activation="relu",
              tied_embeddings=False, lm_head_bias=True),
    4,
)  # fmt: skip


def _experts() -> Network:
    """Four feed-forward experts 8-16-8 with biases; the routing comes from the data loader."""
    op: LayerOp = Experts(8, 16, 4, 1, "relu", gated=False, bias=True)
    layer = Layer("experts", op, ("x", "routing"), "y")
    inputs = (Input("x", 32, "fp32"), Input("routing", 12, "fp32"))
    return Network("experts", 4, inputs, (Block("experts", (layer,)),))


# network, ranks, bytes of one shard of every unit together, units
ROWS = [
    pytest.param(LINEAR, 2, 144, 1, id="linear-8-8 on 2"),
    pytest.param(LINEAR, 4, 72, 1, id="linear-8-8 on 4"),
    pytest.param(ODD_LINEAR, 2, 100, 1, id="linear-8-5 on 2"),
    pytest.param(ODD_LINEAR, 4, 60, 1, id="linear-8-5 on 4"),
    pytest.param(EMBEDDING, 2, 160, 1, id="embedding on 2"),
    pytest.param(EMBEDDING, 4, 80, 1, id="embedding on 4"),
    pytest.param(CONVOLUTION, 2, 448, 1, id="conv2d on 2"),
    pytest.param(CONVOLUTION, 4, 224, 1, id="conv2d on 4"),
    pytest.param(ATTENTION, 2, 592, 1, id="attention on 2"),
    pytest.param(ATTENTION, 4, 312, 1, id="attention on 4"),
    pytest.param(_experts(), 4, 1120, 1, id="experts on 4"),
    pytest.param(LANGUAGE_MODEL, 2, 2848, 8, id="transformer on 2"),
    pytest.param(LANGUAGE_MODEL, 4, 1456, 8, id="transformer on 4"),
    pytest.param(image_network(), 2, 2_399_764, 4, id="mnist on 2"),
    pytest.param(image_network(), 4, 1_199_912, 4, id="mnist on 4"),
    pytest.param(WIDE_LINEAR, 2, 8_390_656, 1, id="linear-4096-1024 on 2"),
]


@pytest.mark.parametrize(("network", "n", "shards", "units"), ROWS)
def test_each_rank_sends_n_minus_1_shards_forward_and_twice_that_backward(
    network: Network, n: int, shards: int, units: int
) -> None:
    schedule = build("rtp", network, n)
    for rank in range(n):
        assert hop_traffic(schedule, rank) == Traffic(
            (units * (n - 1), (n - 1) * shards), (2 * units * (n - 1), 2 * (n - 1) * shards), (0, 0)
        )


@pytest.mark.parametrize(
    ("network", "n", "forward", "backward"),
    [
        (LINEAR, 2, (1, 144), (2, 288)),
        (LINEAR, 4, (3, 216), (6, 432)),
        (ODD_LINEAR, 2, (1, 100), (2, 200)),
        (ODD_LINEAR, 4, (3, 180), (6, 360)),
        (EMBEDDING, 4, (3, 240), (6, 480)),
        (CONVOLUTION, 4, (3, 672), (6, 1344)),
        (ATTENTION, 4, (3, 936), (6, 1872)),
        (_experts(), 4, (3, 3360), (6, 6720)),
        (LANGUAGE_MODEL, 2, (8, 2848), (16, 5696)),
        (LANGUAGE_MODEL, 4, (24, 4368), (48, 8736)),
        (WIDE_LINEAR, 2, (1, 8_390_656), (2, 16_781_312)),
    ],
)
def test_the_published_table_holds_literally(
    network: Network, n: int, forward: tuple[int, int], backward: tuple[int, int]
) -> None:
    counted = hop_traffic(build("rtp", network, n), 0)
    assert (counted.forward, counted.backward) == (forward, backward)


@pytest.mark.parametrize(("n", "messages", "total"), [(2, 12, 7_199_292), (4, 36, 10_799_208)])
def test_the_image_network_sends_what_rtp_was_counted_to_send(n: int, messages: int, total: int) -> None:
    schedule = build("rtp", image_network(), n)
    _, _, by_kind = communication_totals(schedule, n - 1)
    assert by_kind == {"shift": (total, messages)}


@pytest.mark.parametrize(("network", "n", "shards", "units"), ROWS)
def test_in_place_sends_the_same_bytes_in_chunks(network: Network, n: int, shards: int, units: int) -> None:
    schedule = build("rtp-inplace", network, n, rtp_chunk_bytes=1 << 24)
    whole = Traffic((units * (n - 1), (n - 1) * shards), (2 * units * (n - 1), 2 * (n - 1) * shards), (0, 0))
    assert hop_traffic(schedule, 0) == whole


@pytest.mark.parametrize(("chunk", "per_hop"), [(72, 1), (71, 2), (36, 2), (32, 3), (10, 8), (1, 72), (1 << 20, 1)])
def test_in_place_messages_are_the_shard_over_the_chunk_rounded_up(chunk: int, per_hop: int) -> None:
    schedule = build("rtp-inplace", LINEAR, 4, rtp_chunk_bytes=chunk)
    assert hop_traffic(schedule, 1) == Traffic((3 * per_hop, 216), (6 * per_hop, 432), (0, 0))
    sent_bytes, messages, by_kind = communication_totals(schedule, 1)
    assert (sent_bytes, messages) == (648, 9 * per_hop) == by_kind["shift"]


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
def test_the_faults_of_published_code_would_be_told_apart(strategy: str) -> None:
    """In place, gradients were once rotated twice (9 messages, 648 B backward); an early release made a single weight
    hop per pass (1 of 72 B forward, 4 of 288 B backward)."""
    counted = hop_traffic(build(strategy, LINEAR, 4), 2)
    assert counted.backward not in {(9, 648), (4, 288)}
    assert counted.forward != (1, 72)


@pytest.mark.parametrize(
    ("strategy", "n", "total"),
    [("rtp", 4, 648), ("fsdp", 4, 648), ("ddp", 4, 432), ("rtp", 2, 432), ("fsdp", 2, 432), ("ddp", 2, 288)],
)
def test_one_linear_layer_compared_across_strategies(strategy: str, n: int, total: int) -> None:
    """W = 288 B: 3(N-1)/N W for rotation and FSDP, 2(N-1)/N W for DDP."""
    assert communication_totals(build(strategy, LINEAR, n), 0)[0] == total


def test_nothing_else_is_sent_for_layers_that_all_rotate() -> None:
    assert collectives(build("rtp", ODD_LINEAR, 4), "rtp") == []
