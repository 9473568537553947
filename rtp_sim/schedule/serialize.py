"""The JSON form of a schedule: what is stored in files and handed to executor machines.

`{"schema": "rtp-sim/schedule/1", "name", "world_size", "meta", "groups", "programs", "program_of_rank"}`;
fields at their default are left out, so that large schedules stay small, and no field is ever guessed: an
unknown key, a missing key or a value of the wrong type is an error that names its place
(`programs[0].ops[12].reads[1]`). Keys keep the order of the schedule, so one schedule always gives the same
bytes.

Standard library only: machines that have nothing but torch read these files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.ir import (
    COLLECTIVES,
    Action,
    Buffer,
    Collective,
    Compute,
    Dims,
    Group,
    Holding,
    Hop,
    Op,
    Part,
    Program,
    Recv,
    Schedule,
    Send,
    Shift,
    Site,
    Size,
)
from rtp_sim.schedule.text import Meta, meta_text

SCHEMA = "rtp-sim/schedule/1"

T = TypeVar("T")
Json = Any  # what json.loads returns
Record = dict[str, Json]


def to_json(schedule: Schedule) -> str:
    """The schedule as one line of ASCII JSON, the same bytes for the same schedule. ScheduleError for a nan
    in meta.
    """
    return json.dumps(to_dict(schedule), separators=(",", ":"), allow_nan=False) + "\n"


def from_json(text: str) -> Schedule:
    """The schedule stored in `text`. ScheduleError naming the place where it is cut off or malformed."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        reason = "the text ends early, as a file cut off does" if cut else error.msg
        raise ScheduleError(
            f"schedule JSON: line {error.lineno}, column {error.colno}: {reason}; expected an object with "
            f'"schema": "{SCHEMA}"'
        ) from None
    return from_dict(data)


def to_dict(schedule: Schedule) -> Record:
    """The schedule as plain dicts, lists, strings and numbers, ready for json.dumps."""
    for key, value in schedule.meta.items():
        meta_text(key, value)
    return {
        "schema": SCHEMA,
        "name": schedule.name,
        "world_size": schedule.world_size,
        "meta": dict(schedule.meta),
        "groups": [
            {"name": g.name, "dims": list(g.dims), "instances": [list(m) for m in g.instances]}
            for g in schedule.groups.values()
        ],
        "programs": [
            {
                "name": p.name,
                "buffers": [_buffer_dict(b) for b in p.buffers.values()],
                "ops": [_op_dict(op) for op in p.ops],
            }
            for p in schedule.programs
        ],
        "program_of_rank": list(schedule.program_of_rank),
    }


def from_dict(data: Json) -> Schedule:
    """The schedule held by plain dicts as `to_dict` makes them. ScheduleError naming the place of what is
    wrong.
    """
    reader = _Reader("", data)
    schema = reader.need("schema", _text)
    if schema != SCHEMA:
        raise ScheduleError(f"schedule JSON: schema is {schema!r}; expected {SCHEMA!r}")
    schedule = Schedule(
        name=reader.need("name", _text),
        world_size=reader.need("world_size", _whole),
        meta=reader.need("meta", _meta),
        groups=_by_name("groups", reader.need("groups", _list_of(_group))),
        programs=reader.need("programs", _list_of(_program)),
        program_of_rank=reader.need("program_of_rank", _list_of(_whole)),
    )
    reader.finish()
    return schedule


def _buffer_dict(buffer: Buffer) -> Record:
    record = {
        "name": buffer.name,
        "category": buffer.category,
        "dtype": buffer.dtype,
        "numel": _size_json(buffer.numel),
    }
    holds = [[h.layer, h.split] if h.split else [h.layer] for h in buffer.holds]
    flags = _set(live_in=buffer.live_in, live_out=buffer.live_out, holds=holds, slice_of=buffer.slice_of)
    return record | _part_dict(buffer.part) | flags


def _op_dict(op: Op) -> Record:
    record = {"index": op.index, "name": op.name, "stream": op.stream} | _action_dict(op.action)
    sides = _set(reads=list(op.reads), writes=list(op.writes), after=list(op.after), blocks_host=op.blocks_host)
    return record | sides


