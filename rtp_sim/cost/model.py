"""`ClusterCost`: the cost model that the engines ask, put together from a cluster's device, network and host cores."""

from __future__ import annotations

from collections.abc import Mapping

from rtp_sim.cost.communication import CommunicationCost
from rtp_sim.cost.compute import ComputeCost
from rtp_sim.cost.cores import cores_of
from rtp_sim.cost.host import NO_HOST_COSTS, HostCosts
from rtp_sim.engine.costs import OpCost, Phase
from rtp_sim.hardware.spec import Cluster
from rtp_sim.model.kernels import is_empty
from rtp_sim.schedule.ir import Collective, Compute, Dims, Op, Recv, Send

NOTHING: Mapping[str, int] = {}
BACKWARD = (".bwd", ".dgrad", ".wgrad", "accumulate")
"""How the names of kernels end that autograd launches by itself, without a framework's Python."""


def handled_bytes(op: Op) -> int:
    """Bytes that the executor's host copies for a collective (rtp_sim/executor/parcels.py): of several buffers those
    that it sends as one, and those that arrive as one. Shares of one rank are left out."""
    action = op.action
    assert isinstance(action, Collective)
    kept = [name for name in op.writes if name in op.reads]
    taken = len(op.reads) - len(kept) or len(op.reads)
    handled = action.size_bytes if taken > 1 and action.kind in ("all_reduce", "reduce_scatter") else 0
    arrives = len(op.writes) > 1 or (kept and action.kind == "all_gather")
    return handled + (action.size_bytes if arrives and action.kind != "reduce_scatter" else 0)


class ClusterCost:
    """Implements engine.costs.CostModel for `cluster`. `host_cores` replaces the number of cores that the ranks of one
    host share; it counts only where ranks are on CPUs. `host` gives what a framework spends to issue ops,
    `piped` the groups whose collectives run beside pipeline messages between nodes, with their sizes (`piped.py`)."""

    def __init__(
        self, cluster: Cluster, host_cores: int | None = None, host: HostCosts = NO_HOST_COSTS,
        piped: Mapping[str, int] = NOTHING,
    ) -> None:  # fmt: skip
        self.cluster = cluster
        self.piped = piped
        self.host = host
        self._compute = ComputeCost(cluster.device)
        self._cores = cores_of(cluster, host_cores)
        self._communication = CommunicationCost(cluster, self._cores)
        device = cluster.device
        self._issue_ns = round(device.host_issue_ns.value)
        to_communicate = device.communication_issue_ns or device.host_issue_ns
        self._communication_issue_ns = round(to_communicate.value)
        self._backward_issue_ns = round((device.host_issue_backward_ns or device.host_issue_ns).value)
        self._message_issue_ns = round((device.message_issue_ns or to_communicate).value)

    @property
    def overlap_slowdown_permille(self) -> int:
        """How much longer compute takes beside a communication kernel, times 1000."""
        return round(self.cluster.device.overlap_slowdown.value * 1000)

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """Time of one kernel; none for one with nothing to do."""
        if is_empty(dims):
            return OpCost(0, "assumed")
        return self._compute.cost(kernel, dtype, dims)

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense peak of one device for `dtype`."""
        return self._compute.peak_flops_per_s(dtype)

    def rate_note(self, dtype: str) -> str:
        """What to tell people where the device has no rate of its own for `dtype`; empty if it has."""
        used, name = self._compute.rate_dtype(dtype), self.cluster.device.name
        return "" if used == dtype else f"{name} states no rate for {dtype}: that of {used} is used"

    def host_issue_ns(self, op: Op) -> int:
        """Host time to issue one op: cutting out and putting in place what communication moves may take longer."""
        issue_ns = self.host.issue_ns(op, self._usual_issue_ns(op) + self._handling_ns(op))
        turn = self.cluster.communication.collective_turn_piped_ns
        if turn is not None and isinstance(op.action, Collective) and op.action.group in self.piped:
            return issue_ns + round(turn.value * self.piped[op.action.group])
        return issue_ns

    def _usual_issue_ns(self, op: Op) -> int:
        if isinstance(op.action, Compute):
            return self._backward_issue_ns if op.action.kernel.endswith(BACKWARD) else self._issue_ns
        return self._message_issue_ns if isinstance(op.action, Send | Recv) else self._communication_issue_ns

    def _handling_ns(self, op: Op) -> int:
        """On a CPU, whose host itself lays buffers end to end for a collective and cuts up what arrives: as long as
        copies of as many bytes."""
        line = self.cluster.device.kernels.get(("copy", "fp32"))
        if self._cores is None or line is None or not isinstance(op.action, Collective):
            return 0
        return round(2 * handled_bytes(op) * line.ns_per_byte)

    def link_capacity(self, link: int) -> int:
        """Bytes/s of a wire; of a pool of cores, 1e12 per core."""
        return self._communication.capacity(link)

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """One message."""
        return self._communication.point_to_point(src_rank, dst_rank, size_bytes, chunk_bytes)

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """The phases of a collective."""
        return self._communication.collective(kind, ranks, size_bytes, dtype)

    def compute_pool(self, rank: int) -> int | None:
        """The pool of cores that ranks of one host share; None on accelerators."""
        return None if self._cores is None else self._cores.pool(self.cluster.topology.node_of(rank))

    def basis(self, op: Op, dims: Dims | None) -> str:
        """Where the op's price comes from: "measured", "interpolated" or "assumed"."""
        if isinstance(op.action, Compute):
            return self.compute(op.action.kernel, op.action.dtype, dims or op.action.dims).basis
        if isinstance(op.action, Collective):
            return self._communication.collective_basis
        return self._communication.message_basis
