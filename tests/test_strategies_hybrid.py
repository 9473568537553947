"""Sharding over fewer ranks than there are replicas: `hsdp`, and ZeRO-1's optimizer groups: volumes, training."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from executor_reference import HYPER, Pair, assert_equal, batches_of, run_both
from strategy_helpers import build, collectives, gpt2_tiny, groups_of, kinds

from rtp_sim.errors import InputError
from rtp_sim.executor.dense import train_dense
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.reference import run_reference
from rtp_sim.experiment import Request, prepare
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.metrics import communication_totals
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.build import build_schedule
from rtp_sim.schedule.checks import check
from rtp_sim.schedule.ir import Group, Schedule
from rtp_sim.schedule.layout import make_groups, make_layout
from rtp_sim.schedule.options import Options

ROOT = (256 * 64 + 64 * 64 + 2 * 64) * 4
BLOCK = (12 * 64 * 64 + 13 * 64) * 4
"""Bytes of gpt2-tiny's root unit (embedding, positions, last norm) and of a block, in fp32."""


def spec(micros: int = 1) -> TrainingSpec:
    return TrainingSpec(2, 8, num_microbatches=micros, precision="fp32")


@pytest.mark.parametrize("micros", [1, 3])
def test_hsdp_gathers_inside_and_reduces_shards_across_once(micros: int) -> None:
    """4 ranks to a group: gathers for forward and backward and a reduce-scatter per unit and micro-batch inside, one
    all-reduce of a fourth per unit and step across."""
    schedule = build("hsdp", gpt2_tiny(), 4, spec(micros), dp=2)
    check(schedule)
    inside = kinds(collectives(schedule, "fsdp"))
    assert inside == Counter({
        ("all_gather", ROOT): 2 * micros, ("all_gather", BLOCK): 4 * micros,
        ("reduce_scatter", ROOT): micros, ("reduce_scatter", BLOCK): 2 * micros,
    })  # fmt: skip
    assert kinds(collectives(schedule, "dp")) == Counter({("all_reduce", ROOT // 4): 1, ("all_reduce", BLOCK // 4): 2})


def test_hsdp_in_one_group_is_fsdp() -> None:
    """What a rank sends and keeps."""
    hybrid, plain = build("hsdp", gpt2_tiny(), 4, spec(2)), build("fsdp", gpt2_tiny(), 4, spec(2))
    assert communication_totals(hybrid, 0) == communication_totals(plain, 0)
    assert [b.numel for b in hybrid.programs[0].buffers.values()] == [
        b.numel for b in plain.programs[0].buffers.values()
    ]


@pytest.mark.parametrize(("n", "dp", "micros"), [(2, 2, 1), (3, 2, 2), (2, 3, 2)])
def test_hsdp_trains_as_dense(n: int, dp: int, micros: int) -> None:
    torch.set_num_threads(1)
    training = TrainingSpec(2, 4, num_microbatches=micros, precision="fp32")
    assert_equal(run_both("hsdp", gpt2_tiny(4), n, training, dp=dp))


def in_groups(n: int, size: int, micros: int) -> Schedule:
    """zero1 on n ranks whose optimizer state is shared by `size` of them."""
    layout, groups = groups_of("zero1", 1, n)
    groups["zero1"] = Group("zero1", (size,), tuple(tuple(range(i, i + size)) for i in range(0, n, size)))
    options = Options(zero1_size=size, ddp_bucket_bytes=40_000)
    training = TrainingSpec(2, 4, num_microbatches=micros, precision="fp32")
    return build_schedule("zero1", gpt2_tiny(4), training, layout, groups, options)


def test_zero1_groups_all_reduce_over_all_and_gather_inside() -> None:
    schedule = in_groups(6, 2, 2)
    check(schedule)
    reduced, gathered = collectives(schedule, "dp"), collectives(schedule, "zero1")
    assert {kind for kind, *_ in reduced} == {"all_reduce"}
    assert {kind for kind, *_ in gathered} == {"all_gather"}
    assert sum(size for *_, size in reduced) == sum(size for *_, size in gathered) == ROOT + 2 * BLOCK
    states = sum(b.size_bytes() for b in schedule.programs[0].buffers.values() if b.category == "optimizer")
    # Adam keeps two numbers per parameter.
    assert states == 2 * (ROOT + 2 * BLOCK) // 2


@pytest.mark.parametrize(("n", "size"), [(4, 2), (6, 3)])
def test_zero1_groups_train_as_dense(n: int, size: int) -> None:
    torch.set_num_threads(1)
    schedule, network = in_groups(n, size, 2), gpt2_tiny(4)
    training = TrainingSpec(2, 4, num_microbatches=2, precision="fp32")
    parameters = initial_parameters(network, dtype=torch.float64)
    batches = batches_of(schedule, network, training, 2)
    found = run_reference(schedule, network, training, parameters, batches, hyper=HYPER)
    dense = train_dense(network, parameters, batches, 2, "adamw", HYPER.lr, HYPER.weight_decay, HYPER.momentum,
                        HYPER.eps)  # fmt: skip
    assert_equal(Pair(schedule, found, dense))


def test_zero1_may_all_reduce_and_still_share_the_optimizer() -> None:
    """Whole gradients are added up (nanotron), each rank updates its third: as dense, and bytes by hand."""
    torch.set_num_threads(1)
    options = Options(zero1_all_reduce=True, dp_overlap=False)
    network, training = gpt2_tiny(4), TrainingSpec(2, 4, num_microbatches=2, precision="fp32")
    layout, groups = groups_of("zero1", 1, 3)
    schedule = build_schedule("zero1", network, training, layout, groups, options)
    check(schedule)
    # 120,576 parameters: three equal slices.
    total = ROOT + 2 * BLOCK
    found = kinds(collectives(schedule, "dp"))
    assert found == Counter({("all_reduce", total): 1, ("all_gather", total): 1})
    parameters = initial_parameters(network, dtype=torch.float64)
    batches = batches_of(schedule, network, training, 2)
    ran = run_reference(schedule, network, training, parameters, batches, hyper=HYPER)
    dense = train_dense(network, parameters, batches, 2, "adamw", HYPER.lr, HYPER.weight_decay, HYPER.momentum,
                        HYPER.eps)  # fmt: skip
    assert_equal(Pair(schedule, ran, dense))


def test_groups_on_a_cluster() -> None:
    """Two nodes of 8: shards and optimizer groups inside the nodes, replicas across."""
    topology = load_cluster("dgx-a100-80g", 2, None).topology
    groups = make_groups(make_layout("hsdp", 16, 8, None), topology)
    assert {frozenset(g) for g in groups["fsdp"].instances} == {frozenset(range(8)), frozenset(range(8, 16))}
    assert {frozenset(g) for g in groups["dp"].instances} == {frozenset((r, r + 8)) for r in range(8)}
    groups = make_groups(make_layout("zero1", 16, None, None), topology, zero1_size=8)
    assert {frozenset(g) for g in groups["zero1"].instances} == {frozenset(range(8)), frozenset(range(8, 16))}


def test_a_size_that_does_not_divide_is_said() -> None:
    with pytest.raises(InputError, match="--zero1-size 3 does not divide the 8 data-parallel replicas"):
        prepare(Request("gpt2-tiny", "dgx-a100-80g", "zero1", options=Options(zero1_size=3)))
