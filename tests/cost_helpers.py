"""Round toy hardware for the cost room's tests: a device whose rates divide well, and clusters wired by hand."""

from __future__ import annotations

from rtp_sim.hardware.spec import Cluster, CommunicationParams, Device, Number
from rtp_sim.hardware.topology import Fabric, Topology
from rtp_sim.hardware.wiring import LinkClass, Nics, NodeTemplate, Wire, Wiring

PORT = 100 * 10**9
NIC = 10 * 10**9
BASE_NS, INSIDE_NS, BETWEEN_NS, P2P_NS = 10_000, 1000, 5000, 7000
IN_SWITCH_NS = 25_000


def number(value: float, kind: str = "measured") -> Number:
    """A number with a provenance."""
    return Number(value, kind, "toy")


def device(**changes: Number) -> Device:
    """10 units of 100 FLOP/ns, 100 bytes/ns of memory, a floor of 1 us."""
    figures = {
        "compute_units": number(10),
        "memory_bytes": number(1e9),
        "memory_bandwidth_bytes_per_s": number(200e9),
        "matmul_efficiency": number(0.5),
        "attention_efficiency": number(0.5, "assumed"),
        "memory_efficiency": number(0.5),
        "kernel_floor_ns": number(1000),
        "host_issue_ns": number(5000),
        "overlap_slowdown": number(1.25),
        "runtime_reserved_bytes": number(0),
    }
    peaks = {"fp16": number(2e12), "fp32": number(1e12)}
    return Device("toy", "a toy", peak_flops=peaks, **(figures | changes))


def link(name: str, kind: str, rate: int, latency_ns: int, raw: int | None = None, duplex: bool = True) -> LinkClass:
    """A link class that reaches all of its bandwidth unless `raw` says more."""
    return LinkClass(name, kind, raw or rate, rate, latency_ns, duplex, "toy")


def params(
    algorithms: tuple[str, ...] = ("ring",),
    curve: tuple[tuple[int, float], ...] = (),
    least: int | None = None,
    efficiency: float = 0.5,
    kind: str = "measured",
    p2p_efficiency: float = 1.0,
) -> CommunicationParams:
    """Base 10 us, 1 us per step inside and 5 us between nodes, 7 us per message."""
    return CommunicationParams(
        p2p_base_ns=number(P2P_NS, kind),
        p2p_efficiency=number(p2p_efficiency),
        collective_base_ns=number(BASE_NS),
        collective_step_intra_ns=number(INSIDE_NS),
        collective_step_inter_ns=number(BETWEEN_NS),
        algorithms=algorithms,
        size_curve=curve,
        size_curve_provenance=number(len(curve)) if curve else None,
        in_switch_reduction_min_ranks=None if least is None else number(least),
        in_switch_base_ns=None if least is None else number(IN_SWITCH_NS),
        in_switch_efficiency=None if least is None else number(efficiency),
    )


def switched(
    gpus: int,
    nodes: int = 1,
    nics: int = 1,
    communication: CommunicationParams | None = None,
    nodes_per_leaf: int = 64,
    oversubscription: float = 1.0,
) -> Cluster:
    """Nodes of `gpus` on a switch with ports of 100 GB/s (raw 200) and 100 ns; `nics` of 10 GB/s and 500 ns on one PCIe
    switch per `gpus / nics` devices, 50 GB/s and 200 ns a hop."""
    port = link("port", "nvlink", PORT, 100, raw=2 * PORT)
    pcie, nic = link("pcie", "pcie", 50 * 10**9, 200), link("nic", "nic", NIC, 500)
    wires = [Wire(f"gpu{g}", "nvswitch", port) for g in range(gpus)]
    wires += [Wire(f"gpu{g}", f"pcie{g * nics // gpus}", pcie) for g in range(gpus)]
    places = tuple(f"pcie{i}" for i in range(nics))
    template = NodeTemplate(Wiring(gpus, tuple(wires), nics=Nics(places, pcie, nic)))
    fabric = Fabric(False, nodes_per_leaf, oversubscription, 300, "toy")
    topology = Topology(template, fabric, nodes)
    return Cluster("toy", "a toy", device(), gpus, nodes, communication or params(), topology)


def loopback(ranks: int) -> Cluster:
    """CPU ranks of one host, each sending 1 GB/s at most."""
    wires = tuple(Wire(f"gpu{g}", "host0", link("loopback", "loopback", 10**9, 0)) for g in range(ranks))
    topology = Topology(NodeTemplate(Wiring(ranks, wires)), None)
    return Cluster("cpu", "a toy host", device(), ranks, 1, params(), topology)
