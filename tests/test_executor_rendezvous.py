"""Measured transfers start when the partners are there: three ranks in a ring and a collective, times by hand."""

from __future__ import annotations

import numpy as np

from rtp_sim.executor.rendezvous import with_partners
from rtp_sim.schedule.ir import Buffer, Collective, Compute, Group, Hop, Op, Program, Schedule, Shift
from rtp_sim.timeline import RankTimes

BUFFERS = {name: Buffer(name, "weights", "fp32", 4, live_in=True, live_out=True) for name in ("a", "b")}
OPS = (
    Op(0, "work", "compute", Compute("zero", "fp32", (("numel", 4),)), (), ("a",)),
    Op(1, "hop", "ring", Shift("g", (Hop((1,), 16),)), ("a",), ("b",)),
    Op(2, "sum", "ring", Collective("all_reduce", "g", 16, "fp32"), ("b",), ("b",)),
)


def test_starts_move_to_the_partners() -> None:
    schedule = Schedule("s", 3, {"g": Group("g", (3,), ((0, 1, 2),))}, (Program("p", BUFFERS, OPS),), (0, 0, 0))
    raw = {0: ([0, 10, 100], [10, 60, 150]), 1: ([0, 30, 110], [30, 60, 150]), 2: ([0, 50, 120], [50, 60, 150])}
    measured = {r: RankTimes(np.array(s), np.array(e)) for r, (s, e) in raw.items()}
    moved = with_partners(schedule, measured)
    # Rank 0 exchanges with 1 (ready at 30) and 2 (at 50): it begins with the first. Rank 2 is ready only at 50.
    assert [int(moved[r].start_ns[1]) for r in range(3)] == [30, 30, 50]
    assert [int(moved[r].start_ns[2]) for r in range(3)] == [120, 120, 120]
    assert [int(moved[r].start_ns[0]) for r in range(3)] == [0, 0, 0]
    assert [moved[r].end_ns.tolist() for r in range(3)] == [e for _, e in raw.values()]


def test_no_transfer_starts_after_its_end() -> None:
    """Clocks of several machines may disagree by more than a transfer takes."""
    schedule = Schedule("s", 3, {"g": Group("g", (3,), ((0, 1, 2),))}, (Program("p", BUFFERS, OPS),), (0, 0, 0))
    raw = {0: ([0, 10, 20], [10, 20, 30]), 1: ([0, 10, 45], [10, 20, 50]), 2: ([0, 10, 20], [10, 20, 30])}
    moved = with_partners(schedule, {r: RankTimes(np.array(s), np.array(e)) for r, (s, e) in raw.items()})
    assert [int(moved[r].start_ns[2]) for r in range(3)] == [30, 45, 30]
