"""Starts the workers of a run on this machine, watches them, and stops all of them when one fails.

Each worker is a process group of its own with torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR ...),
so `torchrun -m rtp_sim.executor run1/` starts the same worker. This launcher adds what torchrun does not have: it
reads where every rank is (progress.py), names the rank and the op at which a run failed or stands still, and leaves no
process behind: workers are killed by process group, and die with the launcher where the system offers that (Linux).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rtp_sim.errors import InputError
from rtp_sim.executor.progress import Place, read_place
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import Record, RunDirectory
from rtp_sim.executor.whereabouts import describe, furthest_behind
from rtp_sim.schedule.ir import Schedule

HOST = "127.0.0.1"
LAUNCHER_PID = "RTP_SIM_LAUNCHER_PID"
POLL_S = 0.05
GRACE_S = 0.7
"""How long to listen to the other ranks once one has failed: the first to fail is not always the first heard of."""

START_UP_S = 120.0
"""Least patience outside of a step: importing torch on many ranks at once takes its time."""

Report = Callable[[str], None]


class RunFailed(Exception):
    """The run began and did not end well: the message names the rank and the op it was in."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A rank's process."""

    rank: int
    process: subprocess.Popen[bytes]


def launch(run: RunDirectory, schedule: Schedule, request: RunRequest, port: int | None, report: Report) -> None:
    """Runs the schedule on processes of this machine, one per rank that the request asks for, until all are done.

    InputError for a set-up that cannot work (port in use, no GPU, no torch), RunFailed when a rank dies, raises or
    stands still for longer than `request.timeout_s`. Either way no worker is left.
    """
    if not request.stated and find_spec("torch") is None:
        raise InputError("running a schedule needs torch; install it with: pip install 'rtp-sim[torch]'")
    port = free_port() if port is None else _require_free(port)
    workers: list[Worker] = []
    try:
        ranks = request.ranks(schedule.world_size)
        for number, rank in enumerate(ranks):
            workers.append(_start(run, len(ranks), request, port, number, rank))
        _watch(run, schedule, request, workers, report)
    finally:
        _stop(workers)


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _require_free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(f"--port {port} cannot be used: {error}; leave it out to take a free one") from None
    return port


def _start(run: RunDirectory, world_size: int, request: RunRequest, port: int, number: int, rank: int) -> Worker:
    command = [sys.executable, "-m", "rtp_sim.executor", str(run.path)]
    with run.of_rank(rank, "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | _environment(world_size, request, port, number),
        )  # fmt: skip
    return Worker(rank, process)


def _environment(world_size: int, request: RunRequest, port: int, number: int) -> Mapping[str, str]:
    package = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    mine = {
        "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": HOST, "MASTER_PORT": port, "OMP_NUM_THREADS": request.threads,
        "MKL_NUM_THREADS": request.threads, "PYTHONPATH": path, LAUNCHER_PID: os.getpid(),
    }  # fmt: skip
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # All ranks are here: the loopback device needs no name resolution, which some containers lack.
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        mine |= {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
    return {key: str(value) for key, value in mine.items()}


# ---- watching


def _watch(run: RunDirectory, schedule: Schedule, request: RunRequest, workers: list[Worker], report: Report) -> None:
    said = ""
    while True:
        codes = [w.process.poll() for w in workers]
        if any(codes):
            _let_others_fail(workers)
            _raise_cause(run, schedule, workers)
        if all(code == 0 for code in codes):
            return
        places = {w.rank: read_place(run.of_rank(w.rank, "progress")) for w in workers if w.process.poll() is None}
        _require_movement(schedule, request, places)
        now = _progress_line(places, request)
        if now and now != said:
            report(now)
            said = now
        time.sleep(POLL_S)


def _progress_line(places: Mapping[int, Place | None], request: RunRequest) -> str:
    seen = [place for place in places.values() if place is not None]
    if not seen:
        return ""
    place = min(seen, key=furthest_behind)
    if place.phase not in ("step", "between steps"):
        return place.phase
    number = place.step - request.warmup + 1
    if number > request.steps:
        return "one step under the profiler"
    return f"step {number} of {request.steps}" if number > 0 else f"warm-up step {place.step + 1} of {request.warmup}"


def _require_movement(schedule: Schedule, request: RunRequest, places: Mapping[int, Place | None]) -> None:
    """RunFailed if a rank has stood still for too long; the one furthest behind is named first."""
    now_ns = time.monotonic_ns()
    seen = {rank: place for rank, place in places.items() if place is not None}
    still = {rank: place for rank, place in seen.items() if _stands_still(place, request, now_ns)}
    if not still:
        return
    # A rank that waits for another one still moves on in its own time: the one behind all others is to blame.
    first = min(seen, key=lambda rank: furthest_behind(seen[rank]))
    others = "; ".join(f"rank {r} {describe(schedule, r, p)}" for r, p in sorted(seen.items())[:8] if r != first)
    seconds = (now_ns - seen[first].changed_ns) / 1e9
    raise RunFailed(
        f"rank {first} {describe(schedule, first, seen[first])} and has not moved for {seconds:.1f} s "
        f"(--timeout {request.timeout_s:g})" + (f"; meanwhile {others}" if others else "")
    )


def _stands_still(place: Place, request: RunRequest, now_ns: int) -> bool:
    in_steps = place.phase in ("step", "between steps")
    patience_s = request.timeout_s if in_steps else max(request.timeout_s, START_UP_S)
    return now_ns - place.changed_ns > patience_s * 1e9


def _let_others_fail(workers: list[Worker]) -> None:
    """Waits a moment for the ranks that fail because of the first, or before it and unseen."""
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and any(w.process.poll() is None for w in workers):
        time.sleep(POLL_S / 5)


# ---- who was it


def _raise_cause(run: RunDirectory, schedule: Schedule, workers: list[Worker]) -> None:
    """InputError for a set-up that cannot work, RunFailed for everything else, naming the rank that failed first."""
    failed = [w for w in workers if w.process.poll()]
    errors = {w.rank: run.read_rank(w.rank, "error.json") for w in failed}
    for error in errors.values():
        if error is not None and error["kind"] == "set-up":
            raise InputError(str(error["message"]))
    first = min(failed, key=lambda w: _order(w, errors[w.rank]))
    place = read_place(run.of_rank(first.rank, "progress"))
    where = describe(schedule, first.rank, place) if place is not None else "had not begun"
    raise RunFailed(f"rank {first.rank} {where}: {_reason(run, first, errors[first.rank])}")


def _order(worker: Worker, error: Record | None) -> tuple[int, int, int]:
    """Causes before consequences: killed from outside, raised, aborted, and last those that lost a partner."""
    code = worker.process.poll() or 0
    if error is not None:
        return (3 if error["kind"] == "communication" else 1), int(error["time_ns"]), worker.rank
    return (2 if -code == signal.SIGABRT else 0), 0, worker.rank


def _reason(run: RunDirectory, worker: Worker, error: Record | None) -> str:
    if error is not None:
        return str(error["message"])
    code = worker.process.poll() or 0
    what = f"the process exited with code {code}"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (if nobody sent it, the machine ran out of memory)" if name == "SIGKILL" else ""
        what = f"the process was ended by {name}{hint}"
    log = run.of_rank(worker.rank, "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{what}; its last words: {log[-1]}" if log else what


# ---- the end


def _stop(workers: list[Worker]) -> None:
    """Kills whatever is left of every worker's process group and waits for it."""
    for worker in workers:
        # The group outlives its first process where that has started others.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
    for worker in workers:
        worker.process.wait()
