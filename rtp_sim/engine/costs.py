"""What the engines ask of a cost model: the time of a kernel, the phases of a transfer, the capacity of a
resource.

The engines know nothing about hardware. A cost model (see `rtp_sim/cost/`) knows nothing about events. This
module is the narrow waist between them, and the only thing that both import.

A *link* here is any shared resource with an integer index: a wire, a port, a host bridge, or a machine's pool
of CPU cores. Amounts are integers throughout, which is what lets folded and unfolded runs agree to the
nanosecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rtp_sim.schedule.ir import Dims, Op


@dataclass(frozen=True, slots=True)
class OpCost:
    """Time of one kernel alone on its device. `basis` is "measured", "interpolated" or "assumed". `slowdown_permille`
    is how much longer it takes beside a communication; None is the cost model's for all kernels."""

    duration_ns: int
    basis: str
    slowdown_permille: int | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of a communication: `latency_ns` pass first, then `work_bytes` flow.

    While w bytes of the work pass, link l carries w * usage[l] bytes. `cap_bytes_per_s` bounds the rate of
    the work whatever the links allow (small-message efficiency, a copy through a bounce buffer); None is no
    bound.
    """

    latency_ns: int
    work_bytes: int
    usage: Mapping[int, int]
    cap_bytes_per_s: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for amounts with which time could stand still or run backwards."""
        if self.latency_ns < 0 or self.work_bytes < 0:
            raise ValueError(f"latency and work must not be negative: {self}")
        if self.cap_bytes_per_s is not None and self.cap_bytes_per_s < 1:
            raise ValueError(f"a cap must be at least 1 byte/s: {self}")
        if any(weight < 1 for weight in self.usage.values()):
            raise ValueError(f"weights must be at least 1: {self}")


class CostModel(Protocol):
    """Prices of ops on one cluster. Every method is a pure function of its arguments."""

    @property
    def overlap_slowdown_permille(self) -> int:
        """1126: compute takes 12.6 % longer while a communication of the same rank is in flight; 1000: no
        effect.

        Ranks with a compute pool do not use it: there, transfers take their share of the pool itself.
        """

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """Time of one kernel."""

    def host_issue_ns(self, op: Op) -> int:
        """Time the host thread of a rank spends to issue `op`."""

    def link_capacity(self, link: int) -> int:
        """Bytes/s of a link, at least 1 (for a compute pool: see `compute_pool`)."""

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One message between two different ranks. `chunk_bytes` is set for in-place shifts, which move that
        much at a time through a bounce buffer. Usage depends on the ranks and the algorithm, not on the
        size."""

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """The phases of a collective of two or more ranks, one after another. The root of a broadcast or
        reduce is ranks[0]: the engine rotates the group's order so that it is."""

    def compute_pool(self, rank: int) -> int | None:
        """The link that stands for the pool of cores which the rank's compute shares with other ranks; None on
        a GPU.

        What passes through it are picoseconds of core time: a pool of c cores has link_capacity(link) ==
        c * 1e12, a kernel puts 1,000 per ns of its duration on it and advances by at most 1e12 a second, and
        the weight of a transfer is its core time in ps per byte. Since sharing starts from equal amounts a
        second, and a transfer moves far fewer bytes than a kernel has picoseconds, transfers get what they can
        use first: threads that move data sleep most of the time, and the system lets who wakes up run at once.
        """
