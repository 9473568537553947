"""A whole sweep: points keyed, what the folder has taken from there, the rest computed, the table written.

table = run_sweep(axes, points, Path("sweep"), LocalProcesses(2))
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rtp_sim import __version__
from rtp_sim.errors import InputError
from rtp_sim.sweep.axes import Axis
from rtp_sim.sweep.drive import Evaluate, Progress, SchedulerLost, compute, keyed
from rtp_sim.sweep.evaluate import Answer, Row, evaluate, without_result
from rtp_sim.sweep.folder import RunFolder, replace_file
from rtp_sim.sweep.points import Point, key_of, program_hash
from rtp_sim.sweep.schedulers import Scheduler
from rtp_sim.sweep.table import Table, as_csv, document


def run_sweep(
    axes: Sequence[Axis],
    points: Sequence[Point],
    folder: Path | None,
    scheduler: Callable[[], Scheduler],
    inputs: Mapping[str, Any] | None = None,
    *,
    evaluate_point: Evaluate = evaluate,
    told: Callable[[str], None] = lambda text: None,
) -> Table:
    """The table of all points, which are in the order of the grid. `scheduler` is made only if there is something to
    compute; `told` hears of progress. With a `folder` every row is kept there as it comes, and the table at the end.

    Raises InputError if no point can be keyed (an unknown profile, say), for a folder that holds other things, or where
    the scheduler cannot be reached or is lost on the way.
    """
    asked = dict(inputs or {})
    keys, refused = _keys(points)
    wanted = {key: point for key, point in keyed(points, keys).items() if key not in refused}
    with ExitStack() as stack:
        kept = None
        if folder is not None:
            about = {**asked, "axes": _described(axes), "program": program_hash(), "versions": versions()}
            kept = stack.enter_context(RunFolder(folder, about, wanted))
        rows = dict(kept.rows) if kept else {}
        left = {key: point for key, point in wanted.items() if key not in rows}
        if rows:
            told(f"{len(rows)} of {len(wanted)} points are in {folder} already")
        if left:
            _compute(left, len(wanted), scheduler, rows, kept, evaluate_point, told)
        at = {p.at: rows[key] if key in rows else refused[key] for p, key in zip(points, keys, strict=True)}
        table = Table(tuple(axes), at)
        if kept is not None:
            kept.put_in_order()
            text = json.dumps(document(table, asked), indent=1, ensure_ascii=False, allow_nan=False)
            replace_file(kept.path / "table.json", text + "\n")
            replace_file(kept.path / "table.csv", as_csv(table))
    return table


def versions() -> dict[str, str]:
    """Of what the numbers came out of."""
    found = {"rtp_sim": __version__, "python": platform.python_version()}
    for name in ("numpy", "simpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _keys(points: Sequence[Point]) -> tuple[list[str], dict[str, Row]]:
    """A key per point, and rows of those that have none: a profile without the number that is changed, say. InputError
    if that is so of all."""
    keys: list[str] = []
    refused: dict[str, Row] = {}
    for number, point in enumerate(points):
        try:
            keys.append(key_of(point))
        except InputError as error:
            keys.append(f"refused {number}")
            refused[keys[-1]] = without_result("", "cannot", str(error))
    if points and len(refused) == len(points):
        raise InputError(str(next(iter(refused.values()))["reason"]))
    return keys, refused


def _compute(
    left: Mapping[str, Point], total: int, scheduler: Callable[[], Scheduler], rows: dict[str, Row],
    kept: RunFolder | None, evaluate_point: Evaluate, told: Callable[[str], None],
) -> None:  # fmt: skip
    """Fills `rows` with what is left."""
    workers = scheduler()
    progress = Progress(total, total - len(left), told)

    def keep(answer: Answer) -> None:
        # What is in memory is what is in the file, also where the answer did not come through one.
        row = json.loads(json.dumps(answer.row, allow_nan=False))
        rows[row["key"]] = row
        if kept is not None:
            kept.keep(answer)
        progress.count()
        progress.tick()

    try:
        compute(left, workers, keep, evaluate_point, progress.tick)
    except SchedulerLost as error:
        where = f"; they are in {kept.path}, and the same command goes on from there" if kept else ""
        raise InputError(f"{error} after {len(rows)} of {total} points{where}") from None
    finally:
        workers.close()


def _described(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    return [{"name": axis.name, "values": [value.text for value in axis.values]} for axis in axes]
