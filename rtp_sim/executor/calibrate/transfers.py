"""Times of ring shifts and collectives among the ranks of this host, on gloo or NCCL.

How often each size is sent follows from the size alone: ranks that stopped on their own clocks would get out of step
and hang. Between two transfers every rank computes for a moment, because in a training step the library's threads have
gone to sleep and the caches hold something else. Ranks of one host share a clock, so a transfer is timed from when the
last rank was ready to when the last rank was done, which is how the simulator counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from rtp_sim.executor.calibrate.kernels import between_events
from rtp_sim.executor.calibrate.samples import SHIFT, STEPS, TransferSample

Run = Callable[[], object]
KINDS = (SHIFT, *STEPS)
SIZES = (64, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
QUICK_SIZES = (64, 1 << 14, 1 << 17, 1 << 20, 1 << 22)
COLD_BYTES = 64 << 20
MOST_BUFFERS = 8
ELEMENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class RankTimes:
    """One rank's side of the repetitions of one transfer: when it was ready, when done, and the CPU time it took."""

    kind: str
    size_bytes: int
    ready_ns: tuple[int, ...]
    done_ns: tuple[int, ...]
    cpu_ns: int


def repetitions(size_bytes: int, quick: bool) -> int:
    """How often a transfer is timed in one pass: the same number on every rank."""
    most = 10 if quick else 12
    return max(most // 3, min(most, (64 << 20) // max(1, size_bytes)))


def measure(device: torch.device, quick: bool, say: Callable[[str], None]) -> list[RankTimes]:
    """This rank's times of all kinds and sizes; the process group is there already."""
    results = []
    work = _between(device)
    for kind in KINDS:
        for size in QUICK_SIZES if quick else SIZES:
            results.append(_measured(kind, size, device, repetitions(size, quick), work))
            took = sorted(b - a for a, b in zip(results[-1].ready_ns, results[-1].done_ns, strict=True))
            say(f"{kind} {results[-1].size_bytes} B: {took[len(took) // 2] / 1e3:,.0f} us on this rank")
    return results


def joined(passes: Sequence[Sequence[RankTimes]]) -> list[RankTimes]:
    """The same transfers gone through several times, as one."""
    return [
        replace(
            same[0],
            ready_ns=tuple(t for times in same for t in times.ready_ns),
            done_ns=tuple(t for times in same for t in times.done_ns),
            cpu_ns=sum(times.cpu_ns for times in same),
        )
        for same in zip(*passes, strict=True)
    ]


def combined(ranks: Sequence[Sequence[RankTimes]], shared_clock: bool) -> list[TransferSample]:
    """One sample per transfer from what every rank saw. Without a shared clock (times on devices) the rank that came
    last saw the transfer alone: the shortest time counts."""
    samples = []
    for sides in zip(*ranks, strict=True):
        if shared_clock:
            ready = [max(times) for times in zip(*(side.ready_ns for side in sides), strict=True)]
            done = [max(times) for times in zip(*(side.done_ns for side in sides), strict=True)]
            times = [max(1, b - a) for a, b in zip(ready, done, strict=True)]
        else:
            took = [[b - a for a, b in zip(side.ready_ns, side.done_ns, strict=True)] for side in sides]
            times = [max(1, min(each)) for each in zip(*took, strict=True)]
        cpu_ns = round(sum(side.cpu_ns for side in sides) / len(times))
        samples.append(TransferSample(sides[0].kind, len(sides), sides[0].size_bytes, tuple(times), cpu_ns))
    return samples


def _measured(kind: str, size_bytes: int, device: torch.device, count: int, work: Run) -> RankTimes:
    n = dist.get_world_size()
    # A multiple of what every rank can hold an equal share of.
    numel = -(-size_bytes // (ELEMENT_BYTES * n)) * n
    size_bytes = numel * ELEMENT_BYTES
    buffers = max(2, min(MOST_BUFFERS, COLD_BYTES // size_bytes))
    runs = [transfer(kind, numel, device) for _ in range(buffers)]
    for run in runs:
        run()
    ready, done, cpu_ns = [], [], 0
    for i in range(count):
        work()
        if device.type == "cuda":
            a, b = _on_device(runs[i % buffers], device)
        else:
            cpu = time.process_time_ns()
            a = time.perf_counter_ns()
            runs[i % buffers]()
            b = time.perf_counter_ns()
            cpu_ns += time.process_time_ns() - cpu
        ready.append(a)
        done.append(b)
    return RankTimes(kind, size_bytes, tuple(ready), tuple(done), cpu_ns)


def _on_device(run: Run, device: torch.device) -> tuple[int, int]:
    elapsed_ns = between_events(run)
    torch.cuda.synchronize(device)
    return 0, elapsed_ns()


def transfer(kind: str, numel: int, device: torch.device) -> Run:
    """What runs one transfer of `numel` fp32 elements (a multiple of the ranks), with buffers of its own."""
    n, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.zeros(numel, device=device)
    if kind == SHIFT:
        received = torch.zeros(numel, device=device)
        ahead, behind = (rank + 1) % n, (rank - 1) % n

        def shift() -> None:
            ops = [dist.P2POp(dist.isend, whole, ahead), dist.P2POp(dist.irecv, received, behind)]
            for pending in dist.batch_isend_irecv(ops):
                pending.wait()

        return shift
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole)
    share = torch.zeros(numel // n, device=device)
    # Both were renamed in newer releases of torch.
    if kind == "all_gather":
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(whole, share)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return lambda: scatter(share, whole)


def _between(device: torch.device) -> Run:
    """A moment of computing: a product of about 0.4 ms on a core."""
    size = 256 if device.type == "cpu" else 1024
    a, b, c = (torch.ones(size, size, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)
