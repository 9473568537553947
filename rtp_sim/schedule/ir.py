"""The schedule IR: what every rank does in one training step, as data that is printed, checked, simulated and run.

A `Schedule` holds one `Program` per rank class; ranks of one class differ only in their position in the groups.
A program is a list of `Op`s in the order in which the host issues them. Each op runs on one stream of the rank, in
order on that stream, and starts when it is issued, its stream is free, every op in `after` is done and, for
communication, every partner is there.

Rank arithmetic keeps one program for all ranks: peers are offsets along a group, and the shard a rank holds is an
offset from its own position (`Part`). Sizes that differ from shard to shard (uneven partitions) are tuples indexed by
the shard, so uneven partitions need no second program.

Standard library only: the executor imports this module on machines that have nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "communication", "workspace")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all")
DTYPE_BYTES = {
    "fp64": 8, "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1, "uint8": 1, "int32": 4, "int64": 8,
}  # fmt: skip

Size = int | tuple[int, ...]
"""A number, or one number per shard index."""

Dims = tuple[tuple[str, int], ...]
"""Named sizes of a kernel, for example (("m", 4096), ("k", 1600), ("n", 4800))."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which shard: the rank's position in `group` plus `offset`, per dimension of the group, modulo its size."""

    group: str
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holding:
    """Parameters of `layer` that lie in a buffer: all of them, or the shard along `split` (a word of layers.py)."""

    layer: str
    split: str = ""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Storage of a rank. `numel` elements of `dtype`; a tuple of sizes is indexed by the shard `part` names.

    Without `live_in` it holds nothing at the start of the step, without `live_out` nothing is kept at its end. In
    between, its memory is held from each fresh write (one by an op that does not also read it) to the last op that
    reads or updates what was written.

    What an interpreter needs of flat buffers: `holds` lists whose parameters (or their gradients, or states) lie in it
    one after another; with `slice_of`, a group, only this rank's equal share of that sequence, padded at its end.
    """

    name: str
    category: str
    dtype: str
    numel: Size
    part: Part | None = None
    live_in: bool = False
    live_out: bool = False
    holds: tuple[Holding, ...] = ()
    slice_of: str = ""

    def size_bytes(self, shard: int = 0) -> int:
        """Bytes of the buffer when the shard it is sized by has index `shard`."""
        numel = self.numel if isinstance(self.numel, int) else self.numel[shard]
        return numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Site:
    """Which kernel of a model an op launches: it belongs to call number `call` of `layer`, split along `split`."""

    layer: str
    call: int
    split: str = ""


@dataclass(frozen=True, slots=True)
class Compute:
    """One kernel launch. `variants`, one entry per shard index, replaces `dims` where the shards are uneven.

    `site` says which kernel of the model it is; from it follow the roles of the op's `reads` and `writes`.
    """

    kernel: str
    dtype: str
    dims: Dims
    part: Part | None = None
    variants: tuple[Dims, ...] | None = None
    site: Site | None = None

    def dims_at(self, shard: int) -> Dims:
        """The kernel's sizes when the shard it works on has index `shard`."""
        return self.dims if self.variants is None else self.variants[shard]


@dataclass(frozen=True, slots=True)
class Hop:
    """One exchange of a shift: send to position + offset, receive from position - offset (cyclic in each dimension).

    `size_bytes` is what this rank sends; as a tuple it is indexed by the shard being sent, named by `part`.
    """

    offset: tuple[int, ...]
    size_bytes: Size
    part: Part | None = None

    def bytes_at(self, shard: int) -> int:
        """Bytes sent when the shard being sent has index `shard`."""
        return self.size_bytes if isinstance(self.size_bytes, int) else self.size_bytes[shard]


