"""One rank of many alone on one device: what it holds and sends is what the simulator says of the whole schedule.

The machine runs in this process; nothing is sent, so a rank of 8 or of 64 costs what one rank costs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import schedule_helpers as helpers
import torch
from executor_helpers import answered, gone
from strategy_helpers import FlatCost, build, gpt2_tiny, llama_tiny, stack

from rtp_sim.cli import main
from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.memory import memory_profile
from rtp_sim.executor.alone import alone
from rtp_sim.executor.batches import random_batch
from rtp_sim.executor.distributed import StepTimes, communicates
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.progress import Progress
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.metrics import communication_totals
from rtp_sim.model.layers import Linear
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.builder import Builder
from rtp_sim.schedule.ir import Collective, Compute, Group, Recv, Schedule, Send, Shift
from rtp_sim.timeline import RankTimes, of_one_rank
from rtp_sim.timeline_file import timeline_from_json, timeline_to_json
from rtp_sim.validation.diff import diff
from rtp_sim.validation.one_rank import clusters_for, predict_alone, without_partners
from rtp_sim.validation.predict import Conditions
from rtp_sim.validation.runs import MeasuredRun

ATTEMPTS = 8
STRATEGIES = ("rtp", "rtp-inplace", "ddp", "zero1", "zero2", "fsdp", "tp", "tp-sp")


@dataclass(frozen=True)
class Lone:
    """A machine that has run alone, and the times of its last step."""

    schedule: Schedule
    machine: Machine
    times: StepTimes


def run_alone(
    path: Path, schedule: Schedule, network: Network, rank: int, communication: str, steps: int = 2,
    training: TrainingSpec | None = None,
) -> Lone:  # fmt: skip
    training = training or TrainingSpec(2, network.seq, precision="fp32", optimizer="adamw")
    machine = Machine(schedule, rank, network, training, initial_parameters(network))
    interpreter = alone(schedule, rank, machine, Progress(path / "progress"), communication)
    for step in range(steps):
        micros = int(schedule.meta["num_microbatches"] or 1)
        machine.start_step(random_batch(network, 2, micros, rank, step))
        times = interpreter.run_step()
    return Lone(schedule, machine, times)


# ---- against the simulator, to the byte


@pytest.mark.parametrize("communication", ["fake", "copy"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_alone_holds_and_sends_what_the_whole_schedule_says(tmp_path: Path, strategy: str, communication: str):
    """Kernels that take ten times a transfer's time: then every transfer is done before the host needs it, as here,
    unless other programs keep the copying thread from the cores; such a run is made again."""
    network, n, rank = gpt2_tiny(), 4 if strategy in ("tp", "tp-sp") else 8, 3
    schedule = build(strategy, network, n, TrainingSpec(2, network.seq, precision="fp32", optimizer="adamw"))
    predicted = longest_path(schedule, FlatCost({}, 1, 10), fold=False)
    profile = memory_profile(schedule, rank, predicted.times(rank))
    for _ in range(ATTEMPTS if communication == "copy" else 1):
        lone = run_alone(tmp_path, schedule, network, rank, communication)
        storage = lone.machine.storage
        if storage.peak_bytes == profile.peak_bytes:
            break
    assert storage.peak_bytes == profile.peak_bytes
    held = {category: size for category, size in storage.peak_by_category.items() if size}
    assert held == {category: size for category, size in profile.by_category_at_peak.items() if size}
    sent = lone.times.sent
    assert (sent.size_bytes, sent.messages) == communication_totals(schedule, rank)[:2]


def test_what_it_computes_with_stays_of_ordinary_size(tmp_path: Path):
    """No infinities, and no numbers so small that a CPU is slow with them (below 1.2e-38 in fp32), after five steps
    with shards of 64 ranks, most of which have no head of their own."""
    for strategy, n in (("rtp", 64), ("fsdp", 64), ("zero1", 64), ("rtp-inplace", 3)):
        network = llama_tiny()
        schedule = build(strategy, network, n, TrainingSpec(2, network.seq, precision="fp32", optimizer="adamw"))
        lone = run_alone(tmp_path, schedule, network, 2, "fake", steps=5)
        for name, flat in lone.machine.storage.items():
            if flat.is_floating_point() and flat.numel():
                assert float(flat.abs().max()) < 100, (strategy, name)
                assert not bool(((flat != 0) & (flat.abs() < 1.2e-38)).any()), (strategy, name)


# ---- times


def test_fake_communication_takes_no_time_and_kernels_follow_one_another(tmp_path: Path):
    network = gpt2_tiny()
    lone = run_alone(tmp_path, build("rtp", network, 4), network, 1, "fake")
    now = lone.times.start_ns
    for op in lone.schedule.program(1).ops:
        start_ns, end_ns = lone.times.ops[:, op.index].tolist()
        assert now <= start_ns
        assert (end_ns == start_ns) == communicates(op)
        now = end_ns
    assert now <= lone.times.end_ns


def test_copies_keep_the_order_of_streams_and_dependencies(tmp_path: Path):
    network = gpt2_tiny()
    lone = run_alone(tmp_path, build("rtp", network, 4), network, 1, "copy")
    start_ns, end_ns = lone.times.ops
    last: dict[str, int] = {}
    for op in lone.schedule.program(1).ops:
        assert all(end_ns[i] <= start_ns[op.index] for i in op.after), op.name
        assert start_ns[op.index] >= last.get(op.stream, 0), op.name
        last[op.stream] = end_ns[op.index]
        assert end_ns[op.index] > start_ns[op.index] or not communicates(op)


# ---- what arrives


def test_a_receive_without_a_partner_brings_small_numbers(tmp_path: Path):
    b = Builder("row")
    b.buffer("m0/x", "activations", "fp32", 5000, live_in=True)
    b.buffer("m0/got", "activations", "fp32", 5000, live_out=True)
    b.op("send", "send", Send("row", (1,), 20_000, "t"), ("m0/x",))
    b.op("recv", "recv", Recv("row", (-1,), 20_000, "t"), (), ("m0/got",))
    schedule = Schedule("row", 3, {"row": Group("row", (3,), ((0, 1, 2),))}, (b.program(),), (0, 0, 0))
    network = stack([Linear(5000, 1)], input_numel=5000)
    machine = Machine(schedule, 1, network, TrainingSpec(1, 1, precision="fp32"), initial_parameters(network))
    machine.start_step([{"x": torch.ones(5000)}])
    found = alone(schedule, 1, machine, Progress(tmp_path / "progress"), "fake").run_step()
    assert (found.sent.size_bytes, found.sent.messages) == (20_000, 1)
    got = machine.storage["m0/got"]
    assert float(got.std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(got[:901], got[4099:])


def parcel_of(path: Path, kind: str, network: Network) -> tuple[Machine, list[torch.Tensor]]:
    """Rank 1 of 2 that sums, gathers or scatters eight numbers, 0 to 7; what it finds afterwards with fake and copied
    communication."""
    out = {"all_reduce": 8, "all_gather": 16, "reduce_scatter": 4}[kind]
    b = Builder(kind)
    b.buffer("m0/x", "activations", "fp32", 8, live_in=True)
    b.buffer("m0/y", "activations", "fp32", out, live_out=True)
    size = {"all_reduce": 32, "all_gather": 64, "reduce_scatter": 32}[kind]
    b.op("move", "move", Collective(kind, "pair", size, "fp32"), ("m0/x",), ("m0/y",))
    schedule = Schedule(kind, 2, {"pair": Group("pair", (2,), ((0, 1),))}, (b.program(),), (0, 0))
    machine = Machine(schedule, 1, network, TrainingSpec(1, 1, precision="fp32"), initial_parameters(network))
    found = []
    for communication in ("fake", "copy"):
        machine.start_step([{"x": torch.arange(8)}])
        alone(schedule, 1, machine, Progress(path / "progress"), communication).run_step()
        found.append(machine.storage["m0/y"].clone())
    return machine, found


@pytest.mark.parametrize(
    ("kind", "fake", "copied"),
    [
        ("all_reduce", [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("all_gather", [0, 1, 2, 3, 4, 5, 6, 7] * 2, [0, 1, 2, 3, 4, 5, 6, 7] * 2),
        # Its own part, or the mean of both: (0 + 4) / 2, (1 + 5) / 2 ...
        ("reduce_scatter", [4, 5, 6, 7], [2, 3, 4, 5]),
    ],
)
def test_collectives_leave_the_ranks_own_data(tmp_path: Path, kind: str, fake: list[int], copied: list[int]):
    _, found = parcel_of(tmp_path, kind, stack([Linear(8, 1)], input_numel=8))
    assert [t.tolist() for t in found] == [fake, copied]


# ---- the prediction of a rank alone


def test_copies_are_as_large_as_what_is_sent():
    """Over 3 ranks the shards are uneven, so rank 1's hops are its own. In place every byte is copied twice."""
    network, rank = gpt2_tiny(), 1
    for strategy, passes in (("rtp", 1), ("rtp-inplace", 2)):
        schedule = build(strategy, network, 3)
        copied = without_partners(schedule, rank, "copy").programs[0].ops
        assert all(isinstance(op.action, Compute) for op in copied)
        hops = [op.index for op in schedule.program(rank).ops if isinstance(op.action, Shift)]
        total = sum(dict(copied[i].action.dims)["numel"] for i in hops)
        assert total == passes * communication_totals(schedule, rank)[2]["shift"][0]
        faked = without_partners(schedule, rank, "fake").programs[0].ops
        assert {dict(faked[i].action.dims)["numel"] for i in hops} == {0}


