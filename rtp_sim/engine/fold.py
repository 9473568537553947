"""Folding: which ranks behave alike, exactly, so that one of them is simulated for all.

Ranks, links and communication instances form a graph: a flow touches its sender, its receiver and, with
weights, the links of its route; a collective its members and its links; the compute of a rank its pool of
cores. Colour refinement (the 1-dimensional Weisfeiler-Leman algorithm) gives the coarsest equitable partition
of that graph: every rank of a class has the same program and the same numbers of neighbours in every other
class, and so has every link and every instance. Ranks of one class then do the same things at the same
nanosecond, and the activities of one class put the same total weight on every link of a class. One
representative with that total weight stands for all.

Without folding the same code runs on the discrete partition, in which every rank, link and instance stands
for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from rtp_sim.engine.costs import CostModel, Phase
from rtp_sim.errors import ScheduleError
from rtp_sim.schedule.ir import Collective, Compute, Group, Part, Program, Schedule, Send, Shift, Size

MAX_ROUNDS = 64
"""Refinement that goes on longer (a long ring with one odd link) gains little: every rank then stands for
itself."""

MAX_SAMPLED_SIZES = 4

NEARLY = 0.1
"""By how much latencies may differ of messages that are taken to be alike: a switch more or less."""

Usage = tuple[tuple[int, int], ...]
"""(link class, total weight) pairs, sorted."""

NodeKey = tuple[object, ...]
"""("flow", Wire, sender), ("group", name, instance) or ("compute", rank)."""

CollectiveKind = tuple[str, int, str, int]
"""kind, size_bytes, dtype, root."""


@dataclass(frozen=True, slots=True)
class Wire:
    """One pattern of point-to-point messages: every rank that uses it sends to the peer at `offset` in
    `group`."""

    group: str
    offset: tuple[int, ...]
    chunk_bytes: int | None
    cyclic: bool

    def receiver(self, group: Group, rank: int) -> int | None:
        """Whom `rank` sends to; None past the end of a group that is not cyclic."""
        return group.peer(rank, self.offset) if self.cyclic else group.neighbour(rank, self.offset)

    def sender(self, group: Group, rank: int) -> int | None:
        """Whom `rank` receives from; None past the end of a group that is not cyclic."""
        if self.cyclic:
            return group.peer(rank, self.offset, -1)
        return group.neighbour(rank, tuple(-o for o in self.offset))


@dataclass(slots=True)
class Patterns:
    """The communication a program uses: message sizes by wire, collectives by group, all groups, and the
    sizes that depend on which shard a rank holds."""

    wires: dict[Wire, set[int]] = field(default_factory=dict)
    collectives: dict[str, dict[CollectiveKind, None]] = field(default_factory=dict)
    groups: dict[str, None] = field(default_factory=dict)
    uneven: dict[tuple[Part, tuple[object, ...]], None] = field(default_factory=dict)


@dataclass(slots=True)
class _Node:
    """A communication instance (or a rank's compute): the ranks it touches and what it puts on which link."""

    key: NodeKey
    ranks: tuple[int, ...]
    ordered: bool
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class Quotient:
    """Who stands for whom. `representative_of` is indexed by rank; `capacity` by link class, in bytes/s.

    `instance_of[group][i]` is the instance that stands for instance i. Usages are by (node key of a
    representative, its own usage of single links).
    """

    representative_of: tuple[int, ...]
    instance_of: Mapping[str, tuple[int, ...]]
    capacity: tuple[int, ...]
    rounds: int
    _usages: Mapping[NodeKey, Mapping[frozenset[tuple[int, int]], Usage]]

    @property
    def representatives(self) -> tuple[int, ...]:
        """The ranks that are simulated, ascending."""
        return tuple(r for r, by in enumerate(self.representative_of) if r == by)

    def usage(self, key: NodeKey, phase: Phase) -> Usage:
        """What the class that `key` represents puts on each link class while `phase` runs, everyone
        together."""
        try:
            return self._usages[key][frozenset(phase.usage.items())]
        except KeyError:
            raise ValueError(
                f"{key}: the cost model gave a usage of links, {dict(phase.usage)}, that it did not give for "
                "the sampled sizes; the links of a point-to-point message must not depend on its size"
            ) from None


def fold(schedule: Schedule, cost: CostModel, *, folded: bool = True, alike: bool = False) -> Quotient:
    """The quotient of the schedule on the hardware that `cost` prices.

    With `alike`, ranks with the same program and shards of the same sizes, which communicate with such ranks, are taken
    to do the same at the same time, wherever they sit, if their messages cost nearly the same: one of them stands for
    all, and its transfers go as fast as the slowest of theirs. That is no longer exact.

    Raises ScheduleError where an op names a group that its rank is not in, or a neighbour past the end of a
    group.
    """
    patterns = _patterns(schedule)
    _check_membership(schedule, patterns)
    nodes = list(_nodes(schedule, cost, patterns))
    links = sorted({link for node in nodes for _, usage in _usages_of(node) for link in usage})
    capacities = [cost.link_capacity(link) for link in links]
    if min(capacities, default=1) < 1:
        raise ValueError("the cost model gave a link a capacity below 1 byte/s")
    number = {link: n for n, link in enumerate(links)}
    edges = [_edges(node, number) for node in nodes]
    size = (schedule.world_size, len(nodes), len(links))
    colours, rounds = [list(range(n)) for n in size], 0
    if folded:
        ranks, wires = _rank_colours(schedule, patterns), _interned(capacities)
        refined = _taken_alike(ranks, wires, nodes, edges) if alike else None
        refined = refined or _refine([ranks, _node_colours(nodes), wires], nodes, edges)
        if refined is not None:
            colours, rounds = refined
    return _quotient(schedule, nodes, edges, colours, capacities, rounds)


class Folds:
    """Quotients of earlier schedules, for schedules that use the same groups, wires and links in other sizes.

    Who behaves alike follows from who sends to whom over which links. Sizes matter only through the links that a
    collective's algorithm uses, and through shards of uneven size; both are compared.
    """

    def __init__(self) -> None:
        self._known: dict[object, Quotient] = {}

    def fold(self, schedule: Schedule, cost: CostModel, alike: bool = False) -> Quotient:
        """The quotient of the schedule, which must be priced by the same cost model each time."""
        patterns = _patterns(schedule)
        key = (
            alike,
            schedule.program_of_rank,
            tuple((name, group.dims, group.instances) for name, group in schedule.groups.items()),
            tuple(_shape_of(schedule, cost, found) for found in patterns),
        )
        if key not in self._known:
            self._known[key] = fold(schedule, cost, alike=alike)
        return self._known[key]


def _shape_of(schedule: Schedule, cost: CostModel, found: Patterns) -> object:
    """What of a program's communication matters for folding, beside its size."""
    used = []
    for name, wanted in found.collectives.items():
        members = schedule.groups[name].instances[0]
        phases = {
            tuple(id(phase.usage) for phase in found): found
            for found in (
                cost.collective(kind, members, size_bytes, dtype)
                for kind, size_bytes, dtype, root in wanted
                if len(members) > 1 and not root
            )
        }
        usages = frozenset(tuple(frozenset(p.usage.items()) for p in found) for found in phases.values())
        used.append((name, usages, frozenset(root for *_, root in wanted)))
    uneven = tuple((part, tuple(_interned(sizes))) for part, sizes in found.uneven)
    return frozenset(used), frozenset(found.wires), frozenset(uneven)


def _patterns(schedule: Schedule) -> list[Patterns]:
    """Those of every program; of one that several numbers stand for they are worked out once."""
    found: dict[int, Patterns] = {}
    for program in schedule.programs:
        if id(program) not in found:
            found[id(program)] = patterns_of(program)
    return [found[id(program)] for program in schedule.programs]


def patterns_of(program: Program) -> Patterns:
    """What the program computes and sends that other ranks may do differently."""
    found = Patterns()
    hops: dict[tuple[str, tuple[int, ...], int | None, Size, Part | None], None] = {}
    for buffer in program.buffers.values():
        _note_uneven(found, buffer.part, buffer.numel)
    for op in program.ops:
        action = op.action
        if not isinstance(action, Compute):
            found.groups[action.group] = None
        if isinstance(action, Compute):
            _note_uneven(found, action.part, action.variants)
        elif isinstance(action, Shift):
            for hop in action.hops:
                hops[action.group, hop.offset, action.chunk_bytes, hop.size_bytes, hop.part] = None
        elif isinstance(action, Collective):
            kind = (action.kind, action.size_bytes, action.dtype, action.root)
            found.collectives.setdefault(action.group, {})[kind] = None
        elif isinstance(action, Send):
            wire = Wire(action.group, action.offset, None, False)
            found.wires.setdefault(wire, set()).add(action.size_bytes)
    for group, offset, chunk_bytes, size, part in hops:
        sizes = (size,) if isinstance(size, int) else size
        found.wires.setdefault(Wire(group, offset, chunk_bytes, True), set()).update(sizes)
        _note_uneven(found, part, size)
    return found


def _note_uneven(found: Patterns, part: Part | None, sizes: Size | tuple[object, ...] | None) -> None:
    if part is not None and isinstance(sizes, tuple) and len(set(sizes)) > 1:
        found.uneven[part, sizes] = None


def collective_ranks(members: tuple[int, ...], root: int) -> tuple[int, ...]:
    """The members as a cost model sees them: in ring order, the root first."""
    return members[root:] + members[:root]


def _check_membership(schedule: Schedule, patterns: list[Patterns]) -> None:
    for rank, program in enumerate(schedule.program_of_rank):
        for name in patterns[program].groups:
            if name not in schedule.groups or rank not in schedule.groups[name].place:
                raise ScheduleError(
                    f"rank {rank} runs program {schedule.programs[program].name!r}, which communicates in "
                    f"group {name!r}, but is in none of its instances"
                )


def _nodes(schedule: Schedule, cost: CostModel, patterns: list[Patterns]) -> Iterator[_Node]:
    """Every flow, every group instance with its collectives, every rank with a compute pool."""
    sizes: dict[Wire, set[int]] = {}
    kinds: dict[str, dict[CollectiveKind, None]] = {}
    for found in patterns:
        for wire, some in found.wires.items():
            sizes.setdefault(wire, set()).update(some)
        for name, more in found.collectives.items():
            kinds.setdefault(name, {}).update(more)
    for wire, some in sizes.items():
        users = [r for r in range(schedule.world_size) if wire in patterns[schedule.program_of_rank[r]].wires]
        yield from _flows(schedule, cost, wire, _sampled(some), users)
    for name, wanted in kinds.items():
        for i, members in enumerate(schedule.groups[name].instances):
            if len(members) > 1:
                phases = tuple(
                    phase
                    for kind, size_bytes, dtype, root in wanted
                    for phase in cost.collective(kind, collective_ranks(members, root), size_bytes, dtype)
                )
                yield _Node(("group", name, i), members, False, phases)
    for rank in range(schedule.world_size):
        pool = cost.compute_pool(rank)
        if pool is not None:
            yield _Node(("compute", rank), (rank,), False, (Phase(0, 1, {pool: 1}, None),))


def _flows(
    schedule: Schedule, cost: CostModel, wire: Wire, sizes: tuple[int, ...], users: list[int]
) -> Iterator[_Node]:
    group = schedule.groups[wire.group]
    for rank in users:
        to = wire.receiver(group, rank)
        if to is None:
            raise ScheduleError(
                f"rank {rank} (program {schedule.program(rank).name!r}) sends to offset {wire.offset} in "
                f"group {wire.group!r}, past the end: its position is {group.position(rank)} of {group.dims}"
            )
        if to != rank:
            phases = tuple(cost.point_to_point(rank, to, s, wire.chunk_bytes) for s in sizes)
            yield _Node(("flow", wire, rank), (rank, to), True, phases)


def _sampled(sizes: set[int]) -> tuple[int, ...]:
    ordered = sorted(sizes)
    return tuple(ordered) if len(ordered) <= MAX_SAMPLED_SIZES else (ordered[0], ordered[-1])


def _edges(node: _Node, number: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """(phase, link, weight) with links by number, of the first phase with each usage."""
    return [
        (p, number[link], weight) for p, usage in _usages_of(node) for link, weight in usage.items()
    ]


def _usages_of(node: _Node) -> list[tuple[int, Mapping[int, int]]]:
    """The usages of the phases, those that are the same object once, with the first phase that has them: sizes of one
    collective differ in their time alone."""
    first: dict[int, int] = {}
    for p, phase in enumerate(node.phases):
        first.setdefault(id(phase.usage), p)
    return [(p, node.phases[p].usage) for p in first.values()]


def _interned(values: Iterable[object]) -> list[int]:
    table: dict[object, int] = {}
    return [table.setdefault(value, len(table)) for value in values]


def _rank_colours(schedule: Schedule, patterns: list[Patterns]) -> list[int]:
    """Program, and the sizes of the shards that the rank holds wherever these are uneven."""
    return _interned(
        (program, *(sizes[schedule.shard_index(rank, part)] for part, sizes in patterns[program].uneven))
        for rank, program in enumerate(schedule.program_of_rank)
    )


def _node_colours(nodes: list[_Node]) -> list[int]:
    """The kind of instance, and what its phases cost (those of one pattern are in the same order)."""
    return _interned(
        (
            *(node.key[:2] if node.key[0] != "compute" else node.key[:1]),
            *((p.latency_ns, p.work_bytes, p.cap_bytes_per_s) for p in node.phases),
        )
        for node in nodes
    )


def _refine(
    colours: list[list[int]], nodes: list[_Node], edges: list[list[tuple[int, int, int]]]
) -> tuple[list[list[int]], int] | None:
    """Refine (rank, node, link) colours until no class splits; None if that takes more than MAX_ROUNDS."""
    ranks, instances, alone = colours
    labels: dict[tuple[int, int], int] = {}
    node_links = [[(labels.setdefault((p, w), len(labels)) << 32, k) for p, k, w in own] for own in edges]
    touching: list[list[tuple[int, int]]] = [[] for _ in alone]
    rank_nodes: list[list[tuple[int, int]]] = [[] for _ in ranks]
    for n, node in enumerate(nodes):
        for label, link in node_links[n]:
            touching[link].append((label, n))
        for role, rank in enumerate(node.ranks):
            rank_nodes[rank].append((role << 32 if node.ordered else 0, n))
    # Links of one colour that the same nodes use in the same way, as on one route, are refined as one.
    bundle = _interned(zip(alone, map(tuple, touching), strict=True))
    first = {number: link for link, number in reversed(list(enumerate(bundle)))}
    links = [alone[first[number]] for number in range(len(first))]
    link_nodes = [touching[first[number]] for number in range(len(first))]
    node_bundles = [Counter((label, bundle[link]) for label, link in own) for own in node_links]
    count = sum(len(set(c)) for c in (ranks, instances, links))
    for rounds in range(1, MAX_ROUNDS + 1):
        members = [
            tuple(ranks[r] for r in n.ranks) if n.ordered else tuple(sorted([ranks[r] for r in n.ranks])) for n in nodes
        ]
        across = [_across(own, links) for own in node_bundles]
        instances = _interned(zip(instances, members, across, strict=True))
        links = _split(links, link_nodes, instances)
        ranks = _split(ranks, rank_nodes, instances)
        refined = sum(len(set(c)) for c in (ranks, instances, links))
        if refined == count:
            return [ranks, instances, [links[number] for number in bundle]], rounds
        count = refined
    return None


def _across(own: Mapping[tuple[int, int], int], links: list[int]) -> tuple[tuple[int, int], ...]:
    """How many links of each colour a node uses, and how."""
    found: dict[int, int] = {}
    for (label, number), count in own.items():
        key = label + links[number]
        found[key] = found.get(key, 0) + count
    return tuple(sorted(found.items()))


def _taken_alike(
    ranks: list[int], links: list[int], nodes: list[_Node], edges: list[list[tuple[int, int, int]]]
) -> tuple[list[list[int]], int] | None:
    """The (rank, node, link) classes where links do not tell ranks apart, but only whom they communicate with does:
    links that carry the same of every class of instances are a class. None where instances of one class differ by more
    than a little latency."""
    kinds = _interned(node.key[: 1 if node.key[0] == "compute" else 2] for node in nodes)
    refined = _refine([ranks, kinds, []], nodes, [[] for _ in nodes])
    if refined is None:
        return None
    ranks, instances, _ = refined[0]
    first: dict[int, _Node] = {}
    if not all(_nearly_equal(first.setdefault(k, node), node) for k, node in zip(instances, nodes, strict=True)):
        return None
    touching: list[dict[tuple[int, int], int]] = [{} for _ in links]
    for n, own in enumerate(edges):
        for phase, link, weight in own:
            key = instances[n], phase
            touching[link][key] = touching[link].get(key, 0) + weight
    links = _interned((own, frozenset(carried.items())) for own, carried in zip(links, touching, strict=True))
    return [ranks, instances, links], 1


def _nearly_equal(one: _Node, other: _Node) -> bool:
    """Whether their phases differ by no more than NEARLY in latency."""
    return len(one.phases) == len(other.phases) and all(
        (p.work_bytes, p.cap_bytes_per_s) == (q.work_bytes, q.cap_bytes_per_s)
        and abs(p.latency_ns - q.latency_ns) <= NEARLY * p.latency_ns
        for p, q in zip(one.phases, other.phases, strict=True)
    )


def _split(colours: list[int], around: list[list[tuple[int, int]]], instances: list[int]) -> list[int]:
    return _interned(
        (own, tuple(sorted([label + instances[n] for label, n in touching])))
        for own, touching in zip(colours, around, strict=True)
    )


def _quotient(
    schedule: Schedule,
    nodes: list[_Node],
    edges: list[list[tuple[int, int, int]]],
    colours: list[list[int]],
    capacities: list[int],
    rounds: int,
) -> Quotient:
    """Representatives, and the total weight that each class of instances puts on any one link of each
    class."""
    ranks, instances, links = colours
    links = _interned(links)
    first: dict[int, int] = {}
    for rank, colour in enumerate(ranks):
        first.setdefault(colour, rank)
    by_class: dict[int, list[int]] = {}
    for n, colour in enumerate(instances):
        by_class.setdefault(colour, []).append(n)
    population: dict[int, int] = {}
    for link_class in links:
        population[link_class] = population.get(link_class, 0) + 1
    usages: dict[NodeKey, dict[frozenset[tuple[int, int]], Usage]] = {}
    instance_of = {name: list(range(len(g.instances))) for name, g in schedule.groups.items()}
    for same in by_class.values():
        leader = nodes[same[0]]
        totals = _totals([edges[n] for n in same], links, population)
        usages[leader.key] = {
            frozenset(usage.items()): totals.get(p, ()) for p, usage in _usages_of(leader)
        }
        if leader.key[0] == "group":
            for n in same:
                _, name, i = nodes[n].key
                instance_of[str(name)][int(str(i))] = int(str(leader.key[2]))
    capacity = [0] * len(population)
    for link, link_class in enumerate(links):
        capacity[link_class] = capacities[link]
    return Quotient(
        tuple(first[colour] for colour in ranks),
        {name: tuple(indices) for name, indices in instance_of.items()},
        tuple(capacity),
        rounds,
        usages,
    )


def _totals(
    edges: list[list[tuple[int, int, int]]], links: list[int], population: Mapping[int, int]
) -> dict[int, Usage]:
    """By phase: the weight on any one link of each link class, checked to be the same on all of them."""
    weight: dict[tuple[int, int], int] = {}
    for own in edges:
        for phase, link, w in own:
            weight[phase, link] = weight.get((phase, link), 0) + w
    seen: dict[tuple[int, int], list[int]] = {}
    for (phase, link), total in weight.items():
        seen.setdefault((phase, links[link]), []).append(total)
    usage: dict[int, list[tuple[int, int]]] = {}
    for (phase, link_class), totals in seen.items():
        assert len(totals) == population[link_class], "partition is not equitable: a link of the class is unused"
        assert min(totals) == max(totals), "partition is not equitable: links of one class carry unequal weight"
        usage.setdefault(phase, []).append((link_class, totals[0]))
    return {phase: tuple(sorted(pairs)) for phase, pairs in usage.items()}
