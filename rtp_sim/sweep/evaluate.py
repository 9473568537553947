"""One point computed: what a worker does, wherever it runs.

Without a global batch every strategy does micro-batch x GPUs sequences, as `rtp-sim compare` has it, so that the points
of one setting do the same work. A point that cannot be laid out is an answer too, with its reason.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

from rtp_sim.compose.estimate import estimate
from rtp_sim.errors import InputError
from rtp_sim.experiment import built, run, settle
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.metrics import metrics_row
from rtp_sim.sweep.points import Point, key_of

Row = dict[str, Any]
"""key; status "ok", "cannot" (it cannot be laid out) or "failed" (its computation broke); reason; how the metrics came
about; gpus; global_batch; metrics, as `metrics.metrics_row` has them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A row, and what of it is not the same each time: the seconds it took and the process."""

    row: Row
    wall_s: float
    worker: str


def evaluate(point: Point) -> Answer:
    """The row of a point. The key is worked out here again, from what this process has of profiles and program."""
    began = time.perf_counter()
    key = key_of(point)
    try:
        row = _computed(point) | {"key": key, "status": "ok", "reason": ""}
    except InputError as error:
        row = without_result(key, "cannot", str(error))
    return Answer({name: row[name] for name in NAMES}, time.perf_counter() - began, str(os.getpid()))


NAMES = ("key", "status", "reason", "how", "gpus", "global_batch", "metrics")


def without_result(key: str, status: str, reason: str) -> Row:
    """The row of a point that has no metrics."""
    empty: Row = dict.fromkeys(NAMES)
    return empty | {"key": key, "status": status, "reason": reason}


def _computed(point: Point) -> Row:
    request = point.request
    cluster = load_cluster(request.cluster, request.nodes or 1, request.gpus, dict(point.changes))
    if request.global_batch is None and request.micro_batches is None:
        request = replace(request, global_batch=request.micro_batch * cluster.world_size)
    setting = settle(request, cluster)
    if point.engine == "estimate":
        found = estimate(setting)
        metrics, how = found.metrics, found.how
    else:
        metrics, how = run(built(setting), point.engine).metrics, "simulated"
    return {
        "how": how,
        "gpus": cluster.world_size,
        "global_batch": request.global_batch,
        "metrics": metrics_row(metrics),
    }
