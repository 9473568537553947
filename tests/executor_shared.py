"""A schedule of nothing but communication for the tests of shared memory, and the tensors that its ops move."""

from __future__ import annotations

import torch
from schedule_helpers import Row, program, ring, schedule

from rtp_sim.executor.dtypes import DTYPES
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.schedule.ir import COLLECTIVES, DTYPE_BYTES, Buffer, Collective, Hop, Op, Recv, Schedule, Send, Shift

SMALL, LARGE = 24, 60_000
"""Elements: multiples of 2, 3 and 4; the larger is added up in parts by more than two ranks."""


def exchanges(n: int) -> Schedule:
    """Every kind of exchange among n ranks, on two streams."""
    rows, buffers = [], {}
    for dtype in ("fp32", "fp64", "bf16", "int64"):
        for numel in (SMALL, LARGE):
            buffers[f"x{dtype}{numel}"] = Buffer(f"x{dtype}{numel}", "workspace", dtype, numel)
            for kind in COLLECTIVES:
                action = Collective(kind, "ring", numel * DTYPE_BYTES[dtype], dtype, root=n - 1)
                stream = f"stream{len(rows) % 2}"
                rows.append(Row(f"{kind}.{dtype}.{numel}", stream, action, f"x{dtype}{numel}", f"x{dtype}{numel}"))
    size = SMALL * 4
    hops = (Hop((1,), size), Hop((n - 1,), size // 2))
    rows.append(Row("both ways", "stream0", Shift("ring", hops), "xfp32a xfp32b", "yfp32a yfp32b"))
    rows.append(Row("in place", "stream0", Shift("ring", hops[:1], chunk_bytes=16), "xfp32a", "xfp32a"))
    rows.append(Row("to itself", "stream0", Shift("ring", (Hop((n,), size),)), "xfp32a", "yfp32a"))
    rows.append(Row("receive", "stream1", Recv("ring", (-1,), size, "line"), "", "yfp32a"))
    rows.append(Row("send", "stream0", Send("ring", (1,), size, "line"), "xfp32a"))
    return schedule([ring(n, "ring")], program("p", rows, buffers))


def content(op: Op, rank: int, numel: int, dtype: torch.dtype, hop: int = 0) -> torch.Tensor:
    """Whole numbers that follow from rank and op, small enough for sums in bf16 to be exact."""
    generator = torch.Generator().manual_seed(1000 * op.index + 10 * rank + hop)
    return torch.randint(0, 20, (numel,), generator=generator).to(dtype)


def parcel(op: Op, n: int, rank: int) -> Parcel:
    """The rank's part of a collective; sums by sum, in every other op the maximum."""
    action = op.action
    assert isinstance(action, Collective)
    dtype, numel = DTYPES[action.dtype], action.size_bytes // DTYPE_BYTES[action.dtype]
    send = content(op, rank, numel // n if action.kind == "all_gather" else numel, dtype)
    receive = send
    if action.kind in ("all_gather", "reduce_scatter", "all_to_all"):
        received = {"all_gather": numel, "reduce_scatter": numel // n, "all_to_all": numel}[action.kind]
        receive = torch.zeros(received, dtype=dtype)
    reduction = "max" if action.dtype == "int64" else "sum"
    return Parcel(action.kind, tuple(range(n)), send, receive, numel, reduction, action.root)


def transfers(op: Op, n: int, rank: int) -> list[Transfer]:
    """What a rank moves for a shift, send or receive."""
    action, nothing = op.action, torch.zeros(0)
    if isinstance(action, Shift):
        found = []
        for j, hop in enumerate(action.hops):
            assert isinstance(hop.size_bytes, int)
            send = content(op, rank, hop.size_bytes // 4, torch.float32, j)
            to, source = (rank + hop.offset[0]) % n, (rank - hop.offset[0]) % n
            if action.chunk_bytes is None:
                found.append(Transfer(to, source, send, torch.zeros_like(send)))
            else:
                bounce = torch.zeros(action.chunk_bytes, dtype=torch.uint8)
                found.append(Transfer(to, source, send, send, bounce))
        return found
    if isinstance(action, Send):
        return [Transfer(rank + 1, rank + 1, content(op, rank, SMALL, torch.float32), nothing)] if rank < n - 1 else []
    return [Transfer(rank - 1, rank - 1, nothing, torch.zeros(SMALL))] if rank > 0 else []
