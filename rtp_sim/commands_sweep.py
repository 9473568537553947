"""What `rtp-sim sweep` does: a grid of experiments out of the arguments, computed, resumed, printed and drawn.

Anything that `compare` takes can be varied by its flag's name, any number of the profile by its dotted key.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from rtp_sim.commands import known_strategies, request_of
from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.report.sweep_tables import crossing_lines, reason_lines, sweep_table, verdict
from rtp_sim.report.tables import print_table, write_json
from rtp_sim.schedule.layout import INNER_AXIS
from rtp_sim.sweep.axes import EXAMPLE, Axis, axis_of, read_axis
from rtp_sim.sweep.points import Point
from rtp_sim.sweep.run import run_sweep
from rtp_sim.sweep.schedulers import DaskWorkers, LocalProcesses, Scheduler
from rtp_sim.sweep.table import STRATEGY, Table, as_csv, document, fastest
from rtp_sim.text import nearest

Reparse = Callable[[Sequence[str]], Namespace]
"""The arguments with more of them at the end."""

FIXED = {
    "run", "strategies", "vary", "output", "report", "workers", "scheduler", "format", "quiet", "default_cluster",
    "gpus", "nodes",
}  # fmt: skip
"""Arguments that say how a sweep runs, not what is computed; the last two have lists of their own."""
DEGREES = ("rtp", "tp", "fsdp", "pp")


def sweep(a: Namespace, reparse: Reparse) -> int:
    """Computes the grid. Exit code 1 if nothing fits, or a point's computation failed."""
    if a.report and not Path(a.report).parent.is_dir():
        raise InputError(f"--report {a.report}: there is no directory {Path(a.report).parent}")
    a.cluster = a.cluster or a.default_cluster
    axes = _axes(a)
    points = _points(a, axes, reparse)
    inputs = {"engine": a.engine, "base": _base(a)}
    folder = Path(a.output) if a.output else None
    table = run_sweep(axes, points, folder, lambda: _scheduler(a), inputs, told=lambda text: _say(a, text))
    if a.report:
        from rtp_sim.report.sweep_html import write_sweep_report

        write_sweep_report(a.report, table, inputs["base"])
        _say(a, f"wrote {a.report}")
    _show(a, table, inputs)
    failed = [row for row in table.rows.values() if row["status"] == "failed"]
    for row in failed:
        print(f"rtp-sim: a point failed: {row['reason']}", file=sys.stderr)
    return 1 if failed or not any(fastest(table).values()) else 0


def _show(a: Namespace, table: Table, inputs: dict[str, Any]) -> None:
    if a.format == "json":
        write_json(document(table, inputs))
    elif a.format == "csv":
        sys.stdout.write(as_csv(table))
    else:
        print(verdict(table))
        print_table(sweep_table(table))
        for line in (*reason_lines(table), *crossing_lines(table)):
            print(line)


def _scheduler(a: Namespace) -> Scheduler:
    if a.scheduler:
        _say(a, f"connecting to {a.scheduler}")
        return DaskWorkers(a.scheduler)
    return LocalProcesses(a.workers)


# ---- the grid


def _axes(a: Namespace) -> list[Axis]:
    """What is varied, in the order given; the strategy last, so that strategies lie side by side."""
    strategies = axis_of(STRATEGY, [s.strip() for s in a.strategies.split(",") if s.strip()] or [""])
    known_strategies([value.text for value in strategies.values])
    if a.gpus and a.nodes:
        raise InputError("--gpus and --nodes are both given; expected one of them")
    axes = [axis_of(name, [str(n) for n in getattr(a, name)]) for name in ("gpus", "nodes") if getattr(a, name)]
    axes += [read_axis(text) for text in a.vary]
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1 or name == STRATEGY:
            flag = "--strategies" if name == STRATEGY else f"--vary {name}"
            raise InputError(f"{name} is varied twice; expected one {flag} with all its values")
    return [*axes, strategies]


def _points(a: Namespace, axes: Sequence[Axis], reparse: Reparse) -> list[Point]:
    """All points of the grid, the last axis fastest."""
    settings = [_values(a, axis, reparse) for axis in axes]
    clusters = next(([v.text for v in axis.values] for axis in axes if axis.name == "cluster"), [a.cluster])
    for axis in axes:
        if "." in axis.name:
            _check_number(axis, clusters)
    points = []
    for choice in product(*(zip(axis.values, ways, strict=True) for axis, ways in zip(axes, settings, strict=True))):
        given = Namespace(**vars(a))
        given.gpus = given.nodes = None
        changes: list[tuple[str, str | float]] = []
        for _, setting in choice:
            for name, value in setting.items():
                if "." in name:
                    changes.append((name, value))
                else:
                    setattr(given, name, value)
        _leave_out_degrees(given)
        points.append(
            Point(tuple(v.text for v, _ in choice), request_of(given, given.strategy), tuple(changes), given.engine)
        )
    return points


def _values(a: Namespace, axis: Axis, reparse: Reparse) -> list[dict[str, Any]]:
    """What each value of the axis sets: an argument by name, or a number of the profile by its dotted key."""
    if axis.name == STRATEGY:
        return [{STRATEGY: value.text} for value in axis.values]
    if "." in axis.name:
        return [{axis.name: _plain_or_text(value.text)} for value in axis.values]
    name = axis.name.replace("-", "_")
    if name in ("gpus", "nodes"):
        return [{name: int(value.text)} for value in axis.values]
    known = [n.replace("_", "-") for n in vars(a) if n not in FIXED]
    if axis.name not in known:
        raise InputError(f"--vary {axis.name}: {nearest(axis.name, known)}; or a number of the profile, {EXAMPLE}")
    if isinstance(getattr(a, name), bool):
        return [{name: _switch(axis.name, value.text)} for value in axis.values]
    return [{name: getattr(reparse([f"--{axis.name}", value.text]), name)} for value in axis.values]


def _check_number(axis: Axis, clusters: Sequence[str]) -> None:
    """InputError for a value that makes sense in none of the clusters' profiles."""
    for value in axis.values:
        errors = []
        for cluster in clusters:
            try:
                load_cluster(cluster, changes={axis.name: _plain_or_text(value.text)})
            except InputError as error:
                errors.append(error)
        if len(errors) == len(clusters):
            raise InputError(f"--vary {axis.name}={value.text}: {errors[0]}")


def _switch(name: str, text: str) -> bool:
    """Switches are varied as NAME=no,yes."""
    if text not in ("yes", "no"):
        raise InputError(f"--vary {name}={text}: expected no or yes, for example --vary {name}=no,yes")
    return text == "yes"


def _plain_or_text(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _leave_out_degrees(given: Namespace) -> None:
    """A degree of an axis that the strategy does not have says nothing about it: --tp 8 is of tp alone."""
    axis = INNER_AXIS.get(given.strategy, "")
    for name in DEGREES[:3]:
        if name != axis:
            setattr(given, name, None)
    if not axis:
        given.dp = None


def _base(a: Namespace) -> dict[str, Any]:
    """What all points have in common, as the documents repeat it."""
    given = Namespace(**vars(a))
    given.gpus = given.nodes = None
    request = asdict(request_of(given, a.strategies.split(",")[0].strip()))
    options = request.pop("options")
    shown = {name: value for name, value in request.items() if name not in (STRATEGY, "gpus", "nodes", "inner")}
    degrees = {name: getattr(a, name) for name in DEGREES}
    return shown | {k: v for k, v in degrees.items() if v is not None} | {"options": options}


def _say(a: Namespace, text: str) -> None:
    if not a.quiet:
        print(f"rtp-sim: {text}", file=sys.stderr)
