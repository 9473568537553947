"""`Draft`: a cluster profile in the making, every number with its provenance, and its TOML text.

It begins with what the topology and the device say and with assumptions for the rest; fits replace numbers one by one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rtp_sim.hardware.importers.node_tree import NodeTree
from rtp_sim.hardware.profiles import list_clusters, load_cluster, load_communication, read_device_file
from rtp_sim.hardware.spec import Cluster, CommunicationParams, Number

NVLINK, PCIE, NODE, SOCKET, NIC = "nvlink", "pcie", "node", "socket", "nic"
LIKE_NVLINK, LIKE_PCIE = "dgx-a100-80g", "pcie-4x4090"
"""Whose figures stand in for what was not measured, where no profile has the same device."""
COUNTED = Number(0, "measured", "counted in the steps of collectives and the base of messages, which were measured")


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """A class of links as a profile states it; `kind` as in hardware.wiring."""

    kind: str
    bandwidth: Number
    efficiency: Number
    latency: Number


@dataclass(frozen=True)
class Draft:
    """A profile to be written. `device` is a device profile's name or the absolute path of its file."""

    tree: NodeTree
    device: str
    description: str
    links: Mapping[str, LinkFigures]
    communication: CommunicationParams
    notes: tuple[str, ...] = ()
    head: tuple[str, ...] = field(default=())

    def with_link(self, name: str, **figures: Any) -> Draft:
        """The draft with other figures for one class of links."""
        return replace(self, links={**self.links, name: replace(self.links[name], **figures)})

    def with_communication(self, **figures: Any) -> Draft:
        """The draft with other communication parameters."""
        return replace(self, communication=replace(self.communication, **figures))

    def with_sources(self, changed: Callable[[str], str]) -> Draft:
        """The draft with every number's source changed so."""

        def number(of: Any) -> Any:
            return replace(of, source=changed(of.source)) if isinstance(of, Number) else of

        links = {
            name: LinkFigures(link.kind, number(link.bandwidth), number(link.efficiency), number(link.latency))
            for name, link in self.links.items()
        }
        p = self.communication
        figures = {f.name: number(getattr(p, f.name)) for f in fields(p)}
        return replace(self, links=links, communication=replace(p, **figures))

    def cluster(self, nodes: int = 1, gpus: int | None = None) -> Cluster:
        """The cluster as it loads from the written profile."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "draft.toml"
            path.write_text(profile_toml(self), encoding="utf-8")
            return load_cluster(str(path), nodes, gpus)


def first_draft(tree: NodeTree, device: str, topo_file: str, nic: Number | None, like: str | None) -> Draft:
    """The draft that a topology gives alone. InputError for an unknown device or profile."""
    name, file = read_device_file(device)
    like = like or _closest(name, bool(tree.switch_links or tree.pairs))
    lent = _efficiencies(like)
    links: dict[str, LinkFigures] = {}
    wiring = Number(0, "measured", f"nvidia-smi topo -m ({topo_file})")
    if tree.switch_links or tree.pairs:
        links[NVLINK] = LinkFigures(
            "nvlink", _nvlink(tree, file.scale_up_bandwidth),
            lent.get("nvlink", Number(0.78, "assumed", f"as on {LIKE_NVLINK}")),
            Number(185, "assumed", "as measured on A100"),
        )  # fmt: skip
    if tree.hubs:
        links[PCIE] = LinkFigures(
            "pcie", file.pcie_bandwidth or Number(31e9, "assumed", "PCIe 4 x16"),
            lent.get("pcie", Number(0.84, "assumed", "host copies measured at 26 of 31 GB/s on PCIe 4 x16")),
            Number(250, "assumed", "typical PCIe hop"),
        )  # fmt: skip
    between = Number(0.8, "assumed", "device to device traffic across host bridges reaches less than the link")
    for link, what, ns in ((NODE, "host bridges of a NUMA node", 300), (SOCKET, "NUMA nodes", 400)):
        if any(wires.link == link for wires in tree.hubs):
            bandwidth = Number(50e9, "assumed", f"link between {what}; the topology states no speed")
            links[link] = LinkFigures("host", bandwidth, between, Number(ns, "assumed", "typical of server CPUs"))
    if tree.nics:
        links[NIC] = LinkFigures(
            "nic", nic or Number(50e9, "assumed", "400 Gb/s a NIC: the topology states no speed (--nic does)"),
            lent.get("nic", Number(0.9, "assumed", "protocol overhead of RDMA networks")),
            Number(650, "assumed", "adapter, cable and leaf switch; about 1.3 us from NIC to NIC"),
        )  # fmt: skip
    communication = replace(load_communication(like), kinds={})
    if not tree.switch_links:
        # Only a switch reduces.
        in_switch: dict[str, Any] = {
            "in_switch_reduction_min_ranks": None,
            "in_switch_base_ns": None,
            "in_switch_efficiency": None,
        }
        algorithms = tuple(a for a in communication.algorithms if a != "in-switch")
        communication = replace(communication, algorithms=algorithms, **in_switch)
    description = f"{tree.gpus}x {name}, {wires_in_words(tree)}, imported"
    head = (f"Written by rtp-sim hardware import. Wiring: {wiring.source}.",)
    notes = [f"Wiring as nvidia-smi topo -m prints it ({topo_file}): {wires_in_words(tree)}."]
    if tree.left_out:
        notes.append(
            f"Across the sockets from every GPU, so taken for storage and left out: {', '.join(tree.left_out)}."
        )
    if tree.switch_links:
        notes.append(f"NV{tree.switch_links} between all {tree.gpus} GPUs is more than a GPU has links for: a switch.")
    return Draft(tree, device, description, links, communication, tuple(notes), head)


def _closest(device: str, nvlink: bool) -> str:
    """A profile with the same device and sort of wires, one of NVIDIA's own nodes if there is a choice."""
    same = [name for name in list_clusters() if (cluster := load_cluster(name)).device.name == device
            and nvlink == any(link.kind == "nvlink" for link in cluster.topology.links)]  # fmt: skip
    return min(same, key=lambda name: (not name.startswith("dgx"), name), default=LIKE_NVLINK if nvlink else LIKE_PCIE)


