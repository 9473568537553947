"""One rank's program on a machine without streams: the interpreter of a schedule, over any transport.

The host goes through the program in order. It computes where it stands; a communication op it hands to the thread of
the op's stream (lanes.py) and goes on, until an op comes that needs the result. What the IR says of streams holds: an
op starts after the one before it on its stream and after those in its `after`. In one thing the host is stricter: it
hands on a communication op only when the data to send is there, because cutting it out is the host's work, and so is
putting in place what has arrived: only the host touches the machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rtp_sim.executor.clocks import now_ns
from rtp_sim.executor.lanes import Board, Job, Lane
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.transport import Traffic, Transport
from rtp_sim.schedule.ir import Collective, Compute, Op, Program, Recv, Schedule, Send
from rtp_sim.timeline import TimesNs

if TYPE_CHECKING:
    from rtp_sim.executor.exchange import Parcel, Transfer


@dataclass(frozen=True)
class StepTimes:
    """One step of one rank on its own clock: start and end of the step, of every op (`ops[0]`, `ops[1]`, by index),
    and what was sent."""

    start_ns: int
    end_ns: int
    ops: TimesNs
    sent: Traffic


Around = Callable[[Op], AbstractContextManager[object]]


class Actor(Protocol):
    """One rank that carries out the ops an interpreter walks through: a `Machine`, or one that only takes the time for
    it (sleepers.py)."""

    def run(self, op: Op) -> None:
        """Does a compute op."""

    def parcel(self, op: Op) -> Parcel:
        """The rank's part of a collective, when the op is issued."""

    def transfers(self, op: Op) -> list[Transfer]:
        """What a shift, send or receive moves, when the op is issued."""

    def finish(self, op: Op, parcel: Parcel | None = None) -> None:
        """Ends a communication op whose data are there."""


class Interpreter(Protocol):
    """Runs one rank's program, step by step. `around` is entered around every op, for a profiler's ranges."""

    around: Around

    def run_step(self) -> StepTimes:
        """One step from start to end."""


class HostInterpreter:
    """The interpreter for CPUs. `progress` is told about every op."""

    def __init__(self, schedule: Schedule, rank: int, machine: Actor, transport: Transport, progress: Progress) -> None:
        self._machine, self._transport, self._progress = machine, transport, progress
        self.around: Around = nullcontext
        self._program = schedule.program(rank)
        self._tags = transfer_tags(schedule)
        self._waits = ordered_after(self._program)
        self._data = touched_after(self._program)
        # What the host waits for before it computes an op; None for an op that communicates.
        self._ops = [
            (op, None if communicates(op) else waits | data)
            for op, waits, data in zip(self._program.ops, self._waits, self._data, strict=True)
        ]
        self._computed = np.array([op.index for op, needed in self._ops if needed is not None], dtype=np.int64)
        self._awaited = awaited_at_once(self._program, self._waits, self._data)
        streams = dict.fromkeys(op.stream for op in self._program.ops if communicates(op))
        self._lanes = {stream: Lane(i, stream, progress) for i, stream in enumerate(streams)}
        self._unfinished: dict[int, Movement] = {}

    def run_step(self) -> StepTimes:
        """One step. CommunicationError, naming the op, if a partner is gone or late."""
        ops = self._program.ops
        done = {op.index: threading.Event() for op in ops if communicates(op)}
        board = Board(np.zeros((2, len(ops)), dtype=np.int64), done)
        for lane in self._lanes.values():
            lane.traffic = Traffic()
        # Lists, and names looked up once: between two kernels of microseconds every one of them counts.
        begun, ended = [0] * len(ops), [0] * len(ops)
        at, run, around, unfinished = self._progress.at, self._machine.run, self.around, self._unfinished
        start_ns = now_ns()
        for op, needed in self._ops:
            index = op.index
            at(index)
            if needed is None:
                self._settle(board, self._data[index])
                self._communicate(op, board)
                self._settle(board, (index,) if op.blocks_host else ())
                continue
            if unfinished:
                self._settle(board, needed)
            begun[index] = now_ns()
            with around(op):
                run(op)
            ended[index] = now_ns()
        self._settle(board, self._unfinished.keys())
        mine = self._computed
        board.times[:, mine] = np.array([begun, ended], dtype=np.int64)[:, mine]
        sent = sum((lane.traffic for lane in self._lanes.values()), Traffic())
        return StepTimes(start_ns, now_ns(), board.times, sent)

    def _communicate(self, op: Op, board: Board) -> None:
        """Hands the op to its stream's thread; does it here where the host would wait for it at once anyway."""
        self._unfinished[op.index] = moves = movement(op, self._machine, self._transport, self._tags)
        job = Job(op, partial(self._move, op, moves), self._waits[op.index], board)
        if op.index in self._awaited:
            self._lanes[op.stream].do(job)
        else:
            self._lanes[op.stream].put(job)

    def _move(self, op: Op, moves: Movement) -> Traffic:
        """Moves the data, on the thread of the op's lane or the host's."""
        with self.around(op):
            return moves.start()

    def _settle(self, board: Board, needed: Collection[int]) -> None:
        """Waits for these communication ops; puts into place what they, and others done meanwhile, have brought."""
        if not self._unfinished:
            return
        board.wait(needed)
        for i in [i for i in self._unfinished if i in needed or board.done[i].is_set()]:
            self._unfinished.pop(i).finish()


