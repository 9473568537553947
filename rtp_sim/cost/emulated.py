"""`EmulatedCost`: a host's compute, and transfers over an emulated link: the link's stated time, then copying.

Ranks copy what they send into shared memory while the link's time runs, and what they receive out of it afterwards
(`executor/shm.py`). A copy moves each byte twice, at the device's memory bandwidth, and takes its share of the cores.
"""

from __future__ import annotations

from math import ceil

from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.costs import OpCost, Phase
from rtp_sim.link import Link
from rtp_sim.schedule.ir import Dims, Op


def _touched(kind: str, n: int) -> float:
    """How often a rank reads or writes the whole array once the link's time is over."""
    if kind == "all_reduce":
        # Two add up everything; of more each its part, and copies the others' results.
        return 3 if n == 2 else (n + 1) / n + 2 / n + 2 * (n - 1) / n
    return {"reduce_scatter": 1 + 1 / n, "reduce": n + 1}.get(kind, 2)


class EmulatedCost:
    """Implements engine.costs.CostModel: kernels and cores are those of `base`."""

    def __init__(self, base: ClusterCost, link: Link) -> None:
        self.base, self.link = base, link
        device = base.cluster.device
        self._copied_bytes_per_s = device.memory_bandwidth_bytes_per_s.value * device.memory_efficiency.value / 2

    @property
    def overlap_slowdown_permille(self) -> int:
        """Sleeping disturbs nobody; copying takes cores."""
        return 1000

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """Time of one kernel."""
        return self.base.compute(kernel, dtype, dims)

    def host_issue_ns(self, op: Op) -> int:
        """Host time to issue one op."""
        return self.base.host_issue_ns(op)

    def link_capacity(self, link: int) -> int:
        """Of a pool of cores."""
        return self.base.link_capacity(link)

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One message, copied by the receiver; the sender's copy lies in the link's time."""
        return self._phase(self.link.message_ns(src_rank, dst_rank, size_bytes, chunk_bytes), size_bytes, 1, dst_rank)

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """One phase. All ranks copy at once, so the work is what one copies, with the cores of all."""
        stated_ns = self.link.collective_ns(kind, ranks, size_bytes, dtype)
        copied = ceil(size_bytes * _touched(kind, len(ranks)) / 2)
        return (self._phase(stated_ns, copied, len(ranks), ranks[0]),)

    def compute_pool(self, rank: int) -> tuple[int, int] | None:
        """The pool of cores that ranks of one host share."""
        return self.base.compute_pool(rank)

    def _phase(self, stated_ns: int, copied_bytes: int, copies: int, rank: int) -> Phase:
        """After the link's time, `copied_bytes` by each of so many ranks."""
        pool = self.base.compute_pool(rank)
        cap = max(1, int(self._copied_bytes_per_s))
        usage = {}
        if pool is not None:
            link, core_weight = pool
            usage = {link: max(1, round(copies * core_weight * 1e9 / cap))}
        return Phase(stated_ns, copied_bytes, usage, cap)
