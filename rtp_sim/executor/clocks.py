"""Clocks of the ranks on one scale: how far each rank's monotonic clock is ahead of rank 0's.

Ranks on one machine read the same clock. Otherwise a rank asks rank 0 for its time over and over; half way between
question and answer (Cristian, 1989) both clocks show the same moment, to within half the round trip, so the quickest
round trip is the one to believe. Drift within a run is not followed. Torch is imported only where ranks talk.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROUNDS = 25
EARLY_NS = 100_000
"""How long before its end a precise sleep stops to trust the system's timer."""


@dataclass(frozen=True, slots=True)
class Clock:
    """This rank's clock reads `offset_ns` more than rank 0's, to within `error_ns` (0: it is the same clock)."""

    offset_ns: int
    error_ns: int


def now_ns() -> int:
    """The clock that everything is measured with."""
    return time.monotonic_ns()


def sleep_until(deadline_ns: int) -> None:
    """Sleeps until then, no longer: sleeps end late, so the last stretch is slept in short ones."""
    while (left_ns := deadline_ns - now_ns()) > 0:
        time.sleep((left_ns - EARLY_NS) / 1e9 if left_ns > 2 * EARLY_NS else 1e-5)


def align(control: ProcessGroup) -> Clock:
    """Compares this rank's clock with rank 0's, one rank after another. All ranks of the group must call it."""
    import torch.distributed as dist

    rank, size = dist.get_rank(control), dist.get_world_size(control)
    machines: list[str | None] = [None] * size
    dist.all_gather_object(machines, machine_id(), group=control)
    found = Clock(0, 0)
    for other in range(1, size):
        if machines[other] == machines[0]:
            continue
        if rank == 0:
            _answer(control, other)
        elif rank == other:
            found = ask(control)
    return found


def ask(control: ProcessGroup) -> Clock:
    """The offset of this rank's clock from rank 0's, which must answer meanwhile."""
    import torch
    import torch.distributed as dist

    reading = torch.zeros(1, dtype=torch.int64)
    best: Clock | None = None
    for _ in range(ROUNDS):
        before_ns = now_ns()
        dist.send(reading, group=control, group_dst=0)
        dist.recv(reading, group=control, group_src=0)
        after_ns = now_ns()
        error_ns = (after_ns - before_ns + 1) // 2
        if best is None or error_ns < best.error_ns:
            best = Clock((before_ns + after_ns) // 2 - int(reading.item()), error_ns)
    assert best is not None
    return best


def _answer(control: ProcessGroup, other: int) -> None:
    """Rank 0's side of `ask`."""
    import torch
    import torch.distributed as dist

    reading = torch.zeros(1, dtype=torch.int64)
    for _ in range(ROUNDS):
        dist.recv(reading, group=control, group_src=other)
        reading.fill_(now_ns())
        dist.send(reading, group=control, group_dst=other)


def machine_id() -> str:
    """What is the same for two processes exactly if they read the same monotonic clock: one boot of one kernel, one
    time namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        # No such word here: treat every process as a machine of its own and measure.
        return f"unknown {now_ns()}"
    offsets = Path("/proc/self/timens_offsets")
    return boot.read_text(encoding="ascii") + (offsets.read_text(encoding="ascii") if offsets.exists() else "")


def start_together(control: ProcessGroup, clock: Clock, lead_ns: int = 2_000_000) -> None:
    """Waits until all ranks are here, then until a moment that rank 0 names: ranks leave a barrier one by one."""
    import torch
    import torch.distributed as dist

    dist.barrier(group=control)
    moment = torch.tensor([now_ns() + lead_ns], dtype=torch.int64)
    dist.broadcast(moment, group=control, group_src=0)
    sleep_until(int(moment.item()) + clock.offset_ns)
