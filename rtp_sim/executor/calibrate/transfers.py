"""Times of ring shifts and collectives among the ranks of this host, by any of the executor's transports.

How often each size is sent follows from the size alone: ranks that stopped on their own clocks would get out of step
and hang. Between two transfers every rank computes for a moment, because in a training step the library's threads have
gone to sleep and the caches hold something else. Ranks of one host share a clock, so a transfer is timed from when the
last rank was ready to when the last rank was done, which is how the simulator counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rtp_sim.executor.calibrate.kernels import between_events
from rtp_sim.executor.calibrate.samples import SHIFT, STEPS, TransferSample, median
from rtp_sim.executor.clocks import now_ns
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.executor.lanes import Board, Job, Lane
from rtp_sim.executor.pace import pace_ns, steady, usual_ns
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.transport import Traffic, Transport
from rtp_sim.schedule.ir import Buffer, Collective, Group, Hop, Op, Program, Schedule, Shift

Run = Callable[[], object]
KINDS = (SHIFT, *STEPS)
SIZES = (64, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
QUICK_SIZES = (64, 1 << 14, 1 << 17, 1 << 20, 1 << 22)
COLD_BYTES = 64 << 20
MOST_BUFFERS = 8
ELEMENT_BYTES = 4
LEAST_BESIDE_BYTES, BESIDE_BYTES, MOST_BESIDE, TURNS_BESIDE = 1 << 18, 1 << 24, 6, 2
"""Transfers that products run beside: from which size, how many bytes in all, how many at most, how often in a pass."""
PRODUCTS = 80
"""Products of about a millisecond each: longer than the transfers beside them."""


@dataclass(frozen=True, slots=True)
class RankTimes:
    """One rank's side of the repetitions of one transfer: when it was ready and when done; on CPUs also the core's pace
    before each (pace.py) and, of large ones, how much longer computing took beside a transfer (`lost_ns`)."""

    kind: str
    size_bytes: int
    ready_ns: tuple[int, ...]
    done_ns: tuple[int, ...]
    pace_ns: tuple[int, ...] = ()
    lost_ns: tuple[int, ...] = ()


def repetitions(size_bytes: int, quick: bool) -> int:
    """How often a transfer is timed in one pass: the same number on every rank."""
    most = 10 if quick else 12
    return max(most // 3, min(most, (64 << 20) // max(1, size_bytes)))


Measure = Callable[[str, int, int], RankTimes]
"""(kind, elements, repetitions) -> this rank's side of them."""


def measure(times_of: Measure, ranks: int, quick: bool, say: Callable[[str], None]) -> list[RankTimes]:
    """This rank's times of all kinds and sizes."""
    results = []
    for kind in KINDS:
        for numel in sizes_of(ranks, quick):
            size_bytes = numel * ELEMENT_BYTES
            mine = times_of(kind, numel, repetitions(size_bytes, quick))
            results.append(mine)
            took = sorted(b - a for a, b in zip(mine.ready_ns, mine.done_ns, strict=True))
            say(f"{kind} {size_bytes} B: {took[len(took) // 2] / 1e3:,.0f} us on this rank")
    return results


