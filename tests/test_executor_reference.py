"""Every strategy trains every network as plain dense training does: losses, every gradient, every parameter.

In fp64, where the order of additions changes the 15th digit and a wrong schedule the first. Each rank has data of its
own, so that a gradient that is lost, doubled or averaged over the wrong ranks shows.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from executor_reference import EXACT, Pair, assert_equal, batches_of, run_both
from strategy_helpers import EVERY_STRATEGY, INNER, bert_tiny, build, llama_tiny, moe_tiny, stack

from rtp_sim.executor.dense import dense_loss
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.reference import run_reference
from rtp_sim.metrics import communication_totals
from rtp_sim.model.layers import (
    Activation,
    Add,
    Conv2d,
    CrossEntropy,
    Embedding,
    Experts,
    Layer,
    LayerOp,
    Linear,
    MaxPool2d,
    Mlp,
    Norm,
    Router,
)
from rtp_sim.model.network import Block, Input, Network, transformer_network, unfused
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec


def image_tiny() -> Network:
    """Two convolutions of 3 and 5 channels on 8 x 8 images, pooling, two linears: nothing divides by 2, 3 and 4."""
    ops: list[LayerOp] = [
        Conv2d(1, 3, 3, 8, 8), Activation("relu", 3 * 36), Conv2d(3, 5, 3, 6, 6, padding=1), Activation("relu", 5 * 36),
        MaxPool2d(5, 6, 6, 2), Linear(45, 12), Activation("relu", 12), Linear(12, 5), CrossEntropy(5),
    ]  # fmt: skip
    network = stack(ops, input_numel=64)
    last = network.blocks[-1].layers[0]
    loss = Layer(last.name, last.op, (*last.inputs, "targets"), last.output)
    inputs = (Input("x", 64, "fp32"), Input("targets", 1, "int64"))
    return Network("image-tiny", 1, inputs, (*network.blocks[:-1], Block(loss.name, (loss,))))


def gpt2_small() -> Network:
    """Two blocks of width 24 with 4 heads, vocabulary 36, tied embeddings: 2, 3 and 4 divide all but the heads."""
    return transformer_network(find_model("gpt2-tiny", hidden_size=24, vocab_size=36), 4)


def uneven() -> Network:
    """5 heads, 11 feed-forward features, 13 vocabulary rows, biases everywhere: no rank count divides them."""
    return transformer_network(
        find_model("gpt2-tiny", hidden_size=15, num_heads=5, ffn_hidden_size=11, vocab_size=13), 8
    )


def experts_with_biases() -> Network:
    """Routed experts with biases, whose second one lies on every shard where the experts are sliced."""
    layers = (
        Layer("e", Embedding(11, 6), ("ids",), "e.y"),
        Layer("r", Router(6, 3, 2), ("e.y",), "r.y"),
        Layer("x", Experts(6, 5, 3, 2, "gelu", False, True), ("e.y", "r.y"), "x.y"),
        Layer("a", Add(6), ("e.y", "x.y"), "a.y"),
        Layer("n", Norm("layernorm", 6), ("a.y",), "n.y"),
        Layer("m", Mlp(6, 7, "relu"), ("n.y",), "m.y"),
        Layer("h", Linear(6, 11, vocab=True), ("m.y",), "h.y"),
        Layer("l", CrossEntropy(11), ("h.y", "targets"), "l.y"),
    )
    inputs = (Input("ids", 4, "int64"), Input("targets", 4, "int64"))
    return Network("experts", 4, inputs, (Block("only", layers),))


NETWORKS = {
    "gpt2": gpt2_small(), "llama": llama_tiny(4), "moe": moe_tiny(4), "image": image_tiny(), "uneven": uneven(),
    "experts": experts_with_biases(),
}  # fmt: skip


def training(network: Network, optimizer: str = "adamw", **changes: object) -> TrainingSpec:
    return TrainingSpec(2, network.seq, precision="fp32", optimizer=optimizer, **changes)  # type: ignore[arg-type]


def cases() -> list[tuple[str, str, int]]:
    found = []
    for strategy in EVERY_STRATEGY:
        for name in NETWORKS:
            if strategy.startswith("tp") and name == "image":
                continue
            # Tensor parallelism wants a part for every rank.
            most = 3 if strategy.startswith("tp") and name == "experts" else 4
            found += [(strategy, name, n) for n in ((1,) if strategy == "single" else range(1, most + 1))]
    return found


@pytest.mark.parametrize(("strategy", "name", "n"), cases())
def test_two_steps(strategy: str, name: str, n: int) -> None:
    """Of AdamW, and on 3 ranks also of SGD."""
    for optimizer in ("adamw", "sgd") if n == 3 else ("adamw",):
        assert_equal(run_both(strategy, NETWORKS[name], n, training(NETWORKS[name], optimizer)))


VARIANTS: list[tuple[str, int, dict[str, object]]] = [
    ("ddp", 3, {"ddp_first_bucket_bytes": 1000, "ddp_bucket_bytes": 3000}),
    ("zero1", 3, {"ddp_first_bucket_bytes": 1000, "ddp_bucket_bytes": 3000}),
    ("zero2", 3, {"ddp_first_bucket_bytes": 1000, "ddp_bucket_bytes": 3000}),
    ("fsdp", 3, {"fsdp_unit": "model"}),
    ("fsdp", 3, {"fsdp_prefetch": False}),
    ("tp", 2, {"dp": 2}),
    ("tp", 3, {"dp": 2, "dp_sync": "zero1"}),
    ("tp-sp", 3, {"dp": 2, "dp_sync": "zero2"}),
    ("rtp", 3, {"rtp_hide_gradient_hop": True}),
    ("rtp", 3, {"rtp_prefetch": True}),
    ("rtp", 3, {"rtp_fuse_mlp": True}),
    ("rtp", 4, {"rtp_fuse_mlp": True, "rtp_prefetch": True, "rtp_hide_gradient_hop": True}),
    ("rtp", 4, {"dims": (2, 2)}),
    ("rtp", 2, {"dp": 2}),
    ("rtp", 3, {"dp": 2, "dp_sync": "zero1"}),
    ("rtp", 2, {"dp": 2, "dp_sync": "zero2"}),
    ("rtp-inplace", 3, {"rtp_chunk_bytes": 1000}),
    ("rtp-inplace", 4, {"dims": (2, 2), "rtp_fuse_mlp": True}),
    ("rtp-inplace", 2, {"dp": 2, "dp_sync": "zero1"}),
]  # fmt: skip


def variants() -> list[tuple[str, str, int, dict[str, object]]]:
    return [
        (strategy, name, n, options)
        for strategy, n, options in VARIANTS
        for name in ("gpt2", "moe", "image", "uneven")
        if not (strategy.startswith("tp") and name == "image")
    ]


@pytest.mark.parametrize(("strategy", "name", "n", "options"), variants())
def test_options_change_the_schedule_and_not_the_training(
    strategy: str, name: str, n: int, options: dict[str, object]
) -> None:
    assert_equal(run_both(strategy, NETWORKS[name], n, training(NETWORKS[name]), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", [s for s in EVERY_STRATEGY if s != "single"])
@pytest.mark.parametrize(("recompute", "micro"), [("none", 2), ("full", 1), ("full", 2)])
def test_micro_batches_and_recomputation(strategy: str, recompute: str, micro: int) -> None:
    for name in ("gpt2", "moe"):
        spec = training(NETWORKS[name], num_microbatches=micro, recompute=recompute)
        assert_equal(run_both(strategy, NETWORKS[name], 3, spec))


@pytest.mark.parametrize("optimizer", ["adam", "sgd-momentum"])
@pytest.mark.parametrize("strategy", ["zero2", "fsdp", "rtp"])
def test_the_other_optimizers(optimizer: str, strategy: str) -> None:
    """Two micro-batches and three steps: states carry over."""
    spec = training(NETWORKS["uneven"], optimizer, num_microbatches=2)
    assert_equal(run_both(strategy, NETWORKS["uneven"], 2, spec, steps=3))


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_an_encoder_with_materialised_attention(strategy: str, recompute: str) -> None:
    """Norms after the residuals, segments, a dense layer before the head, dropout layers, attention's included."""
    spec = training(bert_tiny(4), attention="materialised", recompute=recompute)
    assert_equal(run_both(strategy, bert_tiny(4), 1 if strategy == "single" else 3, spec))


