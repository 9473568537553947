"""The walk: every stage applies its stretches in order, and messages join them, until all have come to their end.

A message goes when what it carries is ready, the message before it on the same wire is through, and both hosts have
issued their halves: where the receiver's host runs ahead of everything, its times are known beforehand, and where it
waits for messages, as soon as it comes to the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rtp_sim.compose.stretch import EARLIER, HOST, NEVER, RECEIVED, Stretch

Key = tuple[str, int, int]
"""What travels: "F" or "B", the piece whose output (or the gradient of it) it is, the micro-batch."""


class Turn(NamedTuple):
    """One stretch as a stage comes to it: what it receives and sends, whose end it continues and is known by; whether
    it leaves a mark."""

    stretch: Stretch
    receives: Key | None = None
    sends: Key | None = None
    send_ns: int = 0
    continues: object = None
    known_as: object = None
    marks: bool = False


Mark = tuple[dict[str, int], tuple[int, int, int]]
"""The clocks of a stage, and what it has spent: computing, exposed, held up by its host."""


@dataclass
class Progress:
    """Where a stage is: its clocks (host and streams), the ends that later turns refer to, what it has done, and where
    it was after its first forward pass of each micro-batch (`marks`).

    `host_ns` is by how much the host held the compute stream up, turn by turn, without what it issues behind a message
    that it waits for. `sent_ns` is when the last of its sends is through, `meets_ns` when it came to the collective
    that ended its last stretch."""

    clocks: dict[str, int] = field(default_factory=lambda: {HOST: 0})
    ends: dict[object, dict[str, int]] = field(default_factory=dict)
    sent_ns: int = 0
    meets_ns: int = 0
    compute_ns: int = 0
    exposed_ns: int = 0
    host_ns: int = 0
    marks: list[Mark] = field(default_factory=list)

    def mark(self) -> Mark:
        """Where it is now."""
        return self.clocks.copy(), (self.compute_ns, self.exposed_ns, self.host_ns)

    @property
    def end_ns(self) -> int:
        """The latest end of any stream."""
        return max((t for name, t in self.clocks.items() if name != HOST), default=0)


class _Pending(NamedTuple):
    """A message that is ready at its sender, on a stream of which it takes `send_ns`."""

    stage: Progress
    stream: str
    ready_ns: int
    send_ns: int


def walk(
    stages: Sequence[Progress], turns: Sequence[Sequence[Turn]], slowdown_permille: int = 1000, paced: bool = False
) -> None:
    """All stages through their turns; `paced`, kernels wait for the sends before them.

    ValueError where none can go on: the stages' orders do not fit together.
    """
    posted = _receive_hosts(stages, turns)
    arrived: dict[Key, int] = {}
    pending: dict[Key, _Pending] = {}
    at = [0] * len(stages)
    going = True
    while going:
        going = False
        for number, (stage, mine) in enumerate(zip(stages, turns, strict=True)):
            while at[number] < len(mine):
                turn = mine[at[number]]
                if turn.receives is not None:
                    posted.setdefault(turn.receives, stage.clocks[HOST] + turn.stretch.receive_issue_ns)
                _deliver(pending, posted, arrived)
                if turn.receives is not None and turn.receives not in arrived:
                    break
                if paced and any(message.stage is stage for message in pending.values()):
                    break
                if paced:
                    stage.clocks["compute"] = max(stage.clocks.get("compute", 0), stage.sent_ns)
                _take(stage, turn, arrived, pending, slowdown_permille)
                at[number] += 1
                going = True
    _deliver(pending, posted, arrived)
    if any(at[number] < len(mine) for number, mine in enumerate(turns)):
        raise ValueError(f"the stages stand still at their turns {at}")


def meet(members: Sequence[Progress], stream: str, duration_ns: int) -> None:
    """The collective that ended the last stretch of all members."""
    end_ns = max(stage.meets_ns for stage in members) + duration_ns
    for stage in members:
        stage.clocks[stream] = end_ns


def _receive_hosts(stages: Sequence[Progress], turns: Sequence[Sequence[Turn]]) -> dict[Key, int]:
    """When the receiver's host has issued each receive, up to the first that it waits for."""
    posted: dict[Key, int] = {}
    for stage, mine in zip(stages, turns, strict=True):
        clock_ns = stage.clocks[HOST]
        for turn in mine:
            if turn.receives is not None:
                posted[turn.receives] = clock_ns + turn.stretch.receive_issue_ns
            if set(turn.stretch.issued) != {HOST}:
                break
            clock_ns += turn.stretch.issued[HOST]
    return posted


def _deliver(pending: dict[Key, _Pending], posted: Mapping[Key, int], arrived: dict[Key, int]) -> None:
    """The messages whose receivers have asked for them, in the order of their sending."""
    for key in [key for key in pending if key in posted]:
        message = pending.pop(key)
        stage, clocks = message.stage, message.stage.clocks
        ready_ns = max(message.ready_ns, clocks.get(message.stream, 0), posted[key])
        arrived[key] = clocks[message.stream] = ready_ns + message.send_ns
        stage.sent_ns = max(stage.sent_ns, arrived[key])


def _take(
    stage: Progress, turn: Turn, arrived: Mapping[Key, int], pending: dict[Key, _Pending], slowdown_permille: int
) -> None:
    """One turn of a stage whose receive has arrived."""
    stretch, clocks = turn.stretch, stage.clocks
    state = clocks.copy()
    if turn.receives is not None:
        state[RECEIVED] = arrived[turn.receives]
    if turn.continues is not None:
        for stream, end_ns in stage.ends[turn.continues].items():
            state[EARLIER + stream] = end_ns
    after = stretch.after
    slowed = stretch.slowed_ns
    if slowdown_permille > 1000 and stage.sent_ns > clocks.get("compute", 0):
        slowed += _beside_messages(stage, turn, slowdown_permille)
    for stream, vector in stretch.ends.items():
        clocks[stream] = after(vector, state) + slowed
    if "compute" in stretch.ends:
        end_ns = clocks["compute"] - slowed
        if end_ns == state[HOST] + stretch.ends["compute"].get(HOST, NEVER):
            at_once = {name: time for name, time in state.items() if name != HOST}
            stage.host_ns += max(0, end_ns - max(0, after(stretch.ends["compute"], at_once)))
    if stretch.receive is not None and turn.receives is not None:
        clocks[stretch.receive.stream] = arrived[turn.receives]
    if stretch.send is not None and stretch.source is not None and turn.sends is not None:
        ready_ns = after(stretch.source, state) + slowed
        pending[turn.sends] = _Pending(stage, stretch.send.stream, ready_ns, turn.send_ns)
    if stretch.meets is not None:
        stage.meets_ns = after(stretch.meets, state) + slowed
    clocks[HOST] = after(stretch.issued, state) + (slowed if stretch.host_waits else 0)
    stage.compute_ns += stretch.compute_ns + slowed
    stage.exposed_ns += stretch.exposed_ns
    if turn.known_as is not None:
        stage.ends[turn.known_as] = {stream: clocks[stream] for stream in stretch.ends}
    if turn.marks:
        stage.marks.append(stage.mark())


def _beside_messages(stage: Progress, turn: Turn, slowdown_permille: int) -> int:
    """How much longer the kernels take beside the stage's own sends that are still under way when they begin."""
    under_way_ns = stage.sent_ns - stage.clocks.get("compute", 0)
    beside_ns = min(under_way_ns, turn.stretch.compute_ns)
    return beside_ns - beside_ns * 1000 // slowdown_permille
