"""The walk: every stage applies its stretches in order, and messages join them, until all have come to their end.

A message goes when what it carries is ready, the message before it on the same wire is through, and both hosts have
issued their halves; the receiver's host runs ahead of everything, so that its times are known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rtp_sim.compose.stretch import EARLIER, HOST, RECEIVED, Stretch

Key = tuple[str, int, int]
"""What travels: "F" or "B", the piece whose output (or the gradient of it) it is, the micro-batch."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One stretch as a stage comes to it: what it receives and sends, whose end it continues and is known by."""

    stretch: Stretch
    receives: Key | None = None
    sends: Key | None = None
    send_ns: int = 0
    continues: object = None
    known_as: object = None


@dataclass
class Progress:
    """Where a stage is: its clocks (host and streams), the ends that later turns refer to, what it has done.

    `host_ns` is by how much the host held the compute stream up, turn by turn.
    `meets_ns` is when it came to the collective that ended its last stretch."""

    clocks: dict[str, int] = field(default_factory=lambda: {HOST: 0})
    ends: dict[object, dict[str, int]] = field(default_factory=dict)
    meets_ns: int = 0
    compute_ns: int = 0
    exposed_ns: int = 0
    host_ns: int = 0

    @property
    def end_ns(self) -> int:
        """The latest end of any stream."""
        return max((t for name, t in self.clocks.items() if name != HOST), default=0)


def walk(
    stages: Sequence[Progress], turns: Sequence[Sequence[Turn]], slowdown_permille: int = 1000, paced: bool = False,
    waits: bool = False,
) -> None:  # fmt: skip
    """All stages through their turns; `paced`, kernels wait for the sends before them; with `waits`, hosts wait for
    what they receive (when the other half of a message was issued is then taken as without waiting).

    ValueError where none can go on: the stages' orders do not fit together.
    """
    posted = _receive_hosts(stages, turns)
    arrived: dict[Key, int] = {}
    at = [0] * len(stages)
    going = True
    while going:
        going = False
        for number, (stage, mine) in enumerate(zip(stages, turns, strict=True)):
            while at[number] < len(mine):
                turn = mine[at[number]]
                if turn.receives is not None and turn.receives not in arrived:
                    break
                if paced:
                    stage.clocks["compute"] = max(stage.clocks.get("compute", 0), _sent_ns(stage))
                if waits and turn.receives is not None:
                    issued = arrived[turn.receives] - turn.stretch.receive_issue_ns
                    stage.clocks[HOST] = max(stage.clocks[HOST], issued)
                _take(stage, turn, posted, arrived, slowdown_permille)
                at[number] += 1
                going = True
    if any(at[number] < len(mine) for number, mine in enumerate(turns)):
        raise ValueError(f"the stages stand still at their turns {at}")


def meet(members: Sequence[Progress], stream: str, duration_ns: int) -> None:
    """The collective that ended the last stretch of all members."""
    end_ns = max(stage.meets_ns for stage in members) + duration_ns
    for stage in members:
        stage.clocks[stream] = end_ns


def _receive_hosts(stages: Sequence[Progress], turns: Sequence[Sequence[Turn]]) -> Mapping[Key, int]:
    """When the receiver's host has issued each receive."""
    posted: dict[Key, int] = {}
    for stage, mine in zip(stages, turns, strict=True):
        clock_ns = stage.clocks[HOST]
        for turn in mine:
            if turn.receives is not None:
                posted[turn.receives] = clock_ns + turn.stretch.receive_issue_ns
            clock_ns += turn.stretch.issue_ns
    return posted


def _take(
    stage: Progress, turn: Turn, posted: Mapping[Key, int], arrived: dict[Key, int], slowdown_permille: int
) -> None:
    """One turn of a stage whose receive has arrived."""
    stretch, clocks = turn.stretch, stage.clocks
    state = dict(clocks)
    if turn.receives is not None:
        state[RECEIVED] = arrived[turn.receives]
    if turn.continues is not None:
        for stream, end_ns in stage.ends[turn.continues].items():
            state[EARLIER + stream] = end_ns
    after = stretch.after
    slowed = stretch.slowed_ns + _beside_messages(stage, turn, slowdown_permille)
    for stream, vector in stretch.ends.items():
        clocks[stream] = after(vector, state) + slowed
    if "compute" in stretch.ends:
        at_once = {name: time for name, time in state.items() if name != HOST}
        stage.host_ns += max(0, clocks["compute"] - slowed - max(0, after(stretch.ends["compute"], at_once)))
    if stretch.receive is not None and turn.receives is not None:
        clocks[stretch.receive.stream] = arrived[turn.receives]
    if stretch.send is not None and stretch.source is not None and turn.sends is not None:
        ready_ns = max(after(stretch.source, state) + slowed, posted[turn.sends])
        arrived[turn.sends] = clocks[stretch.send.stream] = ready_ns + turn.send_ns
    if stretch.meets is not None:
        stage.meets_ns = after(stretch.meets, state) + slowed
    clocks[HOST] = state[HOST] + stretch.issue_ns
    stage.compute_ns += stretch.compute_ns + slowed
    stage.exposed_ns += stretch.exposed_ns
    if turn.known_as is not None:
        stage.ends[turn.known_as] = {stream: clocks[stream] for stream in stretch.ends}


def _sent_ns(stage: Progress) -> int:
    """When the last of the stage's sends is through."""
    return max((t for name, t in stage.clocks.items() if name.startswith("send")), default=0)


def _beside_messages(stage: Progress, turn: Turn, slowdown_permille: int) -> int:
    """How much longer the kernels take beside the stage's own sends that are still under way when they begin."""
    if slowdown_permille <= 1000:
        return 0
    begin = stage.clocks.get("compute", 0)
    under_way = _sent_ns(stage) - begin
    beside = min(max(0, under_way), turn.stretch.compute_ns)
    return beside - beside * 1000 // slowdown_permille
