"""Where one strategy overtakes another along an axis.

Between two neighbouring points of the grid every strategy's number is taken to go in a straight line; where two of
these lines meet is the crossing. Only strategies that fit into memory at both ends take part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

Series = Mapping[str, Sequence[float | None]]
"""Per strategy one number per value of the axis, lower is better; None where it does not fit or there is none."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """Above `at` (in the axis's unit) `winner` beats `loser`, below it is the other way round. `value` is the number of
    both there; `leads` says that nothing else is better at that place."""

    at: float
    value: float
    winner: str
    loser: str
    leads: bool


def crossings(x: Sequence[float], series: Series) -> list[Crossing]:
    """All crossings of all pairs along ascending `x`, in order of place. Strategies that merely touch do not cross, and
    neither do those that are equal for a stretch."""
    found = []
    for a, b in combinations(series, 2):
        for at, value, a_wins in _of_pair(x, series[a], series[b]):
            winner, loser = (a, b) if a_wins else (b, a)
            others = [_between(x, ys, at) for name, ys in series.items() if name not in (a, b)]
            leads = all(y is None or y >= value for y in others)
            found.append(Crossing(at, value, winner, loser, leads))
    return sorted(found, key=lambda c: (c.at, c.winner, c.loser))


def _of_pair(
    x: Sequence[float], first: Sequence[float | None], second: Sequence[float | None]
) -> list[tuple[float, float, bool]]:
    """(place, value there, whether the first is better above) of each change of sign of first - second."""
    found: list[tuple[float, float, bool]] = []
    before: tuple[float, float] | None = None
    for at, a, b in zip(x, first, second, strict=True):
        if a is None or b is None:
            before = None
            continue
        gap = a - b
        if gap == 0:
            continue
        if before is not None and before[1] * gap < 0:
            place = before[0] + (at - before[0]) * before[1] / (before[1] - gap)
            value = _between(x, first, place)
            assert value is not None
            found.append((place, value, gap < 0))
        before = at, gap
    return found


def _between(x: Sequence[float], ys: Sequence[float | None], at: float) -> float | None:
    """The number at a place on the straight line between its neighbours; None where one of them is none."""
    for i in range(len(x) - 1):
        if x[i] <= at <= x[i + 1]:
            low, high = ys[i], ys[i + 1]
            if low is None or high is None:
                return None
            return low + (high - low) * (at - x[i]) / (x[i + 1] - x[i])
    return None
