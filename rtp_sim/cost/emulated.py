"""`EmulatedCost`: a host's compute, and transfers through its memory with a stated link's time in between.

Over shared memory a rank copies what it sends, meets its partners, and copies what it receives (`executor/shm.py`).
With an emulated link the link's time passes once all are there, and the first copy lies in it. So a transfer takes what
the profile of the host, calibrated over shared memory, says without the first copy, plus the link's time, or without
the link's time where the first copy takes longer. Both copies take core time, which computing beside them lacks.
"""

from __future__ import annotations

from dataclasses import replace

from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.costs import OpCost, Phase
from rtp_sim.link import Link
from rtp_sim.schedule.ir import Dims, Op


class EmulatedCost:
    """Implements engine.costs.CostModel: kernels, cores and copies are those of `base`, transfers also take `link`."""

    overlap_slowdown_permille = 1000

    def __init__(self, base: ClusterCost, link: Link) -> None:
        self.base, self.link = base, link

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """Time of one kernel."""
        return self.base.compute(kernel, dtype, dims)

    def host_issue_ns(self, op: Op) -> int:
        """Host time to issue one op."""
        return self.base.host_issue_ns(op)

    def link_capacity(self, link: int) -> int:
        """Of the host's memory, or of its pool of cores."""
        return self.base.link_capacity(link)

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One message; memory needs no chunks, but the link counts them."""
        copies, nothing = (self.base.point_to_point(src_rank, dst_rank, size, None) for size in (size_bytes, 0))
        link_ns = self.link.message_ns(src_rank, dst_rank, size_bytes, chunk_bytes)
        return self._with_link(copies, (copies.work_bytes - nothing.work_bytes) / 2, link_ns)

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """One phase after the link's time."""
        (copies,), (nothing,) = (self.base.collective(kind, ranks, size, dtype) for size in (size_bytes, 0))
        link_ns = self.link.collective_ns(kind, ranks, size_bytes, dtype)
        first_bytes = (copies.work_bytes - nothing.work_bytes) * _before(kind, len(ranks))
        return (self._with_link(copies, first_bytes, link_ns),)

    def compute_pool(self, rank: int) -> int | None:
        """The pool of cores that ranks of one host share."""
        return self.base.compute_pool(rank)

    def _with_link(self, copies: Phase, first_bytes: float, link_ns: int) -> Phase:
        """The copies, of which the first lies within the link's time."""
        rates = [self.link_capacity(link) // weight for link, weight in copies.usage.items()]
        rates += [] if copies.cap_bytes_per_s is None else [copies.cap_bytes_per_s]
        within_ns = round(first_bytes / min(rates) * 1e9) if rates else 0
        return replace(copies, latency_ns=copies.latency_ns + max(0, link_ns - within_ns))


def _before(kind: str, n: int) -> float:
    """Of all that a rank reads and writes for a collective (in whole arrays), the share before it meets the others."""
    before = 2 / n if kind == "all_gather" else 2.0
    if kind == "all_reduce":
        # Two add up everything; of more each adds up its part, leaves it, and copies the others' results.
        after = 3.0 if n == 2 else (n + 1) / n + 2 / n + 2 * (n - 1) / n
    else:
        after = {"reduce_scatter": 1 + 1 / n, "reduce": n + 1.0}.get(kind, 2.0)
    return before / (before + after)
