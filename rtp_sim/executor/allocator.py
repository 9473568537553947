"""The CPU allocator's own account of a piece of work: every allocation and release that torch's profiler reports.

The buffers that the executor counts (storage.py) are what a schedule knows of; the allocator also sees what kernels
use for a moment. This is how the two are compared, and how the twins, which have no buffers, are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

MARK_BYTES = 12_347
"""Size of the tensors that mark moments among the events: nothing else is likely to have it."""


def mark() -> None:
    """A moment among the events."""
    torch.empty(MARK_BYTES, dtype=torch.uint8)


def events(work: Callable[[], None]) -> list[int]:
    """Bytes allocated (released: negative) while `work` runs, in order, of all threads. Releases of what was there
    before do not appear."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    kineto = found.profiler.kineto_results.events()
    memory = [(e.start_ns(), e.nbytes()) for e in kineto if e.name() == "[memory]"]
    return [size for _, size in sorted(memory, key=lambda pair: pair[0])]


def held_at_marks(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Bytes held at each mark, and the most that was held from one mark to the next (from the last on: to the end)."""
    held, most = 0, 0
    at: list[int] = []
    peaks: list[int] = []
    for size in sizes:
        if size == MARK_BYTES:
            if at:
                peaks.append(most)
            at.append(held)
            most = held
        elif size != -MARK_BYTES:
            held += size
            most = max(most, held)
    return at, [*peaks, most]
