"""How sure a predicted step time is: the interval that the machine's calibration leaves around it."""

from __future__ import annotations

from rtp_sim.hardware.spec import Cluster


def spread_of(cluster: Cluster) -> tuple[float, float] | None:
    """Measured over predicted of the steps that the machine's profile was fitted to, from the 10th to the 90th
    percentile; None where its profile has none."""
    found = cluster.residuals
    return None if found is None else (found.low.value, found.high.value)


def interval_s(step_s: float, cluster: Cluster) -> tuple[float, float] | None:
    """Where the true step time lies, judged by the spread of the calibration's errors; None where that is not known."""
    spread = spread_of(cluster)
    return None if spread is None else (step_s * spread[0], step_s * spread[1])


def tied(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    """Whether two intervals meet."""
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]
