"""Calibration: what counts as measured, a user's mistakes, and processes that never stay behind."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calibrate_ranks import job

from rtp_sim import commands_calibrate
from rtp_sim.cli import main
from rtp_sim.cost.model import ClusterCost
from rtp_sim.errors import InputError
from rtp_sim.executor.calibrate.launch import run_ranks
from rtp_sim.executor.calibrate.samples import (
    KernelSample,
    TransferSample,
    median,
)
from rtp_sim.executor.calibrate.shapes import Shape
from rtp_sim.hardware.profiles import load_cluster

# ---- measuring


def test_a_transfer_counts_from_the_last_rank_that_was_ready() -> None:
    torch = pytest.importorskip("torch")
    assert torch
    from rtp_sim.executor.calibrate.transfers import RankTimes, combined

    early = RankTimes("shift", 64, (100, 1000), (180, 1090), (), (30, 90, 40))
    late = RankTimes("shift", 64, (150, 1000), (190, 1060), (), (50, 60))
    # Computing lost 40 and 55 in the median, on each of as many cores as the two ranks have.
    (sample,) = combined([[early], [late]], shared_clock=True, cores=8)
    assert sample == TransferSample("shift", 2, 64, (40, 90), 95)
    (sample,) = combined([[early], [late]], shared_clock=True, cores=1)
    assert sample.core_ns == 48
    # Each device knows only its own times: the rank that waited least saw the transfer alone.
    (sample,) = combined([[early], [late]], shared_clock=False)
    assert sample.times_ns == (40, 60)


def test_transfers_beside_a_slow_core_count_only_where_there_are_no_others() -> None:
    pytest.importorskip("torch")
    from rtp_sim.executor.calibrate.transfers import RankTimes, combined

    start, usual = (0,) * 8, (100,) * 8
    first = RankTimes("shift", 64, start, (40, 41, 42, 43, 90, 45, 46, 47), (*usual[:4], 170, *usual[:3]))
    second = RankTimes("shift", 64, start, (40, 41, 42, 99, 44, 45, 46, 47), (*usual[:3], 150, 100, 110, 100, 100))
    disturbed = RankTimes("shift", 128, (0,), (70,), (160,))
    quiet = RankTimes("shift", 128, (0,), (60,), usual[:1])
    small, large = combined([[first, disturbed], [second, quiet]], shared_clock=True)
    # The fourth and the fifth had a rank that was slow; 10 % off is as usual. The only one of 128 bytes stays.
    assert small.times_ns == (40, 41, 42, 45, 46, 47)
    assert large.times_ns == (70,)


def test_kernels_in_slow_steps_count_only_where_no_other_step_has_them() -> None:
    pytest.importorskip("torch")
    from rtp_sim.executor.calibrate.probe import ProbeTimes, gathered

    def step(pace_ns: int, took_ns: int, issue_ns: int, kernel: str = "add") -> ProbeTimes:
        return ProbeTimes((KernelSample(kernel, "fp32", (("numel", 8),), (took_ns,)),), (issue_ns,), pace_ns)

    steps = [step(70, 5, 1), step(115, 9, 2), step(72, 6, 3), step(120, 30, 4, "gelu"), step(71, 7, 5)]
    samples, issue = gathered(steps)
    assert {s.kernel: s.times_ns for s in samples} == {"add": (5, 6, 7), "gelu": (30,)}
    assert issue == [1, 3, 5]


def test_the_usual_pace_is_what_the_cores_have_most_of_the_time() -> None:
    from rtp_sim.executor.pace import pace_ns, steady, usual_ns

    assert usual_ns([160, 101, 100, 155, 102]) == 101  # one in five is faster
    assert usual_ns([]) == 0
    # 15 % either way: 86.7 to 117.3.
    assert [reading for reading in (86, 87, 117, 118) if steady(reading, 102)] == [87, 117]
    assert steady(10**9, 0)
    assert pace_ns() > 0


def test_a_quick_calibration_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    profile = tmp_path / "here.toml"
    assert main(["calibrate", "-o", str(profile), "--nproc", "2", "--quick"]) == 0
    said = capsys.readouterr()
    assert "memory-bound kernels" in said.out
    assert "all_reduce" in said.err
    assert not multiprocessing.active_children()
    kept = json.loads((tmp_path / "here.calibration.json").read_text())
    assert {t["kind"] for t in kept["transfers"]} == {"shift", "all_reduce", "all_gather", "reduce_scatter"}
    assert {t["ranks"] for t in kept["transfers"]} == {2}
    assert {k["kernel"] for k in kept["kernels"]} >= {"linear", "copy", "add", "gelu", "layernorm", "sdpa", "sdpa.bwd"}
    # What the file states is what the loaded profile gives.
    cluster = load_cluster(str(profile))
    errors = [
        abs(
            ClusterCost(cluster).compute(k["kernel"], k["dtype"], tuple(k["dims"].items())).duration_ns / k["mean_ns"]
            - 1
        )
        for k in kept["steps"]
        if k["kernel"].startswith("linear")
    ]
    assert median(errors) == pytest.approx(kept["residuals"]["products fp32 in steps"]["median"], abs=1e-3)
    assert cluster.host is not None
    assert cluster.host.cores.value == os.cpu_count()
    for strategy in ("ddp", "rtp"):
        command = ["simulate", "--cluster", str(profile), "--model", "gpt2-tiny", "--strategy", strategy]
        assert main([*command, "--precision", "fp32", "--format", "json", "--quiet"]) == 0
        assert json.loads(capsys.readouterr().out)


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "nowhere/mine.toml"], "there is no directory nowhere"),
        (["-o", "mine.json"], "expected a file name that ends in .toml"),
        (["-o", "mine.toml", "--nproc", "0"], "not a whole number"),
        (["-o", "mine.toml", "--timeout", "-1"], "expected seconds"),
        ([], "-o/--output"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_torch_it_names_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["calibrate", "-o", str(tmp_path / "mine.toml")]) == 2
    assert "pip install rtp-sim[torch]" in capsys.readouterr().err


def test_without_cuda_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["calibrate", "-o", str(tmp_path / "mine.toml"), "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["calibrate", "-o", str(tmp_path / "mine.toml"), "--device", "cuda", "--nproc", "2"]) == 2
    assert "a rank for each" in capsys.readouterr().err


def test_the_command_needs_torch_only_to_measure() -> None:
    code = "import sys, rtp_sim.commands_calibrate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- processes


def test_results_come_back_in_order() -> None:
    said: list[str] = []
    assert run_ranks(job, "", 3, 30, said.append) == [0, 10, 20]
    assert len(said) == 3


@pytest.mark.parametrize(
    ("what", "timeout_s", "message"),
    [
        ("die", 30, r"rank 1 died \(exit code 7\)"),
        ("kill", 30, r"rank 1 died \(signal 9\)"),
        ("fail", 30, "rank 1 failed: RuntimeError: no luck"),
        ("hang", 3, "no rank has reported for 3 s|BrokenBarrierError"),
    ],
)
def test_a_rank_that_is_lost_ends_the_calibration(what: str, timeout_s: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_ranks(job, what, 2, timeout_s, lambda _: None)
    assert not multiprocessing.active_children()


def test_ranks_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    where = tmp_path / "pid"
    code = (
        "from calibrate_ranks import job; from rtp_sim.executor.calibrate.launch import run_ranks; "
        f"run_ranks(job, {str(where)!r}, 1, 60, print)"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        until = time.monotonic() + 30
        while not (where.is_file() and where.read_text()):
            assert time.monotonic() < until
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    rank = int(where.read_text())
    until = time.monotonic() + 10
    while _runs(rank):
        assert time.monotonic() < until, "the rank outlived its parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie that nobody has collected."""
    status = Path(f"/proc/{pid}/status")
    try:
        os.kill(pid, 0)
        return not (status.is_file() and "State:\tZ" in status.read_text())
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(("ranks", "with_tensor_parallelism"), [(2, True), (4, False)])
def test_probes_split_heads_only_where_every_rank_gets_one(
    monkeypatch: pytest.MonkeyPatch, ranks: int, with_tensor_parallelism: bool
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(commands_calibrate, "SHAPES", (Shape("gpt", 96, 2, 400, 160, 24),))
    names = [probe.schedule.name for probe in commands_calibrate.probes(ranks, quick=False)]
    assert names == ["ddp", "rtp", *(["tp-sp"] if with_tensor_parallelism else [])]
