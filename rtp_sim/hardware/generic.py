"""A cluster from a few words, for machines that have no profile:
`generic:h100-sxm,gpus=8,nics=4,nic=200Gb/s`.

The node is the plainest one with these numbers: a scale-up switch if the device has scale-up links, PCIe
switches below one host bridge, the NICs spread evenly over the PCIe switches, and a full fat tree of rail
leaves. Everything that the words do not say is assumed and says so in its provenance.
"""

from __future__ import annotations

from rtp_sim.errors import InputError
from rtp_sim.hardware.nodes import link_class
from rtp_sim.hardware.profiles import (
    GENERIC,
    cluster_shape,
    device_from_file,
    load_communication,
    read_device_file,
)
from rtp_sim.hardware.spec import Cluster, Number
from rtp_sim.hardware.topology import Fabric, Topology
from rtp_sim.hardware.wiring import LinkClass, Nics, NodeTemplate, Wire, Wiring
from rtp_sim.units import parse_bandwidth

LIKE = "dgx-a100-80g"
"""The profile whose communication parameters and link efficiencies a generic cluster borrows."""

_EXAMPLE = f'for example "{GENERIC}h100-sxm,gpus=8,nics=4,nic=200Gb/s"'
_KEYS = ("gpus", "nics", "nic", "scaleup", "oversubscription")
_PORTS_PER_LEAF = 32


def generic_cluster(
    device_name: str,
    gpus_per_node: int,
    nics_per_node: int,
    nic_bandwidth_bytes_per_s: int,
    scaleup_bandwidth_bytes_per_s: int | None = None,
    oversubscription: float = 1.0,
    nodes: int = 1,
    gpus: int | None = None,
) -> Cluster:
    """A cluster of `nodes` plain nodes. Bandwidths are raw, in bytes/s and one direction.

    Without `scaleup_bandwidth_bytes_per_s` the device profile's own is taken; a device without scale-up
    links talks over PCIe. `gpus` as in `profiles.load_cluster`. Raises InputError.
    """
    if gpus_per_node < 1 or nics_per_node < 0 or nic_bandwidth_bytes_per_s < 1:
        raise InputError(
            f"given gpus={gpus_per_node}, nics={nics_per_node}, nic={nic_bandwidth_bytes_per_s} bytes/s, "
            "expected gpus >= 1, nics >= 0, nic > 0"
        )
    name, file = read_device_file(device_name)
    scale_up = file.scale_up_bandwidth
    if scaleup_bandwidth_bytes_per_s is not None:
        scale_up = _given(scaleup_bandwidth_bytes_per_s)
    pcie = _pcie(file.pcie_bandwidth or Number(31e9, "assumed", "PCIe 4 x16"))
    wires = _tree(gpus_per_node, nics_per_node, pcie)
    if scale_up is not None:
        wires += [Wire(f"gpu{g}", "nvswitch", _scale_up(scale_up)) for g in range(gpus_per_node)]
    nics = None
    if nics_per_node:
        switches = _switches(gpus_per_node, nics_per_node)
        places = tuple(f"pcie{i * switches // nics_per_node}" for i in range(nics_per_node))
        nics = Nics(places, pcie, _nic(_given(nic_bandwidth_bytes_per_s)))
    label = f"{GENERIC}{device_name}"
    nodes, used = cluster_shape(label, gpus_per_node, nodes, gpus)
    template = NodeTemplate(Wiring(gpus_per_node, tuple(wires), nics=nics))
    fabric = Fabric(True, _PORTS_PER_LEAF, oversubscription, 300, "assumed: full fat tree unless given otherwise")
    return Cluster(
        name=label,
        description=f"{gpus_per_node} {name} per node, {nics_per_node} NICs, generic wiring",
        device=device_from_file(name, file),
        gpus_per_node=used,
        nodes=nodes,
        communication=load_communication(LIKE),
        topology=Topology(template, fabric, nodes, used),
        notes=("Generic cluster: wiring, latencies and efficiencies are assumed.",),
    )


def parse_generic(text: str, nodes: int = 1, gpus: int | None = None) -> Cluster:
    """The cluster that `generic:<device>,key=value,...` names; keys gpus, nics, nic, scaleup,
    oversubscription.

    Defaults: 8 GPUs, as many NICs as GPUs, 400 Gb/s each, the device's own scale-up. Raises InputError.
    """
    device, *rest = text.removeprefix(GENERIC).split(",")
    words: dict[str, str] = {}
    for part in rest:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in _KEYS or key in words:
            raise InputError(
                f"given {part.strip()!r} in {text!r}, expected each of {', '.join(_KEYS)} at most once as "
                f"key=value, {_EXAMPLE}"
            )
        words[key] = value
    per_node = _whole(words.get("gpus", "8"), "gpus", text)
    try:
        oversubscription = float(words.get("oversubscription", "1"))
    except ValueError:
        raise InputError(
            f"given oversubscription={words['oversubscription']} in {text!r}, expected a number >= 1, {_EXAMPLE}"
        ) from None
    return generic_cluster(
        device.strip(),
        per_node,
        _whole(words.get("nics", str(per_node)), "nics", text),
        parse_bandwidth(words.get("nic", "400 Gb/s")),
        parse_bandwidth(words["scaleup"]) if "scaleup" in words else None,
        oversubscription,
        nodes,
        gpus,
    )


def _whole(value: str, key: str, text: str) -> int:
    if not value.isdecimal():
        raise InputError(f"given {key}={value} in {text!r}, expected a whole number, {_EXAMPLE}")
    return int(value)


def _switches(gpus: int, nics: int) -> int:
    """PCIe switches of a node: one per GPU, or per NIC where GPUs share NICs."""
    return min(gpus, nics) if nics else gpus


def _tree(gpus: int, nics: int, pcie: LinkClass) -> list[Wire]:
    """Every GPU below a PCIe switch, every PCIe switch below the host bridge."""
    switches = _switches(gpus, nics)
    below = [Wire(f"gpu{g}", f"pcie{g * switches // gpus}", pcie) for g in range(gpus)]
    return below + [Wire(f"pcie{s}", "host0", pcie) for s in range(switches)]


def _given(bandwidth: float) -> Number:
    return Number(bandwidth, "assumed", "given with the generic cluster")


def _scale_up(bandwidth: Number) -> LinkClass:
    efficiency = Number(0.78, "assumed", f"as measured on {LIKE}")
    return link_class("scale-up", "nvlink", bandwidth, efficiency, Number(180, "assumed", f"as on {LIKE}"))


def _pcie(bandwidth: Number) -> LinkClass:
    efficiency = Number(0.84, "assumed", "host copies measured at 26 of 31 GB/s on PCIe 4 x16")
    return link_class("pcie", "pcie", bandwidth, efficiency, Number(250, "assumed", "typical PCIe hop"))


def _nic(bandwidth: Number) -> LinkClass:
    efficiency = Number(0.9, "assumed", "protocol overhead of RDMA networks")
    return link_class("nic", "nic", bandwidth, efficiency, Number(650, "assumed", "typical adapter and leaf"))
