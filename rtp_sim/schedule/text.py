"""The text form of a schedule: a listing that reads like a program and parses back to the same `Schedule`.

One line, one thing; `#` starts a comment; indentation is free. The grammar, by example::

    schedule "rtp 2 layers"
    world 4
    meta tokens = 8192
    group rtp dims 4
      instance 0-3
    program all ranks 0-3
      buffer w.a weights fp16 (10, 10, 10, 9) part rtp[+0] live-in live-out
      buffer y activations fp16 4096
      buffer g.a gradients fp16 100 holds h0.norm, h0.attn split heads slice of dp
      %0 compute l0.f0 linear[m=8 k=4 n=3] fp16 part rtp[-1] x, w.a -> y
      %1 ring l0.hop0 shift rtp hop [+1] (20, 20, 20, 18) part rtp[+0] w.a -> w.b after %0 blocks-host

* An op is `%index stream name action operands clauses`; operands are `reads -> writes`, left out where there
  are none.
* Actions: `kernel[dim=size ...] dtype [part P] [at layer call [split kind]] [variants [dims] [dims] ...]`;
  `shift group (hop [offset] bytes [part P])... [chunk bytes]`; `all_reduce group bytes dtype [root n]` and the
  other collectives; `send group [offset] bytes tag t` and `recv` alike. Clauses: `after %i %j ...`,
  `blocks-host`.
* A size is a number of bytes (buffers: of elements) or one per shard in parentheses; a part `group[offsets]`
  names the shard by its offset from the rank's own position. Names that are not plain words are JSON strings.
* Ranks are lists of numbers, ranges `0-7` and strided ranges `0-12:4`.

Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.ir import (
    Action,
    Buffer,
    Collective,
    Compute,
    Dims,
    Op,
    Part,
    Recv,
    Schedule,
    Send,
    Shift,
    Site,
    Size,
)
from rtp_sim.schedule.parse import KEYWORDS, PLAIN_NAME, Meta, from_text

__all__ = [
    "Meta", "buffer_line", "compact_ranks", "from_text", "meta_text", "op_line", "operands", "readable_bytes",
    "to_text",
]  # fmt: skip


def to_text(schedule: Schedule) -> str:
    """The schedule as text; `from_text` gives it back. ScheduleError for a nan in meta."""
    lines = [f"schedule {_name(schedule.name)}", f"world {schedule.world_size}"]
    lines += [f"meta {_name(key)} = {meta_text(key, value)}" for key, value in schedule.meta.items()]
    for group in schedule.groups.values():
        lines += ["", f"group {_name(group.name)} dims {' '.join(map(str, group.dims))}".rstrip()]
        lines += [f"  instance {compact_ranks(members)}".rstrip() for members in group.instances]
    for number, program in enumerate(schedule.programs):
        ranks = compact_ranks(list(schedule.ranks_of(number)))
        lines += ["", f"program {_name(program.name)} ranks {ranks}".rstrip()]
        lines += [f"  {buffer_line(buffer)}" for buffer in program.buffers.values()]
        lines += [f"  {op_line(op)}" for op in program.ops]
    return "\n".join(lines) + "\n"


def op_line(op: Op) -> str:
    """One op in text form, without indentation: also what error messages print around a bad op."""
    words = [f"%{op.index}", _name(op.stream), _name(op.name), _action(op.action)]
    if op.reads or op.writes:
        words.append(operands(op))
    if op.after:
        words.append("after " + " ".join(f"%{a}" for a in op.after))
    if op.blocks_host:
        words.append("blocks-host")
    if not isinstance(op.action, Compute):
        words.append(f" # {readable_bytes(_largest(op.action))}")
    return " ".join(words)


def operands(op: Op) -> str:
    """`reads -> writes` of an op."""
    return " ".join([*_names(op.reads), "->", *_names(op.writes)])


def buffer_line(buffer: Buffer) -> str:
    """One buffer in text form, without indentation."""
    line = f"buffer {_name(buffer.name)} {_name(buffer.category)} {_name(buffer.dtype)} {_size(buffer.numel)}"
    line += _part(buffer.part) + " live-in" * buffer.live_in + " live-out" * buffer.live_out
    if buffer.holds:
        line += " holds " + ", ".join(
            _name(h.layer) + (f" split {_name(h.split)}" if h.split else "") for h in buffer.holds
        )
    return line + (f" slice of {_name(buffer.slice_of)}" if buffer.slice_of else "")


def compact_ranks(ranks: Sequence[int]) -> str:
    """Ranks in their given order, ascending runs folded: [0, 1, 2, 5, 9, 13] -> "0-2 5-13:4"."""
    words, i = [], 0
    while i < len(ranks):
        step = ranks[i + 1] - ranks[i] if i + 1 < len(ranks) else 0
        j = i
        while step > 0 and ranks[i] >= 0 and j + 1 < len(ranks) and ranks[j + 1] - ranks[j] == step:
            j += 1
        if j - i < 2:
            words.append(str(ranks[i]))
            i += 1
        else:
            words.append(f"{ranks[i]}-{ranks[j]}" + (f":{step}" if step > 1 else ""))
            i = j + 1
    return " ".join(words)


def readable_bytes(size_bytes: int) -> str:
    """Three digits and a decimal unit: 12300000 -> "12.3 MB"."""
    value, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def meta_text(key: str, value: Meta) -> str:
    """A meta value as JSON. ScheduleError for nan and the infinities, which JSON cannot say."""
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        raise ScheduleError(
            f"meta {key!r} is {value!r}; expected a string, a finite number, true, false or none"
        ) from None


def _action(action: Action) -> str:
    match action:
        case Compute(kernel, dtype, dims, part, variants, site):
            shards = "" if variants is None else " variants" + "".join(f" {_dims(v)}" for v in variants)
            return f"{_name(kernel)}{_dims(dims)} {_name(dtype)}{_part(part)}{_site(site)}{shards}"
        case Shift(group, hops, chunk_bytes):
            steps = "".join(f" hop {_offset(h.offset)} {_size(h.size_bytes)}{_part(h.part)}" for h in hops)
            return f"shift {_name(group)}{steps}" + ("" if chunk_bytes is None else f" chunk {chunk_bytes}")
        case Collective(kind, group, size_bytes, dtype, root):
            return f"{kind} {_name(group)} {size_bytes} {_name(dtype)}" + (f" root {root}" if root else "")
        case Send(group, offset, size_bytes, tag) | Recv(group, offset, size_bytes, tag):
            kind = "send" if isinstance(action, Send) else "recv"
            return f"{kind} {_name(group)} {_offset(offset)} {size_bytes} tag {_name(tag)}"


def _largest(action: Action) -> int:
    """Bytes of a communication, the largest shard of each hop."""
    if isinstance(action, Shift):
        sizes = [h.size_bytes for h in action.hops]
        return sum(s if isinstance(s, int) else max(s, default=0) for s in sizes)
    return 0 if isinstance(action, Compute) else action.size_bytes


def _name(text: str) -> str:
    return text if PLAIN_NAME.fullmatch(text) and text not in KEYWORDS else json.dumps(text)


def _names(names: tuple[str, ...]) -> list[str]:
    return [_name(n) + ("," if i < len(names) - 1 else "") for i, n in enumerate(names)]


def _size(size: Size) -> str:
    return str(size) if isinstance(size, int) else f"({', '.join(map(str, size))})"


def _offset(offset: tuple[int, ...]) -> str:
    return f"[{','.join(f'{o:+d}' for o in offset)}]"


def _part(part: Part | None) -> str:
    return "" if part is None else f" part {_name(part.group)}{_offset(part.offset)}"


def _site(site: Site | None) -> str:
    if site is None:
        return ""
    return f" at {_name(site.layer)} {site.call}" + (f" split {_name(site.split)}" if site.split else "")


def _dims(dims: Dims) -> str:
    return f"[{' '.join(f'{_name(name)}={size}' for name, size in dims)}]"
