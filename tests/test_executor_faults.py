"""Runs that go wrong while they run: they stop in time, say who and where, keep what was done, leave nobody behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from executor_helpers import ROOT, gone, pids_of, started, wait_for_step

FAULTY = str(ROOT / "tests" / "executor_fault")
ENDLESS = ("--strategy", "rtp", "--nproc-per-node", 3, "--steps", 100_000)
# The first kernel of the first layer that is computed with the first shard: op %1 follows the hop %0.
KERNEL = 1


def finished_steps(run: Path) -> int:
    return len(json.loads((run / "result.json").read_text(encoding="utf-8"))["step_times_ns"])


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_a_killed_rank_ends_the_run_and_the_finished_steps_stay(tmp_path: Path, transport: str):
    run = tmp_path / "run"
    process = started(*ENDLESS, "--transport", transport, "-o", run)
    os.kill(wait_for_step(run, 1, 4, process), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(
        r"the run failed: rank 1 was (in step \d+ at %\d+ '.*|between steps).*: the process was ended by SIGKILL", err
    )
    assert "Traceback" not in err
    assert "steps measured" in out
    # Two of the five or more were for warming up.
    assert finished_steps(run) >= 3
    assert (run / "measured.json").exists()
    assert gone(run)


@pytest.mark.parametrize("strategy", ["rtp", "ddp"])
def test_a_rank_that_raises_is_named_with_its_op(tmp_path: Path, strategy: str):
    run = tmp_path / "run"
    process = started(
        "--strategy", strategy, "--nproc-per-node", 2, "--warmup", 0, "--steps", 100, "-o", run, "--timeout", 20,
        PYTHONPATH=FAULTY, FAULT=f"raise:1:2:{KERNEL}",
    )  # fmt: skip
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    op = "m0.embed.tokens.F0.0.embedding" if strategy == "rtp" else "m0.embed.positions.F.0.positions"
    assert f"the run failed: rank 1 was in step 2 at %{KERNEL} '{op}'" in err
    assert "ArithmeticError: a fault for the test" in err
    assert "Traceback" not in err
    assert "Traceback" in (run / "ranks" / "1" / "log.txt").read_text(encoding="utf-8")
    assert finished_steps(run) == 2
    assert gone(run)


def test_a_rank_that_stands_still_is_named_within_the_timeout(tmp_path: Path):
    run = tmp_path / "run"
    process = started(
        "--strategy", "rtp", "--nproc-per-node", 3, "--warmup", 0, "--steps", 100, "-o", run, "--timeout", 3,
        PYTHONPATH=FAULTY, FAULT=f"hang:2:3:{KERNEL}",
    )  # fmt: skip
    wait_for_step(run, 2, 2, process)
    since = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - since < 3 + 7
    assert process.returncode == 1
    place = f"rank 2 was in step 3 at %{KERNEL} 'm0.embed.tokens.F0.0.embedding' (embedding)"
    assert f"the run failed: {place}" in err
    assert "has not moved for" in err
    assert "meanwhile rank 0 was in step 3" in err
    assert finished_steps(run) == 3
    assert gone(run)


def test_a_killed_launcher_takes_its_workers_along(tmp_path: Path):
    run = tmp_path / "run"
    process = started(*ENDLESS, "-o", run)
    wait_for_step(run, 0, 0, process)
    assert len(pids_of(run)) == 3
    process.kill()
    process.communicate(timeout=10)
    assert gone(run)


def test_an_interrupted_run_leaves_nobody(tmp_path: Path):
    run = tmp_path / "run"
    process = started(*ENDLESS, "-o", run)
    wait_for_step(run, 0, 0, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "rtp-sim: interrupted\n"
    assert gone(run, within_s=0.5)
