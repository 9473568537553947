"""Twins: torch's own training step gives the losses of dense training, and the executor's memory is the allocator's.

The runs are real, on two gloo processes that do all of them one after another, in double precision where losses are
compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from executor_helpers import answered, work_off
from strategy_helpers import bert_tiny, build, gpt2_tiny, image_network, llama_tiny, moe_tiny

from rtp_sim.cli import main
from rtp_sim.errors import InputError
from rtp_sim.executor.allocator import events, held_at_marks, mark
from rtp_sim.executor.alone import NOISE_NUMEL, AtOnce, StandIn
from rtp_sim.executor.batches import random_batch
from rtp_sim.executor.collect import collect
from rtp_sim.executor.dense import train_dense
from rtp_sim.executor.machine import Machine, replicas
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import Record, RunDirectory
from rtp_sim.executor.twins import require_twin
from rtp_sim.model.network import Network, transformer_network, with_dropout
from rtp_sim.model.spec import ModelSpec
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Schedule

STEPS = 3


def wide() -> Network:
    """Three blocks of width 64, untied: large enough that the tensors count and not what libraries keep beside them."""
    return transformer_network(
        ModelSpec("wide", 3, 64, 4, vocab_size=512, max_positions=64, gated_mlp=True, activation="silu",
                  position="rotary", norm="rmsnorm", tied_embeddings=False, qkv_bias=False, out_bias=False,
                  mlp_bias=False),
        32,
    )  # fmt: skip


@dataclass(frozen=True)
class Twin:
    """A strategy on two ranks and the network that it trains."""

    name: str
    strategy: str
    network: Network
    micros: int = 1
    optimizer: str = "adamw"
    recompute: str = "none"

    @property
    def training(self) -> TrainingSpec:
        return TrainingSpec(2, self.network.seq, self.micros, "fp32", self.recompute, self.optimizer)

    def schedule(self) -> Schedule:
        return build(self.strategy, self.network, 2, self.training)


TWINS = (
    Twin("ddp", "ddp", gpt2_tiny(), micros=2),
    Twin("ddp-image", "ddp", image_network(), optimizer="sgd-momentum"),
    Twin("fsdp", "fsdp", gpt2_tiny(), micros=2, optimizer="adam"),
    Twin("fsdp-llama", "fsdp", llama_tiny(), recompute="full"),
    Twin("tp", "tp", gpt2_tiny(), micros=2),
    Twin("tp-llama", "tp", llama_tiny(), optimizer="sgd"),
    Twin("tp-sp", "tp-sp", gpt2_tiny()),
    Twin("tp-sp-llama", "tp-sp", llama_tiny()),
    # Without dropout: a twin would draw masks of its own.
    Twin("tp-sp-bert", "tp-sp", with_dropout(bert_tiny(), 0.0)),
)
MEASURED = Twin("wide", "fsdp", wide())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All twins in double precision, then fully sharded training both ways in single precision."""
    path, jobs = tmp_path_factory.mktemp("twins"), []

    def job(name: str, case: Twin, **request: object) -> None:
        run = RunDirectory(path / name)
        asked = RunRequest(case.network, case.training, steps=STEPS, warmup=0, **request)  # type: ignore[arg-type]
        run.prepare(case.schedule(), asked)
        jobs.append({"run": str(run.path)})

    for case in TWINS:
        job(case.name, case, twin=True, float_dtype="fp64")
    job("wide-twin", MEASURED, twin=True)
    job("wide", MEASURED)
    work_off(jobs, 2, path)
    return path


def result_of(path: Path) -> Record:
    run = RunDirectory(path)
    return collect(run, *run.load())


@pytest.mark.parametrize("case", TWINS, ids=lambda case: case.name)
def test_a_twin_trains_as_dense_training_does(runs: Path, case: Twin):
    """Three steps: the second and third loss need the right gradients and updates of the ones before."""
    schedule = case.schedule()
    batches = [
        [random_batch(case.network, 2, case.micros, replica, step) for replica in range(replicas(schedule))]
        for step in range(STEPS)
    ]
    parameters = initial_parameters(case.network)
    expected = train_dense(case.network, parameters, batches, 2, case.training.optimizer)
    result = result_of(runs / case.name)
    assert result["loss"] == pytest.approx(expected.losses, rel=1e-9)
    assert expected.losses[0] != pytest.approx(expected.losses[1], rel=1e-4)
    assert (result["failure"], result["steps_finished"], len(result["step_times_ns"])) == (None, STEPS, STEPS)
    assert min(result["peak_memory_bytes"]) > 0
    assert result["bytes_sent"] is None
    assert not (runs / case.name / "measured.json").exists()


