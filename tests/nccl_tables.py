"""Writes tables as nccl-tests print them, from closed forms, for tests of their readers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

FACTOR = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "alltoall": lambda n: (n - 1) / n,
    "sendrecv": lambda n: 1.0,
    "broadcast": lambda n: 1.0,
}
HEADER = (
    "#                                                              out-of-place                       in-place\n"
    "#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw "
    "#wrong"
)
POWERS = tuple(1 << k for k in range(3, 34))


def devices(ranks: int, hosts: int = 1, gpu: str = "NVIDIA H100 80GB HBM3") -> str:
    each = ranks // hosts
    return "\n".join(
        f"#  Rank {r:2d} Group  0 Pid {100 + r} on node-{r // each} device {r % each:2d} [0000:{r:02x}:00] {gpu}"
        for r in range(ranks)
    )


def row(kind: str, ranks: int, size: int, time_us: float, in_place_us: float | None = None) -> str:
    def body(us: float) -> str:
        algbw = size / us / 1e3
        return f"{us:.2f} {algbw:.2f} {algbw * FACTOR[kind](ranks):.2f}"

    again = time_us if in_place_us is None else in_place_us
    return f"{size} {size // 4} float sum -1 {body(time_us)} 0 {body(again)} N/A"


def table(
    kind: str, ranks: int, time_us: Callable[[int], float], hosts: int = 1, sizes: Sequence[int] = POWERS
) -> str:  # fmt: skip
    """A whole run."""
    rows = "\n".join(row(kind, ranks, size, time_us(size)) for size in sizes)
    return (
        f"# Collective test starting: {kind}_perf\n# nThread 1 nGpus 1 minBytes 8\n#\n# Using devices\n"
        f"{devices(ranks, hosts)}\n#\n{HEADER}\n{rows}\n# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 1\n#\n"
    )
