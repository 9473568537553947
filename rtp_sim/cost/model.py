"""`ClusterCost`: the cost model that the engines ask, put together from a cluster's device and network."""

from __future__ import annotations

from rtp_sim.cost.communication import CommunicationCost
from rtp_sim.cost.compute import ComputeCost
from rtp_sim.engine.costs import OpCost, Phase
from rtp_sim.hardware.spec import Cluster
from rtp_sim.schedule.ir import Compute, Dims, Op


class ClusterCost:
    """Implements engine.costs.CostModel for `cluster`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._compute = ComputeCost(cluster.device)
        self._communication = CommunicationCost(cluster)
        self._issue_ns = round(cluster.device.host_issue_ns.value)
        self._links = cluster.topology.links

    @property
    def overlap_slowdown_permille(self) -> int:
        """How much longer compute takes beside a communication kernel, times 1000."""
        return round(self.cluster.device.overlap_slowdown.value * 1000)

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """Time of one kernel."""
        return self._compute.cost(kernel, dtype, dims)

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense peak of one device for `dtype`."""
        return self._compute.peak_flops_per_s(dtype)

    def host_issue_ns(self, op: Op) -> int:
        """Host time to issue one op, whatever it is."""
        return self._issue_ns

    def link_capacity(self, link: int) -> int:
        """Bytes/s of a link."""
        return self._links[link].bandwidth_bytes_per_s

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One message."""
        return self._communication.point_to_point(src_rank, dst_rank, size_bytes, chunk_bytes)

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """The phases of a collective."""
        return self._communication.collective(kind, ranks, size_bytes, dtype)

    def compute_pool(self, rank: int) -> tuple[int, int] | None:
        """The pool of cores that ranks of one host share; none on accelerators."""
        return None

    def basis(self, op: Op, dims: Dims | None) -> str:
        """Where the op's price comes from: "measured", "interpolated" or "assumed"."""
        if isinstance(op.action, Compute):
            return self.compute(op.action.kernel, op.action.dtype, dims or op.action.dims).basis
        return self._communication.basis