def _action_dict(action: Action) -> Record:
    match action:
        case Compute(kernel, dtype, dims, part, variants, site):
            record: Record = {"kind": "compute", "kernel": kernel, "dtype": dtype, "dims": _dims_json(dims)}
            shards = {} if variants is None else {"variants": [_dims_json(v) for v in variants]}
            return record | _part_dict(part) | _site_dict(site) | shards
        case Shift(group, hops, chunk_bytes):
            steps = [
                {"offset": list(h.offset), "size_bytes": _size_json(h.size_bytes)} | _part_dict(h.part) for h in hops
            ]
            chunk = {} if chunk_bytes is None else {"chunk_bytes": chunk_bytes}
            return {"kind": "shift", "group": group, "hops": steps} | chunk
        case Collective(kind, group, size_bytes, dtype, root):
            return {"kind": kind, "group": group, "size_bytes": size_bytes, "dtype": dtype} | _set(root=root)
        case Send(group, offset, size_bytes, tag) | Recv(group, offset, size_bytes, tag):
            kind = "send" if isinstance(action, Send) else "recv"
            return {
                "kind": kind,
                "group": group,
                "offset": list(offset),
                "size_bytes": size_bytes,
                "tag": tag,
            }


def _set(**fields: Json) -> Record:
    """The fields that are not at their (falsy) default."""
    return {key: value for key, value in fields.items() if value}


def _part_dict(part: Part | None) -> Record:
    return {} if part is None else {"part": {"group": part.group, "offset": list(part.offset)}}


def _site_dict(site: Site | None) -> Record:
    return {} if site is None else {"site": {"layer": site.layer, "call": site.call} | _set(split=site.split)}


def _size_json(size: Size) -> Json:
    return size if isinstance(size, int) else list(size)


def _dims_json(dims: Dims) -> Json:
    return [[name, size] for name, size in dims]


Read = Callable[[str, Json], T]
"""Turns the value found at a place into a T, or raises naming the place."""


def _wrong(place: str, value: Json, expected: str) -> ScheduleError:
    given = json.dumps(value)
    given = given if len(given) <= 60 else given[:57] + "..."
    return ScheduleError(f"schedule JSON: {place or 'top level'}: expected {expected}, got {given}")


class _Reader:
    """Takes the fields of one JSON object and sees that none is left over."""

    def __init__(self, place: str, data: Json) -> None:
        if not isinstance(data, dict):
            raise _wrong(place, data, "an object")
        self.place, self.data, self.known = place, data, set[str]()

    def need(self, key: str, read: Read[T]) -> T:
        """A field that must be there."""
        if key not in self.data:
            raise ScheduleError(f'schedule JSON: {self.place or "top level"}: the key "{key}" is missing')
        self.known.add(key)
        return read(f"{self.place}.{key}".lstrip("."), self.data[key])

    def get(self, key: str, read: Read[T], default: T) -> T:
        """A field that may be left out."""
        self.known.add(key)
        return self.need(key, read) if key in self.data else default

    def finish(self) -> None:
        """Nothing unknown may be left."""
        if unknown := [key for key in self.data if key not in self.known]:
            place, expected = self.place or "top level", ", ".join(sorted(self.known))
            raise ScheduleError(f'schedule JSON: {place}: unknown key "{unknown[0]}"; known here: {expected}')


def _text(place: str, value: Json) -> str:
    if not isinstance(value, str):
        raise _wrong(place, value, "a string")
    return value


def _whole(place: str, value: Json) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(place, value, "a whole number")
    return value


def _flag(place: str, value: Json) -> bool:
    if not isinstance(value, bool):
        raise _wrong(place, value, "true or false")
    return value


def _list_of(read: Read[T]) -> Read[tuple[T, ...]]:
    def read_list(place: str, value: Json) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise _wrong(place, value, "a list")
        return tuple(read(f"{place}[{i}]", item) for i, item in enumerate(value))

    return read_list


_texts, _wholes = _list_of(_text), _list_of(_whole)


def _size(place: str, value: Json) -> Size:
    return _wholes(place, value) if isinstance(value, list) else _whole(place, value)


def _meta(place: str, value: Json) -> dict[str, Meta]:
    if not isinstance(value, dict):
        raise _wrong(place, value, "an object")
    for key, item in value.items():
        if item is not None and not isinstance(item, str | int | float):
            raise _wrong(f"{place}.{key}", item, "a string, a number, true, false or null")
    return value


