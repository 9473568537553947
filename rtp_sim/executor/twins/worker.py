"""The worker of a twin: as that of the executor, with torch's own training step in place of a schedule."""

from __future__ import annotations

import math

import numpy as np
import torch

from rtp_sim.executor.allocator import events, held_at_marks, mark
from rtp_sim.executor.clocks import now_ns, start_together
from rtp_sim.executor.environment import keep_freed_memory, pin_to_core, require_device
from rtp_sim.executor.machine import replica_of
from rtp_sim.executor.pace import pace_ns
from rtp_sim.executor.twins.trainer import Trainer
from rtp_sim.executor.worker import Worker


class TwinWorker(Worker):
    """One rank's twin from joining the others to its results. It leaves times of steps, no times of ops."""

    def work(self) -> None:
        """All of it. Raises what goes wrong."""
        keep_freed_memory()
        if self.request.pin:
            pin_to_core(self.environment.local_rank)
        require_device(self.request, self.environment)
        self.progress.enter("joining the group")
        control, _ = self._join()
        clock = self._align(control)
        self.progress.enter("preparing")
        device = torch.device("cpu" if self.request.device == "cpu" else f"cuda:{self.environment.local_rank}")
        trainer = Trainer(self.schedule.name, self.request, device)
        record = self._description(clock)
        self.run.write_rank(self.rank, "rank.json", record)
        replica = replica_of(self.schedule, self.rank)
        for step in range(self.request.warmup + self.request.steps):
            self.progress.enter("between steps", step)
            batch = self._batch(replica, step)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before_ns = pace_ns()
            start_together(control, clock)
            self.progress.enter("step", step)
            start_ns = now_ns()
            loss = trainer.step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            self._leave(step, start_ns, now_ns(), float(loss), device, before_ns)
        self.progress.enter("checking")
        if device.type == "cpu":
            del trainer
            record |= {"peak_memory_bytes": self._peak_bytes(replica, device)}
        self.run.write_rank(self.rank, "rank.json", record)
        self._finish(control)

    def _leave(self, step: int, start_ns: int, end_ns: int, loss: float, device: torch.device, before_ns: int) -> None:
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        record = {
            "step": step, "warmup": step < self.request.warmup, "start_ns": start_ns, "end_ns": end_ns,
            "loss": loss if math.isfinite(loss) else None, "bytes_sent": None, "messages": None,
            "peak_memory_bytes": peak, "memory_by_category": None, "pace_ns": (before_ns + pace_ns()) // 2,
        }  # fmt: skip
        self.run.append_step(self.rank, record, np.zeros((2, 0), dtype=np.int64))

    def _peak_bytes(self, replica: int, device: torch.device) -> int:
        """The most that the allocator holds in a second step, when the optimizer has its states: of another life of the
        same training, under the profiler from its beginning, since that reports changes alone."""
        batches = [self._batch(replica, step) for step in range(2)]

        def life() -> None:
            trainer = Trainer(self.schedule.name, self.request, device)
            trainer.step(batches[0])
            mark()
            trainer.step(batches[1])
            mark()

        _, peaks = held_at_marks(events(life))
        return peaks[0]
