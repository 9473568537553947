"""Ranks that sleep instead of computing and sending: the executor's interpreter, lanes and rendezvous, with every
duration as stated (`rtp_sim/stated.py`). Nothing is allocated or computed, and torch is not imported.

A sleep ends a little late, and a thread that is woken runs a little later still. So that such delays do not add up, an
op's time counts from when it could begin (the end of what it waited for, as stated) and not from when its thread got to
run; the host's stated time to issue an op has the interpreter's own work in it. More than `SLACK_NS` is not forgiven.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rtp_sim.executor.clocks import now_ns, sleep_until
from rtp_sim.executor.distributed import HostInterpreter, StepTimes, ordered_after
from rtp_sim.executor.environment import Environment, sharpen_timers
from rtp_sim.executor.mailboxes import Channel, key_of, plan_channels
from rtp_sim.executor.memory import Memory
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import Record, RunDirectory
from rtp_sim.executor.transport import Traffic
from rtp_sim.schedule.ir import Collective, Compute, Op, Recv, Schedule, Send, Shift
from rtp_sim.stated import StatedTimes

if TYPE_CHECKING:
    from rtp_sim.executor.exchange import Parcel, Transfer

SLACK_NS = 1_000_000
LEAD_NS = 2_000_000
"""A step begins so long after the last rank has come."""


class SleepingRank:
    """One rank, as the interpreter's actor and as its transport."""

    def __init__(self, schedule: Schedule, rank: int, times: StatedTimes, memory: Memory) -> None:
        self._schedule, self._rank, self._times = schedule, rank, times
        places, _ = plan_channels(schedule, 0)
        self._channels = {key: Channel(memory, p, rank) for key, p in places.items() if rank in p.members}
        self._before = ordered_after(schedule.program(rank))
        # When the host was done with its last op, and what it has waited for since; when communication ops were issued
        # and have ended.
        self._host_ns = self._awaited_ns = 0
        self._issued_ns: dict[int, int] = {}
        self._ended_ns: dict[int, int] = {}

    def start_step(self, moment_ns: int) -> None:
        """The step begins at this moment."""
        self._host_ns = self._awaited_ns = moment_ns

    # ---- the host

    def run(self, op: Op) -> None:
        """Sleeps for a kernel."""
        action = op.action
        assert isinstance(action, Compute)
        dims = action.dims_at(self._schedule.shard_index(self._rank, action.part))
        self._issue()
        self._host_ns += self._times.kernel_ns(action.kernel, action.dtype, dims, self._rank)
        sleep_until(self._host_ns)

    def parcel(self, op: Op) -> Parcel:
        """Nothing to send; notes when the op was issued."""
        self._issue()
        self._issued_ns[op.index] = self._host_ns
        return None  # type: ignore[return-value]

    def transfers(self, op: Op) -> list[Transfer]:
        """As `parcel`."""
        self.parcel(op)
        return []

    def finish(self, op: Op, parcel: Parcel | None = None) -> None:
        """The host has waited for the op (or found it done)."""
        self._awaited_ns = max(self._awaited_ns, self._ended_ns[op.index])
        if op.blocks_host:
            self._host_ns = max(self._host_ns, self._ended_ns[op.index])

    def _issue(self) -> None:
        """The host issues an op, and waits for what it needs: one beside the other."""
        self._host_ns = _unless_late(max(self._host_ns + self._times.issue_ns, self._awaited_ns))

    # ---- the streams

    def collective(self, op: Op, parcel: Parcel) -> Traffic:
        """Waits for all members, then sleeps."""
        action = op.action
        assert isinstance(action, Collective)
        channel = self._channel(op)
        if channel is None:
            self._ended_ns[op.index] = self._ready_ns(op)
            return Traffic()
        members, others = channel.place.members, tuple(channel.others())
        ranks = members[action.root :] + members[: action.root]
        ready = self._met(op, channel, others)
        took_ns = self._times.collective_ns(action.kind, ranks, action.size_bytes, action.dtype)
        self._sleep(op, max(ready.values()) + took_ns)
        channel.end(others)
        return Traffic()

    def exchange(self, op: Op, transfers: Sequence[Transfer], tag: int) -> Traffic:
        """Waits for the partners, then sleeps until the last message has passed."""
        flows, channel = self._flows(op), self._channel(op)
        if channel is None or not flows:
            self._ended_ns[op.index] = self._ready_ns(op)
            return Traffic()
        position = channel.place.members.index
        partners = {position(r) for source, target, *_ in flows for r in (source, target)} - {channel.position}
        ready = self._met(op, channel, tuple(partners))
        self._sleep(op, max(
            max(ready[position(source)], ready[position(target)])
            + self._times.message_ns(source, target, size_bytes, chunk_bytes)
            for source, target, size_bytes, chunk_bytes in flows
        ))  # fmt: skip
        channel.end(partners)
        return Traffic()

    def _flows(self, op: Op) -> list[tuple[int, int, int, int | None]]:
        """(source, target, size_bytes, chunk_bytes) of the messages to and from this rank."""
        action, schedule, rank = op.action, self._schedule, self._rank
        assert isinstance(action, Shift | Send | Recv)
        group = schedule.groups[action.group]
        if not isinstance(action, Shift):
            peer = group.neighbour(rank, action.offset)
            ends = (rank, peer) if isinstance(action, Send) else (peer, rank)
            return [] if peer is None else [(*ends, action.size_bytes, None)]
        found = []
        for hop in action.hops:
            to, source = group.peer(rank, hop.offset), group.peer(rank, hop.offset, -1)
            for a, b in ((rank, to), (source, rank)):
                if a != b:
                    found.append((a, b, hop.bytes_at(schedule.shard_index(a, hop.part)), action.chunk_bytes))
        return found

    def _channel(self, op: Op) -> Channel | None:
        """None where the rank meets nobody."""
        return self._channels.get(key_of(self._schedule, self._rank, op))

    def _met(self, op: Op, channel: Channel, partners: tuple[int, ...]) -> dict[int, int]:
        channel.begin(self._ready_ns(op))
        return dict(channel.meet(partners))

    def _ready_ns(self, op: Op) -> int:
        """When the op was issued and what it waits for on streams was done."""
        before = [self._ended_ns[i] for i in self._before[op.index]]
        return _unless_late(max(self._issued_ns[op.index], *before, 0))

    def _sleep(self, op: Op, end_ns: int) -> None:
        sleep_until(end_ns)
        self._ended_ns[op.index] = _unless_late(end_ns)


