"""`Lane`: a communication stream of a rank without a GPU, a thread that does its ops one after another.

gloo has no streams: a thread per stream gives it the order of the IR (an op starts when the one before it on its
stream and those in its `after` are done) and lets the host go on computing meanwhile. Waiting inside torch releases
Python's lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from rtp_sim.executor.clocks import now_ns
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.transport import Traffic
from rtp_sim.schedule.ir import Op
from rtp_sim.timeline import TimesNs


class CommunicationError(Exception):
    """A communication op failed: usually because the rank at the other end is gone or late."""


@dataclass
class Board:
    """What host and lanes of one step share: which communication ops are done, all op times, the first failure."""

    times: TimesNs
    done: dict[int, threading.Event]
    failure: list[tuple[Op, BaseException]] = field(default_factory=list)

    def wait(self, needed: Collection[int]) -> None:
        """Until these communication ops are done. CommunicationError, naming the op, if one failed."""
        for i in needed:
            self.done[i].wait()
        if self.failure:
            op, error = self.failure[0]
            raise CommunicationError(f"%{op.index} {op.name!r} failed: {error}") from error


@dataclass(frozen=True)
class Job:
    """A communication op, how to do it, and the communication ops of other streams that it must wait for."""

    op: Op
    move: Callable[[], Traffic]
    needed: Collection[int]
    board: Board


class Lane:
    """One stream. `traffic` is what it has sent since it was last set to nothing."""

    def __init__(self, number: int, stream: str, progress: Progress) -> None:
        self.traffic = Traffic()
        self._number, self._progress = number, progress
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._lock, self._waiting, self._idle = threading.Lock(), 0, threading.Event()
        self._idle.set()
        # A daemon: a worker whose partner is gone ends without waiting for it.
        threading.Thread(target=self._work, name=f"lane {stream}", daemon=True).start()

    def put(self, job: Job) -> None:
        """Queues an op behind those already there."""
        with self._lock:
            self._waiting += 1
            self._idle.clear()
        self._jobs.put(job)

    def do(self, job: Job) -> None:
        """Does an op on the caller's thread, once those before it are done: two changes of threads less."""
        self._idle.wait()
        self._work_on(job)

    def _work(self) -> None:
        while True:
            self._work_on(self._jobs.get())
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._idle.set()

    def _work_on(self, job: Job) -> None:
        for i in job.needed:
            job.board.done[i].wait()
        if not job.board.failure:
            self._move(job)
        job.board.done[job.op.index].set()

    def _move(self, job: Job) -> None:
        index, times = job.op.index, job.board.times
        self._progress.in_flight(self._number, index)
        times[0, index] = now_ns()
        try:
            self.traffic += job.move()
        except BaseException as error:
            # Whatever it is, the host must hear of it: it waits for this op.
            job.board.failure.append((job.op, error))
            return
        times[1, index] = now_ns()
        self._progress.in_flight(self._number, -1)
