"""Do the programs of different ranks fit together: same collectives and shifts in the same order on every
group, and a receive for every send?

The k-th collective or shift that a rank issues on a group meets the k-th of every other member. A send meets
the receive of its neighbour with the same tag, the k-th of that tag where it is used again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from rtp_sim.schedule.finding import Finding, at, at_op, excerpt
from rtp_sim.schedule.ir import Collective, Op, Program, Recv, Schedule, Send, Shift
from rtp_sim.schedule.text import op_line

Lane = tuple[str, str, tuple[int, ...]]
"""("send" or "recv", group, offset): one direction of point-to-point traffic."""

Tagged = tuple[str, int]
"""(tag, how many of that tag came before on the same lane)."""


@dataclass(frozen=True)
class Channels:
    """The communication of one program, sorted by what it has to match."""

    rounds: dict[str, list[int]] = field(default_factory=dict)
    """group -> its collectives and shifts, in the order issued."""
    lanes: dict[Lane, dict[Tagged, int]] = field(default_factory=dict)
    """lane -> tagged -> op."""

    @cached_property
    def place(self) -> dict[int, int | Tagged]:
        """op -> its place in its group's rounds, or on its lane."""
        places: dict[int, int | Tagged] = {i: k for ops in self.rounds.values() for k, i in enumerate(ops)}
        return places | {i: tagged for lane in self.lanes.values() for tagged, i in lane.items()}


def channels(program: Program) -> Channels:
    """What `program` sends, receives and joins in."""
    found = Channels()
    times: dict[tuple[Lane, str], int] = {}
    for i, op in enumerate(program.ops):
        if isinstance(op.action, Collective | Shift):
            found.rounds.setdefault(op.action.group, []).append(i)
        elif isinstance(op.action, Send | Recv):
            lane, tag = lane_of(op.action), op.action.tag
            k = times.get((lane, tag), 0)
            times[lane, tag] = k + 1
            found.lanes.setdefault(lane, {})[tag, k] = i
    return found


def lane_of(action: Send | Recv, *, other_end: bool = False) -> Lane:
    """The lane of a send or receive, or that of the op it must meet on the neighbour."""
    sends = isinstance(action, Send) != other_end
    offset = tuple(-o for o in action.offset) if other_end else action.offset
    return "send" if sends else "recv", action.group, offset


def matching_findings(schedule: Schedule) -> Iterator[Finding]:
    """Every place where two ranks would wait for different things. The schedule must be well formed."""
    traffic = [channels(program) for program in schedule.programs]
    yield from _round_findings(schedule, traffic)
    yield from _transfer_findings(schedule, traffic)


def _round_findings(schedule: Schedule, traffic: list[Channels]) -> Iterator[Finding]:
    seen: set[tuple[str, int, int]] = set()
    for name, group in schedule.groups.items():
        for members in group.instances:
            lead = schedule.program_of_rank[members[0]]
            for rank in members:
                other = schedule.program_of_rank[rank]
                if other == lead or (name, lead, other) in seen:
                    continue
                seen.add((name, lead, other))
                ours, theirs = traffic[lead].rounds.get(name, []), traffic[other].rounds.get(name, [])
                yield from _compare(schedule, name, (members[0], lead, ours), (rank, other, theirs))


Side = tuple[int, int, list[int]]
"""A rank, its program, and the ops of that program on the group in question."""


def _compare(schedule: Schedule, group: str, ours: Side, theirs: Side) -> Iterator[Finding]:
    """The first op at which two members of a group part ways."""
    (rank, p, mine), (other_rank, q, other) = ours, theirs
    for k in range(max(len(mine), len(other))):
        where = f"group {group!r}, collective or shift number {k}"
        if k >= len(mine) or k >= len(other):
            here, i, short = (p, mine[k], other_rank) if k < len(mine) else (q, other[k], rank)
            what = f"{where}: rank {short} issues only {k} on this group and never meets this op"
            yield at_op(schedule, "matching", here, i, what)
            return
        a, b = schedule.programs[p].ops[mine[k]], schedule.programs[q].ops[other[k]]
        if a.action != b.action:
            issued = f"rank {rank} issues '{op_line(a)}', but rank {other_rank} issues '{op_line(b)}'"
            finding = at_op(schedule, "matching", p, mine[k], f"{where}: {issued}")
            theirs_shown = f"  and in program {schedule.programs[q].name!r}:"
            message = f"{finding.message}\n{theirs_shown}\n{excerpt(schedule.programs[q], (other[k],))}"
            yield Finding("error", "matching", message, p, mine[k])
            return


def _transfer_findings(schedule: Schedule, traffic: list[Channels]) -> Iterator[Finding]:
    seen: set[tuple[int, int, Lane]] = set()
    for rank, p in enumerate(schedule.program_of_rank):
        for lane, posted in traffic[p].lanes.items():
            example = schedule.programs[p].ops[next(iter(posted.values()))].action
            assert isinstance(example, Send | Recv)
            peer = schedule.groups[example.group].neighbour(rank, example.offset)
            assert peer is not None, "the structure check comes first"
            q = schedule.program_of_rank[peer]
            if (p, q, lane) not in seen:
                seen.add((p, q, lane))
                answers = traffic[q].lanes.get(lane_of(example, other_end=True), {})
                yield from _answered(schedule, (rank, p, posted), (peer, q, answers))


def _answered(
    schedule: Schedule, ours: tuple[int, int, dict[Tagged, int]], theirs: tuple[int, int, dict[Tagged, int]]
) -> Iterator[Finding]:
    """Every send has its receive and the other way round, of the same size."""
    (rank, p, posted), (peer, q, answers) = ours, theirs
    for tagged, i in posted.items():
        action = schedule.programs[p].ops[i].action
        assert isinstance(action, Send | Recv)
        sends = isinstance(action, Send)
        if tagged not in answers:
            verb, back = ("sends to", "receives") if sends else ("receives from", "sends")
            what = (
                f"rank {rank} {verb} rank {peer} with tag {action.tag!r} (number {tagged[1]} of it), but "
                f"rank {peer} {back} nothing with it; tags it {back} with: {_tags(answers)}"
            )
            yield at_op(schedule, "matching", p, i, what)
            continue
        answer: Op = schedule.programs[q].ops[answers[tagged]]
        assert isinstance(answer.action, Send | Recv)
        if sends and answer.action.size_bytes != action.size_bytes:
            there = f"{at(schedule, q, answers[tagged])} of program {schedule.programs[q].name!r}"
            what = (
                f"rank {rank} sends {action.size_bytes} bytes with tag {action.tag!r}, but rank {peer} "
                f"expects {answer.action.size_bytes} in {there}"
            )
            yield at_op(schedule, "matching", p, i, what)


def _tags(answers: dict[Tagged, int]) -> str:
    tags = list(dict.fromkeys(tag for tag, _ in answers))
    return (", ".join(tags[:6]) + (", ..." if len(tags) > 6 else "")) if tags else "none"
