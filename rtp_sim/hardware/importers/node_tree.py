"""From the matrix of `nvidia-smi topo -m` to a node's wiring: NVLinks, PCIe switches, host bridges, sockets, NICs.

Devices nearer than a level to each other lie below one hub of that level: PIX below a PCIe switch, PXB below a switch
of switches, PHB below a host bridge, NODE in a NUMA node, SYS across. Where NVLink hides how GPUs lie on PCIe, what
NICs they share and which NUMA node (else which CPU cores) they belong to tells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rtp_sim.hardware.importers.topo_matrix import LEVELS, TopoMatrix

MOST_NVLINKS = 18
"""Links of a GPU since Hopper. More than that by the matrix, all pairs added up: the links end at a switch."""

_HUB = {"PIX": "pcie", "PXB": "bridge", "PHB": "host", "NODE": "numa", "SYS": "smp"}


@dataclass(frozen=True, slots=True)
class HubWires:
    """Everything in `members` hangs on `hub`; `link` is "pcie", "node" (between host bridges) or "socket"."""

    hub: str
    members: tuple[str, ...]
    link: str


@dataclass(frozen=True, slots=True)
class NodeTree:
    """A node's wiring in the words of a cluster profile.

    `switch_links` are the NVLinks of each GPU that end at a switch (0: no switch), `pairs` the direct ones (gpu, gpu,
    links). `nics` names the NICs and where each is attached, `left_out` those that lie across the sockets from every
    GPU while others do not: storage and management.
    """

    gpus: int
    switch_links: int
    pairs: tuple[tuple[int, int, int], ...]
    hubs: tuple[HubWires, ...]
    nics: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]


def node_tree(matrix: TopoMatrix) -> NodeTree:
    """The wiring. PCIe is left out where nothing uses it: no NICs, and NVLink between all GPUs."""
    pairs = [(a, b, matrix.nvlinks(a, b)) for a in range(matrix.gpus) for b in range(a + 1, matrix.gpus)]
    linked = [pair for pair in pairs if pair[2]]
    switch_links = _switch_links(matrix, linked, len(pairs))
    nics = {nic: matrix.nic_names.get(nic, nic) for nic in matrix.nics}
    left_out = _unrelated(matrix)
    used = [nic for nic in matrix.nics if nic not in left_out]
    everything = bool(linked) and len(linked) == len(pairs)
    hubs: list[HubWires] = []
    places: dict[str, str] = {}
    if used or not everything:
        hubs, places = _pcie(matrix, used)
    return NodeTree(
        matrix.gpus, switch_links, () if switch_links else tuple(linked), tuple(hubs),
        tuple((nics[nic], places[nic]) for nic in used), tuple(nics[nic] for nic in left_out),
    )  # fmt: skip


def _switch_links(matrix: TopoMatrix, linked: Sequence[tuple[int, int, int]], pairs: int) -> int:
    """Links of a GPU to the switch; 0 where the links are direct."""
    counts = {links for _, _, links in linked}
    if len(counts) != 1 or len(linked) != pairs or matrix.gpus < 3:
        return 0
    (links,) = counts
    return links if links * (matrix.gpus - 1) > MOST_NVLINKS else 0


def _unrelated(matrix: TopoMatrix) -> tuple[str, ...]:
    gpus = [f"GPU{i}" for i in range(matrix.gpus)]
    far = tuple(nic for nic in matrix.nics if all(matrix.cells[gpu, nic] == "SYS" for gpu in gpus))
    return far if len(far) < len(matrix.nics) else ()


def _pcie(matrix: TopoMatrix, nics: Sequence[str]) -> tuple[list[HubWires], dict[str, str]]:
    """The tree of hubs, and where each NIC is attached. Units are joined level by level, nearest first; a hub is made
    where a class has several units (a host bridge always), and NICs hang on the hub right above them."""
    devices = [*(f"GPU{i}" for i in range(matrix.gpus)), *nics]
    unit = {device: device for device in devices}
    places: dict[str, str] = {}
    hubs: list[HubWires] = []
    for depth, level in enumerate(LEVELS):
        number = 0
        for members in _classes(matrix, devices, depth):
            units = list(dict.fromkeys(unit[device] for device in members))
            # Ports of one adapter hang on whatever their adapter hangs on.
            if level != "PHB" and (len(units) == 1 or all(u in nics for u in units)):
                continue
            hub = f"{_HUB[level]}{number}"
            number += 1
            places |= dict.fromkeys((u for u in units if u in nics), hub)
            wired = tuple(u.lower() if u in devices else u for u in units if u not in nics)
            hubs.append(HubWires(hub, wired, {"NODE": "node", "SYS": "socket"}.get(level, "pcie")))
            for device in members:
                unit[device] = hub
    return hubs, places


def _classes(matrix: TopoMatrix, devices: Sequence[str], depth: int) -> list[list[str]]:
    """The devices that reach each other over levels up to LEVELS[depth], in order of their first member."""
    root = {device: device for device in devices}

    def find(device: str) -> str:
        while root[device] != device:
            device = root[device]
        return device

    near = set(LEVELS[: depth + 1])
    for i, a in enumerate(devices):
        for b in devices[:i]:
            if matrix.cells.get((a, b)) in near or LEVELS[depth] == "SYS" or _share_numa(matrix, a, b, depth):
                first, second = sorted((find(a), find(b)), key=devices.index)
                root[second] = first
    classes: dict[str, list[str]] = {}
    for device in devices:
        classes.setdefault(find(device), []).append(device)
    return list(classes.values())


def _share_numa(matrix: TopoMatrix, a: str, b: str, depth: int) -> bool:
    """Whether two GPUs whose cell says NVLink lie in one NUMA node, from level NODE on."""
    if depth < LEVELS.index("NODE") or not (a.startswith("GPU") and b.startswith("GPU")):
        return False
    i, j = int(a[3:]), int(b[3:])
    if not matrix.nvlinks(i, j):
        return False
    if matrix.numa[i] is not None and matrix.numa[j] is not None:
        return matrix.numa[i] == matrix.numa[j]
    return bool(matrix.affinity[i]) and matrix.affinity[i] == matrix.affinity[j]