def _efficiencies(like: str) -> dict[str, Number]:
    """What links reach of their rate in another profile, by kind."""
    found = {link.kind: link.bandwidth_bytes_per_s / link.raw_bandwidth_bytes_per_s
             for link in load_cluster(like).topology.links}  # fmt: skip
    return {kind: Number(value, "assumed", f"as on {like}") for kind, value in found.items()}


def wires_in_words(tree: NodeTree) -> str:
    """ "NVSwitch, 8 NICs" """
    inside = (
        f"NVSwitch with {tree.switch_links} links each"
        if tree.switch_links
        else "NVLink pairs"
        if tree.pairs
        else "PCIe"
    )
    return f"{inside}, {len(tree.nics)} NICs" if tree.nics else inside


def _nvlink(tree: NodeTree, scale_up: Number | None) -> Number:
    """Of a port of the switch, or of one direct link. NVLink 2 to 4 have 25 GB/s a link, NVLink 5 has 50."""
    each = 50e9 if scale_up is not None and scale_up.value >= 800e9 else 25e9
    kind = "assumed" if scale_up is None else "vendor"
    generation = "NVLink5 of 50" if each == 50e9 else "NVLink2 to 4 of 25"
    links = tree.switch_links or 1
    return Number(links * each, kind, f"{links} {generation} GB/s, one direction; links counted by nvidia-smi topo -m")


# ---- TOML


def profile_toml(draft: Draft) -> str:
    """The profile's text. It loads to the same cluster, however often it is written."""
    lines = [*(f"# {line}" for line in draft.head), "", f"description = {_text(draft.description)}"]
    lines += [f"device = {_text(draft.device)}", f"gpus_per_node = {draft.tree.gpus}", "notes = ["]
    lines += [*(f"    {_text(note)}," for note in draft.notes), "]", ""]
    for name, link in draft.links.items():
        lines += [
            f"[links.{name}]", f"kind = {_text(link.kind)}", f"bandwidth = {_number(link.bandwidth, _bandwidth)}",
            f"efficiency = {_number(link.efficiency, _ratio)}", f"latency = {_number(link.latency, _time)}", "",
        ]  # fmt: skip
    lines += _wires(draft.tree)
    lines += ["[communication]", *_communication(draft.communication)]
    return "\n".join(lines) + "\n"


