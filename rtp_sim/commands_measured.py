"""What `rtp-sim validate --measured` and `--all` do: published runs predicted, as a table, JSON or a page.

Exit code 0: every row was read. 1: some rows have mistakes (they are named; the others are predicted). 2: a file cannot
be read at all. Rows that are in order but cannot be predicted are listed with the reason and do not count as mistakes.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from rtp_sim.errors import InputError
from rtp_sim.report.accuracy_tables import accuracy_grids, accuracy_json, verdict
from rtp_sim.report.diff_tables import print_grid
from rtp_sim.report.tables import write_json
from rtp_sim.validation.measured import read_measured
from rtp_sim.validation.published import Progress, predict

FOLDER_VARIABLE = "RTP_SIM_MEASURED"
DEFAULT_FOLDER = Path("..") / "shared" / "measured"
EVERY_S = 5.0


def validate_measured(a: Namespace) -> int:
    """Predicts the rows of the files and says how well."""
    tables = [read_measured(path) for path in files_of(a)]
    outcomes = predict(tables, Path(a.output) if a.output else None, a.workers, progress(a))
    if a.report:
        from rtp_sim.report.accuracy_html import write_accuracy_report

        write_accuracy_report(a.report, outcomes, a.worst)
        say(a, f"wrote {a.report}")
    for outcome in outcomes:
        if outcome.invalid:
            print(f"rtp-sim: {outcome.invalid}", file=sys.stderr)
    if a.format == "json":
        write_json(accuracy_json(outcomes))
    else:
        print(verdict(outcomes))
        for grid in accuracy_grids(outcomes, a.worst):
            print_grid(grid)
    return 1 if any(outcome.invalid for outcome in outcomes) else 0


def files_of(a: Namespace) -> list[Path]:
    """The files asked for. InputError if a folder holds none."""
    if a.all is None:
        return [Path(name) for name in a.measured]
    folder = Path(a.all or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)
    found = sorted(folder.glob("*.csv"))
    if not found:
        raise InputError(
            f"--all: no CSV files in {str(folder)!r}; expected a folder of measured runs, given as --all FOLDER or in "
            f"the environment variable {FOLDER_VARIABLE}"
        )
    return found


def progress(a: Namespace) -> Progress:
    """Tells on stderr, every few seconds, how many experiments are predicted."""
    began = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= EVERY_S:
            last = now
            say(a, f"{done} of {total} different experiments predicted, {now - began:.0f} s")

    return tell


def say(a: Namespace, message: str) -> None:
    """A line on stderr, unless --quiet."""
    if not a.quiet:
        print(f"rtp-sim: {message}", file=sys.stderr)
