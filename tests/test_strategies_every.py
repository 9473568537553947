"""Every strategy on every small network: the checks pass, both engines agree, and the work adds up to the model's.

FLOPs are summed over all ranks with the sizes of the shard each works on, and compared with formulas in the model's
numbers: nothing is computed twice or left out, however uneven the shards.
"""

from __future__ import annotations

import pytest
from strategy_helpers import (
    DATA_PARALLEL,
    EVERY_STRATEGY,
    FlatCost,
    bert_tiny,
    build,
    gpt2_tiny,
    image_network,
    llama_tiny,
    misfits,
    moe_tiny,
    total_flops,
    updated_parameters,
)

from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.simulate import simulate
from rtp_sim.errors import InputError
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.checks import check
from rtp_sim.schedule.ir import Schedule

BATCH, SEQ = 3, 8
NETWORKS = {"gpt2": gpt2_tiny(SEQ), "llama": llama_tiny(SEQ), "moe": moe_tiny(SEQ), "image": image_network()}
T = BATCH * SEQ

# Fused attention: 2 products of 2 b s^2 (heads x head_dim) FLOPs forward, 5 backward.
PRODUCT = {
    "gpt2": 2 * BATCH * SEQ**2 * 64,
    "llama": 2 * BATCH * SEQ**2 * 32,
    "moe": 2 * BATCH * SEQ**2 * 32,
    "image": 0,
}

# Multiply-adds of the linears of one block per token: attention, and MLP, experts (2 of 8 per token) or router.
LLAMA_ATTENTION = 32 * (32 + 2 * 16) + 32 * 32
BLOCK = {
    "gpt2": 12 * 64 * 64,
    "llama": LLAMA_ATTENTION + 3 * 32 * 48,
    "moe": LLAMA_ATTENTION + 2 * 3 * 32 * 16,
}
HEAD = {"gpt2": 256 * 64, "llama": 48 * 32, "moe": 48 * 32}
ROUTER = {"gpt2": 0, "llama": 0, "moe": 32 * 8}


def image_flops() -> int:
    """3 times the forward, but the first convolution needs no input gradient."""
    first, second = 26 * 26 * 32 * 9, 24 * 24 * 64 * 32 * 9
    return 2 * BATCH * (2 * first + 3 * (second + 9216 * 128 + 128 * 10))


def flops_of_a_replica(name: str, recompute: str, routers: int = 1) -> int:
    """One micro-batch: 3 times the forward (attention 3.5), and the blocks' forward again under full recompute.
    `routers` counts on how many ranks the replicated router runs."""
    if name == "image":
        return image_flops()
    passes = 4 if recompute == "full" else 3
    linears = 2 * T * (passes * 2 * (BLOCK[name] + routers * ROUTER[name]) + 3 * HEAD[name])
    return linears + 2 * PRODUCT[name] * (7 + 2 * (passes - 3))


def cases() -> list[tuple[str, str, int]]:
    found = []
    for strategy in EVERY_STRATEGY:
        for name in NETWORKS:
            if strategy.startswith("tp") and name == "image":
                continue
            found += [(strategy, name, n) for n in ((1,) if strategy == "single" else (1, 2, 3, 4))]
    return found


def schedule_of(strategy: str, name: str, n: int, recompute: str, micro: int) -> Schedule:
    network: Network = NETWORKS[name]
    return build(strategy, network, n, TrainingSpec(BATCH, network.seq, micro, recompute=recompute))


@pytest.mark.parametrize(("strategy", "name", "n"), cases())
def test_checks_engines_flops_and_updates(strategy: str, name: str, n: int) -> None:
    for recompute, micro in (("none", 1), ("none", 2), ("full", 1), ("full", 2)):
        schedule = schedule_of(strategy, name, n, recompute, micro)
        check(schedule)
        cost = FlatCost({"linear": 11, "optimizer": 3}, 5, other_ns=7)
        assert simulate(schedule, cost).step_time_ns == longest_path(schedule, cost).step_time_ns
        shared = strategy.startswith("tp")
        replicas = 1 if shared else n
        expected = replicas * micro * flops_of_a_replica(name, recompute, n if strategy == "tp" else 1)
        assert total_flops(schedule) == expected, (recompute, micro)


