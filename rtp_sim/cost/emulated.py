"""`EmulatedCost`: a host's compute, and transfers over an emulated link: the link's stated time, then a copy.

A rank copies what it sends into shared memory while the link's time runs, and what it receives out of it afterwards
(`executor/shm.py`). A copy reads and writes each byte at the device's memory bandwidth and takes a core meanwhile.
"""

from __future__ import annotations

from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.costs import OpCost, Phase
from rtp_sim.link import Link
from rtp_sim.schedule.ir import Dims, Op

MEET_NS = 100_000
"""Until the stream's thread has woken after the link's time, and the host's after the copy: assumed, of the size of a
small transfer without a link on a 2-core server (86 to 131 us measured)."""


class EmulatedCost:
    """Implements engine.costs.CostModel: kernels and cores are those of `base`."""

    overlap_slowdown_permille = 1000

    def __init__(self, base: ClusterCost, link: Link) -> None:
        self.base, self.link = base, link
        # Calibration measures it with copies; other kernels reach less.
        self._touched_bytes_per_s = base.cluster.device.memory_bandwidth_bytes_per_s.value

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
        """One message. Copies need no chunks, but the link counts them."""
        stated_ns = self.link.message_ns(src_rank, dst_rank, size_bytes, chunk_bytes)
        return self._phase(stated_ns, 2 * size_bytes, 1, dst_rank)

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """One phase in which all ranks copy at once."""
        stated_ns = self.link.collective_ns(kind, ranks, size_bytes, dtype)
        return (self._phase(stated_ns, _touched(kind, len(ranks)) * size_bytes, len(ranks), ranks[0]),)

    def compute_pool(self, rank: int) -> tuple[int, int] | None:
        """The pool of cores that ranks of one host share."""
        return self.base.compute_pool(rank)

    def _phase(self, stated_ns: int, touched_bytes: float, copying: int, rank: int) -> Phase:
        """After the stated time so many ranks read or write `touched_bytes` each."""
        pool, rate = self.base.compute_pool(rank), max(1, int(self._touched_bytes_per_s))
        usage = {} if pool is None else {pool[0]: max(1, round(copying * pool[1] * 1e9 / rate))}
        return Phase(MEET_NS + stated_ns, round(touched_bytes), usage, rate)


def _touched(kind: str, n: int) -> float:
    """How often a rank reads or writes the whole array once the link's time is over."""
    if kind == "all_reduce":
        # Two add up everything; of more each adds up its part, leaves it, and copies the others' results.
        return 3 if n == 2 else (n + 1) / n + 2 / n + 2 * (n - 1) / n
    return {"reduce_scatter": 1 + 1 / n, "reduce": n + 1}.get(kind, 2)
