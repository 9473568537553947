"""Every gradient contribution reaches the rank that updates the weight, exactly once, and reads its own shard's inputs.

Contributions are counted in symbols (strategy_meaning.py): one per weight-gradient kernel and rank, micro-batches and
both users of tied weights included.
"""

from __future__ import annotations

from collections import Counter

import pytest
from strategy_helpers import DATA_PARALLEL, INNER, build, gpt2_tiny, image_network, llama_tiny, moe_tiny
from strategy_meaning import expected_update, foreign_reads, interpret

from rtp_sim.model.network import Network, unfused
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Schedule

NETWORKS = {"gpt2": gpt2_tiny(), "llama": llama_tiny(), "moe": moe_tiny(), "image": image_network()}


def users_of(network: Network) -> dict[str, set[str]]:
    """weight -> the layers that use it."""
    users: dict[str, set[str]] = {}
    for layer in network.layers():
        if layer.op.numel():
            users.setdefault(layer.weight_name, set()).add(layer.name)
    return users


def lost_or_extra(schedule: Schedule, network: Network, axis: str) -> list[str]:
    """Weights whose update is not the sum of exactly the contributions to the rank's own shard."""
    meaning, found = interpret(schedule, axis), []
    for weight, layers in users_of(network).items():
        for rank, updates in enumerate(meaning.updates):
            wanted = expected_update(schedule, rank, layers, axis)
            ops = {op for _, op in expected_update(schedule, rank, layers)}
            held = updates.get(f"g.{weight}", Counter())
            # A bucket hands the sums of its other layers back too; they say nothing about this weight.
            got = Counter({k: v for k, v in held.items() if k[1] in ops})
            if got != wanted:
                lost, extra = sum((wanted - got).values()), sum((got - wanted).values())
                found.append(f"rank {rank} g.{weight}: {lost} lost, {extra} too many")
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("n", "dims", "dp"), [(2, (), 1), (3, (), 1), (4, (), 1), (4, (2, 2), 1), (2, (), 2)])
@pytest.mark.parametrize("options", [{}, {"rtp_hide_gradient_hop": True}, {"rtp_fuse_mlp": True, "rtp_prefetch": True}])
@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
def test_rotation_sums_every_contribution_at_home(
    strategy: str, name: str, n: int, dims: tuple[int, ...], dp: int, options: dict[str, bool]
) -> None:
    network = NETWORKS[name]
    whole = network if options.get("rtp_fuse_mlp") else unfused(network)
    for recompute, micro in (("none", 1), ("none", 2), ("full", 1), ("full", 2)):
        training = TrainingSpec(2, network.seq, micro, recompute=recompute)
        schedule = build(strategy, network, n, training, dims=dims, dp=dp, **options)
        assert lost_or_extra(schedule, whole, "rtp") == []


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("strategy", ["rtp", "rtp-inplace"])
@pytest.mark.parametrize("fuse", [False, True])
def test_rotation_reads_the_activations_of_the_shard_it_works_on(
    strategy: str, name: str, n: int, recompute: str, fuse: bool
) -> None:
    """The backward runs through the shards in reverse: sub-step k needs what forward sub-step n-1-k kept."""
    network = NETWORKS[name]
    schedule = build(strategy, network, n, TrainingSpec(2, network.seq, recompute=recompute), rtp_fuse_mlp=fuse)
    assert foreign_reads(schedule) == []


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2])
def test_ddp_updates_every_rank_with_everything(name: str, n: int, micro: int) -> None:
    network = NETWORKS[name]
    schedule = build("ddp", network, n, TrainingSpec(2, network.seq, micro))
    assert lost_or_extra(schedule, network, "") == []


@pytest.mark.parametrize("strategy", [s for s in DATA_PARALLEL if s != "ddp"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("micro", [1, 2])
def test_sharded_updates_see_every_contribution_once(strategy: str, name: str, n: int, micro: int) -> None:
    """The buckets (or units) of a rank together hold every contribution of every rank, once."""
    network = NETWORKS[name]
    schedule = build(strategy, network, n, TrainingSpec(2, network.seq, micro))
    everything = sum((expected_update(schedule, 0, {x.name}) for x in network.layers()), Counter())
    assert everything
    for updates in interpret(schedule).updates:
        assert sum(updates.values(), Counter()) == everything


@pytest.mark.parametrize("strategy", ["tp", "tp-sp"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "moe"])
@pytest.mark.parametrize("dp", [1, 2])
def test_tensor_parallel_adds_replicas_of_a_shard_once(strategy: str, name: str, dp: int) -> None:
    """A shard's gradient is the sum over the replicas that hold it; that of a whole weight differs between tp and
    tp-sp: with sequence parallelism each rank has seen its own tokens, so norms and positions are summed over tp."""
    network = NETWORKS[name]
    schedule = build(strategy, network, 2, TrainingSpec(2, network.seq), dp=dp)
    assert INNER[strategy] == "tp"
    own = [x.name for x in network.layers() if x.op.numel() and type(x.op).__name__ in ("Attention", "Mlp", "Experts")]
    meaning = interpret(schedule, "tp")
    for rank, updates in enumerate(meaning.updates):
        for layer in own:
            wanted = expected_update(schedule, rank, {layer}, "tp")
            assert updates[f"g.{layer}"] == Counter({k: v for k, v in wanted.items() if k[0] % 2 == rank % 2})
        summed = 2 * dp if strategy == "tp-sp" else dp
        norms = [x.name for x in network.layers() if type(x.op).__name__ == "Norm"]
        assert all(sum(updates[f"g.{norm}"].values()) == summed for norm in norms)
