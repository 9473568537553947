"""The host's side: compute beside messages, memory, what software and machine this is, and who else uses it."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from rtp_sim.executor.calibrate.kernels import Run, between_events, timed
from rtp_sim.executor.calibrate.samples import Facts

OVERLAP_NUMEL = 1 << 21
"""Elements of the all-reduce that a product runs beside: 8 MiB."""


def overlap_times(device: torch.device, ranks: int, rounds: int) -> tuple[list[int], list[int]]:
    """Times of a product alone, and beside what a training step has in flight: an all-reduce, or on a single CUDA
    device a copy on another stream. Both empty on a single CPU rank."""
    if ranks == 1 and device.type == "cpu":
        return [], []
    size = 384 if device.type == "cpu" else 2048
    a, b, c = (torch.ones(size, size, device=device) for _ in range(3))

    def product() -> object:
        return torch.mm(a, b, out=c)

    alone = [t for _ in range(rounds) for t in timed(device, product, [product])]
    start_beside = _in_flight(device, ranks)
    beside = []
    for _ in range(rounds):
        finish = start_beside()
        beside += _timed_once(device, product)
        finish()
    return alone, beside


def _timed_once(device: torch.device, launch: Run) -> list[int]:
    """As `timed` without the launch before, which would outlast what is in flight."""
    if device.type == "cuda":
        elapsed_ns = between_events(launch)
        torch.cuda.current_stream(device).synchronize()
        return [elapsed_ns()]
    start = time.perf_counter_ns()
    launch()
    return [time.perf_counter_ns() - start]


def _in_flight(device: torch.device, ranks: int) -> Callable[[], Callable[[], object]]:
    """What starts a transfer and returns what waits for its end."""
    if ranks > 1:
        buffer = torch.zeros(OVERLAP_NUMEL, device=device)

        def all_reduce() -> Callable[[], object]:
            pending = dist.all_reduce(buffer, async_op=True)
            return lambda: pending.wait()

        return all_reduce
    source, target = (torch.zeros(64 << 20, device=device) for _ in range(2))
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def copy() -> Callable[[], object]:
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
        return side.synchronize

    return copy


def memory_bytes(device: torch.device, ranks: int) -> int:
    """Memory of one rank's device: on a CPU its share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks


def reserved_bytes(device: torch.device) -> int:
    """What the runtime holds beside tensors: on CUDA memory that is neither free nor the allocator's, on a CPU what the
    process keeps in memory. To be read before anything large is allocated."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(1, int(total - free - torch.cuda.memory_reserved(device)))
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if platform.system() == "Darwin" else peak * 1024)


def compute_units(device: torch.device) -> int:
    """Multiprocessors; 1 for a CPU rank."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def facts(device: torch.device, pin: bool) -> Facts:
    """Machine, software and settings; no names of hosts or users."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "threads": torch.get_num_threads(),
        "pinned": pin,
        "backend": dist.get_backend() if dist.is_initialized() else None,
    }


def cpu_name() -> str:
    """The processor's model name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def busy_core_s() -> float | None:
    """Core-seconds that the whole host has been busy since it started; None where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    ticks = [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
