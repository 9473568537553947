"""`StatedTimes`: what every kernel, message and collective of a run takes, written down before it starts.

A run with stated times computes and moves nothing: its ranks sleep for these times (`executor/sleepers.py`), and its
prediction uses the same ones (`cost/stated.py`). What is then compared is how ops wait for the host, their stream, each
other and their partners. A file beside the run's schedule holds them. Standard library only: ranks import this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rtp_sim.errors import InputError
from rtp_sim.schedule.ir import Dims

SCHEMA = "rtp-sim/stated-times/1"
KernelKey = tuple[str, str, Dims]
"""kernel, dtype, dims."""
MessageKey = tuple[int, int, int, int | None]
"""source, target, size_bytes, chunk_bytes."""
CollectiveKey = tuple[str, tuple[int, ...], int, str]
"""kind, ranks with the root first, size_bytes, dtype."""


@dataclass(frozen=True, slots=True)
class StatedTimes:
    """Times in ns. `issue_ns` is the host's time per op. Kernels of a rank in `slow` take that many thousandths of
    theirs (1500: half as long again)."""

    issue_ns: int
    kernels: Mapping[KernelKey, int]
    messages: Mapping[MessageKey, int]
    collectives: Mapping[CollectiveKey, int]
    slow: Mapping[int, int] = field(default_factory=dict)

    def kernel_ns(self, kernel: str, dtype: str, dims: Dims, rank: int) -> int:
        """Time of a kernel on a rank."""
        return slowed(self.kernels[kernel, dtype, dims], self.slow.get(rank, 1000))

    def message_ns(self, source: int, target: int, size_bytes: int, chunk_bytes: int | None) -> int:
        """Time of a message once both ranks are there."""
        return self.messages[source, target, size_bytes, chunk_bytes]

    def collective_ns(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> int:
        """Time of a collective once all its ranks are there."""
        return self.collectives[kind, ranks, size_bytes, dtype]


def slowed(time_ns: int, permille: int) -> int:
    """The time on a rank that takes so many thousandths of it."""
    return time_ns * permille // 1000


def to_json(times: StatedTimes) -> str:
    """The times as JSON."""
    document = {
        "schema": SCHEMA,
        "issue_ns": times.issue_ns,
        "slow_permille": {str(rank): permille for rank, permille in times.slow.items()},
        "kernels": [[*key, ns] for key, ns in times.kernels.items()],
        "messages": [[*key, ns] for key, ns in times.messages.items()],
        "collectives": [[*key, ns] for key, ns in times.collectives.items()],
    }
    return json.dumps(document) + "\n"


def from_json(text: str) -> StatedTimes:
    """The times stored in `text`. InputError if it holds none."""
    try:
        data: Any = json.loads(text)
        if data["schema"] != SCHEMA:
            raise InputError(f"stated times: schema is {data['schema']!r}; expected {SCHEMA!r}")
        return StatedTimes(
            int(data["issue_ns"]),
            {(kernel, dtype, tuple((n, v) for n, v in dims)): ns for kernel, dtype, dims, ns in data["kernels"]},
            {(source, target, size, chunk): ns for source, target, size, chunk, ns in data["messages"]},
            {(kind, tuple(ranks), size, dtype): ns for kind, ranks, size, dtype, ns in data["collectives"]},
            {int(rank): permille for rank, permille in data["slow_permille"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"stated times: {error!r}; expected what rtp-sim run --stated-times writes") from None
