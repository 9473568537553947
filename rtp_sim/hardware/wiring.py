"""One node's wiring: its devices, switches and NICs, the links between them, and the routes inside the
node.

A `Wiring` says what is plugged into what; `NodeTemplate` numbers its directed links once and finds routes
in it. `topology.py` repeats the template node after node by adding an offset to the link numbers, so a
cluster costs no route search of its own. Vertices are named by what they are: gpu0.., nic0.. (ports), and
hubs such as nvswitch, pcie0, host0.

Routes between two devices take, in this order of preference: scale-up links and their switches (NVLink,
xGMI); PCIe switches and host bridges; anything, also through other devices. Fewest hops win, then
bandwidth, then the name.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from rtp_sim.errors import InputError
from rtp_sim.hardware.spec import Link

SCALE_UP = ("nvlink", "xgmi")
LINK_KINDS = (*SCALE_UP, "pcie", "host", "nic", "fabric", "loopback")

_HOP_COST = 10**6
_BANDWIDTH_COST = 10**14


@dataclass(frozen=True, slots=True)
class LinkClass:
    """A sort of cable or bus: one direction's bytes/s (raw, and what transfers reach), latency, provenance.

    With `duplex` false both directions share the bandwidth.
    """

    name: str
    kind: str
    raw_bandwidth_bytes_per_s: int
    bandwidth_bytes_per_s: int
    latency_ns: int
    duplex: bool
    provenance: str


@dataclass(frozen=True, slots=True)
class Wire:
    """`count` links of one class side by side between two vertices, seen as one wire of `count` times the
    rate.
    """

    a: str
    b: str
    link: LinkClass
    count: int = 1


@dataclass(frozen=True, slots=True)
class Nics:
    """The NICs of a node: NIC i hangs on vertex `attached_to[i]` by `attach_link`, and on the fabric by
    `link`.
    """

    attached_to: tuple[str, ...]
    attach_link: LinkClass
    link: LinkClass


@dataclass(frozen=True, slots=True)
class Wiring:
    """A node: `gpus` devices, wires, hubs whose through traffic shares one resource, and NICs if it has
    any.
    """

    gpus: int
    wires: tuple[Wire, ...]
    shared_hubs: Mapping[str, LinkClass] = field(default_factory=dict)
    nics: Nics | None = None


@dataclass(frozen=True, slots=True)
class Port:
    """One or more NICs that a device uses as one; `up` and `down` are the link numbers to and from the
    fabric.
    """

    name: str
    nics: tuple[int, ...]
    up: int
    down: int


def is_gpu(vertex: str) -> bool:
    """Whether the vertex is a device (and so never forwards unless there is no other way)."""
    return vertex.startswith("gpu")


class NodeTemplate:
    """The numbered links of one node and the routes between its devices and ports, found when first asked
    for.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.gpus = wiring.gpus
        self.links: list[Link] = []
        self.edges: dict[tuple[str, str], int] = {}
        self.shared: dict[str, int] = {}
        self._neighbours: dict[str, list[tuple[str, int]]] = {f"gpu{g}": [] for g in range(wiring.gpus)}
        self._routes: dict[tuple[int, int], tuple[int, ...]] = {}
        self.direct_count: dict[tuple[int, int], int] = {}
        for wire in wiring.wires:
            self._add_wire(wire)
        for hub, link in wiring.shared_hubs.items():
            self.shared[hub] = self._add_link(hub, link, 1)
        self.ports: tuple[Port, ...] = ()
        self.port_of_gpu: tuple[int, ...] = ()
        self._ways: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        if wiring.nics is not None:
            self._add_ports(wiring.nics)

    def _add_link(self, name: str, link: LinkClass, count: int) -> int:
        index = len(self.links)
        self.links.append(
            Link(
                index=index,
                name=name,
                kind=link.kind,
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * count,
                raw_bandwidth_bytes_per_s=link.raw_bandwidth_bytes_per_s * count,
                latency_ns=link.latency_ns,
                provenance=link.provenance,
            )
        )
        return index

    def _add_wire(self, wire: Wire) -> None:
        """Two directed links, or one that both directions share."""
        a, b, link = wire.a, wire.b, wire.link
        if a == b or (a, b) in self.edges:
            raise InputError(f"given two wires between {a} and {b} (or a wire to itself), expected one wire xN")
        there = self._add_link(f"{a}->{b}" if link.duplex else f"{a}<->{b}", link, wire.count)
        back = self._add_link(f"{b}->{a}", link, wire.count) if link.duplex else there
        for source, target, index in ((a, b, there), (b, a, back)):
            self.edges[source, target] = index
            self._neighbours.setdefault(source, []).append((target, index))
        if is_gpu(a) and is_gpu(b) and link.kind in SCALE_UP:
            pair = (int(a[3:]), int(b[3:]))
            self.direct_count[pair] = self.direct_count[pair[::-1]] = wire.count

    def route(self, source: int, target: int) -> tuple[int, ...]:
        """Link numbers from device to device of this node; () from a device to itself. InputError if
        unconnected.
        """
        if source == target:
            return ()
        if (source, target) not in self._routes:
            paths = [self._paths(f"gpu{source}", choice) for choice in ("scale-up", "host", "any")]
            for g in range(self.gpus):
                vertex = f"gpu{g}"
                found = next((p[vertex] for p in paths if vertex in p), None)
                if found is not None:
                    self._routes[source, g] = self._links_on(found[1])
        try:
            return self._routes[source, target]
        except KeyError:
            raise InputError(f"gpu{source} and gpu{target} of a node are not connected by any wire") from None

    def egress(self, gpu: int) -> tuple[int, ...]:
        """Link numbers from a device to the fabric, its port's uplink last."""
        return self._ways[gpu][0]

    def ingress(self, gpu: int) -> tuple[int, ...]:
        """Link numbers from the fabric to a device: the same way back, so the port's downlink first."""
        return self._ways[gpu][1]

    def bandwidth(self, source: int, target: int) -> int:
        """Bytes/s of the narrowest link between two devices of the node."""
        return min(self.links[i].bandwidth_bytes_per_s for i in self.route(source, target))

    def _path_to(self, gpu: int, vertex: str) -> tuple[str, ...]:
        for choice in ("host", "any"):
            paths = self._paths(f"gpu{gpu}", choice)
            if vertex in paths:
                return paths[vertex][1]
        raise InputError(f"gpu{gpu} of a node has no way to {vertex}")

    def _links_on(self, path: tuple[str, ...]) -> tuple[int, ...]:
        """The links along a path, with the shared resource of every hub passed through."""
        links: list[int] = []
        for position, (a, b) in enumerate(itertools.pairwise(path)):
            if position and a in self.shared:
                links.append(self.shared[a])
            links.append(self.edges[a, b])
        return tuple(links)

    def _paths(self, source: str, choice: str) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Cheapest paths (cost, vertices) from `source`. Dijkstra; ties go to the alphabetically first path.

        `choice` "scale-up" uses only such links, "host" everything else, and both forward through no device.
        """
        done: dict[str, tuple[int, tuple[str, ...]]] = {}
        queue: list[tuple[int, tuple[str, ...]]] = [(0, (source,))]
        while queue:
            cost, path = heapq.heappop(queue)
            vertex = path[-1]
            if vertex in done:
                continue
            done[vertex] = (cost, path)
            if choice != "any" and vertex != source and is_gpu(vertex):
                continue
            for target, index in self._neighbours[vertex]:
                link = self.links[index]
                if target in done or (choice != "any" and (link.kind in SCALE_UP) != (choice == "scale-up")):
                    continue
                # Hops first; among equally short paths the wider: below 10^8 bytes/s this term is capped.
                tie = min(_BANDWIDTH_COST // link.bandwidth_bytes_per_s, _HOP_COST // 64)
                heapq.heappush(queue, (cost + _HOP_COST + tie, (*path, target)))
        return done

    def _add_ports(self, nics: Nics) -> None:
        """Bundle the NICs into ports (see `assign_nics`) and wire each to its vertex and to the fabric."""
        bundles = assign_nics([self._nearest(g, nics.attached_to) for g in range(self.gpus)])
        numbers = {bundle: n for n, bundle in enumerate(sorted(set(bundles)))}
        ports = []
        for bundle in numbers:
            name = f"nic{bundle[0]}" if len(bundle) == 1 else f"nic{bundle[0]}-{bundle[-1]}"
            self._add_wire(Wire(nics.attached_to[bundle[0]], name, nics.attach_link, len(bundle)))
            up = self._add_link(f"{name}->fabric", nics.link, len(bundle))
            down = self._add_link(f"fabric->{name}", nics.link, len(bundle))
            ports.append(Port(name, bundle, up, down))
        self.ports = tuple(ports)
        self.port_of_gpu = tuple(numbers[bundle] for bundle in bundles)
        for gpu, number in enumerate(self.port_of_gpu):
            port = self.ports[number]
            path = self._path_to(gpu, port.name)
            self._ways.append(((*self._links_on(path), port.up), (port.down, *self._links_on(path[::-1]))))

    def _nearest(self, gpu: int, attached_to: tuple[str, ...]) -> tuple[int, ...]:
        """The NICs the fewest hops away from a device, not through other devices where that is possible."""
        for choice in ("host", "any"):
            paths = self._paths(f"gpu{gpu}", choice)
            hops = {i: len(paths[v][1]) for i, v in enumerate(attached_to) if v in paths}
            if hops:
                least = min(hops.values())
                return tuple(i for i, h in hops.items() if h == least)
        raise InputError(f"gpu{gpu} of a node has no way to any NIC")


def assign_nics(nearest: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Which NICs each device uses, given the nearest ones of each: all NICs near it are dealt out evenly.

    Devices with the same nearest NICs share them: with as many or more NICs than devices each gets its own
    run of NICs, bundled as one port; with fewer, neighbours use one NIC together. Where the sets of two
    devices overlap without being equal, each device takes the single nearest NIC that the fewest before it
    took.
    """
    sets = set(nearest)
    bundles: list[tuple[int, ...]] = []
    if any(a != b and set(a) & set(b) for a in sets for b in sets):
        taken: dict[int, int] = dict.fromkeys((nic for s in sets for nic in s), 0)
        for near in nearest:
            choice = min(near, key=lambda nic: (taken[nic], nic))
            taken[choice] += 1
            bundles.append((choice,))
        return bundles
    seen: dict[tuple[int, ...], int] = {}
    for near in nearest:
        place, sharers = seen.get(near, 0), nearest.count(near)
        seen[near] = place + 1
        first, end = place * len(near) // sharers, (place + 1) * len(near) // sharers
        bundles.append(near[first : max(end, first + 1)])
    return bundles
