"""`rtp-sim trace`: where the time went in traces of PyTorch's profiler, of any program."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from rtp_sim.errors import InputError
from rtp_sim.report.diff_tables import print_grid
from rtp_sim.report.tables import write_json
from rtp_sim.report.trace_tables import trace_grids, trace_json
from rtp_sim.timeline_file import save_timeline
from rtp_sim.traces.kineto import read_trace
from rtp_sim.traces.summary import summarise


def trace(a: Namespace) -> int:
    """Reads the files, or those of a run's directory, and prints a summary per rank."""
    paths = [file for given in a.files for file in _files(Path(given))]
    if a.timeline:
        _write_timeline(a)
    traces = []
    for path in paths:
        if not a.quiet:
            print(f"rtp-sim: reading {path}", file=sys.stderr)
        traces.append(read_trace(path))
    ranks = summarise(traces, a.worst)
    if a.format == "json":
        write_json(trace_json(ranks))
        return 0
    for grid in trace_grids(ranks, a.worst):
        print_grid(grid)
    return 0


def _files(given: Path) -> list[Path]:
    """The file itself; of a directory the traces in it, those of a run by rank."""
    if not given.is_dir():
        return [given]
    of_run = sorted(given.glob("ranks/*/trace.json.gz"), key=lambda p: (len(p.parent.name), p.parent.name))
    found = of_run or sorted([*given.glob("*.json"), *given.glob("*.json.gz")])
    if not found:
        raise InputError(
            f"{given} holds no traces; expected *.json or *.json.gz, or what rtp-sim run --profile-trace "
            f"-o {given} leaves"
        )
    return found


def _write_timeline(a: Namespace) -> None:
    if len(a.files) != 1 or not Path(a.files[0]).is_dir():
        raise InputError(f"--timeline {a.timeline}: expected a single directory of rtp-sim run --profile-trace")
    # Imported here: reading a run needs pydantic.
    from rtp_sim.validation.runs import load_run
    from rtp_sim.validation.traced import traced_timeline

    run = load_run(Path(a.files[0]))
    save_timeline(traced_timeline(run.path, run.schedule), a.timeline)
    if not a.quiet:
        print(f"rtp-sim: wrote {a.timeline}", file=sys.stderr)
