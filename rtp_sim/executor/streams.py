"""One rank's program on a GPU: each stream of the IR is a CUDA stream, each op's `after` a wait for an event.

The host issues ops and goes on, except where the IR says that an op blocks it. Times are those of CUDA events on the
device. A communication op is issued on the stream of its name: NCCL works on a stream of its own that waits for it, and
is waited for, so that the span on the IR's stream covers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from rtp_sim.executor.clocks import now_ns
from rtp_sim.executor.distributed import Around, StepTimes, communicates, movement, transfer_tags
from rtp_sim.executor.machine import Machine
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.transport import Traffic, Transport
from rtp_sim.schedule.ir import Op, Schedule
from rtp_sim.timeline import TimesNs

# torch does not annotate the constructors of its CUDA classes.
_cuda: Any = torch.cuda


class StreamInterpreter:
    """The interpreter for GPUs. `progress` is told what the host issues."""

    def __init__(
        self, schedule: Schedule, rank: int, machine: Machine, transport: Transport, progress: Progress
    ) -> None:
        self._machine, self._transport, self._progress = machine, transport, progress
        self.around: Around = nullcontext
        self._program = schedule.program(rank)
        self._tags = transfer_tags(schedule)
        # What the machine made before the first step lies on the current stream.
        torch.cuda.synchronize()
        self._streams = {stream: _cuda.Stream() for stream in self._program.streams}

    def run_step(self) -> StepTimes:
        """One step, until the device has done all of it."""
        ops, sent = self._program.ops, Traffic()
        begin = [_cuda.Event(enable_timing=True) for _ in ops]
        end = [_cuda.Event(enable_timing=True) for _ in ops]
        origin = _cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start_ns = now_ns()
        origin.record()
        for op in ops:
            self._progress.at(op.index)
            stream = self._streams[op.stream]
            with torch.cuda.stream(stream):
                for before in op.after:
                    stream.wait_event(end[before])
                begin[op.index].record(stream)
                with self.around(op):
                    sent += self._do(op, stream)
                end[op.index].record(stream)
            if op.blocks_host:
                end[op.index].synchronize()
        torch.cuda.synchronize()
        end_ns = now_ns()
        times: TimesNs = np.zeros((2, len(ops)), dtype=np.int64)
        for row, events in enumerate((begin, end)):
            times[row] = [start_ns + round(origin.elapsed_time(event) * 1e6) for event in events]
        return StepTimes(start_ns, end_ns, times, sent)

    def _do(self, op: Op, stream: torch.cuda.Stream) -> Traffic:
        """Issues the op on the current stream. The allocator learns which streams use the buffers, so that it gives
        none of them away too early."""
        if not communicates(op):
            self._mark(op, stream)
            self._machine.run(op)
            return Traffic()
        moves = movement(op, self._machine, self._transport, self._tags)
        self._mark(op, stream)
        sent = moves.start()
        moves.finish()
        return sent

    def _mark(self, op: Op, stream: torch.cuda.Stream) -> None:
        for flat in self._tensors(op):
            flat.record_stream(stream)

    def _tensors(self, op: Op) -> Iterator[torch.Tensor]:
        storage = self._machine.storage
        return (storage[name] for name in dict.fromkeys((*op.reads, *op.writes)) if name in storage)
