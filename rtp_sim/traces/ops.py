"""Finds the ops of a schedule in the trace of one rank: when each ran, on the rank's own clock.

Without a device an op ran while its range was open. On a device it ran from the start of the first to the end of the
last kernel or copy that the host launched inside its range: launch and kernel carry the same correlation number, and
the launch lies in the range on its thread. Where the launch is missing, the "External id" names the host's op that it
belongs to. An op that started nothing on the device has no length and stands where the host issued it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtp_sim.errors import InputError
from rtp_sim.traces.intervals import length, union
from rtp_sim.traces.kineto import COPY, KERNEL, LAUNCH, OP, RANGE, Event, Lane, Trace
from rtp_sim.traces.names import read_clock, read_op, read_step


@dataclass(frozen=True, slots=True)
class OpTimes:
    """One op: its name in the trace, its span on the rank's clock, and how long the device worked on it (the union of
    its kernels; without a device the whole span)."""

    name: str
    start_ns: int
    end_ns: int
    busy_ns: int


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One step of one rank, on the rank's own clock. `clock_error_ns` is how far the readings of the clock before and
    after the step disagree."""

    step: int
    ops: Mapping[int, OpTimes]
    clock_error_ns: int


def step_of(trace: Trace) -> StepTrace:
    """The step in a trace that `rtp-sim run --profile-trace` left. InputError if there is none, or an op twice."""
    ranges = [e for e in trace.events if e.what == RANGE]
    steps = [(number, e) for e in ranges if (number := read_step(e.name)) is not None]
    if len(steps) != 1:
        raise InputError(
            f"{trace.path}: {len(steps)} ranges 'rtp-sim step N'; expected the one step that rtp-sim run "
            "--profile-trace records"
        )
    own = _Clock(trace.path, ranges)
    found: dict[int, tuple[str, Event]] = {}
    for e in ranges:
        if (named := read_op(e.name)) is not None:
            if named[0] in found:
                raise InputError(f"{trace.path}: op %{named[0]} ({named[1]}) has two ranges; expected one step only")
            found[named[0]] = named[1], e
    if not found:
        raise InputError(f"{trace.path}: no ranges of ops ('rtp-sim %0 ...'); expected a trace of rtp-sim run")
    kernels = [e for e in trace.events if e.what in (KERNEL, COPY)]
    started = _started(trace.events, kernels, found) if kernels else None
    ops = {}
    for index, (name, e) in found.items():
        spans = [(e.start_ns, e.end_ns)] if started is None else started.get(index, [(e.end_ns, e.end_ns)])
        first, last = min(s for s, _ in spans), max(s for _, s in spans)
        ops[index] = OpTimes(name, own.at(first), own.at(last), length(union(spans)))
    return StepTrace(steps[0][0], ops, own.error_ns)


class _Clock:
    """From the profiler's clock to the rank's: linear between the readings before and those after the step. A range
    opens a little after its time was read, so of several readings the one with the least delay counts."""

    def __init__(self, path: str, ranges: Sequence[Event]) -> None:
        readings = [(e.start_ns, e.start_ns - now) for e in ranges if (now := read_clock(e.name)) is not None]
        if len(readings) < 2:
            raise InputError(
                f"{path}: {len(readings)} readings of the rank's clock ('rtp-sim clock ...'); expected some before and "
                "some after the step"
            )
        half = len(readings) // 2
        self._first = min(readings[:half], key=lambda r: r[1])
        self._last = min(readings[half:], key=lambda r: r[1])
        self.error_ns = abs(self._last[1] - self._first[1])

    def at(self, trace_ns: int) -> int:
        """The rank's clock at this time of the trace."""
        (t0, ahead0), (t1, ahead1) = self._first, self._last
        between = (trace_ns - t0) * (ahead1 - ahead0) // (t1 - t0) if t1 > t0 else 0
        return trace_ns - ahead0 - between


def _started(
    events: Sequence[Event], kernels: Sequence[Event], found: Mapping[int, tuple[str, Event]]
) -> dict[int, list[tuple[int, int]]]:
    """By op, the spans of what it started on the device."""
    by_lane: dict[Lane, list[tuple[int, int, int]]] = {}
    for index, (_, e) in found.items():
        by_lane.setdefault(e.lane, []).append((e.start_ns, e.end_ns, index))
    for ranges in by_lane.values():
        ranges.sort()

    def op_at(event: Event | None) -> int | None:
        spans = by_lane.get(event.lane, []) if event is not None else []
        if event is None or not spans:
            return None
        place = bisect_right(spans, (event.start_ns, 1 << 62, 0)) - 1
        return spans[place][2] if place >= 0 and event.start_ns <= spans[place][1] else None

    launches: dict[int, Event] = {e.correlation: e for e in events if e.what == LAUNCH and e.correlation is not None}
    callers = {e.external: e for e in events if e.what in (OP, RANGE) and e.external is not None}
    started: dict[int, list[tuple[int, int]]] = {}
    for kernel in kernels:
        launch = None if kernel.correlation is None else launches.get(kernel.correlation)
        caller = None if kernel.external is None else callers.get(kernel.external)
        of_launch, of_caller = op_at(launch), op_at(caller)
        found_in = of_caller if of_launch is None else of_launch
        if found_in is not None:
            started.setdefault(found_in, []).append((kernel.start_ns, kernel.end_ns))
    return started
