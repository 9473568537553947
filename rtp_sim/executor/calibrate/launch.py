"""Run a function on several processes of this host, and let nothing be left behind whatever happens to them.

The parent watches every process. If one fails, dies or says nothing for too long, all are ended and InputError says
which it was. If the parent itself is killed, the processes notice that its end of a pipe has gone and leave.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from rtp_sim.errors import InputError

_GRACE_S = 2.0


@dataclass(frozen=True)
class Rank:
    """What a process knows of itself: its number of how many, the cores of the host, and a barrier that uses no CPU.

    `say` reports progress to the parent, which also shows it that the process is alive.
    """

    rank: int
    ranks: int
    cores: int
    timeout_s: float
    wait: Callable[[], None]
    say: Callable[[str], None]


Job = Callable[[Rank, Any], Any]


def host_cores() -> tuple[int, ...]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def run_ranks(
    job: Job, argument: object, ranks: int, timeout_s: float, say: Callable[[str], None], pin: bool = True
) -> list[Any]:
    """What `job(rank, argument)` returns on each of `ranks` processes, in order. With `pin` each has one core.

    `job` is a function of a module. Raises InputError if a process fails, dies, or if none reports for `timeout_s`.
    """
    context = get_context("spawn")
    cores = host_cores()
    barrier = context.Barrier(ranks)
    theirs, mine = context.Pipe(duplex=False)  # never written to: it ends when the parent ends
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(ranks):
            receive, send = context.Pipe(duplex=False)
            core = cores[rank % len(cores)] if pin else None
            state = (rank, ranks, len(cores), timeout_s)
            process = context.Process(
                target=_worker,
                args=(job, argument, state, core, barrier, send, theirs),
                daemon=True,
                name=f"rank {rank}",
            )
            process.start()
            send.close()
            processes.append(process)
            pipes.append(receive)
        return _collect(processes, pipes, timeout_s, say)
    finally:
        _end(processes)
        for end in (*pipes, theirs, mine):
            end.close()


def _worker(
    job: Job, argument: object, state: tuple[int, int, int, float], core: int | None, barrier: Any,
    send: Connection, parent: Connection,
) -> None:  # fmt: skip
    """In the process: run the job and send what it returns, or what went wrong."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    rank, ranks, cores, timeout_s = state
    here = Rank(
        rank, ranks, cores, timeout_s, wait=lambda: barrier.wait(timeout_s), say=lambda text: send.send(("say", text))
    )
    try:
        send.send(("result", job(here, argument)))
    except BaseException as error:
        # Whatever it was, the parent tells it; what it cannot tell (a barrier broken by another's end) it ignores.
        where = traceback.extract_tb(error.__traceback__)[-1]
        send.send(("error", f"{type(error).__name__}: {error} (in {where.name})"))


def _leave_with(parent: Connection) -> None:
    """End this process when the parent has ended."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def _collect(
    processes: Sequence[BaseProcess], pipes: Sequence[Connection], timeout_s: float, say: Callable[[str], None]
) -> list[Any]:
    """The results of all, in order."""
    results: dict[int, Any] = {}
    deadline_s = time.monotonic() + timeout_s
    while len(results) < len(processes):
        open_ranks = [rank for rank in range(len(processes)) if rank not in results]
        watched = [pipes[rank] for rank in open_ranks] + [processes[rank].sentinel for rank in open_ranks]
        ready = connection.wait(watched, timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            raise InputError(
                f"no rank has reported for {timeout_s:g} s (waiting for {', '.join(map(str, open_ranks))}); the ranks "
                "were ended. Give more time with --timeout, or fewer ranks with --nproc"
            )
        for rank in open_ranks:
            if not pipes[rank].poll():
                if processes[rank].sentinel in ready and not pipes[rank].poll():
                    raise InputError(_died(rank, processes))
                continue
            try:
                what, value = pipes[rank].recv()
            except EOFError:
                raise InputError(_died(rank, processes)) from None
            deadline_s = time.monotonic() + timeout_s
            if what == "say":
                say(value)
            elif what == "error":
                raise InputError(_blame(rank, value, processes))
            else:
                results[rank] = value
    return [results[rank] for rank in range(len(processes))]


def _blame(rank: int, error: str, processes: Sequence[BaseProcess]) -> str:
    """A rank often fails because another one is gone: then that one is named."""
    others = [process for number, process in enumerate(processes) if number != rank]
    connection.wait([process.sentinel for process in others], timeout=0.5)
    for number, process in enumerate(processes):
        if number != rank and process.exitcode not in (None, 0):
            return _died(number, processes)
    return f"rank {rank} failed: {error}; the other ranks were ended"


def _died(rank: int, processes: Sequence[BaseProcess]) -> str:
    processes[rank].join(_GRACE_S)
    code = processes[rank].exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return f"rank {rank} died ({how}); the other ranks were ended"


def _end(processes: Sequence[BaseProcess]) -> None:
    """End what still runs: a moment to leave by itself (its result is here), then asked, then killed."""
    done = all(process.exitcode == 0 for process in processes)
    for process in processes:
        if not done and process.is_alive():
            process.join(0.1)
            process.terminate()
    for process in processes:
        process.join(_GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()
