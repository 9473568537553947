"""Fits a few physical numbers of a machine to the calibration rows of measured runs.

The numbers are those of `[calibration]` in a cluster profile: how much of the peak products, attention and memory-bound
kernels reach with the software of those runs, what the host needs to issue a kernel, how much communication slows
compute down, what the links reach. There is none per model, strategy or row. The fit minimises the size of the log
errors (nearly linear beyond 5 %, so that an odd row does not bend the rest) by damped Gauss-Newton steps with
differences, and a weak pull towards the starting values, so that what the rows do not determine stays where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import exp

import numpy as np
import numpy.typing as npt

from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.validation.accuracy import Errors, errors_of
from rtp_sim.validation.evaluate import evaluate
from rtp_sim.validation.interpret import Experiment

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number of a profile by its dotted key: where the fit starts, its bounds, and its unit in the profile."""

    key: str
    start: float
    low: float
    high: float
    unit: str = ""

    def text(self, value: float) -> float | str:
        """The value as a profile has it."""
        return f"{value:.4g} {self.unit}" if self.unit else float(f"{value:.4g}")


PARAMETERS: Mapping[str, Parameter] = {
    p.key.rpartition(".")[2]: p
    for p in (
        Parameter("calibration.matmul_efficiency", 0.75, 0.3, 0.97),
        Parameter("calibration.attention_efficiency", 0.35, 0.04, 0.75),
        Parameter("calibration.memory_efficiency", 0.7, 0.15, 0.95),
        Parameter("calibration.matmul_efficiency_fp32", 0.9, 0.4, 1.0),
        Parameter("calibration.attention_efficiency_fp32", 0.5, 0.05, 1.0),
        Parameter("calibration.matmul_efficiency_ragged", 0.3, 0.05, 0.97),
        Parameter("calibration.overlap_slowdown", 1.15, 1.0001, 2.0),
        Parameter("calibration.host_issue", 10.0, 1.0, 120.0, "us"),
        Parameter("calibration.blocking_issue", 20.0, 1.0, 400.0, "us"),
        Parameter("communication.collective_step_intra", 0.8, 0.1, 60.0, "us"),
        Parameter("communication.collective_base", 6.6, 1.0, 200.0, "us"),
        Parameter("calibration.host_issue_backward", 10.0, 1.0, 120.0, "us"),
        Parameter("calibration.message_issue", 100.0, 1.0, 5000.0, "us"),
        Parameter("calibration.collective_chunk_inter", 42.0, 5.0, 120.0, "us"),
        Parameter("calibration.collective_turn_piped", 350.0, 10.0, 1000.0, "us"),
    )
}
SQUARE_BELOW = 0.05
STEP = 0.03
"""Size of the log differences."""
PULL = 0.05
"""Weight of the pull towards the start, per log unit, against the mean size of an error."""


def link_parameter(name: str) -> Parameter:
    """The efficiency of the links called `name`."""
    return Parameter(f"calibration.link_efficiency.{name}", 0.75, 0.05, 1.0)


@dataclass(frozen=True, slots=True)
class Fit:
    """Values by key, as profiles have them, and the errors of the rows that were fitted; `low` and `high` are the 10th
    and 90th percentile of their measured / predicted step times."""

    values: Mapping[str, float | str]
    errors: Errors
    rows: int
    low: float
    high: float


def fit(
    rows: Sequence[tuple[Experiment, float]], parameters: Sequence[Parameter], iterations: int = 4, workers: int = 2,
    tell: Callable[[str], None] = lambda _: None,
) -> Fit:  # fmt: skip
    """Fits the parameters to (experiment, measured seconds); all experiments are on one cluster."""
    experiments = list(dict.fromkeys(experiment for experiment, _ in rows))
    which = np.array([experiments.index(experiment) for experiment, _ in rows])
    measured = np.log([seconds for _, seconds in rows])
    start = np.log([p.start for p in parameters])
    low, high = np.log([p.low for p in parameters]), np.log([p.high for p in parameters])
    with ProcessPoolExecutor(workers) as pool:

        def residuals(at: Vector) -> Vector:
            changes = {p.key: p.text(exp(v)) for p, v in zip(parameters, at, strict=True)}
            jobs = [(experiment, changes) for experiment in experiments]
            seconds = np.array(list(pool.map(_seconds, jobs, chunksize=2)))
            found: Vector = np.log(seconds)[which] - measured
            return found

        at, left = _minimise(residuals, start, low, high, iterations, tell)
    values = {p.key: p.text(exp(v)) for p, v in zip(parameters, at, strict=True)}
    tenth, last = (float(q) for q in np.quantile(np.exp(-left), (0.1, 0.9)))
    return Fit(values, errors_of(float(exp(r) - 1) for r in left), len(rows), tenth, last)


def _seconds(job: tuple[Experiment, Mapping[str, float | str]]) -> float:
    experiment, changes = job
    return evaluate(experiment, load_cluster(experiment.cluster, gpus=experiment.gpus, changes=changes)).step_s


def _cost(left: Vector, moved: Vector) -> float:
    size = np.abs(left)
    shared = np.where(size < SQUARE_BELOW, size * size / (2 * SQUARE_BELOW), size - SQUARE_BELOW / 2)
    return float(shared.sum() + PULL * len(left) * (moved * moved).mean())


def _minimise(
    residuals: Callable[[Vector], Vector], start: Vector, low: Vector, high: Vector, iterations: int,
    tell: Callable[[str], None],
) -> tuple[Vector, Vector]:  # fmt: skip
    """Damped Gauss-Newton with weights 1 / |residual|; returns the point and its residuals."""
    at, damping = start.copy(), 0.05
    left = residuals(at)
    best = _cost(left, at - start)
    pull = 2 * PULL * len(left) / len(at)
    for turn in range(iterations):
        slope = np.zeros((len(left), len(at)))
        for j in range(len(at)):
            moved = at.copy()
            step = -STEP if at[j] + STEP > high[j] else STEP
            moved[j] += step
            slope[:, j] = (residuals(moved) - left) / step
        weighted = slope / np.maximum(np.abs(left), SQUARE_BELOW)[:, None]
        curvature, gradient = weighted.T @ slope, weighted.T @ left + pull * (at - start)
        while damping < 10:
            matrix = curvature + np.eye(len(at)) * (damping * np.trace(curvature) / len(at) + pull)
            tried = np.clip(at - np.linalg.solve(matrix, gradient), low, high)
            there = residuals(tried)
            if _cost(there, tried - start) < best - 1e-4:
                at, left, best, damping = tried, there, _cost(there, tried - start), max(damping / 3, 1e-3)
                break
            damping *= 4
        else:
            break
        tell(f"turn {turn + 1}: mean error {np.mean(np.abs(np.exp(left) - 1)):.1%}")
    return at, left
