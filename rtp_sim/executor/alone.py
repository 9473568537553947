"""One rank of many on one device: its program runs alone, and a stand-in takes the place of every partner.

What a partner would have sent is made up from what the rank has itself, so that kernels see numbers of ordinary size:
a hop brings the rank's own shard back, a reduction leaves the rank's own contribution (or the mean of its parts), a
gather of weights has small random numbers where the other slices would be. Nothing that is computed means anything;
how long it takes, and what it holds, does.

"fake": communication ops take no time. What they bring is filled in between ops.
"copy": they take the time of a pass over the same bytes, on their own stream (on a CPU in their lane).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from rtp_sim.executor.clocks import now_ns
from rtp_sim.executor.distributed import (
    Around,
    HostInterpreter,
    Interpreter,
    StepTimes,
    communicates,
    movement,
    transfer_tags,
)
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.parcels import sources
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.transport import Traffic
from rtp_sim.schedule.ir import Op, Schedule
from rtp_sim.timeline import TimesNs

NOISE_NUMEL = 4099
"""Length of the made-up numbers, which repeat: a prime, so that no two rows of a matrix are alike."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NOISE_SCALE = 0.02
"""Their standard deviation, as that of initial weights."""


def alone(schedule: Schedule, rank: int, machine: Machine, progress: Progress, communication: str) -> Interpreter:
    """The interpreter of `rank` without its partners; `communication` is "fake" or "copy"."""
    partners = StandIn(machine, communication == "copy")
    if machine.device.type == "cuda":
        from rtp_sim.executor.alone_streams import AloneOnStreams

        return AloneOnStreams(schedule, rank, machine, partners, progress)
    if communication == "copy":
        return HostInterpreter(schedule, rank, machine, partners, progress)
    return AtOnce(schedule, rank, machine, progress, partners)


class StandIn:
    """A transport without partners: what it moves is the rank's own. Traffic is counted as if it were sent."""

    def __init__(self, machine: Machine, copies: bool) -> None:
        self._machine, self.copies = machine, copies
        noise = torch.randn(NOISE_NUMEL, generator=torch.Generator().manual_seed(0)) * NOISE_SCALE
        # In every dtype from the start: on a GPU, streams must not wait for one another to make it.
        self._noise = {dtype: noise.to(machine.device, dtype) for dtype in FLOATS}

    def exchange(self, op: Op, transfers: Sequence[Transfer], tag: int) -> Traffic:
        """Does the transfers of a shift, send or receive."""
        sent = Traffic()
        for transfer in transfers:
            if transfer.to != self._machine.rank:
                sent += Traffic(transfer.sent_bytes, transfer.messages)
            if transfer.bounce is None:
                self._fill(transfer.receive, transfer.send)
            elif self.copies:
                for both in transfer.rounds():
                    self._fill(both.receive, both.send)
                    if both.into is not None:
                        both.into.copy_(both.receive)
        return sent

    def collective(self, op: Op, parcel: Parcel) -> Traffic:
        """Does this rank's part of a collective."""
        send, receive, n = parcel.send, parcel.receive, len(parcel.members)
        place = parcel.members.index(self._machine.rank)
        if parcel.kind == "all_gather":
            parts = receive.view(n, -1)
            if any(self._machine.program.buffers[name].category == "weights" for name in sources(op)):
                self._make_up(receive)
                parts[place].copy_(send)
            else:
                parts.copy_(send)
        elif parcel.kind == "reduce_scatter":
            if self.copies:
                torch.mean(send.view(n, -1), 0, out=receive)
            else:
                receive.copy_(send.view(n, -1)[place])
        elif parcel.kind == "all_to_all":
            receive.copy_(send)
        elif self.copies:
            # In place: a pass that reads and writes as much as a copy would.
            receive.mul_(1)
        return Traffic(*parcel.traffic())

    def _fill(self, receive: torch.Tensor, send: torch.Tensor) -> None:
        """The rank's own data; where there are too few of them, made-up numbers."""
        common = min(receive.numel(), send.numel())
        receive[:common].copy_(send[:common])
        self._make_up(receive[common:])

    def _make_up(self, flat: torch.Tensor) -> None:
        if flat.dtype not in self._noise:
            flat.zero_()
            return
        noise = self._noise[flat.dtype]
        whole = flat.numel() // NOISE_NUMEL * NOISE_NUMEL
        flat[:whole].view(-1, NOISE_NUMEL).copy_(noise)
        flat[whole:].copy_(noise[: flat.numel() - whole])


class AtOnce:
    """The interpreter of "fake" communication on a CPU: the ops in program order, each communication done at once."""

    def __init__(self, schedule: Schedule, rank: int, machine: Machine, progress: Progress, partners: StandIn) -> None:
        self._machine, self._progress, self._partners = machine, progress, partners
        self._ops, self._tags = schedule.program(rank).ops, transfer_tags(schedule)
        self.around: Around = nullcontext

    def run_step(self) -> StepTimes:
        """One step; a communication op starts and ends at one moment, when what it brings has been filled in."""
        times: TimesNs = np.zeros((2, len(self._ops)), dtype=np.int64)
        sent, start_ns = Traffic(), now_ns()
        for op in self._ops:
            self._progress.at(op.index)
            with self.around(op):
                if communicates(op):
                    sent += self._move(op)
                    times[:, op.index] = now_ns()
                else:
                    times[0, op.index] = now_ns()
                    self._machine.run(op)
                    times[1, op.index] = now_ns()
        return StepTimes(start_ns, now_ns(), times, sent)

    def _move(self, op: Op) -> Traffic:
        """In a function of its own, so that nothing keeps the tensors when it is done."""
        moves = movement(op, self._machine, self._partners, self._tags)
        sent = moves.start()
        moves.finish()
        return sent
