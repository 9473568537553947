"""Memory over time: which buffers of a rank hold something when, and the peak, per category.

The rule is the one stated in `schedule.ir.Buffer`. A fresh write (by an op that does not also read the
buffer) begins a version; its memory is held from the start of that op to the end of the last op that uses it
before the next fresh write. Versions of one buffer share one storage: they are never counted twice, even
where an op of a later version starts early.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rtp_sim.schedule.ir import Program, Schedule
from rtp_sim.timeline import RankTimes

Amounts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Version:
    """One content of a buffer. `writer` is the op of the fresh write, None for what the buffer holds at the
    start of the step; `users` are the ops that read or update it, and the writer; `kept` lasts to the end of
    the step."""

    buffer: str
    writer: int | None
    users: tuple[int, ...]
    kept: bool


@dataclass(frozen=True)
class MemoryProfile:
    """`bytes_by_category[c][k]` bytes of category c are held from `time_ns[k]` to `time_ns[k + 1]`.

    `alive_at_peak` lists (buffer, bytes), largest first. The peak is the first moment at which the sum is
    largest.
    """

    time_ns: Amounts
    bytes_by_category: Mapping[str, Amounts]
    peak_bytes: int
    peak_time_ns: int
    by_category_at_peak: Mapping[str, int]
    alive_at_peak: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> Amounts:
        """Sum over the categories, at each of `time_ns`."""
        total = np.zeros(len(self.time_ns), dtype=np.int64)
        for held in self.bytes_by_category.values():
            total += held
        return total


def live_intervals(program: Program) -> list[Version]:
    """The versions of every buffer, in program order within a buffer; buffers in order of the program's
    mapping."""
    uses: dict[str, list[tuple[int, bool]]] = {name: [] for name in program.buffers}
    for op in program.ops:
        for name in dict.fromkeys(op.reads + op.writes):
            uses[name].append((op.index, name not in op.reads))
    versions: list[Version] = []
    for name, buffer in program.buffers.items():
        writer: int | None = None
        users: list[int] = []
        held = buffer.live_in
        for index, fresh in uses[name]:
            if fresh:
                if held or users:
                    versions.append(Version(name, writer, tuple(users), False))
                writer, users, held = index, [], True
            users.append(index)
        if held or users or buffer.live_out:
            versions.append(Version(name, writer, tuple(users), buffer.live_out))
    return versions


def memory_profile(schedule: Schedule, rank: int, times: RankTimes) -> MemoryProfile:
    """What `rank` holds over the step, if its ops have these times. Shards are sized by the rank's own
    position."""
    return memory_profiles(schedule, {rank: times})[rank]


def memory_profiles(schedule: Schedule, ranks: Mapping[int, RankTimes]) -> dict[int, MemoryProfile]:
    """The profile of each rank; what depends on the program alone is worked out once per program."""
    tables: dict[int, _Table] = {}
    profiles: dict[int, MemoryProfile] = {}
    for rank, times in ranks.items():
        number = schedule.program_of_rank[rank]
        if number not in tables:
            tables[number] = _Table(schedule.programs[number])
        profiles[rank] = _profile(schedule, rank, times, tables[number])
    return profiles


class _Table:
    """The versions of a program as arrays: buffer, first writer (-1: there from the start), last of the step, users."""

    def __init__(self, program: Program) -> None:
        versions = live_intervals(program)
        number = {name: n for n, name in enumerate(program.buffers)}
        self.program = program
        self.buffer = np.array([number[v.buffer] for v in versions], dtype=np.int64)
        self.single = np.bincount(self.buffer, minlength=len(number))[self.buffer] == 1
        self.writer = np.array([-1 if v.writer is None else v.writer for v in versions], dtype=np.int64)
        self.kept = np.array([v.kept for v in versions], dtype=bool)
        # A version without users counts its writer (-1 again stands for the start), so that no stretch is empty.
        users = [v.users or (-1,) for v in versions]
        self.users = np.array([u for some in users for u in some], dtype=np.int64)
        self.first_user = np.cumsum([0, *(len(some) for some in users)])[:-1] if users else np.zeros(0, np.int64)
        self.categories = list(dict.fromkeys(b.category for b in program.buffers.values()))
        self.category_of = np.array(
            [self.categories.index(b.category) for b in program.buffers.values()], dtype=np.int64
        )

    def held(self, times: RankTimes, step_end_ns: int) -> tuple[Amounts, Amounts, Amounts]:
        """(buffer number, begin, end) of every stretch that a buffer is held, empty ones left out.

        A kept version is held for the whole rest of the step, even a step of no length.
        """
        if not self.buffer.size:
            empty = np.zeros(0, dtype=np.int64)
            return empty, empty, empty
        # Index -1 is the appended start of the step.
        start, end = np.append(times.start_ns, 0), np.append(times.end_ns, 0)
        begins = start[self.writer]
        lasts = np.maximum.reduceat(end[self.users], self.first_user)
        stops = np.where(self.kept, np.maximum(step_end_ns, begins + 1), np.maximum(lasts, begins))
        # A version whose buffer has no other is a stretch by itself.
        alone = self.single & (stops > begins)
        singles = np.stack([self.buffer[alone], begins[alone], stops[alone]], axis=1)
        stretches: list[list[int]] = []
        several = ~self.single
        for buffer, begin, stop in zip(
            self.buffer[several].tolist(), begins[several].tolist(), stops[several].tolist(), strict=True
        ):
            if stretches and stretches[-1][0] == buffer and begin <= stretches[-1][2]:
                stretches[-1][1] = min(stretches[-1][1], begin)
                stretches[-1][2] = max(stretches[-1][2], stop)
            elif stop > begin:
                stretches.append([buffer, begin, stop])
        table = np.concatenate([singles, np.array(stretches, dtype=np.int64).reshape(-1, 3)])
        return table[:, 0], table[:, 1], table[:, 2]


def _profile(schedule: Schedule, rank: int, times: RankTimes, table: _Table) -> MemoryProfile:
    program, categories = table.program, table.categories
    step_end_ns = int(times.end_ns.max()) if times.end_ns.size else 0
    owner, begin_ns, end_ns = table.held(times, step_end_ns)
    names = list(program.buffers)
    sizes = np.array(
        [b.size_bytes(schedule.shard_index(rank, b.part)) for b in program.buffers.values()], dtype=np.int64
    )
    time_ns = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), begin_ns, end_ns]))
    change = np.zeros((len(categories), len(time_ns)), dtype=np.int64)
    if len(owner):
        held_bytes, held_category = sizes[owner], table.category_of[owner]
        np.add.at(change, (held_category, np.searchsorted(time_ns, begin_ns)), held_bytes)
        np.add.at(change, (held_category, np.searchsorted(time_ns, end_ns)), -held_bytes)
    held = change.cumsum(axis=1)
    total = held.sum(axis=0)
    at = int(total.argmax())
    peak_ns = int(time_ns[at])
    alive = owner[(begin_ns <= peak_ns) & (peak_ns < end_ns)]
    return MemoryProfile(
        time_ns,
        {c: held[k] for k, c in enumerate(categories)},
        int(total[at]),
        peak_ns,
        {c: int(held[k, at]) for k, c in enumerate(categories)},
        tuple(sorted(((names[b], int(sizes[b])) for b in alive), key=lambda pair: (-pair[1], pair[0]))),
    )
