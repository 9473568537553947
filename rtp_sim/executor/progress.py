"""`Progress`: where a worker is, in a few words of shared memory that the launcher reads while it runs.

The file holds whole numbers of 8 bytes: phase, step, op of the program, time of the last change (monotonic clock of
the machine, ns), then for each stream that communicates the op in flight (-1 for none). A worker that stands still, or
is killed, leaves its last place behind, so that the message can name it.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PHASES = (
    "starting", "joining the group", "preparing", "loading", "step", "between steps", "saving", "checking",
    "writing results", "done",
)  # fmt: skip
"""What a worker does, in this order; only "step" has ops."""

LANES = 12
WORDS = 4 + LANES
_WORD = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker was last seen. `op` is -1 outside of a program; `in_flight` are ops that communicate."""

    phase: str
    step: int
    op: int
    changed_ns: int
    in_flight: tuple[int, ...]


class Progress:
    """The worker's side: each call is a store to memory, well below a microsecond."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(_WORD.pack(0) * 3 + _WORD.pack(time.monotonic_ns()) + _WORD.pack(-1) * LANES)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), WORDS * _WORD.size)
        self._words = memoryview(self._memory).cast("q")

    def enter(self, phase: str, step: int = 0) -> None:
        """The worker is in another phase."""
        words = self._words
        words[0], words[1], words[2], words[3] = PHASES.index(phase), step, -1, time.monotonic_ns()

    def at(self, op: int) -> None:
        """The host has come to this op of the program."""
        self._words[2] = op
        self._words[3] = time.monotonic_ns()

    def in_flight(self, lane: int, op: int) -> None:
        """The stream with this number communicates for `op` (-1: it is done)."""
        if lane < LANES:
            self._words[4 + lane] = op
        self._words[3] = time.monotonic_ns()


def read_place(path: Path) -> Place | None:
    """Where the worker of that file was last; None if it has not begun."""
    try:
        words: Sequence[int] = struct.unpack(f"<{WORDS}q", path.read_bytes())
    except (OSError, struct.error):
        return None
    phase = PHASES[words[0]] if 0 <= words[0] < len(PHASES) else PHASES[0]
    return Place(phase, words[1], words[2], words[3], tuple(op for op in words[4:] if op >= 0))