@dataclass(frozen=True)
class Movement:
    """A communication op whose tensors have been taken from the machine: `start` moves them and comes back when they
    are there, `finish` puts them into place."""

    start: Callable[[], Traffic]
    finish: Callable[[], None]


def movement(op: Op, machine: Actor, transport: Transport, tags: Mapping[str, int]) -> Movement:
    """Takes the tensors of a communication op from the machine."""
    action = op.action
    if isinstance(action, Collective):
        parcel = machine.parcel(op)
        return Movement(lambda: transport.collective(op, parcel), lambda: machine.finish(op, parcel))
    transfers = machine.transfers(op)
    tag = tags[action.tag] if isinstance(action, Send | Recv) else 0
    return Movement(lambda: transport.exchange(op, transfers, tag), lambda: machine.finish(op))


# ---- what follows from the program alone


def communicates(op: Op) -> bool:
    """Whether the op moves data between ranks."""
    return not isinstance(op.action, Compute)


def transfer_tags(schedule: Schedule) -> dict[str, int]:
    """A number for each tag of sends and receives, the same on every rank."""
    actions = (op.action for program in schedule.programs for op in program.ops)
    tags = dict.fromkeys(a.tag for a in actions if isinstance(a, Send | Recv))
    return {tag: number for number, tag in enumerate(tags)}


def ordered_after(program: Program) -> list[frozenset[int]]:
    """For each op the communication ops that must be done before it starts: in its `after`, or before it on its
    stream. What others already wait for may be missing, as in `after`."""
    last: dict[str, int] = {}
    found = []
    for op in program.ops:
        before = {*op.after, *([last[op.stream]] if op.stream in last else [])}
        found.append(frozenset(i for i in before if communicates(program.ops[i])))
        last[op.stream] = op.index
    return found


def touched_after(program: Program) -> list[frozenset[int]]:
    """For each op the communication ops whose result it uses or overwrites, or that still read what it overwrites."""
    writer: dict[str, int] = {}
    readers: dict[str, set[int]] = {}
    found = []
    for op in program.ops:
        before = {writer[b] for b in (*op.reads, *op.writes) if b in writer}
        for b in op.writes:
            before |= readers.get(b, set())
        found.append(frozenset(i for i in before if communicates(program.ops[i])))
        for b in op.reads:
            readers.setdefault(b, set()).add(op.index)
        for b in op.writes:
            writer[b], readers[b] = op.index, set()
    return found


def awaited_at_once(
    program: Program, waits: Sequence[frozenset[int]], data: Sequence[frozenset[int]]
) -> frozenset[int]:  # fmt: skip
    """The communication ops that the host waits for before it does anything else."""
    found = set()
    for op, following in zip_longest(program.ops, program.ops[1:]):
        if not communicates(op):
            continue
        if following is None or op.blocks_host:
            found.add(op.index)
        else:
            blocked = data[following.index]
            if not communicates(following):
                blocked |= waits[following.index]
            if op.index in blocked:
                found.add(op.index)
    return frozenset(found)
