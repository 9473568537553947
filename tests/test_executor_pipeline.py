"""Pipelines train as plain dense training does: losses, every gradient, every parameter, in fp64 to 1e-10.

Stages run programs of their own; batch and loss belong to the first and the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from executor_reference import HYPER, Pair, assert_equal, batches_of
from strategy_helpers import build_pipeline, llama_tiny, stack

from rtp_sim.errors import ScheduleError
from rtp_sim.executor.dense import train_dense
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.reference import run_reference
from rtp_sim.metrics import communication_totals
from rtp_sim.model.layers import Linear
from rtp_sim.model.network import Network, transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.pipeline_order import PIPELINES

STRATEGIES = [s for s in PIPELINES if s not in ("zb-1p", "zb-2p")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tied(layers: int = 4) -> Network:
    """Width 24, 4 heads, vocabulary 36, shared by embedding and head."""
    return transformer_network(find_model("gpt2-tiny", num_layers=layers, hidden_size=24, vocab_size=36), 4)


def trained(strategy: str, network: Network, pp: int, micros: int = 4, *, float64: bool = True, recompute: str = "none",
            **options: object) -> Pair:  # fmt: skip
    """Two steps of AdamW by the schedule and dense."""
    spec = TrainingSpec(2, network.seq, num_microbatches=micros, precision="fp32", recompute=recompute)
    options = {"vpp": 2, **options} if strategy == "interleaved" else options
    schedule = build_pipeline(strategy, network, pp, spec, **options)  # type: ignore[arg-type]
    parameters = initial_parameters(network, dtype=torch.float64)
    batches = batches_of(schedule, network, spec, 2)
    reference = run_reference(schedule, network, spec, parameters, batches, hyper=HYPER, float64=float64)
    dense = train_dense(network, parameters, batches, 2, "adamw", HYPER.lr, HYPER.weight_decay, HYPER.momentum,
                        HYPER.eps)  # fmt: skip
    return Pair(schedule, reference, dense)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_every_order_on_2_3_and_4_stages(strategy: str, pp: int) -> None:
    chunks = 2 if strategy in ("interleaved", "zb-v") else 1
    assert_equal(trained(strategy, tied(max(4, pp * chunks)), pp, micros=2 * pp))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2},
        {"tp": 2, "sequence_parallel": True, "recompute": "full"},
        {"dp": 2, "dp_sync": "zero1"},
        {"tp": 2, "dp": 2, "dp_overlap": False},
        {"tp": 2, "pp_scatter_gather": True, "pp_overlap": False},
    ],
)
def test_with_tensor_and_data_parallelism(strategy: str, options: dict[str, object]) -> None:
    assert_equal(trained(strategy, tied(), 2, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
def test_without_shared_weights(strategy: str) -> None:
    assert_equal(trained(strategy, llama_tiny(4), 2, tp=2, dp=2, dp_sync="zero1", recompute="full"))


def test_fewer_micro_batches_than_stages_and_uneven_stages() -> None:
    assert_equal(trained("1f1b", tied(5), 4, micros=2, pp_layers=(1, 2, 1, 1)))
    assert_equal(trained("zb-v", tied(4), 2, micros=1))


@pytest.mark.parametrize(("strategy", "tp", "dp"), [("1f1b", 1, 1), ("zb-h1", 2, 2), ("zb-v", 2, 1)])
def test_clipping_by_the_norm_over_all_stages(strategy: str, tp: int, dp: int) -> None:
    """Shared weights lie on two stages and count once."""
    spec = TrainingSpec(2, 4, num_microbatches=4, precision="fp32", clip_norm=0.05)
    schedule = build_pipeline(strategy, tied(), 2, spec, tp=tp, dp=dp, dp_sync="zero1")
    parameters = initial_parameters(tied(), dtype=torch.float64)
    batches = batches_of(schedule, tied(), spec, 2)
    reference = run_reference(schedule, tied(), spec, parameters, batches, hyper=HYPER)
    dense = train_dense(tied(), parameters, batches, 2, "adamw", HYPER.lr, HYPER.weight_decay, HYPER.momentum,
                        HYPER.eps, clip_norm=0.05)  # fmt: skip
    assert reference.grad_norms == pytest.approx(dense.grad_norms, rel=1e-12)
    assert_equal(Pair(schedule, reference, dense))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_stage_with_the_loss_alone(tp: int) -> None:
    """Balanced by cost: 4 blocks of 6,912 weights and a head of 24 x 576 on 4 stages; logits cross the last cut."""
    network = transformer_network(find_model("gpt2-tiny", num_layers=4, hidden_size=24, vocab_size=576), 4)
    pair = trained("1f1b", network, 4, tp=tp, pp_balance="cost", sequence_parallel=tp > 1)
    assert next(iter(pair.schedule.programs[3].buffers)) == "m0/targets"
    assert_equal(pair)


@pytest.mark.parametrize("strategy", ["1f1b", "interleaved", "zb-v"])
def test_messages_and_bytes_are_those_of_the_simulator(strategy: str) -> None:
    """Counted from the tensors that were sent, in fp32, on every rank."""
    pair = trained(strategy, tied(), 2, float64=False, tp=2, dp=2)
    for rank in range(8):
        assert pair.reference.traffic[rank] == communication_totals(pair.schedule, rank)[2]


def test_only_the_last_stage_has_losses() -> None:
    pair = trained("1f1b", tied(), 4, dp=2)
    assert [len(micros) for micros in pair.reference.losses_by_rank[0]] == [0] * 6 + [4] * 2


def test_a_pipeline_of_plain_layers() -> None:
    """No embedding and no loss: the last layer's output stands for it, the input is no id."""
    network = stack([Linear(6, 6)] * 4, input_numel=6)
    spec = TrainingSpec(2, 1, num_microbatches=3, precision="fp32", optimizer="sgd")
    schedule = build_pipeline("1f1b", network, 2, spec)
    parameters = initial_parameters(network, dtype=torch.float64)
    batches = batches_of(schedule, network, spec, 1)
    found = run_reference(schedule, network, spec, parameters, batches).gradients
    whole = build_pipeline("1f1b", network, 1, spec)
    expected = run_reference(whole, network, spec, parameters, batches).gradients
    for layer, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[layer][name], tensor, rtol=0, atol=1e-10)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    spec = TrainingSpec(2, 4, num_microbatches=2, precision="fp32")
    schedule = build_pipeline("1f1b", tied(), 2, spec)
    first = schedule.programs[0]
    unsent = tuple(op for op in first.ops if not op.name.endswith(".send"))
    broken = replace(schedule, programs=(replace(first, ops=unsent), schedule.programs[1]))
    parameters = initial_parameters(tied(), dtype=torch.float64)
    with pytest.raises(ScheduleError, match=r"rank 0 waits at 'm0.d.h1.add2.y.recv', and nobody goes on"):
        run_reference(broken, tied(), spec, parameters, batches_of(schedule, tied(), spec, 1))
