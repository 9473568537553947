"""A listing of what one rank does, for people: shards and peers resolved to numbers, sizes readable, streams
tagged.

Unlike the text form it cannot be parsed back; it answers "what does rank 3 really send, and to whom?".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rtp_sim.errors import InputError
from rtp_sim.schedule.ir import (
    Action,
    Collective,
    Compute,
    Group,
    Hop,
    Op,
    Part,
    Recv,
    Schedule,
    Send,
    Shift,
    shifted,
    unflatten,
)
from rtp_sim.schedule.text import compact_ranks, operands, readable_bytes

_PHASE = re.compile(r"\.[A-Z]\d*(?=\.|$)")
_COLORS = (36, 33, 35, 32, 34, 31)  # ANSI foregrounds: cyan, yellow, magenta, green, blue, red


def program_listing(schedule: Schedule, rank: int, *, limit: int | None = None, color: bool = False) -> str:
    """The program of `rank`, at most `limit` ops of it; with `color`, ANSI colours tell streams apart.

    InputError for a rank outside the schedule or a negative limit.
    """
    if not 0 <= rank < schedule.world_size:
        raise InputError(f"rank {rank} is not in the schedule; expected 0 to {schedule.world_size - 1}")
    if limit is not None and limit < 0:
        raise InputError(f"limit is {limit}; expected 0 or more ops")
    program = schedule.program(rank)
    shown = program.ops if limit is None else program.ops[:limit]
    lines = list(_heading(schedule, rank))
    section = ""
    width = max((len(stream) for stream in program.streams), default=0)
    actions = [_action(schedule, rank, op.action) for op in shown]
    action_width = min(60, max(map(len, actions), default=0))
    for op, action in zip(shown, actions, strict=True):
        before = section
        section, name = _split(op.name)
        if section != before:
            lines.append(_dim(f"-- {section} ".ljust(60, "-"), color) if section else "")
        stream = _colored(f"{op.stream:<{width}}", program.streams.index(op.stream), color)
        lines.append(f"{f'%{op.index}':>7}  {stream}  {action:<{action_width}}{_ending(op)}  [{name}]")
    if len(shown) < len(program.ops):
        lines.append(f"        ... {len(program.ops) - len(shown)} more of {len(program.ops)} ops")
    return "\n".join(lines) + "\n"


def _heading(schedule: Schedule, rank: int) -> Iterator[str]:
    program = schedule.program(rank)
    ranks = list(schedule.ranks_of(schedule.program_of_rank[rank]))
    yield (
        f"{schedule.name}: rank {rank} of {schedule.world_size}, program '{program.name}' of "
        f"{'rank' if len(ranks) == 1 else 'ranks'} {compact_ranks(ranks)}"
    )
    streams = ", ".join(program.streams) or "(none)"
    yield f"{len(program.ops)} ops on streams {streams}; {len(program.buffers)} buffers"
    for group in schedule.groups.values():
        if rank in group.place:
            instance, position = group.place[rank]
            members = compact_ranks(group.instances[instance])
            yield f"group {group.name}: position {_shard(group, position)} of ranks {members}"


def _action(schedule: Schedule, rank: int, action: Action) -> str:
    match action:
        case Compute():
            shard = schedule.shard_index(rank, action.part)
            sizes = " ".join(f"{name}={size}" for name, size in action.dims_at(shard))
            return f"{action.kernel} {sizes} {action.dtype}{_of_shard(schedule, rank, action.part)}"
        case Shift():
            chunks = f" in chunks of {readable_bytes(action.chunk_bytes)}" if action.chunk_bytes else ""
            return "; ".join(_hop(schedule, rank, action.group, hop) for hop in action.hops) + chunks
        case Collective():
            members = schedule.groups[action.group].instances[schedule.groups[action.group].place[rank][0]]
            rooted = action.kind in ("broadcast", "reduce")
            root = f", root rank {members[action.root]}" if rooted else ""
            size = f"{readable_bytes(action.size_bytes)} {action.dtype}"
            return f"{action.kind} {size} over {action.group} (ranks {compact_ranks(members)}{root})"
        case Send() | Recv():
            peer = schedule.groups[action.group].neighbour(rank, action.offset)
            verb, arrow = ("send", "->") if isinstance(action, Send) else ("receive", "<-")
            return f"{verb} {action.tag} ({readable_bytes(action.size_bytes)}) {arrow} {_rank(peer)}"


def _hop(schedule: Schedule, rank: int, name: str, hop: Hop) -> str:
    """Both directions; what arrives is what the peer's own hop sends, evaluated at the peer."""
    group = schedule.groups[name]
    target, source = group.peer(rank, hop.offset), group.peer(rank, hop.offset, -1)
    ends = []
    for verb, sender, arrow, peer in (("send", rank, "->", target), ("receive", source, "<-", source)):
        size = readable_bytes(hop.bytes_at(schedule.shard_index(sender, hop.part)))
        shard = "" if hop.part is None else f" shard {_shard_number(schedule, sender, hop.part)}"
        ends.append(f"{verb}{shard} ({size}) {arrow} {_rank(peer)}")
    return ", ".join(ends)


def _ending(op: Op) -> str:
    """Operands and dependencies of an op."""
    after = f"  after {' '.join(f'%{a}' for a in op.after)}" if op.after else ""
    used = f"  {operands(op)}" if op.reads or op.writes else ""
    return f"{used}{after}{'  blocks the host' if op.blocks_host else ''}"


def _split(name: str) -> tuple[str, str]:
    """Section and rest of a name: cut before the phase (m0.h0.attn, F0.hop), else before the last part."""
    found = _PHASE.search(name)
    cut = found.start() if found else max(name.rfind("."), 0)
    return name[:cut], name[cut:].lstrip(".")


def _of_shard(schedule: Schedule, rank: int, part: Part | None) -> str:
    return "" if part is None else f", shard {_shard_number(schedule, rank, part)}"


def _shard_number(schedule: Schedule, rank: int, part: Part) -> str:
    group = schedule.groups[part.group]
    return _shard(group, shifted(group.position(rank), group.dims, part.offset))


def _shard(group: Group, position: int) -> str:
    """A position as people count it: its coordinates where the group has several dimensions."""
    if len(group.dims) == 1:
        return str(position)
    return f"{position} {unflatten(position, group.dims)}"


def _rank(peer: int | None) -> str:
    return "nobody" if peer is None else f"rank {peer}"


def _colored(text: str, stream: int, color: bool) -> str:
    return f"\x1b[{_COLORS[stream % len(_COLORS)]}m{text}\x1b[0m" if color else text


def _dim(text: str, color: bool) -> str:
    return f"\x1b[2m{text}\x1b[0m" if color else text