def test_a_rank_alone_is_predicted_kernel_by_kernel():
    network, rank = gpt2_tiny(), 2
    schedule, cost = build("rtp", network, 3), ClusterCost(load_cluster("dgx-a100-80g", 1, 1))
    timeline = predict_alone(schedule, rank, "fake", cost.cluster, Conditions())
    assert set(timeline.representative_of) == {rank}
    for span in timeline.spans(rank):
        action = span.op.action
        if isinstance(action, Compute):
            dims = action.dims_at(schedule.shard_index(rank, action.part))
            assert span.end_ns - span.start_ns == cost.compute(action.kernel, action.dtype, dims).duration_ns
        else:
            assert span.end_ns == span.start_ns


def test_ranks_of_other_programs_have_no_times():
    of = helpers.schedule(
        [helpers.ring(4)], helpers.program("a", [helpers.Row("f", "compute", helpers.kernel(), "x", "y")]),
        helpers.program("b", []), of_rank=(0, 0, 1, 0),
    )  # fmt: skip
    times = RankTimes(np.array([3]), np.array([5]))
    timeline = of_one_rank(of, "measured", 1, times, {"only_rank": 1})
    assert timeline.representative_of == (1, 1, 2, 1)
    assert timeline_from_json(timeline_to_json(timeline)).times(0).end_ns.tolist() == [5]
    found = diff(replace(timeline, kind="predicted"), timeline, (1,))
    assert [rank.rank for rank in found.ranks] == [1]
    assert found.step_error_ns == 0