@dataclass(frozen=True, slots=True)
class Shift:
    """A ring shift: both directions of one or more hops, all in flight together (a batched isend/irecv).

    Hop j sends buffer `reads[j]` and receives into `writes[j]`. Where these are the same buffer the shift is in place:
    it then moves `chunk_bytes` at a time through a bounce buffer, `writes[len(hops)]`. Further `reads` are buffers that
    must stay as they are until the shift is done.
    """

    group: str
    hops: tuple[Hop, ...]
    chunk_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective of a whole group. `size_bytes` follows nccl-tests: the total array for all_gather, reduce_scatter
    and all_to_all, the buffer of one rank for all_reduce, broadcast and reduce. `root` is a position in the group."""

    kind: str
    group: str
    size_bytes: int
    dtype: str
    root: int = 0


@dataclass(frozen=True, slots=True)
class Send:
    """One-sided half of a point-to-point transfer to position + offset (not cyclic); matches a `Recv` by `tag`."""

    group: str
    offset: tuple[int, ...]
    size_bytes: int
    tag: str


@dataclass(frozen=True, slots=True)
class Recv:
    """The other half: receives from position + offset (so a stage's predecessor is offset -1)."""

    group: str
    offset: tuple[int, ...]
    size_bytes: int
    tag: str


Communication = Shift | Collective | Send | Recv
Action = Compute | Communication


@dataclass(frozen=True, slots=True)
class Op:
    """One op of a program: `index` is its place in the program, `name` says what it is and is unique there.

    `after` lists ops of the same program that must be done first (beyond stream order). With `blocks_host` the host
    issues nothing more until this op is done.
    """

    index: int
    name: str
    stream: str
    action: Action
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    after: tuple[int, ...] = ()
    blocks_host: bool = False


@dataclass(frozen=True)
class Program:
    """What the ranks of one class do, in the order their hosts issue it."""

    name: str
    buffers: Mapping[str, Buffer]
    ops: tuple[Op, ...]

    @cached_property
    def streams(self) -> tuple[str, ...]:
        """Stream names in order of first use."""
        return tuple(dict.fromkeys(op.stream for op in self.ops))


@dataclass(frozen=True)
class Group:
    """A communication group: `instances` partitions (some of) the ranks into tuples of equal length, members in ring
    order; `dims` is the shape of the positions, so dims (2, 4) is a two-level ring of 2 x 4 members, last fastest."""

    name: str
    dims: tuple[int, ...]
    instances: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Members of one instance."""
        return len(self.instances[0]) if self.instances else 0

    @cached_property
    def place(self) -> dict[int, tuple[int, int]]:
        """rank -> (instance, position)."""
        return {r: (i, p) for i, members in enumerate(self.instances) for p, r in enumerate(members)}

    def position(self, rank: int) -> int:
        """The rank's flat position in its instance. KeyError if the rank is in none."""
        return self.place[rank][1]

    def peer(self, rank: int, offset: tuple[int, ...], sign: int = 1) -> int:
        """The rank at position + sign * offset, cyclic in every dimension."""
        instance, position = self.place[rank]
        return self.instances[instance][shifted(position, self.dims, offset, sign)]

    def neighbour(self, rank: int, offset: tuple[int, ...]) -> int | None:
        """The rank at position + offset without wrap-around, or None past an end."""
        instance, position = self.place[rank]
        coordinates = [c + o for c, o in zip(unflatten(position, self.dims), offset, strict=True)]
        if any(not 0 <= c < d for c, d in zip(coordinates, self.dims, strict=True)):
            return None
        return self.instances[instance][flatten(coordinates, self.dims)]


@dataclass(frozen=True)
class Schedule:
    """One training step of all ranks: `program_of_rank[r]` indexes `programs`. `meta` carries what reports print
    (strategy, layout, model, tokens and FLOPs of the step): strings and numbers only."""

    name: str
    world_size: int
    groups: Mapping[str, Group]
    programs: tuple[Program, ...]
    program_of_rank: tuple[int, ...]
    meta: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    def program(self, rank: int) -> Program:
        """The program that `rank` runs."""
        return self.programs[self.program_of_rank[rank]]

    def shard_index(self, rank: int, part: Part | None) -> int:
        """Which shard `part` names on this rank; 0 for None."""
        if part is None:
            return 0
        group = self.groups[part.group]
        return shifted(group.position(rank), group.dims, part.offset)

    def ranks_of(self, program: int) -> Iterator[int]:
        """The ranks that run program number `program`."""
        return (r for r, p in enumerate(self.program_of_rank) if p == program)


def unflatten(position: int, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Flat position -> coordinates, last dimension fastest."""
    coordinates = []
    for d in reversed(dims):
        position, c = divmod(position, d)
        coordinates.append(c)
    return tuple(reversed(coordinates))


def flatten(coordinates: tuple[int, ...] | list[int], dims: tuple[int, ...]) -> int:
    """Coordinates -> flat position, last dimension fastest."""
    position = 0
    for c, d in zip(coordinates, dims, strict=True):
        position = position * d + c
    return position


def shifted(position: int, dims: tuple[int, ...], offset: tuple[int, ...], sign: int = 1) -> int:
    """The flat position reached from `position` by sign * offset, cyclic in every dimension."""
    if len(dims) == 1:
        return (position + sign * offset[0]) % dims[0]
    coordinates = unflatten(position, dims)
    return flatten([(c + sign * o) % d for c, o, d in zip(coordinates, offset, dims, strict=True)], dims)


def positions(dims: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All coordinates of a group, in order of flat position."""
    return product(*(range(d) for d in dims))
