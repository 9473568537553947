"""The pace of a core: what a fixed piece of work takes, so that one can see when neighbours slow the core down.

A virtual machine's cores may be threads of shared ones. Its host moves them about: two of them on one core, or one
beside a neighbour's, take up to 1.8 times as long for everything, for seconds or minutes, and the system's own figures
show nothing of it. An interpreter's loop feels that the most, products on the vector units less. CPU time is taken, so
that other processes of this machine that take turns on the core do not count. Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rtp_sim.schedule.ir import Compute, Op

ROUNDS, TURNS = 3, 2500
INTERVAL_NS = 40_000_000
"""How long a step goes on between two readings: they cost it less than 0.4 %."""
TOLERANCE = 0.15
"""How much slower or faster than usual a core may be and still count as steady."""
USUAL_SHARE = 0.2
"""Of all readings the part that may be faster than the usual pace."""


def pace_ns() -> int:
    """CPU time of the fixed work on this thread's core, the least of three rounds: some 0.2 ms in all."""
    return min(_round_ns() for _ in range(ROUNDS))


def _round_ns() -> int:
    start_ns = time.thread_time_ns()
    total = 0
    for i in range(TURNS):
        total += i
    return time.thread_time_ns() - start_ns


class PaceWatch:
    """Reads the pace while a step goes on, entered around each of its ops (`HostInterpreter.around`)."""

    def __init__(self) -> None:
        self._nothing: AbstractContextManager[object] = nullcontext()
        self._readings: list[int] = []
        self._due_ns = 0

    def begin(self) -> None:
        """Before a step."""
        self._readings = [pace_ns()]
        self._due_ns = time.monotonic_ns() + INTERVAL_NS

    def __call__(self, op: Op) -> AbstractContextManager[object]:
        """Before an op; communication is another thread's."""
        if isinstance(op.action, Compute) and time.monotonic_ns() > self._due_ns:
            # The better of two: behind another process's turn the first finds the core's caches cold.
            self._readings.append(min(_round_ns(), _round_ns()))
            self._due_ns = time.monotonic_ns() + INTERVAL_NS
        return self._nothing

    def end(self) -> int:
        """After the step: the mean of the readings, ns."""
        self._readings.append(pace_ns())
        return sum(self._readings) // len(self._readings)


def usual_ns(readings: Sequence[int]) -> int:
    """The pace that cores have when nobody is in their way (0 if there are no readings): that of the fastest fifth. The
    median would be one of the slower paces where neighbours come and go, and another one each time."""
    return sorted(readings)[int(USUAL_SHARE * len(readings))] if readings else 0


def steady(reading_ns: int, usual: int, tolerance: float = TOLERANCE) -> bool:
    """Whether a core was about as fast as usual; true where no usual pace is known."""
    return not usual or abs(reading_ns - usual) <= tolerance * usual
