"""`Sweep`: one table of nccl-tests, whichever way it was written, and the arithmetic of its bandwidths.

algbw is size / time, busbw is algbw times a factor that makes it comparable with the rate of a link: 2 (n-1)/n for
all_reduce, (n-1)/n for all_gather, reduce_scatter, alltoall, gather and scatter, 1 for the others (nccl-tests,
doc/PERFORMANCE.md). The size is that of the whole array: what every rank holds after an all_gather, or gives to a
reduce_scatter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from rtp_sim.errors import InputError

FACTORS = {
    "all_reduce": (2.0, True), "all_gather": (1.0, True), "reduce_scatter": (1.0, True), "alltoall": (1.0, True),
    "gather": (1.0, True), "scatter": (1.0, True), "broadcast": (1.0, False), "reduce": (1.0, False),
    "sendrecv": (1.0, False), "hypercube": (1.0, True),
}  # fmt: skip
"""By kind: what multiplies algbw, and whether (n-1)/n does too."""
PROGRAM = re.compile(rf"\b({'|'.join(sorted(FACTORS, key=len, reverse=True))})_perf\b")

SURE_GB_S = 1.0
"""Bandwidths are printed with two decimals: from here on their ratio is good to a percent."""
TOLERANCE = 0.03
ROUNDED = 0.005
"""Half of the last digit of a printed bandwidth."""


@dataclass(frozen=True, slots=True)
class Device:
    """One rank's line: where it runs and on what."""

    rank: int
    host: str
    device: int
    gpu: str


@dataclass(frozen=True, slots=True)
class Row:
    """One size. Times are averages over the iterations (None: not measured); `line` is the line in the file, or the
    number of the result in JSON."""

    line: int
    size_bytes: int
    dtype: str
    out_of_place_us: float | None
    in_place_us: float | None

    @property
    def best_us(self) -> float:
        """The quicker of both: whatever disturbs a measurement makes it longer."""
        return min(t for t in (self.out_of_place_us, self.in_place_us) if t is not None)


@dataclass(frozen=True, slots=True)
class Sweep:
    """One table. `devices` is empty where the file does not list them all; `ranks` then follows from the busbw,
    or is 0 where that leaves it open."""

    file: str
    line: int
    kind: str
    ranks: int
    devices: tuple[Device, ...]
    rows: tuple[Row, ...]

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts in the order of their first rank."""
        return tuple(dict.fromkeys(device.host for device in self.devices))

    @property
    def gpu(self) -> str:
        """What the GPUs call themselves."""
        return self.devices[0].gpu if self.devices else ""


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """algbw and busbw of one row, as printed in GB/s, to check what the file claims."""

    line: int
    algbw: float
    busbw: float


def busbw_factor(kind: str, ranks: int) -> float:
    """busbw / algbw of `kind` among `ranks` ranks."""
    times, shared = FACTORS[kind]
    return times * (ranks - 1) / ranks if shared else times


def kind_of(named: str, file: str, redop: str, bandwidths: Sequence[Bandwidths], where: str) -> str:
    """What a table measures: the program named with it; else what its busbw can only be; else what the file is called.
    InputError if none of them says."""
    if named:
        return named
    ratio = _ratio(bandwidths)
    if ratio is not None and ratio > 1 + TOLERANCE:
        return "all_reduce"
    if ratio is not None and ratio < 1 - TOLERANCE and redop not in ("", "none"):
        return "reduce_scatter"
    known = sorted(FACTORS, key=len, reverse=True)
    if found := next((kind for kind in known if kind in file.lower().replace("all_to_all", "alltoall")), None):
        return found
    raise InputError(
        f"{where}: nothing says which collective this table measures; expected the program's name above it "
        f"(all_gather_perf) or in the name of the file, one of {', '.join(FACTORS)}"
    )


def ranks_of(kind: str, listed: int, bandwidths: Sequence[Bandwidths], where: str) -> int:
    """The number of ranks: as many as are listed, which the busbw must confirm; with none listed what the busbw says;
    0 if that leaves several numbers open."""
    times, shared = FACTORS[kind]
    ratio = _ratio(bandwidths)
    if listed:
        expected = busbw_factor(kind, listed)
        if ratio is not None and abs(ratio - expected) > TOLERANCE * max(expected, 0.5):
            first = _fastest(bandwidths)
            raise InputError(
                f"{where}: busbw {first.busbw:g} is {ratio:.3f} x algbw {first.algbw:g} at line {first.line}; expected "
                f"{expected:.3f} for {kind} among the {listed} ranks listed"
            )
        return listed
    if not shared or ratio is None:
        return 0
    best = _fastest(bandwidths)
    # factor = times (n - 1) / n, so n = times / (times - factor); both ends of what the rounding allows.
    least, most = ((best.busbw + d) / (best.algbw - d) for d in (-ROUNDED, ROUNDED))
    if most >= times:
        return 0
    fitting = range(ceil(times / (times - least)), floor(times / (times - most)) + 1)
    return fitting[0] if len(fitting) == 1 else 0


def _fastest(bandwidths: Sequence[Bandwidths]) -> Bandwidths:
    """The row whose rate has the most digits."""
    return max(bandwidths, key=lambda b: b.algbw)


def _ratio(bandwidths: Sequence[Bandwidths]) -> float | None:
    """busbw / algbw of that row; None if its rate is too low to tell."""
    best = _fastest(bandwidths) if bandwidths else None
    return best.busbw / best.algbw if best is not None and best.algbw >= SURE_GB_S else None