def _unless_late(moment_ns: int) -> int:
    """The moment at which something could begin, or so much later as its thread was late beyond the slack."""
    return max(moment_ns, now_ns() - SLACK_NS)


# ---- the worker


def work(
    run: RunDirectory, schedule: Schedule, request: RunRequest, environment: Environment, progress: Progress
) -> None:
    """One rank's run, from joining the others to its results. Raises what goes wrong."""
    sharpen_timers()
    progress.enter("joining the group")
    rank, times = environment.rank, run.read_stated()
    _, size_bytes = plan_channels(schedule, 0)
    memory = Memory(size_bytes, rank, schedule.world_size, request.timeout_s, lambda text: _from_rank_0(text, run))
    sleeper = SleepingRank(schedule, rank, times, memory)
    interpreter = HostInterpreter(schedule, rank, sleeper, sleeper, progress)
    for step in range(request.warmup + request.steps):
        progress.enter("between steps", step)
        moment_ns = _start_moment(memory)
        sleeper.start_step(moment_ns)
        sleep_until(moment_ns)
        progress.enter("step", step)
        took = interpreter.run_step()
        run.append_step(rank, _record(step, request, took), took.ops)
    progress.enter("writing results")
    run.write_rank(rank, "rank.json", _description(rank))
    memory.barrier()
    progress.enter("done")


def _from_rank_0(text: str, run: RunDirectory) -> str:
    """Through a file, whole or not there: nothing else connects the ranks yet."""
    if text:
        run.write_rank(0, "memory.json", {"told": text})
        return text
    while (record := run.read_rank(0, "memory.json")) is None:
        time.sleep(0.005)
    return str(record["told"])


def _start_moment(memory: Memory) -> int:
    """A moment at which all ranks begin, soon after the last one has come."""
    memory.barrier()
    if memory.rank == 0:
        memory.note(now_ns() + LEAD_NS)
    memory.barrier()
    return memory.noted(0)


def _description(rank: int) -> Record:
    return {"rank": rank, "host": platform.node(), "pid": os.getpid(), "clock_offset_ns": 0, "clock_error_ns": 0}


def _record(step: int, request: RunRequest, took: StepTimes) -> Record:
    return {
        "step": step, "warmup": step < request.warmup, "start_ns": took.start_ns, "end_ns": took.end_ns, "loss": None,
    }  # fmt: skip
