"""From the words of a cluster file to a node's wiring: link classes, hubs, pairs, and where the NICs hang."""

from __future__ import annotations

import re

from rtp_sim.errors import InputError
from rtp_sim.hardware.files import ClusterFile, CommunicationFile, IntraFile, LinkFile, NicsFile
from rtp_sim.hardware.spec import CommunicationParams, KindParams, Number
from rtp_sim.hardware.wiring import LINK_KINDS, LinkClass, Nics, Wire, Wiring, is_gpu
from rtp_sim.units import parse_bytes

ALGORITHMS = ("ring", "tree", "hierarchical", "in-switch")

_VERTEX = re.compile(r"(gpu\d+|[a-z][a-z_]*\d*)")
_PAIR = re.compile(r"(\w+)\s*-\s*(\w+)(?:\s+x([1-9]\d*))?")
_RUN = re.compile(r"([a-z_]+)(\d+)\.\.(\d+)")


def link_class(
    name: str, kind: str, bandwidth: Number, efficiency: Number, latency: Number, duplex: bool = True
) -> LinkClass:
    """A link class: what transfers reach is the raw bandwidth times the efficiency. Raises InputError."""
    if kind not in LINK_KINDS:
        raise InputError(f"links.{name}.kind: given {kind!r}, expected one of {', '.join(LINK_KINDS)}")
    provenance = "; ".join(
        f"{what} {number.kind}: {number.source}"
        for what, number in (("bandwidth", bandwidth), ("efficiency", efficiency), ("latency", latency))
    )
    return LinkClass(
        name=name,
        kind=kind,
        raw_bandwidth_bytes_per_s=int(bandwidth.value),
        bandwidth_bytes_per_s=round(bandwidth.value * efficiency.value),
        latency_ns=int(latency.value),
        duplex=duplex,
        provenance=provenance,
    )


def wiring_from_file(file: ClusterFile) -> Wiring:
    """The wiring of one node. Raises InputError naming the key for unknown links, vertices and bad texts."""
    classes = {name: _from_link_file(name, link) for name, link in file.links.items()}
    wires: list[Wire] = []
    shared: dict[str, LinkClass] = {}
    for number, intra in enumerate(file.intra):
        where = f"intra.{number}"
        wires += _wires(intra, _class(classes, intra.link, f"{where}.link"), file.gpus_per_node, where)
        if intra.through is not None:
            if intra.hub is None:
                raise InputError(f"{where}.through: given without a hub, expected a hub that it belongs to")
            shared[intra.hub] = _class(classes, intra.through, f"{where}.through")
    nics = None if file.nics is None else _nics(file.nics, classes, file.gpus_per_node)
    return Wiring(file.gpus_per_node, tuple(wires), shared, nics)


def communication_params(file: CommunicationFile) -> CommunicationParams:
    """The communication section as `spec.CommunicationParams`. Raises InputError for unknown algorithms or
    a curve that does not rise in bytes or leaves (0, 1].
    """
    unknown = [name for name in file.algorithms if name not in ALGORITHMS]
    if unknown:
        raise InputError(
            f"communication.algorithms: given {', '.join(unknown)}, expected some of {', '.join(ALGORITHMS)}"
        )
    curve = file.size_curve
    try:
        points = tuple((parse_bytes(size), fraction) for size, fraction in curve.points) if curve else ()
    except InputError as error:
        raise InputError(f"communication.size_curve.points: {error}") from None
    sizes = [size for size, _ in points]
    if sizes != sorted(set(sizes)) or any(not 0 < fraction <= 1 for _, fraction in points):
        raise InputError(
            f"communication.size_curve.points: given {points}, expected rising bytes and fractions in (0, 1]"
        )
    nodes = tuple(file.all_reduce_nodes.points) if file.all_reduce_nodes else ()
    counts = [count for count, _ in nodes]
    if counts != sorted(set(counts)) or any(count < 1 or not 0 < fraction <= 1 for count, fraction in nodes):
        raise InputError(
            f"communication.all_reduce_nodes.points: given {nodes}, expected rising nodes and fractions in (0, 1]"
        )
    return CommunicationParams(
        p2p_base_ns=file.p2p_base,
        p2p_efficiency=file.p2p_efficiency,
        collective_base_ns=file.collective_base,
        collective_step_intra_ns=file.collective_step_intra,
        collective_step_inter_ns=file.collective_step_inter,
        algorithms=tuple(file.algorithms),
        size_curve=points,
        size_curve_provenance=Number(len(points), curve.kind, curve.source) if curve else None,
        in_switch_reduction_min_ranks=file.in_switch_reduction_min_ranks,
        in_switch_base_ns=file.in_switch_base,
        in_switch_efficiency=file.in_switch_efficiency,
        collective_chunk_inter_ns=file.collective_chunk_inter,
        message_stall_ns=file.message_stall,
        message_stall_nodes=file.message_stall_nodes,
        all_reduce_nodes=nodes,
        kinds={name: KindParams(kind.step, kind.efficiency) for name, kind in file.kinds.items()},
    )


def _from_link_file(name: str, link: LinkFile) -> LinkClass:
    return link_class(name, link.kind, link.bandwidth, link.efficiency, link.latency, link.duplex)


def _class(classes: dict[str, LinkClass], name: str, where: str) -> LinkClass:
    if name not in classes:
        raise InputError(f"{where}: given {name!r}, expected one of the links {', '.join(classes) or '(none)'}")
    return classes[name]


def _wires(intra: IntraFile, link: LinkClass, gpus: int, where: str) -> list[Wire]:
    if intra.hub is None and not intra.pairs:
        raise InputError(f"{where}: given neither a hub with members nor pairs, expected one of them")
    wires = [
        Wire(_vertex(member, gpus, f"{where}.members"), _vertex(intra.hub, gpus, f"{where}.hub"), link)
        for member in _expanded(intra.members)
        if intra.hub is not None
    ]
    for text in intra.pairs:
        match = _PAIR.fullmatch(text.strip())
        if match is None:
            raise InputError(f'{where}.pairs: given {text!r}, expected two vertices, for example "gpu0-gpu3 x2"')
        a, b = (_vertex(match[i], gpus, f"{where}.pairs") for i in (1, 2))
        wires.append(Wire(a, b, link, int(match[3] or 1)))
    return wires


def _expanded(members: list[str]) -> list[str]:
    """Runs such as "gpu0..3" written out."""
    names: list[str] = []
    for member in members:
        run = _RUN.fullmatch(member)
        names += [f"{run[1]}{i}" for i in range(int(run[2]), int(run[3]) + 1)] if run else [member]
    return names


def _vertex(name: str, gpus: int, where: str) -> str:
    if not _VERTEX.fullmatch(name) or (is_gpu(name) and not name[3:].isdigit()):
        raise InputError(f'{where}: given {name!r}, expected a vertex such as "gpu0", "pcie1" or "nvswitch"')
    if is_gpu(name) and int(name[3:]) >= gpus:
        raise InputError(f"{where}: given {name!r}, expected gpu0 to gpu{gpus - 1}")
    return name


def _nics(file: NicsFile, classes: dict[str, LinkClass], gpus: int) -> Nics:
    places = [_vertex(name, gpus, "nics.attached_to") for name in _expanded(file.attached_to)]
    if file.count % len(places):
        raise InputError(
            f"nics.count: given {file.count}, expected a multiple of the {len(places)} places in attached_to"
        )
    each = file.count // len(places)
    return Nics(
        attached_to=tuple(place for place in places for _ in range(each)),
        attach_link=_class(classes, file.attach_link, "nics.attach_link"),
        link=_class(classes, file.link, "nics.link"),
    )
