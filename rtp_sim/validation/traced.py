"""The step that every rank of a run did under PyTorch's profiler, as a measured `Timeline` of the same schedule.

Times come from the ranks' traces, put on rank 0's clock with the offsets that the run stored. Communication starts when
its partners are there, as in measured.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from rtp_sim.errors import InputError
from rtp_sim.executor.rendezvous import with_partners
from rtp_sim.schedule.ir import Schedule
from rtp_sim.timeline import RankTimes, Timeline
from rtp_sim.traces.kineto import read_trace
from rtp_sim.traces.ops import StepTrace, step_of
from rtp_sim.validation.runs import PROFILER, MeasuredRun

TRACE = "trace.json.gz"


def traced_timeline(path: Path, schedule: Schedule) -> Timeline:
    """The timeline of the traced step of the run in `path`, from the start of its first op. InputError for a trace
    that is missing or not of this schedule, naming rank and op."""
    steps = {rank: _step(path, schedule, rank) for rank in range(schedule.world_size)}
    if len(numbers := {step.step for step in steps.values()}) > 1:
        raise InputError(
            f"{path}: the traces are of the steps {', '.join(map(str, sorted(numbers)))}; expected one step"
        )
    offsets = {rank: _offset_ns(path, rank) for rank in steps}
    origin_ns = min(op.start_ns - offsets[rank] for rank, step in steps.items() for op in step.ops.values())
    times = {rank: _times(schedule, rank, step, offsets[rank] + origin_ns) for rank, step in steps.items()}
    meta: dict[str, str | int] = {
        "engine": "executor", "clocks": PROFILER, "step": steps[0].step,
        "trace_clock_error_ns": max(step.clock_error_ns for step in steps.values()),
    }  # fmt: skip
    return Timeline(schedule, "measured", with_partners(schedule, times), tuple(range(schedule.world_size)), meta)


def with_trace(run: MeasuredRun) -> MeasuredRun:
    """The run with the traced step's timeline in place of its own."""
    found = traced_timeline(run.path, run.schedule)
    return replace(run, timeline=replace(found, meta={**run.timeline.meta, **found.meta}))


def _step(path: Path, schedule: Schedule, rank: int) -> StepTrace:
    file = path / "ranks" / str(rank) / TRACE
    if not file.is_file():
        raise InputError(f"{file} is missing; expected what rtp-sim run --profile-trace -o {path} leaves for each rank")
    found = step_of(read_trace(file))
    ops = schedule.program(rank).ops
    for index, times in sorted(found.ops.items()):
        if index >= len(ops) or ops[index].name != times.name:
            known = f"{ops[index].name!r}" if index < len(ops) else f"only {len(ops)} ops"
            raise InputError(f"{file}: op %{index} is {times.name!r}, the schedule has {known}; expected the same run")
    missing = next((op for op in ops if op.index not in found.ops), None)
    if missing is not None:
        raise InputError(
            f"{file}: no range of op %{missing.index} ({missing.name}); expected one for each of {len(ops)}"
        )
    return found


def _times(schedule: Schedule, rank: int, step: StepTrace, origin_ns: int) -> RankTimes:
    ops = schedule.program(rank).ops
    start_ns = np.array([step.ops[op.index].start_ns for op in ops], dtype=np.int64) - origin_ns
    end_ns = np.array([step.ops[op.index].end_ns for op in ops], dtype=np.int64) - origin_ns
    return RankTimes(start_ns, end_ns)


def _offset_ns(path: Path, rank: int) -> int:
    """How far the rank's clock is ahead of rank 0's."""
    file = path / "ranks" / str(rank) / "rank.json"
    try:
        record: Mapping[str, object] = json.loads(file.read_text(encoding="utf-8"))
        offset = record["clock_offset_ns"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file}: clock_offset_ns cannot be read; expected what rtp-sim run leaves") from None
    if type(offset) is not int:
        raise InputError(f"{file}: clock_offset_ns is {offset!r}; expected ns")
    return offset
