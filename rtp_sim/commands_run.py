"""What `rtp-sim run` does: a checked schedule into a run directory, its workers started and watched, the result shown.

Imports no torch: that is for the workers, and a machine that only simulates need not have it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rtp_sim.cost.model import ClusterCost
from rtp_sim.cost.stated import priced
from rtp_sim.errors import InputError
from rtp_sim.executor.checkpoint_files import newest
from rtp_sim.executor.collect import collect
from rtp_sim.executor.launcher import RunFailed, launch
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import RunDirectory
from rtp_sim.executor.twins import require_twin
from rtp_sim.experiment import Prepared
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.report.format import format_bytes, format_count, format_percent, format_seconds
from rtp_sim.report.tables import print_table, write_json
from rtp_sim.schedule.checks import check
from rtp_sim.schedule.ir import Schedule
from rtp_sim.schedule.parse import from_text as schedule_from_text
from rtp_sim.schedule.serialize import from_json as schedule_from_json
from rtp_sim.stated import StatedTimes

Result = dict[str, Any]


def execute(a: Namespace, prepared: Prepared) -> int:
    """Runs the prepared schedule on processes of this machine. Exit code 1 if the run fails or --check does not hold;
    InputError for a set-up that cannot work."""
    schedule = prepared.schedule if a.schedule is None else _read_schedule(Path(a.schedule), prepared.schedule)
    request = RunRequest(
        network=prepared.network, training=prepared.training, steps=a.steps, warmup=a.warmup, seed=a.seed,
        device=a.device, transport=a.transport, timeout_s=a.timeout, threads=a.threads, check=a.check, pin=a.pin,
        float_dtype="fp64" if a.fp64 else "", save_tensors=a.save_tensors, profile_trace=a.profile_trace,
        only_rank=a.only_rank, twin=a.twin,
        communication=a.communication or ("real" if a.only_rank is None else "fake"),
        link_latency_ns=a.link_latency, link_bandwidth_bytes_per_s=a.link_bandwidth,
        stated=a.stated_times is not None, load=_absolute(a.load), save=_absolute(a.save), save_every=a.save_every,
    )  # fmt: skip
    if request.load:
        # Found out by the workers too, but seconds later.
        newest(Path(request.load))
    if a.twin:
        require_twin(schedule, request)
    if a.only_rank is not None and a.only_rank >= schedule.world_size:
        raise InputError(f"--only-rank {a.only_rank}: the ranks of this schedule are 0 to {schedule.world_size - 1}")
    check(schedule)
    run = RunDirectory(Path(a.output))
    run.prepare(schedule, request, _stated_times(a, schedule))
    if a.prepare:
        print(f"torchrun --nproc-per-node {len(request.ranks(schedule.world_size))} -m rtp_sim.executor {a.output}")
        return 0

    def report(message: str) -> None:
        if not a.quiet:
            print(f"rtp-sim: {schedule.name}: {message}", file=sys.stderr)

    failure = None
    try:
        launch(run, schedule, request, a.port, report)
    except RunFailed as error:
        failure = str(error)
    result = collect(run, schedule, request, failure)
    if a.format == "json":
        write_json(result)
    else:
        print_table(_table(result))
    if failure is not None:
        print(f"rtp-sim: the run failed: {failure} (logs: {run.path / 'ranks'})", file=sys.stderr)
        return 1
    held = result["check"] is None or result["check"]["passed"]
    if not held:
        print(f"rtp-sim: --check: the first step differs from dense training: {result['check']}", file=sys.stderr)
    return 0 if held else 1


def _read_schedule(path: Path, planned: Schedule) -> Schedule:
    """A schedule from a file, as text or JSON. InputError if it is none, or not for as many ranks as are asked for."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"--schedule {path}: {why}; write one with: rtp-sim schedule --format text") from None
    schedule = schedule_from_json(text) if text.lstrip().startswith("{") else schedule_from_text(text)
    if schedule.world_size != planned.world_size:
        raise InputError(f"--schedule {path}: it is for {schedule.world_size} ranks, the run for {planned.world_size}; "
                         f"expected --nproc-per-node {schedule.world_size}")  # fmt: skip
    return schedule


