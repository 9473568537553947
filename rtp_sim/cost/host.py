"""What the host thread spends to issue an op, by what the op is: a framework's own cost, where the device profile's
single figure (`Device.host_issue_ns`) does not do."""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.schedule.ir import Compute, Op, Shift


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Host time per op in ns; None leaves it to the device profile. `hop_ns` is for a hop of rotation (a shift).
    `waits`: the host waits for a pipeline message before it issues what follows, so that it never runs ahead of one
    (composed steps only)."""

    kernel_ns: int | None = None
    hop_ns: int | None = None
    collective_ns: int | None = None
    waits: bool = False

    def issue_ns(self, op: Op, default_ns: int) -> int:
        """Time to issue `op`."""
        if isinstance(op.action, Compute):
            given = self.kernel_ns
        elif isinstance(op.action, Shift):
            given = self.hop_ns
        else:
            given = self.collective_ns
        return default_ns if given is None else given


NO_HOST_COSTS = HostCosts()
