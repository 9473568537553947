"""One rank of many on a GPU: what would be sent is copied on the stream of its op. Not yet exercised on a GPU."""

from __future__ import annotations

from dataclasses import replace

from rtp_sim.executor.alone import StandIn
from rtp_sim.executor.distributed import StepTimes, communicates
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.streams import StreamInterpreter
from rtp_sim.schedule.ir import Schedule


class AloneOnStreams(StreamInterpreter):
    """The interpreter of both kinds of communication without partners: each op's copies are issued on its stream.

    With "fake" the filling of what arrives (see alone.py) still takes the device a moment; as a span it has no length.
    """

    def __init__(self, schedule: Schedule, rank: int, machine: Machine, partners: StandIn, progress: Progress) -> None:
        super().__init__(schedule, rank, machine, partners, progress)
        self._partners = partners

    def run_step(self) -> StepTimes:
        """One step, until the device has done all of it."""
        found = super().run_step()
        if self._partners.copies:
            return found
        ops = found.ops.copy()
        moved = [op.index for op in self._program.ops if communicates(op)]
        ops[0, moved] = ops[1, moved]
        return replace(found, ops=ops)