def _absolute(directory: str | None) -> str:
    """Whoever starts the workers may be elsewhere."""
    return str(Path(directory).resolve()) if directory else ""


def _stated_times(a: Namespace, schedule: Schedule) -> StatedTimes | None:
    """What every op takes by the profile that --stated-times names; None without it."""
    if a.stated_times is None:
        if a.slow_rank or a.stretch is not None:
            raise InputError("--slow-rank and --stretch change stated times; expected --stated-times with them")
        return None
    if a.prepare:
        raise InputError("--stated-times: ranks that only sleep are started by rtp-sim run; expected no --prepare")
    slow = dict(a.slow_rank or ())
    if wrong := [rank for rank in slow if rank >= schedule.world_size]:
        raise InputError(f"--slow-rank {wrong[0]}: there are {schedule.world_size} ranks, numbered from 0")
    nodes = a.as_nodes
    cluster = load_cluster(a.stated_times, nodes, schedule.world_size)
    return priced(schedule, ClusterCost(cluster), a.stretch or 1.0, slow)


def _table(result: Result) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for title, text in _rows(result):
        table.add_row(title, Text(text))
    return table


def _rows(result: Result) -> Iterator[tuple[str, str]]:
    yield "strategy", f"{result['strategy']} {result['layout']}".rstrip()
    if result["twin"] is not None:
        yield "twin", f"torch's {result['twin']}"
    alone = "" if result["only_rank"] is None else f", rank {result['only_rank']} alone"
    yield "ranks", f"{result['world_size']}{alone} ({result['device']}, {result['transport']})"
    measured = result["step_times_ns"]
    yield "steps measured", str(len(measured))
    if measured:
        median_s = result["median_step_time_ns"] / 1e9
        yield "step, median", format_seconds(median_s)
        yield "step, least to most", f"{format_seconds(min(measured) / 1e9)} to {format_seconds(max(measured) / 1e9)}"
        if result["step_time_cv"] is not None:
            yield "spread (std / mean)", format_percent(result["step_time_cv"])
        if result["only_rank"] is None:
            yield "tokens/s", format_count(result["tokens"] / median_s)
    if result["loss"] and result["loss"][0] is not None:
        yield "loss, first to last", f"{result['loss'][0]:.6f} to {result['loss'][-1]:.6f}"
        yield from _gradient_rows(result)
    if result["bytes_sent"]:
        yield "sent per rank", format_bytes(max(result["bytes_sent"]))
        yield "messages per rank", format_count(max(result["messages"]))
    if result["peak_memory_bytes"]:
        yield "peak memory", format_bytes(max(result["peak_memory_bytes"]))
    if result["first_step"]:
        yield "went on after step", str(result["first_step"])
    if result["saved_steps"]:
        yield "saved after step", ", ".join(str(step) for step in result["saved_steps"])
    if result["allocator_peak_bytes"]:
        yield "peak of the allocator", format_bytes(max(result["allocator_peak_bytes"]))
    if result["check"] is not None:
        found = result["check"]
        yield "check", f"{'ok' if found['passed'] else 'FAILED'} (largest error {found['largest_error']:.1e})"


def _gradient_rows(result: Result) -> Iterator[tuple[str, str]]:
    """Of a run that measures its gradients."""
    norms = [norm for norm in result["grad_norm"] if norm is not None]
    if norms:
        yield "gradient norm, first to last", f"{norms[0]:.6g} to {norms[-1]:.6g}"
    if result["loss_scale"][0] is not None:
        yield "loss scale, first to last", f"{result['loss_scale'][0]:g} to {result['loss_scale'][-1]:g}"
        yield "updates left out", f"{sum(result['skipped'])} of {len(result['skipped'])}"