def sizes_of(ranks: int, quick: bool) -> list[int]:
    """Elements of each transfer: a multiple of what every rank can hold an equal share of."""
    return [-(-size // (ELEMENT_BYTES * ranks)) * ranks for size in (QUICK_SIZES if quick else SIZES)]


def joined(passes: Sequence[Sequence[RankTimes]]) -> list[RankTimes]:
    """The same transfers gone through several times, as one."""
    return [
        replace(
            same[0],
            ready_ns=tuple(t for times in same for t in times.ready_ns),
            done_ns=tuple(t for times in same for t in times.done_ns),
            pace_ns=tuple(t for times in same for t in times.pace_ns),
            lost_ns=tuple(t for times in same for t in times.lost_ns),
        )
        for same in zip(*passes, strict=True)
    ]


def combined(ranks: Sequence[Sequence[RankTimes]], shared_clock: bool, cores: int = 1) -> list[TransferSample]:
    """One sample per transfer from what every rank saw. Without a shared clock (times on devices) the rank that came
    last saw the transfer alone: the shortest time counts. Repetitions during which a rank's core was slower than usual
    are left out, if others are there. What computing lost beside a transfer, `cores` of the host lost."""
    usual = usual_ns([pace for sides in ranks for side in sides for pace in side.pace_ns])
    samples = []
    for sides in zip(*ranks, strict=True):
        if shared_clock:
            ready = [max(times) for times in zip(*(side.ready_ns for side in sides), strict=True)]
            done = [max(times) for times in zip(*(side.done_ns for side in sides), strict=True)]
            times = [max(1, b - a) for a, b in zip(ready, done, strict=True)]
        else:
            took = [[b - a for a, b in zip(side.ready_ns, side.done_ns, strict=True)] for side in sides]
            times = [max(1, min(each)) for each in zip(*took, strict=True)]
        paces = list(zip(*(side.pace_ns for side in sides), strict=True)) or [()] * len(times)
        quiet = [t for t, pace in zip(times, paces, strict=True) if all(steady(p, usual) for p in pace)]
        lost = [median(side.lost_ns) for side in sides if side.lost_ns]
        # Every rank computes longer by the same, however the transfers' core time is spread over the cores.
        core_ns = round(max(0.0, sum(lost) / len(lost)) * min(cores, len(sides))) if lost else 0
        samples.append(TransferSample(sides[0].kind, len(sides), sides[0].size_bytes, tuple(quiet or times), core_ns))
    return samples


# ---- on CPUs, as the executor does it


def transfer_schedule(ranks: int, quick: bool) -> Schedule:
    """One op of each kind and size, so that the executor's transports have room for them."""
    buffers: dict[str, Buffer] = {}
    ops: list[Op] = []
    for kind in KINDS:
        for numel in sizes_of(ranks, quick):
            share = numel if kind in (SHIFT, "all_reduce") else numel // ranks
            out, into = (numel, share) if kind == "reduce_scatter" else (share, numel)
            names = (f"out{len(ops)}", f"in{len(ops)}")
            for name, size in zip(names, (out, into), strict=True):
                buffers[name] = Buffer(name, "communication", "fp32", size)
            size_bytes = numel * ELEMENT_BYTES
            action: Shift | Collective = Shift("all", (Hop((1,), size_bytes),))
            if kind != SHIFT:
                action = Collective(kind, "all", size_bytes, "fp32")
            ops.append(Op(len(ops), name_of(kind, numel), "link", action, reads=names[:1], writes=names[1:]))
    members = tuple(range(ranks))
    program = Program("all", buffers, tuple(ops))
    return Schedule("transfers", ranks, {"all": Group("all", (ranks,), (members,))}, (program,), (0,) * ranks)


def name_of(kind: str, numel: int) -> str:
    """The op of a transfer."""
    return f"{kind} {numel}"


class LaneTimes:
    """Transfers by a transport, handed to a stream's thread by a host that then waits: as in a step, with all that the
    threads cost. `wait` lets all ranks start at once."""

    def __init__(
        self, transport: Transport, schedule: Schedule, rank: int, folder: Path, wait: Callable[[], None]
    ) -> None:
        self._transport, self._rank, self._n = transport, rank, schedule.world_size
        self._ops = {op.name: op for op in schedule.program(rank).ops}
        self._lane = Lane(0, "link", Progress(folder / f"progress{rank}"))
        self._work, self._wait = _between(torch.device("cpu")), wait
        self._product = _product(384)

    def __call__(self, kind: str, numel: int, count: int) -> RankTimes:
        """See `Measure`."""
        op, buffers = self._ops[name_of(kind, numel)], max(2, min(MOST_BUFFERS, COLD_BYTES // (numel * ELEMENT_BYTES)))
        moves = [self._move(op, kind, numel) for _ in range(buffers)]
        for move in moves:
            move()
        ready, done, pace = [], [], []
        for i in range(count):
            pace.append(pace_ns())
            self._work()
            ready.append(now_ns())
            self._start(op, moves[i % buffers]).wait((op.index,))
            done.append(now_ns())
        size_bytes = numel * ELEMENT_BYTES
        lost = self._lost(op, moves, BESIDE_BYTES // size_bytes) if size_bytes >= LEAST_BESIDE_BYTES else []
        return RankTimes(kind, size_bytes, tuple(ready), tuple(done), tuple(pace), tuple(lost))

    def _start(self, op: Op, move: Callable[[], Traffic]) -> Board:
        board = Board(np.zeros((2, op.index + 1), dtype=np.int64), {op.index: threading.Event()})
        self._lane.put(Job(op, move, (), board))
        return board

    def _lost(self, op: Op, moves: Sequence[Callable[[], Traffic]], count: int) -> list[int]:
        """How much longer products take, per transfer, if `count` of them go on meanwhile. All must have ended before
        the products have: a turn in which they had not tells nothing."""
        count, found = max(2, min(MOST_BESIDE, count)), []
        for _ in range(TURNS_BESIDE):
            self._wait()
            alone_ns = self._products()
            self._wait()
            start_ns = now_ns()
            boards = [self._start(op, moves[i % len(moves)]) for i in range(count)]
            self._products()
            beside_ns, ended = now_ns() - start_ns, boards[-1].done[op.index].is_set()
            for board in boards:
                board.wait((op.index,))
            if ended:
                found.append((beside_ns - alone_ns) // count)
        return found

    def _products(self) -> int:
        start_ns = now_ns()
        for _ in range(PRODUCTS):
            self._product()
        return now_ns() - start_ns

    def _move(self, op: Op, kind: str, numel: int) -> Callable[[], Traffic]:
        n, rank, transport = self._n, self._rank, self._transport
        whole = torch.zeros(numel)
        if kind == SHIFT:
            transfer = Transfer((rank + 1) % n, (rank - 1) % n, whole, torch.zeros(numel))
            return lambda: transport.exchange(op, (transfer,), 0)
        share = torch.zeros(numel // n)
        ends = {"all_reduce": (whole, whole), "all_gather": (share, whole), "reduce_scatter": (whole, share)}
        send, receive = ends[kind]
        parcel = Parcel(kind, tuple(range(n)), send, receive, numel)
        return lambda: transport.collective(op, parcel)


# ---- on devices


class DeviceTimes:
    """Transfers by the default process group of devices, between their own events."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._work = device, _between(device)

    def __call__(self, kind: str, numel: int, count: int) -> RankTimes:
        """See `Measure`; every time counts from 0."""
        buffers = max(2, min(MOST_BUFFERS, COLD_BYTES // (numel * ELEMENT_BYTES)))
        runs = [transfer(kind, numel, self._device) for _ in range(buffers)]
        for run in runs:
            run()
        done = []
        for i in range(count):
            self._work()
            elapsed_ns = between_events(runs[i % buffers])
            torch.cuda.synchronize(self._device)
            done.append(elapsed_ns())
        return RankTimes(kind, numel * ELEMENT_BYTES, (0,) * count, tuple(done))


def transfer(kind: str, numel: int, device: torch.device) -> Run:
    """What runs one transfer of `numel` fp32 elements (a multiple of the ranks), with buffers of its own."""
    n, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.zeros(numel, device=device)
    if kind == SHIFT:
        received = torch.zeros(numel, device=device)
        ahead, behind = (rank + 1) % n, (rank - 1) % n

        def shift() -> None:
            ops = [dist.P2POp(dist.isend, whole, ahead), dist.P2POp(dist.irecv, received, behind)]
            for pending in dist.batch_isend_irecv(ops):
                pending.wait()

        return shift
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole)
    share = torch.zeros(numel // n, device=device)
    # Both were renamed in newer releases of torch.
    if kind == "all_gather":
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(whole, share)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return lambda: scatter(share, whole)


def _between(device: torch.device) -> Run:
    """A moment of computing: a product of about 0.4 ms on a core."""
    return _product(256 if device.type == "cpu" else 1024, device)


def _product(size: int, device: torch.device | None = None) -> Run:
    a, b, c = (torch.ones(size, size, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)
