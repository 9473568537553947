"""The checks every schedule passes before it is simulated or run: one call that raises, one that lists
everything.

In order: structure (is it well formed), matching (do the ranks fit together), deadlock (does every rank get
to the end), hazard (is every pair of ops on a buffer ordered), lifetime (is what is read there). Each later
check takes the earlier ones for granted, so nothing follows structure errors, and matching errors leave the
deadlock check out.
"""

from __future__ import annotations

from collections.abc import Iterator

from rtp_sim.errors import DeadlockError, ScheduleError
from rtp_sim.schedule.deadlock import deadlock_findings
from rtp_sim.schedule.finding import Finding
from rtp_sim.schedule.hazards import hazard_findings
from rtp_sim.schedule.ir import Schedule
from rtp_sim.schedule.lifetimes import lifetime_findings
from rtp_sim.schedule.matching import matching_findings
from rtp_sim.schedule.structure import structure_findings

__all__ = ["Finding", "check", "findings"]


def check(schedule: Schedule) -> None:
    """Raise the first error of `findings`: a ScheduleError, for a deadlock a DeadlockError. Warnings pass."""
    for finding in _in_order(schedule):
        if finding.level == "error":
            raise (DeadlockError if finding.rule == "deadlock" else ScheduleError)(finding.message)


def findings(schedule: Schedule) -> list[Finding]:
    """All errors and warnings about `schedule`, in the order of the checks."""
    return list(_in_order(schedule))


def _in_order(schedule: Schedule) -> Iterator[Finding]:
    sound = True
    for finding in structure_findings(schedule):
        sound = False
        yield finding
    if not sound:
        return
    matched = True
    for finding in matching_findings(schedule):
        matched = False
        yield finding
    if matched:
        yield from deadlock_findings(schedule)
    yield from hazard_findings(schedule)
    yield from lifetime_findings(schedule)
