"""What `rtp-sim diff` and `rtp-sim validate` do: predicted timelines against measured ones, as text, JSON or a page."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.report.diff_tables import (
    answer,
    check_grid,
    diff_grids,
    diff_json,
    pace_text,
    print_grid,
    spread_text,
    validation_json,
    verdict,
)
from rtp_sim.report.tables import write_json
from rtp_sim.timeline_file import load_timeline, save_timeline
from rtp_sim.validation.diff import TimelineDiff
from rtp_sim.validation.diff import diff as join

if TYPE_CHECKING:
    from rtp_sim.validation.runs import MeasuredRun, Validation


def diff(a: Namespace) -> int:
    """`rtp-sim diff PREDICTED MEASURED`: the differences of two timelines of one schedule."""
    predicted, measured = load_timeline(a.predicted), load_timeline(a.measured)
    if (predicted.kind, measured.kind) == ("measured", "predicted"):
        raise InputError(
            f"{a.predicted} holds a measured timeline and {a.measured} a predicted one; expected them the other way "
            f"round: rtp-sim diff {a.measured} {a.predicted}"
        )
    joined = join(predicted, measured)
    if a.report:
        from rtp_sim.report.diff_html import write_diff_report

        write_diff_report(a.report, joined, worst=a.worst)
        _progress(a, f"wrote {a.report}")
    if a.format == "json":
        write_json(diff_json(joined, a.worst))
    else:
        print(answer(joined))
        _print_grids(joined, a.worst)
    return 0


def validate(a: Namespace) -> int:
    """`rtp-sim validate RUN`: predicts what was run and judges it. Exit code 1 if it is out of tolerance."""
    # Imported here: reading a run needs pydantic, and predicting it SimPy.
    from rtp_sim.validation.runs import load_run

    if a.profile is None:
        raise InputError("validate: give --profile, the cluster profile of the machine that the run was on")
    run = load_run(Path(a.directory))
    if a.from_trace:
        from rtp_sim.validation.traced import with_trace

        run = with_trace(run)
    found = _judged(a, run)
    cluster = found.cluster
    if a.predicted:
        save_timeline(found.diff.predicted, a.predicted)
        _progress(a, f"wrote {a.predicted}")
    if a.report:
        from rtp_sim.report.diff_html import write_diff_report
        from rtp_sim.report.inputs import cluster_rows

        inputs = [*request_rows(run.request), *cluster_rows(cluster)]
        write_diff_report(a.report, found.diff, worst=a.worst, validation=found, inputs=inputs)
        _progress(a, f"wrote {a.report}")
    if a.format == "json":
        write_json(validation_json(found, a.worst))
    else:
        print(verdict(found))
        print(spread_text(found))
        if text := pace_text(found):
            print(text)
        print_grid(check_grid(found))
        _print_grids(found.diff, a.worst)
        for text in found.notes:
            print(f"note: {text}")
    return 0 if found.passed else 1


def _judged(a: Namespace, run: MeasuredRun) -> Validation:
    """The run against its prediction on the cluster of --profile: of all its ranks, or of the one that ran alone."""
    from rtp_sim.validation.one_rank import clusters_for, validate_one_rank
    from rtp_sim.validation.runs import validate as judge

    ranks = run.schedule.world_size
    try:
        if run.only_rank is not None:
            clusters = clusters_for(run, a.profile, a.nodes)
            _progress(a, f"simulating {run.schedule.name} on {clusters.whole.name}, {ranks} ranks")
            return validate_one_rank(run, clusters, a.tolerance, a.engine)
        cluster = load_cluster(a.profile, a.nodes or 1, ranks)
    except InputError as error:
        raise InputError(f"--profile {a.profile} for the {ranks} ranks of {a.directory}: {error}") from None
    _progress(a, f"simulating {run.schedule.name} on {cluster.name}, {ranks} ranks")
    return judge(run, cluster, a.tolerance, a.engine)


def request_rows(request: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    """The plain values of a run's request as rows of inputs; those of nested objects under dotted names."""
    for name, value in request.items():
        if isinstance(value, dict):
            yield from request_rows(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield ("Run", prefix + name, str(value), "", "")


def _print_grids(joined: TimelineDiff, worst: int) -> None:
    for grid in diff_grids(joined, worst):
        print_grid(grid)


def _progress(a: Namespace, message: str) -> None:
    if not a.quiet:
        print(f"rtp-sim: {message}", file=sys.stderr)
