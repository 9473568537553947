"""The ranks of the executor's tests, which do several jobs one after another: starting torch takes longest.

So it is imported once, and every rank (of WORLD_SIZE) is a fork of the process that has done so.

    python executor_many.py JOBS.json

A job is {"run": directory} for a run, with "shift_ns" to have rank 1 read another clock on another machine and with
"partners": file to note whom each rank's hops go to and come from, {"moves": file} for exchanges and collectives with
values that the test knows, or {"shared": file} for collectives and sends through shared memory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from executor_shared import exchanges, parcel, transfers

from rtp_sim.executor import clocks, distributed, groups, lanes
from rtp_sim.executor.communicate import collective, exchange
from rtp_sim.executor.environment import die_with_parent, read_environment
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.executor.groups import make_control
from rtp_sim.executor.launcher import LAUNCHER_PID
from rtp_sim.executor.progress import Progress
from rtp_sim.executor.rundir import RunDirectory
from rtp_sim.executor.shm import SharedMemoryTransport
from rtp_sim.executor.transport import Traffic
from rtp_sim.executor.worker import worker_of
from rtp_sim.link import Link
from rtp_sim.schedule.ir import Collective


def run(job: dict[str, object], rank: int) -> None:
    directory = RunDirectory(Path(str(job["run"])))
    schedule, request = directory.load()
    shift_ns = int(str(job.get("shift_ns", 0)))
    real_now, real_machine = clocks.now_ns, clocks.machine_id
    if shift_ns:
        clocks.machine_id = lambda: f"machine {rank}"
        clocks.now_ns = distributed.now_ns = lanes.now_ns = lambda: real_now() + shift_ns * rank
    partners: set[int] = set()
    real_exchange = groups.exchange
    if "partners" in job:

        def noted(transfers: Sequence[Transfer], *rest: Any) -> Traffic:
            partners.update(p for t in transfers for p in (t.to, t.source))
            return real_exchange(transfers, *rest)

        groups.exchange = noted
    directory.clear_rank(rank)
    progress = Progress(directory.of_rank(rank, "progress"))
    worker_of(request)(directory, schedule, request, read_environment(), progress).work()
    clocks.now_ns = distributed.now_ns = lanes.now_ns = real_now
    clocks.machine_id = real_machine
    groups.exchange = real_exchange
    if "partners" in job:
        Path(f"{job['partners']}.{rank}").write_text(json.dumps(sorted(partners)), encoding="utf-8")


def moves(job: dict[str, object], rank: int) -> None:
    """Every kind of movement among 3 ranks; rank r starts with numbers made of r."""
    group = dist.new_group([2, 0, 1], timeout=timedelta(seconds=60), backend="gloo", sort_ranks=False)
    position = [2, 0, 1].index(rank)
    to, source = [2, 0, 1][(position + 1) % 3], [2, 0, 1][(position - 1) % 3]
    found: dict[str, object] = {"position": position, "to": to, "source": source}
    mine = torch.arange(6, dtype=torch.float32) + 10 * rank
    nothing = torch.zeros(0)

    arrived = torch.zeros(6)
    sent = exchange([Transfer(to, source, mine, arrived)], group, rank)
    found["shift"] = arrived.tolist(), sent.size_bytes, sent.messages

    # Shards of 4 + rank elements in a buffer of 6, through a bounce buffer of 2 elements.
    content = mine.clone()
    bounce = torch.zeros(8, dtype=torch.uint8)
    sent = exchange([Transfer(to, source, content[: 4 + rank], content[: 4 + source], bounce)], group, rank)
    found["in place"] = content.tolist(), sent.size_bytes, sent.messages

    one, two = torch.zeros(6), torch.zeros(2)
    sent = exchange([Transfer(to, source, mine, one), Transfer(source, to, mine[:2], two)], group, rank)
    found["two hops"] = [*one.tolist(), *two.tolist()], sent.size_bytes, sent.messages

    alone = torch.zeros(6)
    sent = exchange([Transfer(rank, rank, mine, alone)], group, rank)
    found["to itself"] = alone.tolist(), sent.size_bytes, sent.messages

    # Along a line, first to last position.
    if position > 0:
        exchange([Transfer(source, source, nothing, arrived)], group, rank, tag=7)
    if position < 2:
        exchange([Transfer(to, to, mine * 2, nothing)], group, rank, tag=7)
    found["line"] = arrived.tolist()

    for kind, reduction in (("all_reduce", "sum"), ("all_reduce", "max"), ("broadcast", "sum"), ("reduce", "sum")):
        flat = mine.clone()
        sent = collective(Parcel(kind, (2, 0, 1), flat, flat, 6, reduction, root=1), group)
        found[f"{kind} {reduction}"] = flat.tolist(), sent.size_bytes, sent.messages
    for kind, before, after in (("all_gather", 6, 18), ("reduce_scatter", 6, 2), ("all_to_all", 6, 6)):
        received = torch.zeros(after)
        sent = collective(Parcel(kind, (2, 0, 1), mine[:before], received, max(before, after)), group)
        found[kind] = received.tolist(), sent.size_bytes, sent.messages
    Path(f"{job['moves']}.{rank}").write_text(json.dumps(found), encoding="utf-8")


def shared(job: dict[str, object], rank: int) -> None:
    """The schedule of `executor_shared` through shared memory, twice, and over an emulated link."""
    n = dist.get_world_size()
    schedule, found = exchanges(n), []
    for times in (None, Link(100_000, 10**9)):
        control = make_control(60)
        transport = SharedMemoryTransport(schedule, rank, control, 60, times)
        for _ in range(2):
            for op in schedule.program(rank).ops:
                if isinstance(op.action, Collective):
                    mine = parcel(op, n, rank)
                    transport.collective(op, mine)
                    found.append(mine.receive)
                else:
                    moved = transfers(op, n, rank)
                    transport.exchange(op, moved, 0)
                    found += [t.receive for t in moved]
    torch.save(found, f"{job['shared']}.{rank}")


def work(rank: int) -> None:
    """All jobs as one rank, in a process of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    die_with_parent()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    # One meeting for all jobs; each then makes its own process groups. Meeting again at the same port can go wrong: a
    # rank that is back before rank 0 has closed its store finds the old one, with addresses where nobody listens.
    dist.init_process_group = lambda *_, **__: None
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        JOBS[next(iter(job))](job, rank)
        dist.barrier()


def forked(rank: int) -> int:
    """Starts a rank; returns its pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(rank)
        code = 0
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> int:
    """0 if all ranks end well; the first that does not takes the others with it."""
    die_with_parent()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    left = {forked(rank) for rank in range(int(os.environ["WORLD_SIZE"]))}
    while left:
        child, status = os.wait()
        left.discard(child)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


JOBS = {"run": run, "moves": moves, "shared": shared}

if __name__ == "__main__":
    sys.exit(main())
