"""Moves what communication ops move (exchange.py) with torch.distributed.

The calls come back when the data is there. On a GPU they come back at once: waiting then makes the current stream wait
for NCCL's, not the host. So the same code serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from rtp_sim.executor.exchange import Parcel, Round, Transfer
from rtp_sim.executor.transport import Traffic

Group = dist.ProcessGroup


def _renamed(new: str, old: str) -> Callable[..., Any]:
    """torch.distributed renames some functions between 2.11 and 2.13."""
    found: Callable[..., Any] = getattr(dist, new, None) or getattr(dist, old)
    return found


_all_gather = _renamed("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _renamed("reduce_scatter_single", "reduce_scatter_tensor")


def exchange(transfers: Sequence[Transfer], group: Group, rank: int, tag: int = 0) -> Traffic:
    """Does the transfers of one op: those out of place all at once, then those in place, chunk by chunk.

    `tag` tells apart what may be under way between the same ranks in another order. RuntimeError of torch.distributed
    if a partner is gone or does not come within the group's timeout.
    """
    sent, requests = Traffic(), []
    for j, transfer in enumerate(transfers):
        if transfer.to == rank:
            # A ring of one member: what arrives is what was sent.
            transfer.receive.copy_(transfer.send)
            continue
        sent += Traffic(transfer.sent_bytes, transfer.messages)
        if transfer.bounce is None:
            for both in transfer.rounds():
                requests += _requests(transfer, both, group, tag + j)
    _wait_for_all(requests)
    for j, transfer in enumerate(transfers):
        if transfer.bounce is None or transfer.to == rank:
            continue
        for both in transfer.rounds():
            _wait_for_all(_requests(transfer, both, group, tag + j))
            # The chunk that lay there has gone out.
            if both.into is not None:
                both.into.copy_(both.receive)
    return sent


def _requests(transfer: Transfer, both: Round, group: Group, tag: int) -> list[dist.P2POp]:
    """Both directions of one exchange; an empty one is no message."""
    found = []
    if both.send.numel():
        found.append(dist.P2POp(dist.isend, both.send, transfer.to, group, tag))
    if both.receive.numel():
        found.append(dist.P2POp(dist.irecv, both.receive, transfer.source, group, tag))
    return found


def _wait_for_all(requests: list[dist.P2POp]) -> None:
    """Puts everything under way at once (blocking sends round a ring would wait for ever), then waits for all of it."""
    if requests:
        for work in dist.batch_isend_irecv(requests):
            work.wait()


def collective(parcel: Parcel, group: Group) -> Traffic:
    """Does one rank's part of a collective; errors as in `exchange`."""
    operation = dist.ReduceOp.MAX if parcel.reduction == "max" else dist.ReduceOp.SUM
    match parcel.kind:
        case "all_reduce":
            dist.all_reduce(parcel.receive, operation, group=group)
        case "all_gather":
            _all_gather(parcel.receive, parcel.send, group=group)
        case "reduce_scatter":
            _reduce_scatter(parcel.receive, parcel.send, operation, group=group)
        case "broadcast":
            dist.broadcast(parcel.receive, group=group, group_src=parcel.root)
        case "reduce":
            dist.reduce(parcel.receive, op=operation, group=group, group_dst=parcel.root)
        case "all_to_all":
            dist.all_to_all_single(parcel.receive, parcel.send, group=group)
        case other:
            raise ValueError(f"unknown collective {other!r}")
    return Traffic(*parcel.traffic())
