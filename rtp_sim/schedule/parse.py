"""Reads the text form of a schedule (its grammar: `text.py`). An error shows the line, the column and what
was expected.

Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

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

T = TypeVar("T")
Meta = str | int | float | bool | None

_KINDS = ("shift", "send", "recv", *COLLECTIVES)
KEYWORDS = frozenset({
    *_KINDS, "schedule", "world", "meta", "group", "dims", "instance", "program", "ranks", "buffer", "part",
    "live-in", "live-out", "variants", "hop", "chunk", "root", "tag", "after", "blocks-host",
    "holds", "slice", "of", "at", "split",
})  # fmt: skip
"""Words that name things only in double quotes."""

_WORD = r"[A-Za-z_](?:[A-Za-z0-9_./:@*~-]*[A-Za-z0-9_*])?"
PLAIN_NAME = re.compile(_WORD)
_TOKEN = re.compile(
    rf"\s*(?:(?P<end>#.*$|$)|(?P<string>\"(?:[^\"\\]|\\.)*\")|(?P<word>{_WORD})|(?P<op>%\d+)"
    r"|(?P<range>\d+-\d+(?::\d+)?)|(?P<int>[+-]?\d+)|(?P<mark>->|[\[\](),=]))"
)


def from_text(text: str) -> Schedule:
    """The schedule that `text` describes. ScheduleError with line, column and what was expected there."""
    draft = _Draft()
    for number, raw in enumerate(text.split("\n"), start=1):
        line = _Line(number, raw)
        if not line.at_end():
            draft.read(line)
    return draft.schedule()


class _Line:
    """Tokens of one line and the place reached in it."""

    def __init__(self, number: int, text: str) -> None:
        self.number, self.text, self.at = number, text, 0
        self.column, self.kind, self.token = 0, "", ""
        self.advance()

    def advance(self) -> None:
        """Go to the next token."""
        found = _TOKEN.match(self.text, self.at)
        if found is None:
            self.column = self.at + len(self.text[self.at :]) - len(self.text[self.at :].lstrip())
            raise self.error("a word, a number, a quoted name or one of [ ] ( ) , = ->")
        self.kind = found.lastgroup or "end"
        self.token = found.group(self.kind)
        self.column, self.at = found.start(self.kind), found.end()

    def error(self, expected: str) -> ScheduleError:
        """The error that points at the current token."""
        return ScheduleError(
            f"schedule text, line {self.number}: expected {expected}\n  {self.text}\n  {' ' * self.column}^"
        )

    def at_end(self) -> bool:
        """True behind the last token."""
        return self.kind == "end"

    def sees(self, token: str) -> bool:
        """Is this (unquoted) token next?"""
        return self.kind != "string" and self.token == token

    def accept(self, token: str) -> bool:
        """Skip the token if it is next."""
        seen = self.sees(token)
        if seen:
            self.advance()
        return seen

    def expect(self, token: str) -> None:
        """Skip the token, which must be next."""
        if not self.accept(token):
            raise self.error(f"'{token}'")

    def take(self, kind: str, expected: str) -> str:
        """The next token, which must be of this kind."""
        if self.kind != kind:
            raise self.error(expected)
        token = self.token
        self.advance()
        return token

    def finish(self) -> None:
        """Nothing may follow."""
        if not self.at_end():
            raise self.error("the end of the line")

    def names_one(self) -> bool:
        """Is a name next (a quoted one, or a word that is no keyword)?"""
        return self.kind == "string" or (self.kind == "word" and self.token not in KEYWORDS)

    def name(self, what: str) -> str:
        """A name: a plain word or a JSON string."""
        if not self.names_one():
            raise self.error(f"{what} (a name; keywords and odd characters go in double quotes)")
        if self.kind == "word":
            return self.take("word", what)
        try:
            value = str(json.loads(self.token))
        except json.JSONDecodeError:
            raise self.error(f'{what}: a JSON string, such as "w.a"') from None
        self.advance()
        return value

    def whole(self, what: str) -> int:
        """A whole number."""
        return int(self.take("int", f"{what} (a whole number)"))

    def many(self, closing: str, item: Callable[[], T], separator: str = "") -> tuple[T, ...]:
        """Items up to the closing mark, which is skipped."""
        items: list[T] = []
        while not self.accept(closing):
            if items and separator:
                self.expect(separator)
            items.append(item())
        return tuple(items)

    def size(self, what: str) -> Size:
        """A number, or one per shard in parentheses."""
        if self.accept("("):
            return self.many(")", lambda: self.whole(f"{what} of one shard"), ",")
        return self.whole(f"{what}, or one number per shard as (10, 10, 9)")

    def offset(self) -> tuple[int, ...]:
        """`[+1]` or `[+1,-1]`."""
        self.expect("[")
        return self.many("]", lambda: self.whole("an offset along the group"), ",")

    def part(self) -> Part | None:
        """`part group[offset]`, if it is next."""
        return Part(self.name("a group"), self.offset()) if self.accept("part") else None

    def dims(self) -> Dims:
        """`[m=8 k=4]`."""
        self.expect("[")
        return self.many("]", self._dim)

    def _dim(self) -> tuple[str, int]:
        name = self.name("a dimension such as m=4096")
        self.expect("=")
        return name, self.whole("its size")

    def ranks(self) -> tuple[int, ...]:
        """Numbers, ranges and strided ranges up to the end of the line."""
        ranks: list[int] = []
        while not self.at_end():
            if self.kind == "range":
                first, last, step = (int(n or 1) for n in re.split("[-:]", self.token + ":1")[:3])
                ranks += range(first, last + 1, step)
                self.advance()
            else:
                ranks.append(self.whole("a rank, or ranks such as 0-7 or 0-12:4"))
        return tuple(ranks)


class _Draft:
    """What has been read so far."""

    def __init__(self) -> None:
        self.header: dict[str, str | int] = {}
        self.meta: dict[str, Meta] = {}
        self.groups: dict[str, Group] = {}
        self.programs: list[tuple[str, dict[str, Buffer], list[Op]]] = []
        self.program_of: dict[int, int] = {}
        self.last_group = ""

    def read(self, line: _Line) -> None:
        """One line that is not blank."""
        if line.kind == "op":
            if not self.programs:
                raise line.error("a program line before the first op")
            self.programs[-1][2].append(_read_op(line))
            return line.finish()
        readers: Mapping[str, Callable[[_Line], None]] = {
            "schedule": self._schedule, "world": self._world, "meta": self._meta, "group": self._group,
            "instance": self._instance, "program": self._program, "buffer": self._buffer,
        }  # fmt: skip
        reader = readers.get(line.token) if line.kind == "word" else None
        if reader is None:
            raise line.error(f"an op such as %0, or one of {', '.join(readers)}")
        line.advance()
        reader(line)
        return line.finish()

    def schedule(self) -> Schedule:
        """The whole, once every line is read."""
        for key, example in (("name", 'schedule "my schedule"'), ("world", "world 8")):
            if key not in self.header:
                raise ScheduleError(f"schedule text: the line '{example}' is missing")
        world_size = int(self.header["world"])
        missing = [r for r in range(world_size) if r not in self.program_of]
        beyond = sorted(r for r in self.program_of if not 0 <= r < world_size)
        if missing or beyond:
            wrong = f"no program names rank {missing[0]}" if missing else f"a program names rank {beyond[0]}"
            raise ScheduleError(
                f"schedule text: {wrong}; expected every rank from 0 to {world_size - 1} in one program"
            )
        return Schedule(
            name=str(self.header["name"]),
            world_size=world_size,
            groups=self.groups,
            programs=tuple(Program(name, buffers, tuple(ops)) for name, buffers, ops in self.programs),
            program_of_rank=tuple(self.program_of[r] for r in range(world_size)),
            meta=self.meta,
        )

    def _schedule(self, line: _Line) -> None:
        self.header["name"] = line.name("the schedule's name")

    def _world(self, line: _Line) -> None:
        self.header["world"] = line.whole("the number of ranks")

    def _meta(self, line: _Line) -> None:
        key = line.name("a meta key")
        if not line.sees("="):
            raise line.error("'=' and a JSON value, as in: meta tokens = 8192")
        start = line.at + len(line.text[line.at :]) - len(line.text[line.at :].lstrip())
        try:
            value, line.at = json.JSONDecoder().raw_decode(line.text, start)
        except json.JSONDecodeError:
            line.column = start
            raise line.error('a JSON value: "text", a number, true, false or null') from None
        self.meta[key] = value
        line.advance()

    def _group(self, line: _Line) -> None:
        name = _fresh(line, "group", self.groups)
        line.expect("dims")
        dims = []
        while not line.at_end():
            dims.append(line.whole("a dimension of the group"))
        self.groups[name] = Group(name, tuple(dims), ())
        self.last_group = name

    def _instance(self, line: _Line) -> None:
        if not self.groups:
            raise line.error("a group line before the first instance")
        group = self.groups[self.last_group]
        self.groups[group.name] = Group(group.name, group.dims, (*group.instances, line.ranks()))

    def _program(self, line: _Line) -> None:
        name = line.name("the program's name")
        line.expect("ranks")
        column = line.column
        for rank in line.ranks():
            if rank in self.program_of:
                line.column = column
                other = self.programs[self.program_of[rank]][0] if self.program_of[rank] < len(self.programs) else name
                raise line.error(f"ranks without a program; rank {rank} is already in program {other!r}")
            self.program_of[rank] = len(self.programs)
        self.programs.append((name, {}, []))

    def _buffer(self, line: _Line) -> None:
        if not self.programs:
            raise line.error("a program line before the first buffer")
        buffers = self.programs[-1][1]
        name = _fresh(line, "buffer", buffers)
        category = line.name("a category such as weights")
        dtype = line.name("a data type such as fp16")
        numel, part = line.size("a number of elements"), line.part()
        live_in, live_out = line.accept("live-in"), line.accept("live-out")
        holds = _read_holds(line) if line.accept("holds") else ()
        slice_of = ""
        if line.accept("slice"):
            line.expect("of")
            slice_of = line.name("a group")
        buffers[name] = Buffer(name, category, dtype, numel, part, live_in, live_out, holds, slice_of)


def _fresh(line: _Line, what: str, known: Iterable[str]) -> str:
    column = line.column
    name = line.name(f"the {what}'s name")
    if name in known:
        line.column = column
        raise line.error(f"a new name; there is already a {what} {name!r}")
    return name


def _read_op(line: _Line) -> Op:
    index = int(line.take("op", "an op number")[1:])
    stream = line.name("the op's stream")
    name = line.name("the op's name")
    action = _read_action(line)
    reads, writes = _read_operands(line)
    after: list[int] = []
    if line.accept("after"):
        while line.kind == "op" or not after:
            after.append(int(line.take("op", "an op number such as %3")[1:]))
    return Op(index, name, stream, action, reads, writes, tuple(after), line.accept("blocks-host"))


def _read_operands(line: _Line) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not line.names_one() and not line.sees("->"):
        return (), ()
    reads = _read_names(line)
    line.expect("->")
    return reads, _read_names(line)


def _read_names(line: _Line) -> tuple[str, ...]:
    names: list[str] = []
    while line.names_one() if not names else line.accept(","):
        names.append(line.name("a buffer"))
    return tuple(names)


def _read_action(line: _Line) -> Action:
    kind = line.token if line.kind == "word" and line.token in _KINDS else ""
    if not kind:
        kernel = line.name(f"a kernel such as linear[m=8 k=4 n=3] fp16, or one of {', '.join(_KINDS)}")
        if not line.sees("["):
            raise line.error(f"'[' behind the kernel {kernel!r} (or instead of it one of {', '.join(_KINDS)})")
        dims, dtype, part = line.dims(), line.name("a data type such as fp16"), line.part()
        site = _read_site(line) if line.accept("at") else None
        return Compute(kernel, dtype, dims, part, _read_variants(line) if line.accept("variants") else None, site)
    line.advance()
    group = line.name("a group")
    if kind == "shift":
        hops: list[Hop] = []
        while line.accept("hop"):
            hops.append(Hop(line.offset(), line.size("bytes sent"), line.part()))
        return Shift(group, tuple(hops), line.whole("bytes of a chunk") if line.accept("chunk") else None)
    if kind in COLLECTIVES:
        size_bytes, dtype = line.whole("bytes"), line.name("a data type such as fp16")
        return Collective(kind, group, size_bytes, dtype, line.whole("a position") if line.accept("root") else 0)
    offset, size_bytes = line.offset(), line.whole("bytes")
    line.expect("tag")
    return (Send if kind == "send" else Recv)(group, offset, size_bytes, line.name("a tag"))


def _read_site(line: _Line) -> Site:
    layer, call = line.name("a layer"), line.whole("the number of its call")
    return Site(layer, call, line.name("how it is split") if line.accept("split") else "")


def _read_holds(line: _Line) -> tuple[Holding, ...]:
    holds: list[Holding] = []
    while not holds or line.accept(","):
        layer = line.name("a layer")
        holds.append(Holding(layer, line.name("how it is split") if line.accept("split") else ""))
    return tuple(holds)


def _read_variants(line: _Line) -> tuple[Dims, ...]:
    variants: list[Dims] = []
    while line.sees("["):
        variants.append(line.dims())
    return tuple(variants)
