"""What a calibration measured, as plain data: times of kernels, transfers and the host. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtp_sim.schedule.ir import Dims

Facts = Mapping[str, str | int | float | bool | None]

SHIFT = "shift"
"""The kind of a ring shift: every rank sends to the next and receives from the one before, both at once."""
FLOOR_NUMEL = 16
"""Elements of the smallest kernel measured, an addition: its time is all floor."""
STEPS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Collectives measured, and how often their ring goes round: that many times n - 1 steps."""


@dataclass(frozen=True, slots=True)
class KernelSample:
    """Times of one kernel (a name of model/kernels.py) at one size; one entry per launch, of all ranks together."""

    kernel: str
    dtype: str
    dims: Dims
    times_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TransferSample:
    """Times of a shift or a collective among `ranks` ranks, from when the last of them was ready to the last one's end.

    `size_bytes` counts as ir.Hop and ir.Collective do. `core_ns` is the core time that one of them takes from computing
    beside it, summed over the ranks (0 where it was not measured).
    """

    kind: str
    ranks: int
    size_bytes: int
    times_ns: tuple[int, ...]
    core_ns: int = 0


@dataclass(frozen=True, slots=True)
class HostSample:
    """What one rank's host and device are like: cost of issuing an op, memory, and compute alone and beside messages.

    `communication_ns` is the host's time for a communication op (empty where it was not measured). `alone_ns` and
    `beside_ns` time the same kernel; both are empty where there was nothing to run beside it.
    """

    issue_ns: tuple[int, ...]
    memory_bytes: int
    reserved_bytes: int
    compute_units: int
    alone_ns: tuple[int, ...] = ()
    beside_ns: tuple[int, ...] = ()
    communication_ns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Measurements:
    """All of one calibration. `kernels` were called one by one, `steps` are times of kernels inside training steps.
    `facts` describes machine, software and settings."""

    device: str
    ranks: int
    kernels: tuple[KernelSample, ...]
    transfers: tuple[TransferSample, ...]
    host: HostSample
    facts: Facts
    steps: tuple[KernelSample, ...] = ()


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1), linear between neighbours. ValueError if there are no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The median."""
    return quantile(values, 0.5)


INTERRUPTED = 3.0
"""How many medians a time may be long before it counts as an interruption by something else."""


def typical(times: Sequence[float]) -> float:
    """The mean of the times, interruptions left out. The mean and not the median: a step adds up many of them, and the
    sum goes with the mean."""
    most = INTERRUPTED * median(times)
    counted = [t for t in times if t <= most]
    return sum(counted) / len(counted)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 10 % and 90 % quantiles."""
    return quantile(values, 0.1), quantile(values, 0.9)
