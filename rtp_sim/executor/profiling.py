"""One step under PyTorch's profiler, with a range around every op that the reader of the trace finds again.

The profiler keeps a clock of its own: ranges that begin at known times of ours, before and after the step, tell how the
two are related (traces/names.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rtp_sim.executor import clocks
from rtp_sim.schedule.ir import Op
from rtp_sim.traces.names import clock_name, op_name, step_name

ANCHORS = 20


def op_range(op: Op) -> AbstractContextManager[Any]:
    """The range of an op, on whichever thread issues or does it."""
    return record_function(op_name(op.index, op.name))


class StepProfile:
    """The profiler of one step: `begin` before the ranks gather, then `step` around it, then `finish`."""

    def __init__(self, device: str) -> None:
        # Ops that communicate run on threads of their own.
        all_threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self._profile = profile(activities=activities, experimental_config=all_threads)

    def begin(self) -> None:
        """Starts the profiler, which takes a second or two the first time."""
        self._profile.start()
        _anchors()

    def step(self, number: int) -> AbstractContextManager[Any]:
        """The range of the step."""
        return record_function(step_name(number))

    def finish(self, path: Path) -> None:
        """Stops the profiler and writes the trace, whole or not at all."""
        _anchors()
        self._profile.stop()
        part = path.with_name(f"part-{path.name}")
        self._profile.export_chrome_trace(str(part))
        part.replace(path)


def _anchors() -> None:
    for _ in range(ANCHORS):
        with record_function(clock_name(clocks.now_ns())):
            pass
