"""The JSON form of a `Timeline`: what an executor measured or an engine predicted, stored with its schedule.

`{"schema": "rtp-sim/timeline/1", "kind", "meta", "schedule", "representative_of", "ranks"}`, where `schedule` is a
whole schedule as serialize.py writes it and `ranks` maps each represented rank to `{"start_ns": [...], "end_ns":
[...]}`, indexed by op. The same timeline always gives the same bytes. Whatever does not fit together is an error that
names its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rtp_sim.errors import InputError
from rtp_sim.schedule.ir import Schedule
from rtp_sim.schedule.serialize import from_dict, to_dict
from rtp_sim.timeline import RankTimes, Timeline, TimesNs

SCHEMA = "rtp-sim/timeline/1"
KINDS = ("predicted", "measured")
KEYS = ("schema", "kind", "meta", "schedule", "representative_of", "ranks")

Json = Any  # what json.loads returns


def timeline_to_json(timeline: Timeline) -> str:
    """The timeline as one line of ASCII JSON. InputError for a meta value that JSON cannot hold (nan)."""
    document = {
        "schema": SCHEMA,
        "kind": timeline.kind,
        "meta": dict(timeline.meta),
        "schedule": to_dict(timeline.schedule),
        "representative_of": list(timeline.representative_of),
        "ranks": {
            str(rank): {"start_ns": times.start_ns.tolist(), "end_ns": times.end_ns.tolist()}
            for rank, times in sorted(timeline.ranks.items())
        },
    }
    try:
        return json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n"
    except ValueError as error:
        raise InputError(f"timeline JSON: meta holds a number that JSON has no word for: {error}") from None


def timeline_from_json(text: str) -> Timeline:
    """The timeline stored in `text`. InputError (ScheduleError inside the schedule) naming what is wrong and where."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(f"line {error.lineno}, column {error.colno}: {error.msg}; the file may be cut off") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        given = data.get("schema") if isinstance(data, dict) else data
        raise _wrong(f'schema is {_short(given)}; expected an object with "schema": "{SCHEMA}"')
    if missing := [key for key in KEYS if key not in data]:
        raise _wrong(f'the key "{missing[0]}" is missing; expected {", ".join(KEYS)}')
    if unknown := [key for key in data if key not in KEYS]:
        raise _wrong(f'unknown key "{unknown[0]}"; known here: {", ".join(KEYS)}')
    if data["kind"] not in KINDS:
        raise _wrong(f"kind is {_short(data['kind'])}; expected one of {', '.join(KINDS)}")
    schedule = from_dict(data["schedule"])
    ranks = _ranks(schedule, data["ranks"])
    return Timeline(
        schedule, data["kind"], ranks, _representatives(schedule, ranks, data["representative_of"]), _meta(data["meta"])
    )


def save_timeline(timeline: Timeline, path: str | Path) -> None:
    """Writes the timeline to a file. InputError if that is not possible."""
    try:
        Path(path).write_text(timeline_to_json(timeline), encoding="ascii")
    except OSError as error:
        raise InputError(f"cannot write the timeline to {path}: {error.strerror}") from None


def load_timeline(path: str | Path) -> Timeline:
    """The timeline in a file. InputError, naming the file, if there is none in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(
            f"cannot read a timeline from {path}: {reason}; expected a file such as measured.json"
        ) from None
    try:
        return timeline_from_json(text)
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None


def _ranks(schedule: Schedule, data: Json) -> dict[int, RankTimes]:
    if not isinstance(data, dict) or not data:
        raise _wrong(f"ranks is {_short(data)}; expected an object with the times of each represented rank")
    ranks: dict[int, RankTimes] = {}
    for key, times in data.items():
        rank = int(key) if key.isdigit() else -1
        if not 0 <= rank < schedule.world_size:
            raise _wrong(f'ranks has "{key}"; expected ranks from 0 to {schedule.world_size - 1}')
        if not isinstance(times, dict) or sorted(times) != ["end_ns", "start_ns"]:
            raise _wrong(f"ranks.{key} is {_short(times)}; expected an object with start_ns and end_ns")
        ops = len(schedule.program(rank).ops)
        start_ns = _times(f"ranks.{key}.start_ns", times["start_ns"], ops)
        end_ns = _times(f"ranks.{key}.end_ns", times["end_ns"], ops)
        for op in np.flatnonzero(end_ns < start_ns)[:1].tolist():
            raise _wrong(f"ranks.{key}: op %{op} ends at {end_ns[op]} ns, before its start at {start_ns[op]} ns")
        ranks[rank] = RankTimes(start_ns, end_ns)
    return ranks


def _times(place: str, data: Json, ops: int) -> TimesNs:
    if not isinstance(data, list) or not all(type(t) is int for t in data):
        raise _wrong(f"{place} is {_short(data)}; expected a list of whole numbers of ns")
    if len(data) != ops:
        raise _wrong(f"{place} has {len(data)} entries; expected one per op of the rank's program, {ops}")
    try:
        return np.array(data, dtype=np.int64)
    except OverflowError:
        raise _wrong(f"{place} holds a number beyond 64 bits; expected times in ns") from None


def _representatives(schedule: Schedule, ranks: dict[int, RankTimes], data: Json) -> tuple[int, ...]:
    if not isinstance(data, list) or len(data) != schedule.world_size:
        raise _wrong(f"representative_of is {_short(data)}; expected one rank for each of {schedule.world_size} ranks")
    for rank, other in enumerate(data):
        if type(other) is not int or other not in ranks:
            raise _wrong(f"representative_of[{rank}] is {_short(other)}; expected one of {sorted(ranks)}")
        if schedule.program_of_rank[other] != schedule.program_of_rank[rank]:
            raise _wrong(f"representative_of[{rank}] is {other}, which runs another program")
    return tuple(data)


def _meta(data: Json) -> dict[str, str | int | float | bool | None]:
    if not isinstance(data, dict):
        raise _wrong(f"meta is {_short(data)}; expected an object")
    for key, value in data.items():
        if value is not None and not isinstance(value, str | int | float):
            raise _wrong(f"meta.{key} is {_short(value)}; expected a string, a number, true, false or null")
    return data


def _wrong(what: str) -> InputError:
    return InputError(f"timeline JSON: {what}")


def _short(value: Json) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
