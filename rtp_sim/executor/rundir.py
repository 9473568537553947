"""`RunDirectory`: which file of a run lies where, and what each rank leaves there.

    run1/schedule.json  request.json             what to run, written by the launcher
    run1/stated.json                             what every op takes, where ranks only sleep
    run1/ranks/<r>/log.txt  progress  error.json  what the worker of rank r says, where it is, why it failed
    run1/ranks/<r>/steps.jsonl  times.bin         a line and a row of op times per finished step, written at once
    run1/ranks/<r>/rank.json  tensors.pt          host, clock, memory, check; weights and gradients where asked for
    run1/ranks/<r>/trace.json.gz                 the profiler's trace of one more step, where asked for
    run1/measured.json  result.json               the outcome

Standard library and numpy only.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rtp_sim.errors import InputError
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.request import from_json as request_from_json
from rtp_sim.executor.request import to_json as request_to_json
from rtp_sim.schedule.ir import Schedule
from rtp_sim.schedule.serialize import from_json as schedule_from_json
from rtp_sim.schedule.serialize import to_json as schedule_to_json
from rtp_sim.stated import StatedTimes
from rtp_sim.stated import from_json as stated_from_json
from rtp_sim.stated import to_json as stated_to_json

Record = dict[str, Any]
TRACE = "trace.json.gz"
OpTimes = npt.NDArray[np.int64]
"""Of shape (steps, 2, ops): start and end of every op, in ns of the rank's own clock."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def measured(self) -> Path:
        """The timeline of the median step."""
        return self.path / "measured.json"

    @property
    def result(self) -> Path:
        """Step times, losses, traffic, memory, versions."""
        return self.path / "result.json"

    def of_rank(self, rank: int, name: str) -> Path:
        """A file of one rank."""
        return self.path / "ranks" / str(rank) / name

    @property
    def stated(self) -> Path:
        """What every op takes, in a run with stated times."""
        return self.path / "stated.json"

    def prepare(self, schedule: Schedule, request: RunRequest, times: StatedTimes | None = None) -> None:
        """Writes what to run and removes what an earlier run left. InputError if the directory cannot be used."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for old in (self.measured, self.result, self.stated):
                old.unlink(missing_ok=True)
            ranks = self.path / "ranks"
            if ranks.exists() and not (self.path / "request.json").exists():
                raise InputError(f"{ranks} is there already, but not from a run; give another directory")
            if ranks.exists():
                shutil.rmtree(ranks)
            (self.path / "schedule.json").write_text(schedule_to_json(schedule), encoding="utf-8")
            (self.path / "request.json").write_text(request_to_json(request), encoding="utf-8")
            if times is not None:
                self.stated.write_text(stated_to_json(times), encoding="utf-8")
            for rank in request.ranks(schedule.world_size):
                self.of_rank(rank, "").mkdir(parents=True)
        except OSError as error:
            raise InputError(f"cannot write to the run directory {self.path}: {error.strerror}") from None

    def load(self) -> tuple[Schedule, RunRequest]:
        """What to run. InputError if the directory does not say."""
        texts = []
        for name in ("schedule.json", "request.json"):
            try:
                texts.append((self.path / name).read_text(encoding="utf-8"))
            except OSError as error:
                hint = f"make one with: rtp-sim run ... --prepare -o {self.path}"
                raise InputError(f"no run directory at {self.path}: {name}: {error.strerror}; {hint}") from None
        return schedule_from_json(texts[0]), request_from_json(texts[1])

    def read_stated(self) -> StatedTimes:
        """The times of a run with stated times. InputError if they are not there."""
        try:
            return stated_from_json(self.stated.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{self.stated}: {error.strerror}; rtp-sim run --stated-times writes it") from None

    def clear_rank(self, rank: int) -> None:
        """Removes what an earlier run left for this rank (the log stays: it may be open)."""
        self.of_rank(rank, "").mkdir(parents=True, exist_ok=True)
        for name in ("error.json", "steps.jsonl", "times.bin", "rank.json", "tensors.pt", TRACE):
            self.of_rank(rank, name).unlink(missing_ok=True)

    def write_rank(self, rank: int, name: str, record: Record) -> None:
        """Writes a record of one rank, whole or not at all."""
        target = self.of_rank(rank, name)
        part = target.with_suffix(".part")
        part.write_text(json.dumps(record) + "\n", encoding="utf-8")
        part.replace(target)

    def read_rank(self, rank: int, name: str) -> Record | None:
        """A record of one rank; None if it is not there."""
        try:
            found = json.loads(self.of_rank(rank, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def append_step(self, rank: int, record: Record, times: OpTimes) -> None:
        """Keeps a finished step on disk, whatever becomes of the next."""
        with self.of_rank(rank, "times.bin").open("ab") as file:
            file.write(times.astype("<i8").tobytes())
        with self.of_rank(rank, "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_steps(self, rank: int, ops: int) -> tuple[list[Record], OpTimes]:
        """The finished steps of a rank; a line cut off by the end of the process is left out."""
        records: list[Record] = []
        try:
            lines = self.of_rank(rank, "steps.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            raw = self.of_rank(rank, "times.bin").read_bytes()
        except OSError:
            return [], np.zeros((0, 2, ops), dtype=np.int64)
        for line in lines:
            if line.endswith("\n"):
                records.append(json.loads(line))
        row_bytes = 2 * ops * 8
        whole = min(len(records), len(raw) // row_bytes if row_bytes else len(records))
        times = np.frombuffer(raw[: whole * row_bytes], dtype="<i8").astype(np.int64).reshape(whole, 2, ops)
        return records[:whole], times
