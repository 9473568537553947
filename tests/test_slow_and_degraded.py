"""A slow GPU and a degraded link, put in by name: what they cost against hand calculation, and who feels them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cost_helpers import NIC, PORT, switched

from rtp_sim.cli import main
from rtp_sim.cost.slow import SLOW, unmarked
from rtp_sim.errors import InputError
from rtp_sim.experiment import Request, Result, prepare
from rtp_sim.experiment import run as experiment
from rtp_sim.hardware.degraded import degraded
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import op_kind
from rtp_sim.schedule.ir import Collective, Compute
from rtp_sim.schedule.options import Options

ONE_BUCKET = Options(ddp_bucket_bytes=1 << 40, ddp_first_bucket_bytes=1 << 40)
"""All gradients at once, after the backward: nothing runs beside anything else."""


def ddp(cluster: Cluster, engine: str = "simpy", fold: bool = True, **changes: object) -> Result:
    request = Request("gpt2-tiny", "toy", "ddp", micro_batch=512, precision="fp32", options=ONE_BUCKET, **changes)  # type: ignore[arg-type]
    return experiment(prepare(request, cluster), engine, fold)


def kernels_ns(result: Result) -> list[int]:
    """Alone, on a rank that is not slow."""
    cost, program = result.prepared.cost, result.prepared.schedule.programs[0]
    actions = [op.action for op in program.ops if isinstance(op.action, Compute)]
    return [cost.compute(a.kernel, a.dtype, a.dims).duration_ns for a in actions]


def collective_ns(result: Result) -> int:
    """How long the one all-reduce takes once all are there."""
    (op,) = [op for op in result.prepared.schedule.programs[0].ops if isinstance(op.action, Collective)]
    times = result.timeline.times(0)
    return int(times.end_ns[op.index] - times.start_ns[op.index])


@pytest.mark.parametrize("fold", [True, False])
def test_one_slow_gpu_makes_a_compute_bound_step_longer_by_exactly_its_own_kernels(fold: bool) -> None:
    """Everyone waits for rank 3 at the all-reduce and at the end of the step; between, nothing hides anything."""
    healthy, slow = ddp(switched(4), fold=fold), ddp(switched(4), fold=fold, slow_gpus=((3, 1.3),))
    # Compute-bound: the host is never waited for after its first op.
    alone = kernels_ns(healthy)
    assert healthy.timeline.step_time_ns == 5000 + sum(alone) + collective_ns(healthy)
    extra = sum(ns * 1300 // 1000 - ns for ns in alone)
    assert slow.timeline.step_time_ns - healthy.timeline.step_time_ns == extra
    # The fast ones compute as before, and wait.
    assert slow.timeline.representative_of == ((0, 0, 0, 3) if fold else (0, 1, 2, 3))
    split = [int(t.end_ns[-1] - t.start_ns[-1]) for t in (slow.timeline.times(0), slow.timeline.times(3))]
    assert split[1] == split[0] * 1300 // 1000


def test_the_slowest_decides() -> None:
    one = ddp(switched(4), slow_gpus=((3, 1.5),)).timeline.step_time_ns
    assert ddp(switched(4), slow_gpus=((3, 1.5), (1, 1.2))).timeline.step_time_ns == one
    assert ddp(switched(4), slow_gpus=((0, 1.0),)).timeline.step_time_ns == ddp(switched(4)).timeline.step_time_ns


def test_memory_and_traffic_stay_as_they_are() -> None:
    healthy, slow = ddp(switched(4)).metrics, ddp(switched(4), slow_gpus=((3, 1.3),)).metrics
    for name in ("peak_memory_bytes", "memory_by_category", "bytes_sent_per_rank", "messages_per_rank"):
        assert getattr(healthy, name) == getattr(slow, name)


def test_a_mark_is_not_part_of_a_kernel() -> None:
    assert unmarked((("m", 4), (SLOW, 1300))) == ((("m", 4),), 1300)
    assert unmarked((("m", 4),)) == ((("m", 4),), 1000)
    result = ddp(switched(2), slow_gpus=((1, 2.0),))
    assert sum(result.metrics.cost_provenance.values()) == pytest.approx(1)
    assert {op_kind(op) for op in result.prepared.schedule.program(1).ops} == {
        op_kind(op) for op in result.prepared.schedule.program(0).ops
    }


@pytest.mark.parametrize("engine", ["simpy", "longest-path"])
@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_a_degraded_link_slows_the_ring_that_crosses_it(engine: str, fraction: float) -> None:
    """A ring all-reduce of S bytes on n ranks sends 2 (n-1)/n S over every edge: at a fraction f of a port's bandwidth
    it takes 1/f of that flow, the same latency, and the step is longer by just the difference."""
    cluster = switched(4)
    healthy = ddp(cluster, engine)
    (op,) = [op for op in healthy.prepared.schedule.programs[0].ops if isinstance(op.action, Collective)]
    assert isinstance(op.action, Collective)
    edge_bytes = op.action.size_bytes * 6 / 4
    worn = ddp(cluster, engine, degraded_links=(("node0/gpu3->nvswitch", fraction),))
    extra_ns = edge_bytes / PORT * 1e9 * (1 / fraction - 1)
    assert worn.timeline.step_time_ns - healthy.timeline.step_time_ns == pytest.approx(extra_ns, abs=2)
    assert (
        worn.timeline.step_time_ns
        == ddp(cluster, engine, fold=False, degraded_links=(("node0/gpu3->nvswitch", fraction),)).timeline.step_time_ns
    )


def test_a_link_that_nothing_crosses_costs_nothing() -> None:
    step = ddp(switched(4)).timeline.step_time_ns
    assert ddp(switched(4), degraded_links=(("node0/gpu3->pcie0", 0.1),)).timeline.step_time_ns == step


def test_links_by_pattern() -> None:
    cluster = degraded(switched(2, nodes=2), (("node1/nic0*", 0.5), ("*->fabric", 0.5)))
    rates = {link.name: link.bandwidth_bytes_per_s for link in cluster.topology.links if link.kind == "nic"}
    assert rates == {
        "node0/nic0->fabric": NIC // 2, "node0/fabric->nic0": NIC,
        "node1/nic0->fabric": NIC // 4, "node1/fabric->nic0": NIC,
    }  # fmt: skip
    # The cluster that was given is as it was.
    again = switched(2, nodes=2)
    degraded(again, (("*", 0.5),))
    assert again.topology.links == switched(2, nodes=2).topology.links


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--slow-gpu 4=1.3", ["slow GPU 4", "0 to 3"]),
        ("--slow-gpu 3", ["'3'", "3=1.3"]),
        ("--slow-gpu 3=0", ["factor"]),
        ("--degrade-link node0/gpu3->nvswtch=0.5", ["nvswtch", "node0/gpu3->nvswitch"]),
        ("--degrade-link node0/gpu3->nvswitch", ["node0/gpu3->nvswitch=0.5"]),
        ("--degrade-link node0/gpu3->nvswitch=0", ["more than 0"]),
        ("--degrade-link node0/gpu3->nvswitch=1.5", ["at most 1"]),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], line: str, words: list[str]) -> None:
    assert main(f"simulate --quiet --model gpt2-tiny --gpus 4 --strategy ddp {line}".split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (message,) = captured.err.splitlines()
    assert all(word in message for word in words)


def test_a_composed_pipeline_has_no_slow_gpus() -> None:
    from rtp_sim.compose.estimate import estimate

    request = Request("gpt2-medium", "dgx-a100-80g", "1f1b", gpus=4, pp=4, micro_batches=8, slow_gpus=((1, 2.0),))
    with pytest.raises(InputError, match="expected --engine simpy"):
        estimate(request)
    with pytest.raises(InputError, match="in lockstep all ranks are equal"):
        estimate(Request("gpt2-tiny", "dgx-a100-80g", "ddp", gpus=4, slow_gpus=((1, 2.0),)), engine="lockstep")
    slow, healthy = (experiment(prepare(r)).metrics.step_time_s for r in (request, replace(request, slow_gpus=())))
    assert slow > healthy