@pytest.mark.parametrize(("strategy", "name", "n"), cases())
def test_operands_have_the_sizes_their_kernels_state(strategy: str, name: str, n: int) -> None:
    """Exactly, but for rotation, whose sub-steps work on slices of whole inputs and outputs: there, at least."""
    for recompute in ("none", "full"):
        assert misfits(schedule_of(strategy, name, n, recompute, 1), at_least=strategy.startswith("rtp")) == []


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_an_encoder_with_everything_unusual(strategy: str, recompute: str) -> None:
    """Post-norms, dropout, materialised attention, segments, a dense layer before the head."""
    training = TrainingSpec(BATCH, SEQ, 2, recompute=recompute, attention="materialised")
    for n in (1,) if strategy == "single" else (1, 2, 3, 4):
        schedule = build(strategy, bert_tiny(SEQ), n, training)
        check(schedule)
        assert misfits(schedule, at_least=strategy.startswith("rtp")) == []


PARAMETERS = {"gpt2": 120_576, "llama": 18_592, "moe": 34_464, "image": 1_199_882}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_who_updates_how_many_parameters(name: str, n: int) -> None:
    """Summed over the ranks: DDP all of them n times; sharded strategies each once, but for padding (less than n per
    bucket or unit)."""
    for strategy in DATA_PARALLEL:
        updated = updated_parameters(schedule_of(strategy, name, n, "none", 1))
        if strategy == "ddp":
            assert updated == n * PARAMETERS[name]
        else:
            assert 0 <= updated - PARAMETERS[name] < 5 * n


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace", "tp", "tp-sp"])
def test_split_layers_update_each_parameter_once_and_replicated_ones_everywhere(strategy: str, n: int) -> None:
    """Replicated: norms, positions, routers, and the bias of what is summed over shards."""
    split_by_rotation = strategy.startswith("rtp")
    norms = {"gpt2": 5 * 2 * 64 + 64 * 64, "llama": 5 * 32, "moe": 5 * 32 + 2 * 8 * 32}
    # The attention's output bias; the MLP's too where it is one unit (rotation makes it two, split by output).
    biases = {"gpt2": 2 * 64 * (1 if split_by_rotation else 2), "llama": 0, "moe": 0}
    for name in ("gpt2", "llama", "moe"):
        updated = updated_parameters(schedule_of(strategy, name, n, "none", 1))
        assert updated == PARAMETERS[name] + (n - 1) * (norms[name] + biases[name])


@pytest.mark.parametrize(("n", "extra"), [(1, 0), (2, 0), (3, 2 * 128), (4, 3 * 10)])
@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
def test_the_image_network_by_rotation(strategy: str, n: int, extra: int) -> None:
    """Of its linears, 9216 -> 128 on 3 ranks and 128 -> 10 on 4 are split by inputs: their bias is on every shard. On
    3 ranks 10 outputs and 128 inputs divide by neither: split by output, 4 + 3 + 3."""
    assert updated_parameters(schedule_of(strategy, "image", n, "none", 1)) == PARAMETERS["image"] + extra


@pytest.mark.parametrize("strategy", ["tp", "tp-sp"])
def test_tensor_parallelism_refuses_a_network_it_cannot_split(strategy: str) -> None:
    """No layer of the image network is split: every rank would do the whole work."""
    with pytest.raises(InputError, match=strategy):
        build(strategy, image_network(), 2)


@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace", "tp", "tp-sp"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "moe"])
def test_beside_data_parallelism(strategy: str, name: str) -> None:
    """2 x 2 ranks, both ways to keep replicas together: same checks, twice the work of one group."""
    network = NETWORKS[name]
    for dp_sync in ("ddp", "zero1"):
        training = TrainingSpec(BATCH, network.seq, 2)
        schedule = build(strategy, network, 2, training, dp=2, dp_sync=dp_sync)
        check(schedule)
        alone = build(strategy, network, 2, training)
        assert total_flops(schedule) == 2 * total_flops(alone)
        cost = FlatCost({}, 5, other_ns=7)
        assert simulate(schedule, cost).step_time_ns == longest_path(schedule, cost).step_time_ns


def test_rows_of_uneven_experts_add_up() -> None:
    """10 experts over 4 ranks (3, 3, 2, 2), 2 of them per token: the same work as unsplit."""
    network = moe_tiny(SEQ, experts=10)
    one = build("single", network, 1, TrainingSpec(BATCH, SEQ))
    four = build("rtp", network, 4, TrainingSpec(BATCH, SEQ))
    check(four)
    assert total_flops(four) == 4 * total_flops(one)