def test_fully_sharded_memory_is_no_more_than_torchs(runs: Path):
    """Live storage of the executor's fsdp against all that the allocator gave to `fully_shard`."""
    ours, twin = (max(result_of(runs / name)["peak_memory_bytes"]) for name in ("wide", "wide-twin"))
    assert ours <= 1.15 * twin


# ---- live storage against the allocator


class Marks(Progress):
    """Marks the allocator's events at every op, and keeps what the storage counts there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.machine: Machine | None = None
        self.counted: list[int] = []

    def at(self, op: int) -> None:
        assert self.machine is not None
        mark()
        self.counted.append(sum(self.machine.storage.bytes_by_category.values()))


@pytest.mark.parametrize("strategy", ["rtp", "ddp", "fsdp", "tp"])
def test_storage_is_what_the_allocator_holds_at_every_op(tmp_path: Path, strategy: str):
    """Beside the buffers and optimizer states there is the noise that stands in for partners, and not a byte more."""
    network, training = gpt2_tiny(), TrainingSpec(2, 8, precision="fp32", optimizer="adamw")
    schedule, parameters = build(strategy, network, 4, training), initial_parameters(network)
    marks, kept = Marks(tmp_path / "progress"), []

    def life() -> None:
        machine = marks.machine = Machine(schedule, 1, network, training, parameters)
        kept.append(machine)
        interpreter = AtOnce(schedule, 1, machine, marks, StandIn(machine, False))
        for step in range(2):
            machine.start_step(random_batch(network, 2, 1, 1, step))
            interpreter.run_step()

    held, peaks = held_at_marks(events(life))
    ops = len(schedule.program(1).ops)
    assert len(held) == len(marks.counted) == 2 * ops
    # Made once in fp64, fp32, bf16 and fp16.
    noise_bytes = (8 + 4 + 2 + 2) * NOISE_NUMEL
    # In the first step optimizer states and gradients of the step before are not there yet, in the second all is.
    assert [h - noise_bytes for h in held[ops:]] == marks.counted[ops:]
    # What kernels need for a moment comes on top.
    assert max(peaks[ops:]) - noise_bytes >= kept[0].storage.peak_bytes


def test_events_are_those_of_the_work():
    def work() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        mark()
        b = torch.empty(5000, dtype=torch.uint8)
        del b
        mark()
        del a
        mark()

    assert held_at_marks(events(work)) == ([1000, 1000, 0], [6000, 1000, 0])


# ---- as a user meets it


def test_a_twin_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    done = answered("--strategy", "ddp", "--nproc-per-node", 2, "--twin", "--steps", 2, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "torch's DistributedDataParallel" in done.stdout
    assert main(["validate", str(tmp_path / "run"), "--profile", "cpu-local"]) == 2
    assert "is a run of a twin (DistributedDataParallel): it has no ops to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "rtp"], "--twin: torch has no rtp; expected one of ddp, fsdp, tp, tp-sp"),
        (["--strategy", "tp", "--tp", "2", "--dp", "2"], "--twin: tp with 2 replicas; expected --dp 1"),
        (["--strategy", "ddp", "--check"], "--twin runs all ranks and keeps no tensors"),
        (["--strategy", "ddp", "--recompute", "selective"], "--twin: recompute selective; expected none or full"),
        (["--strategy", "ddp", "--precision", "fp16"], "--twin: precision fp16; expected fp32"),
    ],
)
def test_what_has_no_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    words = ["run", "--model", "gpt2-tiny", "--twin", "--nproc-per-node", "4" if "--dp" in arguments else "2"]
    assert main([*words, "-o", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_experts_have_no_twin():
    network, training = moe_tiny(), TrainingSpec(2, 8, precision="fp32")
    with pytest.raises(InputError, match=r"moe-tiny has experts \(h0.router\)"):
        require_twin(build("ddp", network, 2, training), RunRequest(network, training, twin=True))
