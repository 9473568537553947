"""`RunFolder`: where a sweep's results go as they come, and are found again.

    sweep.json    what was asked for, and with which versions
    points.jsonl  a line per computed point, under its key, appended as it comes
    log.jsonl     what differs from run to run: seconds and process of each computation
    table.json, table.csv   all points of the grid in order, written at the end

A line is appended with one write; one that a kill cut short is recognised by its missing end and dropped. At the end
points.jsonl is put into the order of the grid, so a sweep that was killed and resumed leaves the same bytes as one that
was not, log.jsonl apart. The folder is locked while a sweep runs in it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rtp_sim.errors import InputError
from rtp_sim.sweep.evaluate import NAMES, Answer, Row

INPUTS, POINTS, LOG = "sweep.json", "points.jsonl", "log.jsonl"
SCHEMA = "rtp-sim/sweep/1"


class RunFolder:
    """Opened for one sweep, whose points have `keys`. `rows` are those that earlier runs left, by key.

    InputError if the folder cannot be written, holds something else or only points of other inputs, or is in use.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any], keys: Iterable[str]) -> None:
        self.path = path
        self._wanted = list(dict.fromkeys(keys))
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"cannot use the folder {str(path)!r}: {error.strerror}") from None
        try:
            self._take()
            self._all = _read(path / POINTS)
            self._check(inputs)
            self._points = os.open(path / POINTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._log = os.open(path / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except BaseException:
            os.close(self._lock)
            raise
        replace_file(path / INPUTS, json.dumps(inputs, indent=2, ensure_ascii=False) + "\n")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in (self._points, self._log, self._lock):
            os.close(descriptor)

    @property
    def rows(self) -> dict[str, Row]:
        """Rows of this sweep's points that need not be computed again: all that did not fail."""
        return {
            key: self._all[key] for key in self._wanted if key in self._all and self._all[key]["status"] != "failed"
        }

    def keep(self, answer: Answer) -> None:
        """Appends a row."""
        key = answer.row["key"]
        self._all[key] = answer.row
        _append(self._points, answer.row)
        _append(self._log, {"key": key, "wall_s": round(answer.wall_s, 6), "worker": answer.worker})

    def put_in_order(self) -> None:
        """The rows of the grid in its order, then those of other sweeps in the same folder."""
        order = [key for key in self._wanted if key in self._all]
        order += [key for key in self._all if key not in set(self._wanted)]
        text = "".join(_line(self._all[key]) for key in order)
        replace_file(self.path / POINTS, text)

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"the folder {str(self.path)!r} is in use by another sweep; expected one at a time"
            ) from None

    def _check(self, inputs: Mapping[str, Any]) -> None:
        """Points are shared by key, so a sweep may go on from another; from one that shares none it may not."""
        folder = f"the folder {str(self.path)!r}"
        if not (self.path / INPUTS).exists():
            if others := sorted(p.name for p in self.path.iterdir()):
                raise InputError(
                    f"{folder} holds {others[0]} and no {INPUTS}: expected the folder of a sweep, or an empty or new "
                    f"one"
                )
            return
        if not self._all or any(key in self._all for key in self._wanted):
            return
        raise InputError(
            f"{folder} holds another sweep: none of its {len(self._all)} points is one of this sweep's "
            f"{len(self._wanted)} ({_difference(self.path / INPUTS, inputs)}); expected the folder of the same sweep, "
            f"or a new one"
        )


def _difference(path: Path, inputs: Mapping[str, Any]) -> str:
    """What was asked for there and is not here, in a few words."""
    try:
        there: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return f"its {path.name} cannot be read"
    for name in ("program", "base", "axes", "engine"):
        if there.get(name) != inputs.get(name):
            if name == "base" and isinstance(there.get(name), dict):
                pairs = [(k, there[name].get(k), v) for k, v in inputs[name].items() if there[name].get(k) != v]
                if pairs:
                    return f"{pairs[0][0]} is {pairs[0][1]} there and {pairs[0][2]} here"
            return f"its {'version of the program' if name == 'program' else name} differs"
    return "a profile or a model has changed since"


def _read(path: Path) -> dict[str, Row]:
    """The rows by key, the last of each; the file is cut behind its last whole line."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    rows: dict[str, Row] = {}
    for line in data[:whole].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() == set(NAMES):
            rows[row["key"]] = row
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _append(descriptor: int, row: Mapping[str, Any]) -> None:
    os.write(descriptor, _line(row).encode())


def replace_file(path: Path, text: str) -> None:
    """Puts a file there, whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)
