"""A toy cost model with dedicated or shared links, and small schedules, for the engine's tests and
benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rtp_sim.engine.costs import OpCost, Phase
from rtp_sim.schedule.ir import (
    Action,
    Buffer,
    Collective,
    Compute,
    Dims,
    Group,
    Hop,
    Op,
    Program,
    Recv,
    Schedule,
    Send,
    Shift,
)

GB_PER_S = 1_000_000_000
"""One byte per ns."""

Path = Callable[[int, int], Mapping[int, int]]


@dataclass
class ToyCost:
    """Kernels last as many ns as their only dim says. A message takes `latency_ns` and uses the links of
    `path(src, dst)`; a collective is a ring all-reduce of 2 (n - 1) / n times its bytes over the links of its
    ring.

    Without a path, every ordered pair of ranks has a link of its own, so nothing contends.
    """

    world_size: int
    capacities: Mapping[int, int] = field(default_factory=dict)
    path: Path | None = None
    default_capacity: int = GB_PER_S
    latency_ns: int = 0
    issue_ns: int = 0
    slowdown_permille: int = 1000
    cap_bytes_per_s: int | None = None
    pools: Mapping[int, int] = field(default_factory=dict)
    issue_by_name: Mapping[str, int] = field(default_factory=dict)

    @property
    def overlap_slowdown_permille(self) -> int:
        return self.slowdown_permille

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        return OpCost(dims[0][1], "assumed")

    def host_issue_ns(self, op: Op) -> int:
        return self.issue_by_name.get(op.name, self.issue_ns)

    def link_capacity(self, link: int) -> int:
        return self.capacities.get(link, self.default_capacity)

    def links(self, src: int, dst: int) -> Mapping[int, int]:
        return {src * self.world_size + dst: 1} if self.path is None else self.path(src, dst)

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        return Phase(self.latency_ns, size_bytes, self.links(src_rank, dst_rank), self.cap_bytes_per_s)

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        usage: dict[int, int] = {}
        n = len(ranks)
        for k, rank in enumerate(ranks):
            for link, weight in self.links(rank, ranks[(k + 1) % n]).items():
                usage[link] = usage.get(link, 0) + weight
        half = Phase(self.latency_ns * (n - 1), -(-size_bytes * (n - 1) // n), usage, self.cap_bytes_per_s)
        return (half, half) if kind == "all_reduce" else (half,)

    def compute_pool(self, rank: int) -> int | None:
        return self.pools.get(rank)


def switch_path(world_size: int) -> Path:
    """Every rank has a port out (link r) and a port in (link world_size + r) to a switch that never
    blocks."""
    return lambda src, dst: {src: 1, world_size + dst: 1}


def node_path(per_node: int, world_size: int) -> Path:
    """Ports as in `switch_path`; messages between nodes also share their node's uplink and downlink."""

    def path(src: int, dst: int) -> Mapping[int, int]:
        links = {src: 1, world_size + dst: 1}
        a, b = src // per_node, dst // per_node
        if a != b:
            links[2 * world_size + 2 * a] = 1
            links[2 * world_size + 2 * b + 1] = 1
        return links

    return path


class Builder:
    """Collects ops into a program; `add` gives the op's index."""

    def __init__(self, name: str = "p") -> None:
        self.name = name
        self.ops: list[Op] = []

    def add(
        self, action: Action, stream: str, after: tuple[int, ...] = (), blocks: bool = False, name: str = ""
    ) -> int:
        index = len(self.ops)
        self.ops.append(Op(index, name or f"op{index}", stream, action, after=after, blocks_host=blocks))
        return index

    def kernel(
        self,
        ns: int,
        after: tuple[int, ...] = (),
        stream: str = "compute",
        blocks: bool = False,
        name: str = "",
    ) -> int:
        return self.add(compute(ns), stream, after, blocks, name)

    def program(self, buffers: Mapping[str, Buffer] | None = None) -> Program:
        return Program(self.name, buffers or {}, tuple(self.ops))


def compute(ns: int) -> Compute:
    return Compute("linear", "fp32", (("ns", ns),))


def ring(size_bytes: int, offset: int = 1, group: str = "ring") -> Shift:
    return Shift(group, (Hop((offset,), size_bytes),))


def all_reduce(size_bytes: int, group: str = "ring") -> Collective:
    return Collective("all_reduce", group, size_bytes, "fp32")


def send(size_bytes: int, tag: str, offset: int = 1, group: str = "ring") -> Send:
    return Send(group, (offset,), size_bytes, tag)


def recv(size_bytes: int, tag: str, offset: int = -1, group: str = "ring") -> Recv:
    return Recv(group, (offset,), size_bytes, tag)


def one_ring(world_size: int, *programs: Program, of_rank: tuple[int, ...] | None = None) -> Schedule:
    """All ranks in one group "ring"."""
    group = Group("ring", (world_size,), (tuple(range(world_size)),))
    return Schedule("toy", world_size, {"ring": group}, programs, of_rank or (0,) * world_size)


def grid(inner: int, outer: int, *programs: Program, of_rank: tuple[int, ...] | None = None) -> Schedule:
    """Group "inner" of neighbouring ranks, group "outer" across: rank = o * inner + i."""
    world = inner * outer
    rows = tuple(tuple(o * inner + i for i in range(inner)) for o in range(outer))
    columns = tuple(tuple(o * inner + i for o in range(outer)) for i in range(inner))
    groups = {"inner": Group("inner", (inner,), rows), "outer": Group("outer", (outer,), columns)}
    return Schedule("toy", world, groups, programs, of_rank or (0,) * world)


def rtp_program(units: int, ranks: int, kernel_ns: int, size_bytes: int, group: str = "ring") -> Program:
    """An RTP-like step: forward and backward sweeps in which each weight hop runs beside a kernel, and in the
    backward sweep each gradient hop follows its kernel."""
    b = Builder("rtp")
    last = -1
    for _ in range(units):
        held: tuple[int, ...] = ()
        for step in range(ranks):
            hop = b.add(ring(size_bytes, 1, group), "shift", held) if step < ranks - 1 else -1
            last = b.kernel(kernel_ns, held)
            held = (hop, last) if hop >= 0 else ()
    for _ in range(units):
        held = ()
        gradient: tuple[int, ...] = ()
        for step in range(ranks):
            hop = b.add(ring(size_bytes, -1, group), "shift", held) if step < ranks - 1 else -1
            last = b.kernel(2 * kernel_ns, held)
            add = b.kernel(kernel_ns // 4, (last, *gradient))
            held = (hop, last) if hop >= 0 else ()
            if step < ranks - 1:
                gradient = (b.add(ring(size_bytes, -1, group), "gradient", (add,)),)
    b.add(compute(kernel_ns), "compute", (last,))
    return b.program()