# ---- as a user meets it


def test_one_command_runs_a_rank_and_another_judges_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run"
    done = answered("--strategy", "rtp", "--world-size", 64, "--only-rank", 3, "--steps", 2, "--warmup", 1,
                    "--format", "json", "-o", path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["world_size"], result["only_rank"], result["communication"]) == (64, 3, "fake")
    assert (result["transport"], result["loss"], len(result["step_times_ns"])) == ("fake", [None] * 3, 2)
    assert [record["rank"] for record in result["ranks"]] == [3]
    assert [p.name for p in (path / "ranks").iterdir()] == ["3"]
    assert gone(path, within_s=0.5)

    # One CPU core is far slower than the A100 that the profile says it is: the verdict is no, for kernels alone.
    code = main(["validate", str(path), "--profile", "dgx-a100-80g", "--format", "json", "--quiet"])
    document = json.loads(capsys.readouterr().out)
    assert code == 1
    kernels, memory, sent, messages = document["checks"]
    assert (kernels["name"], kernels["passed"]) == ("kernels", False)
    assert (memory["predicted"], memory["passed"]) == (memory["measured"], True)
    assert (sent["passed"], messages["passed"], messages["measured"]) == (True, True, result["messages"][0])
    (rank,) = document["diff"]["ranks"]
    assert (rank["rank"], len(rank["stands_for"])) == (3, 1)
    assert any("rank 3 of 64 ran alone, communication left out" in note for note in document["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only-rank", "64"], "--only-rank 64: the ranks of this schedule are 0 to 63"),
        (["--only-rank", "-1"], "only_rank is -1; expected a rank"),
        (["--only-rank", "3", "--check"], "what one rank alone computes means nothing"),
        (["--communication", "copy"], "communication 'copy' is for a rank alone; give --only-rank R"),
    ],
)
def test_arguments_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    words = ["run", "--model", "gpt2-tiny", "--precision", "fp32", "--strategy", "rtp", "--world-size", "64", "-o"]
    assert main([*words, str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_too_small_for_all_ranks_keeps_its_device():
    """Two cores cannot be 64 ranks of one host: the whole schedule is predicted on hosts with a network."""
    schedule = build("rtp", gpt2_tiny(), 64)
    run = MeasuredRun(
        Path("run"), {}, of_one_rank(schedule, "measured", 3, NO_TIMES, {}), Conditions(), "", (1,), (), (), (), 3
    )
    clusters = clusters_for(run, "cpu-local", None)
    assert (clusters.alone.world_size, clusters.whole.world_size) == (1, 64)
    assert clusters.whole.device == clusters.alone.device
    assert clusters.note.startswith("cpu-local cannot have 64 ranks")
    enough = clusters_for(run, "dgx-a100-80g", None)
    assert (enough.whole.world_size, enough.note) == (64, "")


NO_TIMES = RankTimes(np.zeros(0, np.int64), np.zeros(0, np.int64))
