"""What nccl-tests print: the tables in a log, whatever stands around them.

A log may hold several runs, the shell's prompt, NCCL's own messages between the lines and the rank prefixes of mpirun
or srun. A table begins with the line that heads its columns; the measurements are the last columns of a row, so that
versions with fewer columns before them (no redop, no root) read alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rtp_sim.errors import InputError
from rtp_sim.hardware.importers.sweeps import PROGRAM, Bandwidths, Device, Row, Sweep, kind_of, ranks_of

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PREFIX = re.compile(r"^\s*(\[\d+,\d+\]<std\w+>\s?:?\s?|\d+:\s)")
_DEVICE = re.compile(
    r"Rank\s+(\d+)(?:\s+Group\s+(\d+))?\s+Pid\s+\d+\s+on\s+(\S+)\s+device\s+(\d+)\s+\[[^\]]*\]\s*(.*\S)?"
)
_ROW = re.compile(r"\s*\d+\s+\d+\s+(u?int\d+|half|float|double|b?float\d+|bfloat16|f8e\dm\d|fp8\w*|char|int8)\b")
_MEASURES = ("time", "cputime", "algbw", "busbw", "#wrong", "error", "i_min", "i_max", "i_p99", "i_cv%")
_END = re.compile(r"#\s*(Out of bounds|Avg bus bandwidth)")
_RUN = re.compile(r"nThread\s+\d+")


@dataclass
class _State:
    """What the lines so far have said. `columns` is empty outside of a table."""

    program: str = ""
    devices: list[Device] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    lead: int = 0
    stamps: int = 0
    start: int = 0
    redop: str = ""
    rows: list[Row] = field(default_factory=list)
    bandwidths: list[Bandwidths] = field(default_factory=list)
    wrong: bool = False


def parse_text(text: str, name: str) -> list[Sweep]:
    """All tables in `text`; `name` stands in errors. InputError if there is none, naming what was looked for, or if a
    table is cut off, wrong in itself, or of a run with wrong results."""
    state, found = _State(), []
    lines = text.splitlines()
    for number, raw in enumerate(lines, 1):
        line = _PREFIX.sub("", _ANSI.sub("", raw))
        words = line.lstrip("# ").split()
        if program := PROGRAM.search(line):
            state.program = program[1]
        if _RUN.search(line):
            state.devices = []
        elif match := _DEVICE.search(line):
            state.devices.append(_device(match, f"{name}, line {number}"))
        elif {"size", "count", "time", "algbw"} <= set(words) or {"size", "count", "cputime"} <= set(words):
            found += _finished(state, name)
            _begin(state, words, number, name)
        elif state.columns and _ROW.match(line):
            _add(state, line.split(), f"{name}, line {number}", number)
        elif state.columns and _END.match(line):
            found += _finished(state, name)
            state.program, state.devices = "", []
    found += _finished(state, name)
    if not found:
        raise InputError(
            f"{name}: no table of nccl-tests in {len(lines)} lines; expected what all_reduce_perf prints, with a line "
            "'# size count type redop root time algbw busbw'"
        )
    return found


def _device(match: re.Match[str], where: str) -> Device:
    if match[2] not in (None, "0"):
        raise InputError(
            f"{where}: found Group {match[2]}; several groups ran at once (NCCL_TESTS_SPLIT), expected one group only"
        )
    return Device(int(match[1]), match[3], int(match[4]), match[5] or "")


def _begin(state: _State, words: list[str], number: int, name: str) -> None:
    if "cputime" in words:
        raise InputError(f"{name}, line {number}: the times are of the CPU (-C); expected a run without -C")
    state.columns = [word for word in words if word in _MEASURES]
    state.lead = words.index("time")
    if state.columns.count("time") != 2 or len(state.columns) % 2:
        raise InputError(
            f"{name}, line {number}: measured columns {' '.join(state.columns)}; expected time, algbw, busbw and "
            "#wrong twice, out of place and in place"
        )
    state.stamps = 2 if "timestamp" in words else 0
    state.start, state.rows, state.bandwidths, state.redop = number, [], [], ""


def _add(state: _State, words: list[str], where: str, number: int) -> None:
    """One row. Runs that only measure in place leave the first half of the columns out."""
    width, half = len(state.columns), len(state.columns) // 2
    values = words[: len(words) - state.stamps]
    both = len(values) >= 3 + width
    if not both and len(values) != state.lead + half:
        raise InputError(
            f"{where}: {len(words)} entries; expected size, count, type and then {width} measured ones "
            f"({' '.join(state.columns)}): the line may be cut off"
        )
    measured = values[-width:] if both else [*["-"] * half, *values[-half:]]
    state.redop = state.redop or (values[3] if len(values) > 3 + (width if both else half) else "")
    times: list[float | None] = []
    for part in (measured[:half], measured[half:]):
        if part[0] == "-":
            times.append(None)
            continue
        of_part = dict(zip(state.columns[:half], part, strict=True))
        time_us, algbw, busbw = (_number(of_part[key], key, where) for key in ("time", "algbw", "busbw"))
        wrong = of_part.get("#wrong", of_part.get("error", "N/A"))
        if "#wrong" in of_part and wrong != "N/A" and _number(wrong, "#wrong", where):
            raise InputError(f"{where}: #wrong is {wrong}; expected 0: a run with wrong results is nothing to go by")
        if not time_us > 0:
            raise InputError(f"{where}: time is {of_part['time']}; expected more than 0 us")
        state.bandwidths.append(Bandwidths(number, algbw, busbw))
        times.append(time_us)
    if int(words[0]) > 0:
        state.rows.append(Row(number, int(words[0]), words[2], times[0], times[1]))


def _number(text: str, column: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{where}: {column} is {text!r}; expected a number") from None


def _finished(state: _State, name: str) -> list[Sweep]:
    """The table that ends here, if there is one."""
    if not state.columns:
        return []
    where = f"{name}, line {state.start}"
    state.columns = []
    if not state.rows:
        raise InputError(f"{where}: the table has no rows; expected a line for each message size")
    kind = kind_of(state.program, name, state.redop, state.bandwidths, where)
    devices = sorted(state.devices, key=lambda device: device.rank)
    complete = bool(devices) and [device.rank for device in devices] == list(range(len(devices)))
    ranks = ranks_of(kind, len(devices) if complete else 0, state.bandwidths, where)
    return [Sweep(name, state.start, kind, ranks, tuple(devices) if complete else (), tuple(state.rows))]
