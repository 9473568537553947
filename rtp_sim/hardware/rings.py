"""Ring orders: in which order a group of devices should pass messages around, and how many rings at once.

Inside a node the order is searched: the ring whose most loaded link leaves the most bandwidth per message,
then the one with the most bandwidth in total; the given order wins ties, so on a switch it stays as it is.
Across nodes a ring goes node by node, which crosses each NIC once per direction.
"""

from __future__ import annotations

from collections.abc import Mapping

from rtp_sim.hardware.wiring import NodeTemplate

SEARCH_LIMIT = 8
"""Largest group inside a node for which all orders are searched (7! = 5040); above it the given order is
kept.
"""

Order = tuple[int, ...]
Pair = tuple[int, int]


def best_ring(template: NodeTemplate, members: Order) -> Order:
    """The ring order of `members` (devices of one node) with the largest smallest bandwidth, starting at
    the first.

    Each hop counts with its route's links, and a link that k hops share counts with 1/k of its bandwidth.
    """
    if not 2 < len(members) <= SEARCH_LIMIT:
        return members
    paths = {(a, b): template.route(a, b) for a in members for b in members if a != b}
    capacity = {link: float(template.links[link].bandwidth_bytes_per_s) for path in paths.values() for link in path}
    return _search(members, paths, capacity)[0]


def parallel_rings(template: NodeTemplate, members: Order) -> tuple[Order, ...]:
    """Rings inside one node that together use its point-to-point links, each ring to carry an equal share.

    On a switch or a PCIe tree one ring already fills every device's port, so it is the only one. On a mesh,
    rings are peeled off greedily, widest first, until no ring is left; a ring over links of multiplicity k
    is listed k times, and every ring once more backwards, since a ring loads one direction only.
    """
    ring = best_ring(template, members)
    pairs = [(a, b) for a in members for b in members if a < b]
    number = {pair: n for n, pair in enumerate(pairs)}
    left = {number[pair]: float(template.direct_count.get(pair, 0)) for pair in pairs}
    if not 2 < len(members) <= SEARCH_LIMIT or not any(left.values()):
        return (ring,)
    paths = {(a, b): (number[min(a, b), max(a, b)],) for a in members for b in members if a != b}
    rings: list[Order] = []
    while True:
        order, width = _search(members, paths, left)
        if width == 0:
            break
        rings += [order] * int(width)
        for hop in zip(order, (*order[1:], order[0]), strict=True):
            left[paths[hop][0]] -= width
    backwards = [(order[0], *order[:0:-1]) for order in rings]
    return tuple(rings + backwards) or (ring,)


def node_by_node(parts: list[tuple[int, Order]], gpus_per_node: int, template: NodeTemplate) -> Order:
    """One ring over several nodes: `parts` lists (node, members there) in visiting order; ranks come back."""
    return tuple(node * gpus_per_node + local for node, members in parts for local in best_ring(template, members))


def node_by_node_channels(
    parts: list[tuple[int, Order]], gpus_per_node: int, template: NodeTemplate
) -> tuple[Order, ...]:
    """Rings over several nodes that enter each node at another NIC, each ring to carry an equal share.

    Every node's ring order is cut open before the device where ring j enters. Every second node is walked
    backwards, so that a message leaves one node and enters the next on the same NIC number and stays on its
    rail.
    """
    cycles = [best_ring(template, members) for _, members in parts]
    entries = [_entries(template, cycle) for cycle in cycles]
    count = min(len(e) for e in entries)
    rings = []
    for j in range(count):
        ring: list[int] = []
        for turn, ((node, _), cycle, entry) in enumerate(zip(parts, cycles, entries, strict=True)):
            start = entry[j]
            walk = cycle[start:] + cycle[:start]
            ring += [node * gpus_per_node + local for local in (walk if turn % 2 == 0 else walk[::-1])]
        rings.append(tuple(ring))
    return tuple(rings)


def _entries(template: NodeTemplate, cycle: Order) -> list[int]:
    """Where to cut `cycle` open, one position per port in use, so that also every port is left once if
    possible.

    A cut at position p enters at cycle[p] and leaves at cycle[p - 1]: a bipartite matching of entered ports
    and left ports, by augmenting paths.
    """
    port = [template.port_of_gpu[gpu] for gpu in cycle]
    entered_when_leaving: dict[int, int] = {}
    cut: dict[int, int] = {}

    def place(entered: int, tried: set[int]) -> bool:
        for position in (p for p, number in enumerate(port) if number == entered):
            leaving = port[position - 1]
            if leaving in tried:
                continue
            tried.add(leaving)
            if leaving not in entered_when_leaving or place(entered_when_leaving[leaving], tried):
                entered_when_leaving[leaving], cut[entered] = entered, position
                return True
        return False

    ports = list(dict.fromkeys(port))
    for entered in ports:
        if not place(entered, set()):
            cut[entered] = port.index(entered)
    return [cut[entered] for entered in ports]


def _search(
    members: Order, paths: Mapping[Pair, tuple[int, ...]], capacity: Mapping[int, float]
) -> tuple[Order, float]:
    """The best ring through `members` and its smallest bandwidth, by depth-first search with bounds.

    A partial ring can only get worse as hops are added, so it is left as soon as it cannot beat the best one.
    """
    width = {pair: min(capacity[link] for link in path) for pair, path in paths.items()}
    widest = [max(width[a, b] for b in members if b != a) for a in members]
    best_order, best = members, _score(members, paths, capacity, width)
    if best == (min(widest), sum(widest)):
        return best_order, best[0]
    uses: dict[int, int] = dict.fromkeys(capacity, 0)
    order = [members[0]]

    def extend(bottleneck: float, total: float) -> None:
        nonlocal best_order, best
        left = len(members) - len(order)
        if (bottleneck, total + (left + 1) * max(widest)) <= best:
            return
        for target in [m for m in members if m not in order] or [members[0]]:
            hop = paths[order[-1], target]
            for link in hop:
                uses[link] += 1
            narrowed = min(bottleneck, *(capacity[link] / uses[link] for link in hop))
            reached = total + width[order[-1], target]
            if left == 0 and (narrowed, reached) > best:
                best_order, best = tuple(order), (narrowed, reached)
            elif left:
                order.append(target)
                extend(narrowed, reached)
                order.pop()
            for link in hop:
                uses[link] -= 1

    extend(float("inf"), 0.0)
    return best_order, best[0]


def _score(
    order: Order,
    paths: Mapping[Pair, tuple[int, ...]],
    capacity: Mapping[int, float],
    width: Mapping[Pair, float],
) -> tuple[float, float]:
    """(smallest bandwidth of a shared link, sum of the hops' bandwidths) of a closed ring."""
    hops = list(zip(order, (*order[1:], order[0]), strict=True))
    uses: dict[int, int] = {}
    for hop in hops:
        for link in paths[hop]:
            uses[link] = uses.get(link, 0) + 1
    return min(capacity[link] / n for link, n in uses.items()), sum(width[hop] for hop in hops)
