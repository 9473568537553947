"""`rtp-sim run` as a user meets it: its results, torchrun, and set-ups that cannot work."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from executor_helpers import ROOT, Case, answered, command_line, free_port, gone, prepared
from executor_layouts import named
from strategy_helpers import bert_tiny, gpt2_tiny, image_network, llama_tiny, moe_tiny
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp

from rtp_sim.errors import InputError
from rtp_sim.executor import request as requests
from rtp_sim.executor.batches import random_batch
from rtp_sim.executor.checkpoint_files import complete_steps
from rtp_sim.executor.dense import train_dense
from rtp_sim.executor.parameters import initial_parameters
from rtp_sim.executor.progress import Progress, read_place
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import RunDirectory
from rtp_sim.experiment import Request
from rtp_sim.experiment import prepare as experiment
from rtp_sim.schedule.ir import Schedule
from rtp_sim.schedule.parse import from_text
from rtp_sim.schedule.serialize import from_json, to_json
from rtp_sim.schedule.text import to_text
from rtp_sim.timeline_file import load_timeline

CASE = Case("rtp", "rtp", 2)


def worker(path: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    """One worker by hand, with torchrun's variables."""
    known = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    named = {key: str(value) for key, value in (known | variables).items() if value is not None}
    base = {key: value for key, value in os.environ.items() if key not in known}
    return subprocess.run(
        [sys.executable, "-m", "rtp_sim.executor", str(path)], cwd=ROOT, env=base | named,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


# ---- a run


def planned() -> Schedule:
    """What `run` plans with the options of `given`."""
    request = Request("gpt2-tiny", "cpu-local", "rtp", gpus=2, micro_batch=2, seq_len=8, precision="fp32")
    return experiment(request).schedule


def given(tmp_path: Path, text: str, *more: object) -> subprocess.CompletedProcess[str]:
    """A run of a schedule from a file."""
    path = tmp_path / "given.txt"
    path.write_text(text, encoding="utf-8")
    words = ("--strategy", "rtp", "--rtp", 2, "--micro-batch", 2, "--steps", 2, "--schedule", path)
    return answered(*words, "-o", tmp_path / "run", *more)


def test_a_schedule_edited_by_hand_runs(tmp_path: Path):
    schedule = planned()
    text = to_text(schedule)
    (line,) = [line for line in text.splitlines() if " m0.h0.attn.F0.hop " in line]
    # The hop waits for an op more, and is named otherwise.
    edited = line.replace(" after ", " after %1 ").replace("m0.h0.attn.F0.hop", "first-hop")
    done = given(tmp_path, text.replace(line, edited), "--check")
    assert done.returncode == 0, done.stderr
    ran = from_json((tmp_path / "run" / "schedule.json").read_text(encoding="utf-8"))
    (hop,) = [op for op in ran.program(0).ops if op.name == "first-hop"]
    assert hop.after == (1, *next(op for op in schedule.program(0).ops if op.name == "m0.h0.attn.F0.hop").after)


def test_a_schedule_without_one_of_its_dependencies_does_not_run(tmp_path: Path):
    schedule = planned()
    text = to_text(schedule)
    (line,) = [line for line in text.splitlines() if " m0.h0.attn.F1.0.linear " in line]
    broken = text.replace(line, line.partition(" after ")[0])
    done = given(tmp_path, broken)
    assert done.returncode == 2
    assert "missing dependency" in done.stderr
    assert "m0.h0.attn.F1.0.linear" in done.stderr
    assert not (tmp_path / "run").exists()
    # Nor where torchrun starts what was changed after it had been checked.
    assert given(tmp_path, text, "--prepare").returncode == 0
    (tmp_path / "run" / "schedule.json").write_text(to_json(from_text(broken)), encoding="utf-8")
    done = worker(tmp_path / "run")
    assert done.returncode == 2
    assert "missing dependency" in done.stderr


def test_a_schedule_that_cannot_be_the_one_to_run(tmp_path: Path):
    schedule = planned()
    done = given(tmp_path, to_text(schedule), "--rtp", 3)
    assert done.returncode == 2
    assert "it is for 2 ranks, the run for 3; expected --nproc-per-node 2" in done.stderr
    done = answered("--strategy", "rtp", "--rtp", 2, "--schedule", tmp_path / "none.txt", "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "none.txt: No such file" in done.stderr


def test_one_command_runs_checks_and_reports(tmp_path: Path):
    path = tmp_path / "run"
    words = ("--strategy", "rtp", "--rtp", 2, "--steps", 4, "--warmup", 1, "--check", "--format", "json", "-o", path)
    done = subprocess.run(command_line(*words), cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((path / "result.json").read_text(encoding="utf-8"))
    assert result["schema"] == "rtp-sim/run/1"
    assert (result["strategy"], result["world_size"], result["backend"]) == ("rtp", 2, "gloo")
    assert (len(result["step_times_ns"]), len(result["warmup_step_times_ns"]), len(result["loss"])) == (4, 1, 5)
    # The loss of random words is near that of guessing, log 256 = 5.5.
    assert all(4.5 < loss < 7.5 for loss in result["loss"])
    assert result["check"]["passed"]
    assert result["check"]["compared"] > 20
    assert result["check"]["largest_error"] < 1e-4
    assert result["threads"] == 1
    assert [r["OMP_NUM_THREADS"] for r in result["ranks"]] == ["1", "1"]
    assert result["versions"]["torch"]
    timeline = load_timeline(path / "measured.json")
    assert timeline.schedule == from_json((path / "schedule.json").read_text(encoding="utf-8"))
    assert timeline.meta["engine"] == "executor"
    assert gone(path, within_s=0.5)


def test_torchrun_starts_the_same_workers(tmp_path: Path):
    """The request says which state to begin with and where to save."""
    path = tmp_path / "run"
    torch.save({"model": named(initial_parameters(gpt2_tiny(), seed=4))}, tmp_path / "weights.pt")
    torch_save_to_dcp(tmp_path / "weights.pt", tmp_path / "weights")
    states = ("--load", tmp_path / "weights", "--save", tmp_path / "states")
    told = answered("--strategy", "ddp", "--nproc-per-node", 2, "--steps", 2, "--warmup", 0, *states, "--prepare",
                    "-o", path)  # fmt: skip
    assert told.returncode == 0, told.stderr
    words = told.stdout.split()
    assert words == ["torchrun", "--nproc-per-node", "2", "-m", "rtp_sim.executor", str(path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port()), *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    assert len(result["step_times_ns"]) == 2
    assert load_timeline(path / "measured.json").schedule.name == "ddp"
    assert (result["first_step"], result["saved_steps"], complete_steps(tmp_path / "states")) == (0, [2], [2])
    network, parameters = gpt2_tiny(), initial_parameters(gpt2_tiny(), seed=4)
    first = [random_batch(network, 1, 1, replica) for replica in range(2)]
    assert result["loss"][0] == pytest.approx(train_dense(network, parameters, [first], 1).losses[0], rel=1e-6)


def test_another_run_in_the_same_directory_replaces_the_first(tmp_path: Path):
    first = prepared(tmp_path / "run", CASE)
    first.write_rank(1, "error.json", {"kind": "error"})
    first.result.write_text("{}", encoding="utf-8")
    again = prepared(tmp_path / "run", CASE, steps=3)
    assert again.load()[1].steps == 3
    assert again.read_rank(1, "error.json") is None
    assert not again.result.exists()


# ---- set-ups that cannot work: one message, exit code 2


def test_a_busy_port(tmp_path: Path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        done = answered("--strategy", "ddp", "--nproc-per-node", 2, "--port", port, "-o", tmp_path / "run")
        assert done.returncode == 2
        assert done.stderr.startswith(f"rtp-sim: --port {port} cannot be used")
        assert done.stderr.count("\n") == 1
        # The same, found out by the worker itself.
        done = worker(prepared(tmp_path / "other", CASE).path, MASTER_PORT=port)
        assert done.returncode == 2
        assert f"port in use: the ranks cannot meet at 127.0.0.1:{port}" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_missing_gpu(tmp_path: Path):
    done = answered("--strategy", "ddp", "--nproc-per-node", 2, "--device", "cuda", "-o", tmp_path / "run",
                    CUDA_VISIBLE_DEVICES="")  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "rtp-sim: --device cuda: torch finds no usable GPU on this machine; expected one per rank, or cpu\n"
    )  # fmt: skip
    assert gone(tmp_path / "run", within_s=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "ddp", "--backend", "nccl"), "run: transport nccl moves data between GPUs"),
        (("--strategy", "ddp", "--transport", "emulated"), "link: bandwidth is 0 B/s; expected at least 1, as 1GB/s"),
        (("--strategy", "ddp", "--link-latency", "1ms"), "a link is given, but transport is auto; expected emulated"),
        (("--strategy", "ddp", "--link-latency", "fast"), "argument --link-latency: given 'fast', expected a time"),
        (("--strategy", "ddp", "--precision", "fp8"), "run: precision fp8 can be simulated; products are executed in"),
        (("--strategy", "rtp", "--rtp", 3), "--rtp 3 does not divide 2 GPUs"),
        (("--strategy", "rtp", "--tp", 2), "strategy rtp has no --tp axis"),
        (("--strategy", "ddp", "--timeout", 0), "run: timeout is 0.0; expected seconds"),
        (("--strategy", "ddp", "--check", "--warmup", 0), "the check takes place in the first warm-up step"),
        (("--strategy", "ddp", "--as-nodes", 3), "--as-nodes 3 does not divide 2 processes"),
        (("--strategy", "dpp"), "unknown strategy 'dpp': did you mean"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: tuple[object, ...], message: str):
    done = answered(*arguments, "--nproc-per-node", 2, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_directory_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot write to the run directory"):
        prepared(tmp_path / "file", CASE)
    (tmp_path / "other" / "ranks").mkdir(parents=True)
    with pytest.raises(InputError, match="is there already, but not from a run"):
        prepared(tmp_path / "other", CASE)


def test_another_number_of_processes_than_ranks(tmp_path: Path):
    done = worker(prepared(tmp_path / "run", CASE).path, WORLD_SIZE=3)
    assert (done.returncode, done.stderr) == (
        2, "rtp-sim: the schedule is for 2 ranks, but 3 processes were started (WORLD_SIZE); "
        "expected --nproc-per-node 2\n"
    )  # fmt: skip


def test_a_worker_without_torchrun_or_directory(tmp_path: Path):
    done = worker(prepared(tmp_path / "run", CASE).path, WORLD_SIZE=None)
    assert done.returncode == 2
    assert "the variable WORLD_SIZE is not set" in done.stderr
    done = worker(tmp_path / "nowhere")
    assert done.returncode == 2
    assert f"no run directory at {tmp_path / 'nowhere'}" in done.stderr


# ---- files


@pytest.mark.parametrize("make", [gpt2_tiny, llama_tiny, moe_tiny, bert_tiny, image_network])
def test_a_request_keeps_the_network(make):
    network = make()
    request = RunRequest(network, CASE.training, steps=7, timeout_s=2.5, check=True, float_dtype="fp64")
    assert requests.from_json(requests.to_json(request)) == request


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="rtp-sim/request/9"), "schema is 'rtp-sim/request/9'"),
        (lambda d: d.pop("network"), "'network'"),
        (lambda d: d.update(speed=3), "speed"),
        (lambda d: d.update(steps=0), "steps is 0; expected a whole number of at least 1"),
        (lambda d: d["network"]["blocks"][0]["layers"][0]["layer"].update(op="Warp"), "is a 'Warp'"),
        (lambda d: d["training"].update(precision="fp3"), "precision is 'fp3'"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(change, message: str):
    document = json.loads(requests.to_json(RunRequest(gpt2_tiny(), CASE.training)))
    change(document)
    with pytest.raises(InputError, match=r"request|run|training") as raised:
        requests.from_json(json.dumps(document))
    assert message in str(raised.value)


def test_finished_steps_are_read_up_to_a_cut(tmp_path: Path):
    import numpy as np

    directory = RunDirectory(tmp_path)
    directory.clear_rank(0)
    for step in range(3):
        directory.append_step(0, {"step": step}, np.full((2, 5), step, dtype=np.int64))
    lines = directory.of_rank(0, "steps.jsonl")
    lines.write_text(lines.read_text(encoding="utf-8")[:-3], encoding="utf-8")
    records, times = directory.read_steps(0, 5)
    assert [r["step"] for r in records] == [0, 1]
    assert times.tolist() == [[[0] * 5] * 2, [[1] * 5] * 2]
    assert directory.read_steps(1, 5)[0] == []


def test_a_place_outlives_its_worker(tmp_path: Path):
    path = tmp_path / "progress"
    assert read_place(path) is None
    progress = Progress(path)
    progress.enter("step", 4)
    progress.at(17)
    progress.in_flight(1, 12)
    place = read_place(path)
    assert place is not None
    assert (place.phase, place.step, place.op, place.in_flight) == ("step", 4, 17, (12,))
    progress.in_flight(1, -1)
    progress.enter("done")
    assert read_place(path).phase == "done"