# ---- evaluation


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_evaluation_passes_one_after_another(strategy: str, n: int) -> None:
    """k = 1 ... n + 1 forward-only passes, twice: each gives the loss of its own batch, wherever the last one left the
    shards."""
    network = unfused(NETWORKS["uneven"])
    parameters = initial_parameters(network, dtype=torch.float64)
    for k in range(1, n + 2):
        spec = training(network)
        schedule = build(strategy, network, n, spec, eval_passes=k)
        batches = batches_of(schedule, network, spec, 2)
        result = run_reference(schedule, network, spec, parameters, batches)
        for step, rank in product(range(2), range(n)):
            losses = [float(dense_loss(network, parameters, b, 2)) for b in batches[step][rank]]
            assert result.losses_by_rank[step][rank] == pytest.approx(losses, abs=EXACT)


# ---- what was sent


def sent(strategy: str, n: int, **options: object) -> Pair:
    """Two steps in fp32, as the schedule states its bytes."""
    network = NETWORKS["gpt2"]
    spec = training(network, num_microbatches=2)
    schedule = build(strategy, network, n, spec, **options)  # type: ignore[arg-type]
    executed = network if options.get("rtp_fuse_mlp") or strategy not in INNER else unfused(network)
    executed = network if strategy.startswith("tp") else executed
    parameters = initial_parameters(executed)
    batches = batches_of(schedule, executed, spec, 2)
    return Pair(schedule, run_reference(schedule, network, spec, parameters, batches, float64=False), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "n", "options"),
    [
        *((s, n, {}) for s in EVERY_STRATEGY for n in (1, 2, 3, 4) if s != "single" and not (s == "tp-sp" and n == 3)),
        ("rtp", 3, {"rtp_fuse_mlp": True, "rtp_hide_gradient_hop": True}),
        ("rtp", 2, {"dp": 2, "dp_sync": "zero1"}),
        ("rtp", 4, {"dims": (2, 2)}),
        ("rtp-inplace", 3, {"rtp_chunk_bytes": 1000}),
        ("zero2", 3, {"ddp_first_bucket_bytes": 1000, "ddp_bucket_bytes": 3000}),
    ],
)
def test_messages_and_bytes_are_those_of_the_simulator(strategy: str, n: int, options: dict[str, object]) -> None:
    """Counted from the tensors that were sent, by kind, on every rank."""
    pair = sent(strategy, n, **options)
    for rank in range(pair.schedule.world_size):
        assert pair.reference.traffic[rank] == communication_totals(pair.schedule, rank)[2]
