"""Which horizontal track of a chart each span of a rank lies on, so that spans on one track never overlap.

A stream is one track. The simulator keeps streams in order, so that is all it needs. A measured stream can
hold spans that overlap (asynchronous transfers, clocks read by two threads); these get further tracks of
the same stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtp_sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Track:
    """One row of a rank: its name and the indices of its ops in order of start."""

    name: str
    stream: str
    ops: tuple[int, ...]


def tracks_of(timeline: Timeline, rank: int) -> tuple[Track, ...]:
    """The tracks of one rank: streams in order of first use, further lanes of a stream right behind it."""
    program, times = timeline.schedule.program(rank), timeline.times(rank)
    lanes: dict[str, list[list[int]]] = {stream: [] for stream in program.streams}
    free_ns: dict[str, list[int]] = {stream: [] for stream in program.streams}
    for index in np.lexsort((times.end_ns, times.start_ns)).tolist():
        stream = program.ops[index].stream
        start_ns, end_ns = int(times.start_ns[index]), int(times.end_ns[index])
        lane = next((i for i, free in enumerate(free_ns[stream]) if free <= start_ns), len(lanes[stream]))
        if lane == len(lanes[stream]):
            lanes[stream].append([])
            free_ns[stream].append(0)
        lanes[stream][lane].append(index)
        free_ns[stream][lane] = end_ns
    return tuple(
        Track(stream if lane == 0 else f"{stream} ({lane + 1})", stream, tuple(ops))
        for stream, of_stream in lanes.items()
        for lane, ops in enumerate(of_stream)
    )
