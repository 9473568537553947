"""From what the ranks left in the run directory to `measured.json` and `result.json`.

Only steps that every rank finished count. A step lasts from the first rank's start to the last rank's end, on rank 0's
clock; the timeline is that of the median measured step. Loss is the mean over the ranks, as each has the mean over its
own tokens. Standard library and numpy only.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtp_sim import __version__
from rtp_sim.executor.rendezvous import with_partners
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import OpTimes, Record, RunDirectory
from rtp_sim.executor.twins import TWINS
from rtp_sim.schedule.ir import Schedule
from rtp_sim.timeline import RankTimes, Timeline, of_one_rank
from rtp_sim.timeline_file import save_timeline

SCHEMA = "rtp-sim/run/1"


def collect(run: RunDirectory, schedule: Schedule, request: RunRequest, failure: str | None = None) -> Record:
    """Writes result.json, and measured.json if a measured step was finished; returns the result."""
    steps: list[list[Record]] = []
    times: list[OpTimes] = []
    numbers = request.ranks(schedule.world_size)
    for rank in numbers:
        records, rows = run.read_steps(rank, 0 if request.twin else len(schedule.program(rank).ops))
        steps.append(records)
        times.append(rows)
    # A step under the profiler comes after the measured ones and counts for none of their numbers.
    finished = min((len(records) for records in steps), default=0)
    finished = min(finished, request.warmup + request.steps)
    ranks = [run.read_rank(rank, "rank.json") or {"rank": rank} for rank in numbers]
    spans = [_span_ns(steps, ranks, k) for k in range(finished)]
    measured = [k for k in range(finished) if k >= request.warmup]
    result = _result(schedule, request, failure, steps, ranks, [spans[k][1] - spans[k][0] for k in range(finished)])
    if measured and not request.twin:
        chosen = sorted(measured, key=lambda k: (spans[k][1] - spans[k][0], k))[(len(measured) - 1) // 2]
        result["timeline_step"] = chosen
        save_timeline(_timeline(schedule, request, times, ranks, chosen, spans[chosen][0], result), run.measured)
    _write(run.result, result)
    return result


def _span_ns(steps: Sequence[Sequence[Record]], ranks: Sequence[Record], k: int) -> tuple[int, int]:
    """Start and end of step k on rank 0's clock."""
    starts = [mine[k]["start_ns"] - _offset_ns(ranks[r]) for r, mine in enumerate(steps)]
    ends = [mine[k]["end_ns"] - _offset_ns(ranks[r]) for r, mine in enumerate(steps)]
    return min(starts), max(ends)


def _offset_ns(rank: Record) -> int:
    return int(rank.get("clock_offset_ns", 0))


def _timeline(
    schedule: Schedule, request: RunRequest, times: Sequence[OpTimes], ranks: Sequence[Record], k: int, origin_ns: int,
    result: Record,
) -> Timeline:  # fmt: skip
    measured = {}
    for record, rows in zip(ranks, times, strict=True):
        rank = int(record["rank"])
        start_ns, end_ns = rows[k] - _offset_ns(record) - origin_ns
        # A clock read a little early on another machine must not put an op before the step.
        measured[rank] = RankTimes(np.maximum(start_ns, 0), np.maximum(end_ns, 0))
    measured = with_partners(schedule, measured)
    keys = (
        "device", "backend", "transport", "threads", "torch", "clock_error_ns", "median_step_time_ns", "step_time_cv",
    )  # fmt: skip
    meta = {"engine": "executor", "host": result["host"]["name"], "step": k} | {key: result[key] for key in keys}
    offsets = {f"clock_offset_ns.{r['rank']}": _offset_ns(r) for r in ranks if _offset_ns(r)}
    if request.only_rank is not None:
        meta |= {key: result[key] for key in ("only_rank", "communication")} | offsets
        return of_one_rank(schedule, "measured", request.only_rank, measured[request.only_rank], meta)
    return Timeline(schedule, "measured", measured, tuple(range(schedule.world_size)), meta | offsets)


def _result(
    schedule: Schedule, request: RunRequest, failure: str | None, steps: Sequence[Sequence[Record]],
    ranks: Sequence[Record], durations_ns: Sequence[int],
) -> Record:  # fmt: skip
    finished, measured = len(durations_ns), list(durations_ns[request.warmup :])
    # Ranks that only sleep have no loss, send nothing and hold nothing; stages without the head have no loss.
    counted = finished and not request.stated
    with_loss = [mine for mine in steps if counted and "loss" in mine[0]]
    losses = [_mean([mine[k]["loss"] for mine in with_loss]) for k in range(finished)] if counted else []
    first = ranks[0]
    return {
        "schema": SCHEMA,
        "failure": failure,
        **{key: schedule.meta.get(key) for key in ("strategy", "layout", "model", "tokens", "precision")},
        "world_size": schedule.world_size,
        "only_rank": request.only_rank,
        "communication": request.communication,
        "device": request.device,
        "backend": request.backend,
        "transport": request.real_transport,
        "threads": request.threads,
        "seed": request.seed,
        "warmup": request.warmup,
        "steps_finished": finished,
        "step_times_ns": measured,
        "warmup_step_times_ns": list(durations_ns[: request.warmup]),
        "median_step_time_ns": int(statistics.median_low(measured)) if measured else None,
        "step_time_cv": statistics.stdev(measured) / statistics.fmean(measured) if len(measured) > 1 else None,
        "pace_ns": [max(mine[k].get("pace_ns", 0) for mine in steps) for k in range(finished)],
        "loss": losses,
        **{key: [steps[0][k].get(key) for k in range(finished)] for key in ("grad_norm", "loss_scale", "skipped")},
        "twin": TWINS[schedule.name] if request.twin else None,
        **{
            key: _of_last_step(key, steps, ranks) if counted else None
            for key in ("bytes_sent", "messages", "peak_memory_bytes", "memory_by_category", "allocator_peak_bytes")
        },
        "clock_error_ns": max((int(r.get("clock_error_ns", 0)) for r in ranks), default=0),
        "first_step": first.get("first_step", 0),
        "saved_steps": first.get("saved_steps", []),
        "check": first.get("check"),
        "torch": first.get("torch"),
        "versions": {"rtp-sim": __version__, "python": platform.python_version(), "numpy": np.__version__}
        | {key: first.get(key) for key in ("torch", "gpu")},
        "host": host_description(),
        "ranks": list(ranks),
    }


def _of_last_step(key: str, steps: Sequence[Sequence[Record]], ranks: Sequence[Record]) -> list[Any] | None:
    """What each rank said of its last step, or of its whole run; None where it was not measured."""
    if not all(steps):
        return None
    found = [record.get(key, mine[-1].get(key)) for mine, record in zip(steps, ranks, strict=True)]
    return None if None in found else found


def host_description() -> Mapping[str, str | int | None]:
    """The machine in the words that matter to a measurement."""
    model = None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": platform.node(), "system": f"{platform.system()} {platform.release()}", "machine": platform.machine(),
        "cpu": model, "cores": os.cpu_count(), "usable_cores": usable,
    }  # fmt: skip


def _write(path: Path, record: Record) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a rank has no finite number, or there is none at all."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
