"""Computes the points of a sweep on a scheduler's workers: each key once, lost workers survived, results as they come.

When a worker dies, what was in flight with it is suspect. Suspects are tried again one at a time: a point that loses
its worker while it is alone, as often as the scheduler's `deaths`, is named a failure; all others are computed as if
nothing had happened.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field

from rtp_sim.errors import InputError
from rtp_sim.sweep.evaluate import Answer, evaluate, without_result
from rtp_sim.sweep.points import Point
from rtp_sim.sweep.schedulers import Scheduler

Evaluate = Callable[[Point], Answer]
TICK_S = 1.0


class SchedulerLost(InputError):
    """Nobody is left to compute; what came until then has been handed over."""


@dataclass
class _Work:
    """What is to be done: points by key that wait, suspects, what is in flight, the suspect that is alone in flight,
    and how often a point was that when its worker died."""

    points: Mapping[str, Point]
    waiting: deque[str]
    suspects: deque[str] = field(default_factory=deque)
    flying: dict[Future[Answer], str] = field(default_factory=dict)
    alone: str = ""
    deaths: dict[str, int] = field(default_factory=dict)

    def take(self, width: int) -> str | None:
        """The next key to hand out; None while there is none, or a suspect is to be alone."""
        if self.suspects and not self.flying:
            self.alone = self.suspects.popleft()
            return self.alone
        if self.waiting and not self.suspects and not self.alone and len(self.flying) < width:
            return self.waiting.popleft()
        return None


def compute(
    points: Mapping[str, Point],
    scheduler: Scheduler,
    keep: Callable[[Answer], None],
    evaluate_point: Evaluate = evaluate,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Computes every point and hands its answer to `keep`; calls `tick` about once a second meanwhile.

    Raises SchedulerLost where no point can be computed any more, InputError where a worker has another program or other
    profiles than this process.
    """
    work = _Work(points, deque(points))
    while work.waiting or work.suspects or work.flying:
        while (key := work.take(scheduler.width)) is not None:
            _submit(work, key, scheduler, evaluate_point)
        done, _ = wait(work.flying, timeout=TICK_S, return_when=FIRST_COMPLETED)
        _settle(work, done, scheduler, keep)
        tick()


def _submit(work: _Work, key: str, scheduler: Scheduler, evaluate_point: Evaluate) -> None:
    try:
        future = scheduler.executor().submit(evaluate_point, work.points[key])
    except scheduler.died:
        # The pool broke since the last look: a new one next time.
        scheduler.broken()
        future = scheduler.executor().submit(evaluate_point, work.points[key])
    work.flying[future] = key


def _settle(work: _Work, done: set[Future[Answer]], scheduler: Scheduler, keep: Callable[[Answer], None]) -> None:
    """Hands over what is finished; where all workers die with one, everything in flight is settled, too."""
    if scheduler.die_together and any(isinstance(_error(future), scheduler.died) for future in done):
        done = wait(work.flying).done
    gone = []
    for future in sorted(done, key=list(work.flying).index):
        key, error = work.flying.pop(future), _error(future)
        if isinstance(error, scheduler.lost):
            raise SchedulerLost("the scheduler was lost")
        if isinstance(error, scheduler.died):
            gone.append(key)
        elif error is not None:
            keep(_failed(key, f"{type(error).__name__}: {error}"))
        else:
            keep(_checked(future.result(), key))
    if gone:
        scheduler.broken()
    for key in gone:
        work.deaths[key] = work.deaths.get(key, 0) + (key == work.alone)
        if work.deaths[key] >= scheduler.deaths:
            times = "" if scheduler.deaths == 1 else f" {scheduler.deaths} times"
            keep(_failed(key, f"its worker died{times} while it computed nothing but this point"))
        else:
            work.suspects.append(key)
    if not work.flying:
        work.alone = ""


def _failed(key: str, reason: str) -> Answer:
    return Answer(without_result(key, "failed", reason), 0.0, "")


def _error(future: Future[Answer]) -> BaseException | None:
    """Why there is no result; None if there is one."""
    try:
        return future.exception()
    except CancelledError as error:
        return error


def _checked(answer: Answer, key: str) -> Answer:
    if answer.row["key"] != key:
        raise InputError(
            f"a worker ({answer.worker}) computes something else: its rtp-sim, profiles or model files are not those "
            f"of this process; install the same version there and give files by paths that both have"
        )
    return answer


@dataclass
class Progress:
    """How far a sweep is, in words, at most every `every_s` seconds: `told` gets the text."""

    total: int
    kept: int
    told: Callable[[str], None]
    every_s: float = 5.0
    computed: int = 0
    told_at: int = -1
    began_s: float = field(default_factory=time.monotonic)
    last_s: float = field(default_factory=time.monotonic)

    def count(self) -> None:
        """One more point is computed."""
        self.computed += 1

    def tick(self) -> None:
        """Says how far it is if that is news and it is time, and at the end."""
        now, done = time.monotonic(), self.kept + self.computed
        if done == self.told_at:
            return
        if now - self.last_s >= self.every_s or done == self.total:
            self.last_s, self.told_at = now, done
            self.told(progress_text(done, self.total, self.computed, now - self.began_s))


def progress_text(done: int, total: int, computed: int, seconds: float) -> str:
    """ "37 of 192 points, 3.1 points/s, about 50 s left"; rate and rest count what was computed in this run."""
    if not computed or seconds <= 0:
        return f"{done} of {total} points"
    rate = computed / seconds
    left = f", about {(total - done) / rate:.0f} s left" if done < total else f", {seconds:.0f} s"
    return f"{done} of {total} points, {rate:.3g} points/s{left}"


def keyed(points: Sequence[Point], keys: Sequence[str]) -> dict[str, Point]:
    """Each different point once, in order of first appearance."""
    found: dict[str, Point] = {}
    for key, point in zip(keys, points, strict=True):
        found.setdefault(key, point)
    return found
