"""Sweeps on a real Dask scheduler with real workers, all on this machine: same results, a worker lost, nobody there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sweep_points
from sweep_points import FOLDER, InThisProcess, calls, tiny_grid

from rtp_sim.cli import main
from rtp_sim.errors import InputError
from rtp_sim.sweep.run import run_sweep
from rtp_sim.sweep.schedulers import DaskWorkers

ROOT = Path(__file__).parent.parent
SWEEP = "sweep --model gpt2-tiny --strategies ddp,fsdp --gpus 2 --vary micro-batch=1,2,3 --quiet --format csv"


@dataclass
class Cluster:
    address: str
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]
    calls: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and two workers, which can import what the tests can."""
    folder, port = tmp_path_factory.mktemp("dask"), free_port()
    (folder / "calls").mkdir()
    address = f"tcp://127.0.0.1:{port}"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), FOLDER: str(folder / "calls"),
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
    }  # fmt: skip

    def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"]
        log = (folder / f"{module}.log").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)

    scheduler = start("dask_scheduler", "--host", "127.0.0.1", "--port", str(port))
    workers = [start("dask_worker", address, "--nthreads", "1", "--no-nanny") for _ in range(2)]
    try:
        yield Cluster(address, scheduler, workers, folder / "calls")
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()


def test_the_same_table_as_in_this_process(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wait_until_it_answers(cluster)
    assert main([*SWEEP.split(), "--scheduler", cluster.address, "-o", str(tmp_path / "dask")]) == 0
    there = capsys.readouterr().out
    assert main([*SWEEP.split(), "--workers", "1", "-o", str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out == there
    for name in ("table.json", "table.csv", "points.jsonl", "sweep.json"):
        assert (tmp_path / "dask" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_worker_dies_and_nothing_is_lost(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The point that kills its worker at the first try is computed by the other one."""
    wait_until_it_answers(cluster)
    monkeypatch.setenv(FOLDER, str(cluster.calls))
    axes, points = tiny_grid()
    table = run_sweep(
        axes, points, tmp_path / "s", lambda: DaskWorkers(cluster.address), {}, evaluate_point=sweep_points.deadly_once
    )
    made = calls()
    expected = run_sweep(axes, points, None, InThisProcess, {}, evaluate_point=sweep_points.really)
    assert table.rows == expected.rows
    assert made["2-ddp"] == 2
    deadline = time.monotonic() + 20
    while sum(worker.poll() is not None for worker in cluster.workers) != 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [worker.poll() for worker in cluster.workers].count(-signal.SIGKILL) == 1


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match="cannot be reached"):
        DaskWorkers(address, connect_s=0.3)
    with pytest.raises(InputError, match="cannot be reached"):
        DaskWorkers("nonsense://here", connect_s=0.3)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main([*SWEEP.split(), "--scheduler", "tcp://127.0.0.1:1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "rtp-sim: --scheduler needs Dask: pip install 'rtp-sim[dask]'\n"


def wait_until_it_answers(cluster: Cluster) -> None:
    """Processes need a moment to start."""
    deadline = time.monotonic() + 60
    host, port = cluster.address.removeprefix("tcp://").split(":")
    while time.monotonic() < deadline:
        assert cluster.scheduler.poll() is None
        try:
            with socket.create_connection((host, int(port)), timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the scheduler did not start")
