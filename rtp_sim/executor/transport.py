"""`Transport`: how the data of communication ops get from rank to rank. The one thing in which runs on gloo, NCCL,
shared memory and an emulated link differ.

An interpreter takes tensors from the machine (exchange.py), hands them to a transport, and puts what has come into
place. A transport's calls come back when the data are there (on a GPU: when the current stream will wait for them). It
is called from the thread of the op's stream, one op of a stream after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rtp_sim.schedule.ir import Op

if TYPE_CHECKING:
    from rtp_sim.executor.exchange import Parcel, Transfer


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank has sent, by the accounting of `rtp_sim/metrics.py`."""

    size_bytes: int = 0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.size_bytes + other.size_bytes, self.messages + other.messages)


class Transport(Protocol):
    """Moves data. Whatever goes wrong (a partner is gone, or does not come in time) is raised as RuntimeError."""

    def exchange(self, op: Op, transfers: Sequence[Transfer], tag: int) -> Traffic:
        """Does the transfers of a shift, send or receive; `tag` tells apart sends between the same two ranks."""

    def collective(self, op: Op, parcel: Parcel) -> Traffic:
        """Does this rank's part of a collective."""
