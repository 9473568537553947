"""Who computes the points: processes of this machine, or the workers of a Dask cluster. Both are `Scheduler`s, whose
seam is `concurrent.futures.Executor`.

The only module that imports Dask (extra: dask).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any, Protocol

from rtp_sim.errors import InputError

CONNECT_S = 10.0


class Scheduler(Protocol):
    """`width` points are in flight at most. An exception in `died` says that the worker of a point is gone, with
    `die_together` along with all others; after `deaths` of these while the point was alone in flight, it is the point
    that kills it. One in `lost` says that there is nobody to compute any more."""

    width: int
    deaths: int
    die_together: bool
    died: tuple[type[BaseException], ...]
    lost: tuple[type[BaseException], ...]

    def executor(self) -> Executor:
        """A working executor: the one of last time, or a new one where that is broken. InputError if there is none."""

    def broken(self) -> None:
        """The executor lost a worker."""

    def close(self) -> None:
        """Stops what was started; what still runs is not waited for."""


class LocalProcesses:
    """`workers` processes of this machine. One that dies takes the whole pool along, which is then started anew."""

    deaths = 3
    die_together = True
    died: tuple[type[BaseException], ...] = (BrokenExecutor,)
    lost: tuple[type[BaseException], ...] = ()

    def __init__(self, workers: int | None = None) -> None:
        self.width = workers or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None

    def executor(self) -> Executor:
        """The pool. Its processes are started fresh, not forked, so that they hold nothing of this one's."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.width, context, initializer=end_with_parent)
        return self._pool

    def broken(self) -> None:
        """Forget the pool; what of its processes is left ends by itself."""
        self.close()

    def close(self) -> None:
        """End the pool."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def end_with_parent() -> None:
    """In a worker: end when the process that started it ends, however that happens."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Ctrl-C reaches the whole terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class DaskWorkers:
    """The workers behind the Dask scheduler at `address` (tcp://host:port). InputError without the extra, or if the
    scheduler cannot be reached or has no workers."""

    # The scheduler itself tries a point on three workers before it gives up.
    deaths = 1
    die_together = False

    def __init__(self, address: str, connect_s: float = CONNECT_S) -> None:
        distributed = _distributed()
        self.died: tuple[type[BaseException], ...] = (distributed.KilledWorker,)
        self.lost: tuple[type[BaseException], ...] = (CancelledError, distributed.comm.CommClosedError)
        try:
            self._client: Any = distributed.Client(address, timeout=connect_s, set_as_default=False)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"--scheduler {address}: cannot be reached ({reason}); expected the address of a running "
                             f"Dask scheduler, for example tcp://127.0.0.1:8786") from None  # fmt: skip
        try:
            self._client.wait_for_workers(1, timeout=connect_s)
        except TimeoutError:
            self.close()
            raise InputError(f"--scheduler {address}: has no workers; start some: dask worker {address}") from None
        threads = sum(self._client.nthreads().values())
        self.width = 2 * max(1, threads)

    def executor(self) -> Executor:
        """The cluster."""
        executor: Executor = self._client.get_executor(pure=False)
        return executor

    def broken(self) -> None:
        """The scheduler knows, and replaces nothing."""

    def close(self) -> None:
        """Leave the cluster; what still waits there is taken back."""
        self._client.close(timeout=2)


def _distributed() -> Any:
    try:
        import distributed
        import distributed.comm
    except ImportError:
        raise InputError("--scheduler needs Dask: pip install 'rtp-sim[dask]'") from None
    # Connections that come and go are no news here: what they mean for the sweep is told once.
    for name in ("distributed", "distributed.client", "distributed.comm", "tornado"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return distributed
