"""What `rtp-sim export` does: a plan as files for frameworks, printed or written to a directory."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from rtp_sim.errors import InputError
from rtp_sim.experiment import Setting, settle
from rtp_sim.export.command import simulate_command
from rtp_sim.export.settings import Settings
from rtp_sim.export.targets import export, targets_of
from rtp_sim.planner.plan import Plan
from rtp_sim.report.tables import write_json

SCHEMA = "rtp-sim/export/1"


def export_plan(a: Namespace, setting: Setting) -> int:
    """Prints or writes the settings of a plan. Exit code 1 if none of the targets can do it."""
    found = export(setting, targets_of(a.to))
    if a.output:
        write_settings(Path(a.output), found)
    if a.format == "json":
        write_json({"schema": SCHEMA, "targets": [settings_json(name, made) for name, made in found.items()]})
    else:
        _show(a, found)
    return 0 if any(isinstance(made, Settings) for made in found.values()) else 1


def export_plans(folder: Path, plan: Plan) -> list[Path]:
    """Every plan shown in a folder of its own: what each target is given, and in notes.txt what it is not."""
    written = []
    for row in plan.shown:
        request = row.candidate.request(plan.workload)
        found = export(settle(request))
        own = folder / f"{row.rank}-{row.candidate.strategy}"
        where = f"on {row.candidate.gpus} GPUs of {row.candidate.cluster}"
        lines = [str(row.candidate), where, "", simulate_command(request)]
        for name, made in found.items():
            lines += ["", f"{name}: {made if isinstance(made, str) else made.file_name}"]
            lines += [f"  {text}" for text in (() if isinstance(made, str) else made.notes)]
        write_settings(own, found, "\n".join(lines) + "\n")
        written.append(own)
    return written


def write_settings(folder: Path, found: Mapping[str, Settings | str], notes: str = "") -> None:
    """Writes the files of a plan into a folder, which is made, and `notes` beside them. InputError if that is not
    possible."""
    files = {made.file_name: made.text for made in found.values() if isinstance(made, Settings)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (files | ({"notes.txt": notes} if notes else {})).items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"cannot write the settings to {str(folder)!r}: {error.strerror}") from None


def settings_json(name: str, made: Settings | str) -> dict[str, object]:
    """One target: its file and notes, or `reason`."""
    if isinstance(made, str):
        return {"target": name, "file_name": None, "text": None, "notes": [], "reason": made}
    return {"target": name, "file_name": made.file_name, "text": made.text, "notes": list(made.notes), "reason": None}


def _show(a: Namespace, found: Mapping[str, Settings | str]) -> None:
    """Files on stdout (named, where there are several), the rest on stderr, so that one file can be piped."""
    for name, made in found.items():
        if isinstance(made, str):
            print(f"rtp-sim: not for {name}: {made}", file=sys.stderr)
            continue
        if a.output:
            print(Path(a.output) / made.file_name)
        else:
            print(f"# {made.file_name}\n{made.text}" if len(found) > 1 else made.text, end="")
        for text in made.notes if not a.quiet else ():
            print(f"rtp-sim: {name}: {text}", file=sys.stderr)
