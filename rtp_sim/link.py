"""`Link`: a wire stated as latency and bandwidth, and how long messages and collectives take over it.

A delay line: transfers on different streams do not share it. The executor's emulated transport sleeps for these times
and the cost model of such a run (`cost/stated.py`) predicts with them, so both rest on the same statement. Collectives
are those of a ring, as in `cost/communication.py`, with n ranks and an array of S bytes:

    all-gather, reduce-scatter, all-to-all    (n-1) (latency + S/n / bandwidth)
    all-reduce                                2 (n-1) (latency + S/n / bandwidth)
    broadcast, reduce (pipelined down a chain)  (n-1) latency + S / bandwidth

Standard library only: ranks import this.
"""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.errors import InputError

_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


@dataclass(frozen=True, slots=True)
class Link:
    """Every pair of ranks has such a wire of its own, in each direction."""

    latency_ns: int
    bandwidth_bytes_per_s: int

    def __post_init__(self) -> None:
        """InputError for a link over which nothing, or time itself, would not move."""
        if self.latency_ns < 0:
            raise InputError(f"link: latency is {self.latency_ns} ns; expected at least 0")
        if self.bandwidth_bytes_per_s < 1:
            raise InputError(f"link: bandwidth is {self.bandwidth_bytes_per_s} B/s; expected at least 1, as 1GB/s")

    def message_ns(self, source: int, target: int, size_bytes: int, chunk_bytes: int | None) -> int:
        """Time of one message; one in chunks pays the latency for each. The two ranks do not matter here."""
        chunks = 1 if not chunk_bytes else max(1, -(-size_bytes // chunk_bytes))
        return chunks * self.latency_ns + self._flow_ns(size_bytes)

    def collective_ns(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> int:
        """Time of a collective of two or more ranks once all are there; `size_bytes` is the whole array."""
        n = len(ranks)
        if kind in ("broadcast", "reduce"):
            return (n - 1) * self.latency_ns + self._flow_ns(size_bytes)
        if kind not in _ROUNDS:
            raise InputError(f"given the collective {kind!r}, expected one of {', '.join(_ROUNDS)}, broadcast, reduce")
        steps = _ROUNDS[kind] * (n - 1)
        return steps * self.latency_ns + self._flow_ns(steps * size_bytes) // n

    def _flow_ns(self, size_bytes: int) -> int:
        return size_bytes * 10**9 // self.bandwidth_bytes_per_s
