"""The processes that evaluate candidates, and which does what.

A process remembers what it has folded and composed (evaluate.py), so a candidate goes where its layout, or it itself,
was evaluated before, unless it is done sooner elsewhere. What comes out does not depend on it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess

from rtp_sim.errors import InputError
from rtp_sim.metrics import StepMetrics
from rtp_sim.planner.evaluate import WHOLE, evaluate, short
from rtp_sim.planner.plan import Bounds
from rtp_sim.planner.searched import Found, Searched, slowest

Places = Sequence[tuple[int, int]]
Run = Callable[[Places, bool], list[Found]]
"""Evaluates candidates by (site, place): estimates, or with True simulations."""

PASS_S, COMPOSED_S, FOLD_S = 60e-6, 0.2, 0.15
"""What simulating a pass, composing a step and folding a layout took for Llama-2 70B on 1,024 GPUs, about: it decides
which process does what, and nothing else."""

_SHARED: Searched | None = None
"""What forked workers inherit: networks, clusters and all prices worked out so far."""


@contextmanager
def evaluating(searched: Searched) -> Iterator[Run]:
    """A function that evaluates candidates, on as many processes as the question allows."""
    global _SHARED
    _SHARED = searched
    count = searched.question.processes
    if count < 2:
        yield lambda places, whole: [_evaluated(*place, whole) for place in places]
        return
    homes: dict[object, int] = {}
    workers = [_started() for _ in range(count)]

    def run(places: Places, whole: bool) -> list[Found]:
        chosen = share_out([_work(searched, *place, whole) for place in places], homes, count)
        shares = [[i for i, k in enumerate(chosen) if k == number] for number in range(count)]
        for worker, share in zip(workers, shares, strict=True):
            worker.ask([(*places[i], whole) for i in share])
        found: dict[int, Found] = {}
        for worker, share in zip(workers, shares, strict=True):
            found |= zip(share, worker.answer(), strict=True)
        return [found[i] for i in range(len(places))]

    try:
        yield run
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


@dataclass(frozen=True, slots=True)
class _Worker:
    """A process that evaluates what it is sent, and this end of the connection to it."""

    process: ForkProcess
    connection: Connection

    def ask(self, work: list[tuple[int, int, bool]]) -> None:
        """Sends it (site, place, whole) of what to evaluate. InputError if it is lost."""
        try:
            self.connection.send(work)
        except OSError:
            raise self._lost() from None

    def answer(self) -> list[Found]:
        """What it found. InputError if it is lost; whatever an evaluation raised."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    def _lost(self) -> InputError:
        self.process.join()
        code = self.process.exitcode
        return InputError(f"plan: a process that evaluates layouts ended by itself (exit code {code}); expected it to "
                          f"answer. Was it stopped for lack of memory?")  # fmt: skip


def _started() -> _Worker:
    # All are forked before anything else: with threads about, a fork may copy a lock that nobody opens again.
    here, there = Pipe()
    process = get_context("fork").Process(target=_serve, args=(there, here), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _serve(connection: Connection, other_end: Connection) -> None:
    """In the child: evaluates lists of (site, place, whole) until there are no more."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        try:
            connection.send([_evaluated(*one) for one in asked])
        except Exception as error:
            # The parent raises it.
            connection.send(error)


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work: what it is known as, about how long it takes, and how much longer in a process that knows none
    of these names."""

    names: tuple[object, ...]
    takes_s: float
    unknown_s: float


def share_out(work: Sequence[Work], homes: dict[object, int], count: int) -> list[int]:
    """Which of `count` processes does each of these pieces of work, the longest first: the one that would be done with
    it first. `homes` is which process knows what, and learns."""
    load, chosen = [0.0] * count, [0] * len(work)
    for i in sorted(range(len(work)), key=lambda i: -work[i].takes_s):
        one = work[i]
        home = next((homes[name] for name in one.names if name in homes), None)
        ends_s = [load[k] + one.takes_s + (one.unknown_s if k != home else 0.0) for k in range(count)]
        chosen[i] = ends_s.index(min(ends_s))
        load[chosen[i]] = min(ends_s)
        homes |= dict.fromkeys(one.names, chosen[i])
    return chosen


def _work(searched: Searched, site: int, place: int, whole: bool) -> Work:
    """A candidate: by itself once it has been estimated, and by what it has in common with others: how ranks fold, and
    the programs of stages."""
    one = searched.sites[site].space.candidate(place)
    if whole:
        return Work(((site, place),), one.pp * one.vpp * one.micro_batches * PASS_S, COMPOSED_S)
    degrees = one.axis, one.inner, one.dp, one.pp
    programs = site, degrees, one.strategy, one.vpp, one.micro_batch
    return Work(((site, place), (site, degrees, one.order), programs), COMPOSED_S, FOLD_S)


def _evaluated(number: int, place: int, whole: bool) -> Found:
    assert _SHARED is not None
    site, question = _SHARED.sites[number], _SHARED.question
    candidate = site.space.candidate(place)
    metrics, how = evaluate(question.workload, candidate, site.cluster, _SHARED.network, site.model, whole)
    if how != WHOLE:
        metrics, how = _at_least(metrics, how, site.bounds(place), site.machine.memory_bytes)
    return Found(
        number, place, metrics, how, metrics.peak_memory_bytes <= site.machine.allowed_bytes,
        metrics.step_time_s <= slowest(_SHARED), None, whole or how == WHOLE,
        short(candidate, site.model),
    )  # fmt: skip


def _at_least(metrics: StepMetrics, how: str, bounds: Bounds, usable_bytes: int) -> tuple[StepMetrics, str]:
    """A straight line through short steps can miss a peak that only long ones have; the closed form does not."""
    if metrics.peak_memory_bytes >= bounds.memory_bytes:
        return metrics, how
    held = dict.fromkeys(metrics.memory_by_category, 0) | dict(bounds.memory_by_category)
    fits = bounds.memory_bytes <= usable_bytes
    changed = replace(metrics, peak_memory_bytes=bounds.memory_bytes, memory_by_category=held, fits=fits)
    return changed, f"{how}; memory in closed form"
