"""What communication ops move: flat tensors to send and to receive, ready for any transport.

`Machine.transfers` and `Machine.parcel` make these, an interpreter moves the data (within a process, or by
torch.distributed), and `Machine.finish` puts what has arrived in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Round:
    """One exchange of a transfer: `send` goes out, `receive` is filled (either may be empty), then `receive` is copied
    to `into` where that is given. Next round after that."""

    send: torch.Tensor
    receive: torch.Tensor
    into: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """One hop of a shift, or one half of a point-to-point transfer: `send` goes to rank `to`, `receive` comes from rank
    `source`. In place (`bounce` given) both lie in one buffer and move in chunks of `bounce`'s size."""

    to: int
    source: int
    send: torch.Tensor
    receive: torch.Tensor
    bounce: torch.Tensor | None = None

    def rounds(self) -> Iterator[Round]:
        """The exchanges in order. Both ends count rounds by their own sizes: a side that has no more to send or receive
        has an empty tensor there."""
        if self.bounce is None:
            yield Round(self.send, self.receive)
            return
        chunk = self.bounce.numel()
        # Chunks are counted in bytes, as the schedule states them.
        send, receive = self.send.view(torch.uint8), self.receive.view(torch.uint8)
        for start in range(0, max(send.numel(), receive.numel()), chunk):
            into = receive[start : start + chunk]
            yield Round(send[start : start + chunk], self.bounce[: into.numel()], into)

    @property
    def messages(self) -> int:
        """Messages sent."""
        size_bytes = self.sent_bytes
        return -(-size_bytes // self.bounce.numel()) if self.bounce is not None else int(size_bytes > 0)

    @property
    def sent_bytes(self) -> int:
        """Bytes sent to another rank."""
        return self.send.numel() * self.send.element_size()


@dataclass(frozen=True, slots=True)
class Parcel:
    """One rank's part of a collective.

    `send` and `receive` are flat and contiguous, of the sizes that torch.distributed expects: all_reduce, broadcast and
    reduce work on `receive` in place (it is `send`); of reduce_scatter `send` has n equal parts, `receive` one; of
    all_gather the other way round; of all_to_all both have n. Parts are padded where members' shares differ:
    `elements` counts the array without that padding. `reduction` is "sum" or "max"; `root` is a position in `members`.
    """

    kind: str
    members: tuple[int, ...]
    send: torch.Tensor
    receive: torch.Tensor
    elements: int
    reduction: str = "sum"
    root: int = 0

    def traffic(self) -> tuple[int, int]:
        """Bytes and messages this rank sends under ring algorithms (the accounting of metrics.py)."""
        n, total = len(self.members), self.elements * self.send.element_size()
        if self.kind in ("broadcast", "reduce"):
            return total, 1
        rounds = 2 * (n - 1) if self.kind == "all_reduce" else n - 1
        return -(-rounds * total // n), rounds
