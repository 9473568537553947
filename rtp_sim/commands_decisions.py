"""What `rtp-sim validate --decisions` does: the planner's choices among published runs, and what they cost.

Exit codes are those of `validate --measured`: 1 if some rows have mistakes.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from rtp_sim.commands_measured import progress, say
from rtp_sim.report.decisions_tables import decision_grids, decision_verdict, decisions_json, write_decision_report
from rtp_sim.report.diff_tables import print_grid
from rtp_sim.report.tables import write_json
from rtp_sim.validation.measured import read_measured
from rtp_sim.validation.published import predict


def validate_decisions(a: Namespace) -> int:
    """Ranks the rows of the files within their groups and says what the first in rank cost."""
    tables = [read_measured(Path(name)) for name in a.decisions]
    outcomes = predict(tables, Path(a.output) if a.output else None, a.workers, progress(a))
    if a.report:
        write_decision_report(a.report, outcomes, a.worst)
        say(a, f"wrote {a.report}")
    for outcome in outcomes:
        if outcome.invalid:
            print(f"rtp-sim: {outcome.invalid}", file=sys.stderr)
    if a.format == "json":
        write_json(decisions_json(outcomes))
    else:
        print(decision_verdict(outcomes))
        for grid in decision_grids(outcomes, a.worst):
            print_grid(grid)
    return 1 if any(outcome.invalid for outcome in outcomes) else 0