def _by_name(place: str, items: tuple[T, ...]) -> dict[str, T]:
    named: dict[str, T] = {}
    for i, item in enumerate(items):
        name = str(getattr(item, "name", ""))
        if name in named:
            raise ScheduleError(f"schedule JSON: {place}[{i}].name: {name!r} is there twice")
        named[name] = item
    return named


def _group(place: str, value: Json) -> Group:
    reader = _Reader(place, value)
    group = Group(reader.need("name", _text), reader.need("dims", _wholes), reader.need("instances", _list_of(_wholes)))
    reader.finish()
    return group


def _program(place: str, value: Json) -> Program:
    reader = _Reader(place, value)
    buffers = _by_name(f"{place}.buffers", reader.need("buffers", _list_of(_buffer)))
    program = Program(reader.need("name", _text), buffers, reader.need("ops", _list_of(_op)))
    reader.finish()
    return program


def _buffer(place: str, value: Json) -> Buffer:
    reader = _Reader(place, value)
    buffer = Buffer(
        name=reader.need("name", _text),
        category=reader.need("category", _text),
        dtype=reader.need("dtype", _text),
        numel=reader.need("numel", _size),
        part=reader.get("part", _part, None),
        live_in=reader.get("live_in", _flag, False),
        live_out=reader.get("live_out", _flag, False),
        holds=reader.get("holds", _list_of(_holding), ()),
        slice_of=reader.get("slice_of", _text, ""),
    )
    reader.finish()
    return buffer


def _op(place: str, value: Json) -> Op:
    reader = _Reader(place, value)
    op = Op(
        index=reader.need("index", _whole),
        name=reader.need("name", _text),
        stream=reader.need("stream", _text),
        action=_read_action(reader),
        reads=reader.get("reads", _texts, ()),
        writes=reader.get("writes", _texts, ()),
        after=reader.get("after", _wholes, ()),
        blocks_host=reader.get("blocks_host", _flag, False),
    )
    reader.finish()
    return op


def _read_action(reader: _Reader) -> Action:
    kind = reader.need("kind", _text)
    if kind == "compute":
        return Compute(
            kernel=reader.need("kernel", _text),
            dtype=reader.need("dtype", _text),
            dims=reader.need("dims", _dims),
            part=reader.get("part", _part, None),
            variants=reader.get("variants", _list_of(_dims), None),
            site=reader.get("site", _site, None),
        )
    if kind == "shift":
        return Shift(
            group=reader.need("group", _text),
            hops=reader.need("hops", _list_of(_hop)),
            chunk_bytes=reader.get("chunk_bytes", _whole, None),
        )
    if kind in COLLECTIVES:
        return Collective(
            kind=kind,
            group=reader.need("group", _text),
            size_bytes=reader.need("size_bytes", _whole),
            dtype=reader.need("dtype", _text),
            root=reader.get("root", _whole, 0),
        )
    if kind not in ("send", "recv"):
        raise _wrong(f"{reader.place}.kind", kind, f"one of compute, shift, send, recv, {', '.join(COLLECTIVES)}")
    return (Send if kind == "send" else Recv)(
        group=reader.need("group", _text),
        offset=reader.need("offset", _wholes),
        size_bytes=reader.need("size_bytes", _whole),
        tag=reader.need("tag", _text),
    )


def _hop(place: str, value: Json) -> Hop:
    reader = _Reader(place, value)
    hop = Hop(reader.need("offset", _wholes), reader.need("size_bytes", _size), reader.get("part", _part, None))
    reader.finish()
    return hop


def _part(place: str, value: Json) -> Part:
    reader = _Reader(place, value)
    part = Part(reader.need("group", _text), reader.need("offset", _wholes))
    reader.finish()
    return part


def _site(place: str, value: Json) -> Site:
    reader = _Reader(place, value)
    site = Site(reader.need("layer", _text), reader.need("call", _whole), reader.get("split", _text, ""))
    reader.finish()
    return site


def _holding(place: str, value: Json) -> Holding:
    names = _texts(place, value)
    if not 1 <= len(names) <= 2:
        raise _wrong(place, value, "a layer, or a layer and how it is split")
    return Holding(*names)


def _dims(place: str, value: Json) -> Dims:
    return _list_of(_dim)(place, value)


def _dim(place: str, value: Json) -> tuple[str, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise _wrong(place, value, 'a name and a size, as in ["m", 4096]')
    return _text(f"{place}[0]", value[0]), _whole(f"{place}[1]", value[1])
