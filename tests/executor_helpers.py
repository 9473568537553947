"""Runs of the executor for the tests: run directories, workers that do many of them, and what is left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from strategy_helpers import build, build_pipeline, gpt2_tiny

from rtp_sim.cli import main
from rtp_sim.executor.launcher import LAUNCHER_PID, free_port
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import RunDirectory
from rtp_sim.model.network import Network, transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Schedule

ROOT = Path(__file__).parent.parent
PATIENCE_S = 100


@dataclass(frozen=True)
class Case:
    """A strategy to run: `n` ranks of its axis, times `dp`, times `pp` stages; `options` are words of Options,
    `changes` of TrainingSpec."""

    name: str
    strategy: str
    n: int
    dp: int = 1
    dims: tuple[int, ...] = ()
    micros: int = 1
    optimizer: str = "adamw"
    recompute: str = "none"
    options: tuple[tuple[str, object], ...] = ()
    changes: tuple[tuple[str, object], ...] = ()
    dropout: float = 0.0
    pp: int = 1

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return self.n * self.dp * self.pp

    @property
    def network(self) -> Network:
        """Two blocks of width 64, 4 heads, vocabulary 256, tied embeddings, 8 tokens."""
        if self.dropout:
            return transformer_network(find_model("gpt2-tiny", dropout=self.dropout), 8, "materialised")
        return gpt2_tiny()

    @property
    def training(self) -> TrainingSpec:
        """Two sequences per micro-batch, fp32 throughout unless `changes` says otherwise."""
        words = {"num_microbatches": self.micros, "precision": "fp32", "optimizer": self.optimizer}
        words["recompute"] = self.recompute
        return TrainingSpec(2, 8, **(words | dict(self.changes)))  # type: ignore[arg-type]

    def schedule(self) -> Schedule:
        """The schedule of the case."""
        if self.pp > 1:
            return build_pipeline(self.strategy, self.network, self.pp, self.training, tp=self.n, dp=self.dp,
                                  **dict(self.options))  # fmt: skip
        return build(self.strategy, self.network, self.n, self.training, dp=self.dp, dims=self.dims,
                     **dict(self.options))  # fmt: skip


def prepared(path: Path, case: Case, **request: object) -> RunDirectory:
    """A run directory of the case."""
    run = RunDirectory(path)
    run.prepare(case.schedule(), RunRequest(case.network, case.training, **request))  # type: ignore[arg-type]
    return run


def work_off(jobs: list[dict[str, object]], ranks: int, path: Path) -> None:
    """Does the jobs on `ranks` processes, which are gone afterwards whatever happens."""
    listing = path / f"jobs{ranks}.json"
    listing.write_text(json.dumps(jobs), encoding="utf-8")
    environment = os.environ | {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT), LAUNCHER_PID: str(os.getpid()),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "executor_many.py"), str(listing)]
    log = path / f"jobs{ranks}.log"
    with log.open("wb") as file:
        parent = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        code: object = parent.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        code = f"none after {PATIENCE_S} s"
    finally:
        # The ranks die with it.
        parent.kill()
        parent.wait()
    assert code == 0, f"exit code {code}:\n{log.read_text(encoding='utf-8')}"


def command_line(*arguments: object) -> list[str]:
    """`rtp-sim run` with a small model."""
    words = ["run", "--model", "gpt2-tiny", "--seq-len", "8", "--precision", "fp32", "--quiet"]
    return [sys.executable, "-m", "rtp_sim", *words, *(str(a) for a in arguments)]


def answered(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `rtp-sim run` says, called in this process: Python starts anew for its ranks only."""
    words, out, err = command_line(*arguments)[3:], io.StringIO(), io.StringIO()
    with patch.dict(os.environ, environment), redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def started(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """`rtp-sim run` in the background."""
    return subprocess.Popen(
        command_line(*arguments), cwd=ROOT, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell that starts tests in the background has them ignore interrupts, and what they start as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_step(run: Path, rank: int, step: int, process: subprocess.Popen[str]) -> int:
    """Waits until the rank has finished that many steps; returns the pid of its worker."""
    end = time.monotonic() + PATIENCE_S
    lines = run / "ranks" / str(rank) / "steps.jsonl"
    while time.monotonic() < end and process.poll() is None:
        if lines.exists() and len(lines.read_text(encoding="utf-8").splitlines()) > step:
            record = json.loads((run / "ranks" / str(rank) / "rank.json").read_text(encoding="utf-8"))
            return int(record["pid"])
        time.sleep(0.05)
    raise AssertionError(
        f"the run came to no step {step}: {process.communicate()[1] if process.poll() else 'too slow'}"
    )


def pids_of(run: Path) -> list[int]:
    """The processes that still work on the run directory, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            state = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            continue
        if b"rtp_sim.executor" in words and str(run).encode() in words and state != "Z":
            found.append(int(entry.name))
    return found


def gone(run: Path, within_s: float = 5.0) -> bool:
    """Whether no process works on the run directory any more, or none does within a while; kills what is left."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not pids_of(run):
            return True
        time.sleep(0.05)
    for pid in pids_of(run):
        os.kill(pid, signal.SIGKILL)
    return False
