"""What `rtp-sim export` does: a plan as files for frameworks, printed or written to a directory."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from rtp_sim.errors import InputError
from rtp_sim.experiment import Setting
from rtp_sim.export.settings import Settings
from rtp_sim.export.targets import export, targets_of
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


def write_settings(folder: Path, found: Mapping[str, Settings | str]) -> list[Path]:
    """Writes the files of a plan into a folder, which is made. InputError if that is not possible."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for made in found.values():
            if isinstance(made, Settings):
                path = folder / made.file_name
                path.write_text(made.text, encoding="utf-8", newline="\n")
                written.append(path)
    except OSError as error:
        raise InputError(f"cannot write the settings to {str(folder)!r}: {error.strerror}") from None
    return written


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