def _wires(tree: NodeTree) -> Iterator[str]:
    if tree.switch_links:
        yield from _hub(NVLINK, "nvswitch", (f"gpu0..{tree.gpus - 1}",))
    elif tree.pairs:
        pairs = ", ".join(f'"gpu{a}-gpu{b} x{links}"' for a, b, links in tree.pairs)
        yield from ("[[intra]]", f"link = {_text(NVLINK)}", f"pairs = [{pairs}]", "")
    for wires in tree.hubs:
        if wires.members:
            yield from _hub(wires.link, wires.hub, wires.members)
    if tree.nics:
        places = ", ".join(_text(place) for _, place in tree.nics)
        yield from (
            f"[nics]  # {', '.join(name for name, _ in tree.nics)}", f"count = {len(tree.nics)}",
            f"link = {_text(NIC)}", f"attach_link = {_text(PCIE)}", f"attached_to = [{places}]", "",
            "[fabric]", f"kind = {_text('rails' if len(tree.nics) > 1 else 'leaf')}", "nodes_per_leaf = 32",
            'oversubscription = { value = 1.0, kind = "assumed", source = "full fat tree" }',
            'trunk_latency = { value = "0.3 us", kind = "assumed", source = "one switch hop and its cable" }', "",
        )  # fmt: skip


def _hub(link: str, hub: str, members: tuple[str, ...]) -> Iterator[str]:
    shown = ", ".join(_text(member) for member in members)
    yield from ("[[intra]]", f"link = {_text(link)}", f"hub = {_text(hub)}", f"members = [{shown}]", "")


def _communication(p: CommunicationParams) -> Iterator[str]:
    yield f"p2p_base = {_number(p.p2p_base_ns, _time)}"
    yield f"p2p_efficiency = {_number(p.p2p_efficiency, _ratio)}"
    yield f"collective_base = {_number(p.collective_base_ns, _time)}"
    yield f"collective_step_intra = {_number(p.collective_step_intra_ns, _time)}"
    yield f"collective_step_inter = {_number(p.collective_step_inter_ns, _time)}"
    yield f"algorithms = [{', '.join(_text(a) for a in p.algorithms)}]"
    if p.in_switch_reduction_min_ranks is not None:
        yield f"in_switch_reduction_min_ranks = {_number(p.in_switch_reduction_min_ranks, _count)}"
    if p.in_switch_base_ns is not None:
        yield f"in_switch_base = {_number(p.in_switch_base_ns, _time)}"
    if p.in_switch_efficiency is not None:
        yield f"in_switch_efficiency = {_number(p.in_switch_efficiency, _ratio)}"
    if p.size_curve and p.size_curve_provenance is not None:
        points = ", ".join(f'["{size} B", {fraction:.5g}]' for size, fraction in p.size_curve)
        origin = p.size_curve_provenance
        yield f"size_curve = {{ kind = {_text(origin.kind)}, source = {_text(origin.source)}, points = [{points}] }}"


def _number(number: Number, shown: Callable[[float], str]) -> str:
    value = shown(number.value)
    return f"{{ value = {value}, kind = {_text(number.kind)}, source = {_text(number.source)} }}"


def _bandwidth(value: float) -> str:
    return _text(f"{value / 1e9:.6g} GB/s")


def _time(value: float) -> str:
    return _text(f"{round(value)} ns")


def _ratio(value: float) -> str:
    return str(float(f"{min(1.0, max(1e-4, value)):.5g}"))


def _count(value: float) -> str:
    return str(round(value))


def _text(text: object) -> str:
    """A TOML basic string; JSON's escapes are among TOML's."""
    return json.dumps(str(text), ensure_ascii=False)
