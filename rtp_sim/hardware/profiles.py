"""Loading devices and clusters by name: finds the profile files, reads them and builds the hardware they
describe.

Profiles are searched in the folders of the environment variable RTP_SIM_PROFILES (each with `devices/` and
`clusters/`), then in `hardware_profiles/` beside the package. A name that ends in `.toml` is a path; a
cluster name that starts with `generic:` is built from its words (`generic.py`).
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rtp_sim
from rtp_sim.errors import InputError
from rtp_sim.hardware.changes import changed
from rtp_sim.hardware.spec import Cluster, CommunicationParams, Device, HostParams, MeasuredKernel, Number, Residuals
from rtp_sim.hardware.topology import Fabric, Topology
from rtp_sim.hardware.wiring import NodeTemplate
from rtp_sim.units import parse_bandwidth, parse_flops, parse_time_ns

if TYPE_CHECKING:
    from rtp_sim.hardware.files import CalibrationFile, DeviceFile, KernelFile

GENERIC = "generic:"


def list_devices() -> list[str]:
    """Names of all device profiles, sorted."""
    return _names("devices")


def list_clusters() -> list[str]:
    """Names of all cluster profiles, sorted."""
    return _names("clusters")


def load_device(name_or_path: str) -> Device:
    """A device by profile name or by path of a TOML file. Raises InputError."""
    return device_from_file(*read_device_file(name_or_path))


def load_cluster(
    name_or_path: str, nodes: int = 1, gpus: int | None = None, changes: Mapping[str, Any] | None = None
) -> Cluster:
    """A cluster by profile name, by path of a TOML file or by a `generic:` text.

    `changes` replaces values of the profile for this load: {"calibration.matmul_efficiency": 0.7}, say, by dotted keys
    (changes.py).

    `gpus` is the number of devices in all. With one node it may be smaller than the node (the first ones
    are used) or a multiple of the node (then it says how many nodes); with several nodes each uses gpus /
    nodes devices. Raises InputError.
    """
    if name_or_path.startswith(GENERIC):
        from rtp_sim.hardware.generic import parse_generic

        _no_changes(name_or_path, changes)
        return parse_generic(name_or_path, nodes, gpus)
    path = _find(name_or_path, "clusters")
    return _cluster_from_file(path, nodes, gpus, changes or {})


def profile_contents(name_or_path: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that a cluster's numbers are read from, as plain tables: what results are kept under. Raises
    InputError."""
    if name_or_path.startswith(GENERIC):
        from rtp_sim.hardware.generic import LIKE

        _no_changes(name_or_path, changes)
        device = name_or_path.removeprefix(GENERIC).split(",")[0].strip()
        like = _find(LIKE, "clusters")
        return {"generic": name_or_path, "device": _raw_device(device, None)[1], "like": read_toml(like)}
    path = _find(name_or_path, "clusters")
    raw, _, device_raw = _raw_cluster(path, changes or {})
    return {"name": path.stem, "cluster": raw, "device": device_raw}


def _no_changes(name: str, changes: Mapping[str, Any] | None) -> None:
    if changes:
        raise InputError(f"{name}: given changes of {', '.join(changes)}, expected a profile: of a generic cluster "
                         f"change its text, for example nic=400Gb/s, or a TOML file")  # fmt: skip


def cluster_shape(name: str, per_node: int, nodes: int, gpus: int | None) -> tuple[int, int]:
    """(nodes, devices used per node) for the nodes and devices asked for. Raises InputError with the
    equation.
    """
    if nodes < 1 or (gpus is not None and gpus < 1):
        raise InputError(f"{name}: given {nodes} nodes and {gpus} GPUs, expected at least 1 of each")
    if gpus is None:
        return nodes, per_node
    if nodes > 1:
        if gpus % nodes or gpus > nodes * per_node:
            raise InputError(
                f"{name}: given {gpus} GPUs on {nodes} nodes, expected nodes x (1 to {per_node} GPUs each): "
                f"{gpus} / {nodes} = {gpus / nodes:g}"
            )
        return nodes, gpus // nodes
    if gpus <= per_node:
        return 1, gpus
    if gpus % per_node:
        raise InputError(
            f"{name}: given {gpus} GPUs, expected up to {per_node} or a multiple of {per_node} per node: "
            f"{gpus} / {per_node} = {gpus / per_node:g} nodes"
        )
    return gpus // per_node, per_node


def read_device_file(name_or_path: str, beside: Path | None = None) -> tuple[str, DeviceFile]:
    """The checked content of a device file, with the device's name. A path is taken relative to `beside`
    too.
    """
    from rtp_sim.hardware.files import DeviceFile, validated

    path, raw = _raw_device(name_or_path, beside)
    return path.stem, validated(DeviceFile, raw, path)


def _raw_device(name_or_path: str, beside: Path | None) -> tuple[Path, dict[str, Any]]:
    """The file of a device and its tables as they stand there."""
    if beside is not None and name_or_path.endswith(".toml") and (beside / name_or_path).is_file():
        name_or_path = str(beside / name_or_path)
    path = _find(name_or_path, "devices")
    return path, read_toml(path)


def device_from_file(name: str, file: DeviceFile) -> Device:
    """The `Device` that a device file describes."""
    return Device(
        name=name,
        description=file.description,
        compute_units=file.compute_units,
        memory_bytes=file.memory,
        memory_bandwidth_bytes_per_s=file.memory_bandwidth,
        peak_flops=file.peak_flops,
        matmul_efficiency=file.matmul_efficiency,
        attention_efficiency=file.attention_efficiency,
        memory_efficiency=file.memory_efficiency,
        kernel_floor_ns=file.kernel_floor,
        host_issue_ns=file.host_issue,
        overlap_slowdown=file.overlap_slowdown,
        runtime_reserved_bytes=file.runtime_reserved,
        tdp_w=file.tdp_w,
        price_usd_per_hour=file.price_usd_per_hour,
        communication_issue_ns=file.communication_issue,
        blocking_issue_ns=file.blocking_issue,
        host_pace_ns=file.host_pace,
        kernels=dict(_measured_kernel(name, kernel) for kernel in file.kernels),
    )


def _measured_kernel(device: str, file: KernelFile) -> tuple[tuple[str, str], MeasuredKernel]:
    """One of a device's kernels, by name and dtype."""
    try:
        floor_ns = float(parse_time_ns(file.floor))
        per_flop = 1e9 / parse_flops(file.rate) if file.rate is not None else 0.0
        per_byte = 1e9 / parse_bandwidth(file.bandwidth) if file.bandwidth is not None else 0.0
    except (InputError, ZeroDivisionError) as error:
        raise InputError(f"device {device}: kernels: {file.name} {file.dtype}: {error}") from None
    provenance = Number(floor_ns, file.kind, file.source)
    return (file.name, file.dtype), MeasuredKernel(floor_ns, per_flop, per_byte, provenance)


def load_communication(name: str) -> CommunicationParams:
    """The communication parameters of a cluster profile, every number turned into "assumed", as for another
    machine.
    """
    from rtp_sim.hardware.files import CommunicationFile, validated
    from rtp_sim.hardware.nodes import communication_params

    path = _find(name, "clusters")
    raw = _communication({"like": name}, path, depth=0)
    return communication_params(validated(CommunicationFile, raw, path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError naming the file and, for a syntax error, the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        text = str(error)
        where = re.search(r"line (\d+), column (\d+)", text)
        line = f"line {where[1]}, column {where[2]}" if where else "its end"
        reason = text.split(" (at ")[0]
        raise InputError(f"{path}: not valid TOML at {line}: {reason}") from None


def _cluster_from_file(path: Path, nodes: int, gpus: int | None, changes: Mapping[str, Any]) -> Cluster:
    from rtp_sim.hardware.files import ClusterFile, DeviceFile, validated
    from rtp_sim.hardware.nodes import communication_params, wiring_from_file

    raw, device_path, device_raw = _raw_cluster(path, changes)
    for name, efficiency in raw.get("calibration", {}).get("link_efficiency", {}).items():
        if name not in raw.get("links", {}):
            raise InputError(f"{path}: calibration.link_efficiency.{name}: there is no link of that name in links")
        raw["links"][name] = {**raw["links"][name], "efficiency": efficiency}
    file = validated(ClusterFile, raw, path)
    try:
        described = device_from_file(device_path.stem, validated(DeviceFile, device_raw, device_path))
        device = calibrated(described, file.calibration)
    except InputError as error:
        raise InputError(f"{path}: device: {error}") from None
    nodes, used = cluster_shape(path.stem, file.gpus_per_node, nodes, gpus)
    fabric = (
        None
        if file.fabric is None
        else Fabric(
            rails=file.fabric.kind == "rails",
            nodes_per_leaf=file.fabric.nodes_per_leaf,
            oversubscription=file.fabric.oversubscription.value,
            trunk_latency_ns=int(file.fabric.trunk_latency.value),
            provenance=f"{file.fabric.oversubscription.kind}: {file.fabric.oversubscription.source}",
        )
    )
    try:
        topology = Topology(NodeTemplate(wiring_from_file(file)), fabric, nodes, used)
        communication = _fitted(communication_params(file.communication), file.calibration)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Cluster(
        name=path.stem,
        description=file.description,
        device=device,
        gpus_per_node=used,
        nodes=nodes,
        communication=communication,
        topology=topology,
        notes=tuple(file.notes),
        host=None if file.host is None else HostParams(file.host.cores, file.host.core_time_per_megabyte),
        residuals=_residuals(file.calibration),
    )


def _raw_cluster(path: Path, changes: Mapping[str, Any]) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """The tables of a cluster file, and path and tables of its device's, with the changes made."""
    raw = _cluster(read_toml(path), path, depth=0)
    if not isinstance(raw.get("device"), str):
        # The schema says what is wrong with it.
        return raw, path, {}
    try:
        device_path, device_raw = _raw_device(raw["device"], path.parent)
    except InputError as error:
        raise InputError(f"{path}: device: {error}") from None
    changed(raw, device_raw, changes, path)
    return raw, device_path, device_raw
def _fitted(params: CommunicationParams, fitted: CalibrationFile) -> CommunicationParams:
    """The communication parameters with those numbers that were fitted on this machine."""
    given: dict[str, Any] = {
        "collective_chunk_inter_ns": fitted.collective_chunk_inter,
        "collective_turn_piped_ns": fitted.collective_turn_piped,
    }
    return replace(params, **{name: number for name, number in given.items() if number is not None})


def _residuals(fitted: CalibrationFile) -> Residuals | None:
    if fitted.residual_p10 is None or fitted.residual_p90 is None:
        return None
    return Residuals(fitted.residual_p10, fitted.residual_p90)


def calibrated(device: Device, fitted: CalibrationFile) -> Device:
    """The device with the numbers that were fitted on one machine in place of the profile's own."""
    names = {
        "kernel_floor": "kernel_floor_ns",
        "host_issue": "host_issue_ns",
        "host_issue_backward": "host_issue_backward_ns",
        "message_issue": "message_issue_ns",
        "blocking_issue": "blocking_issue_ns",
        "runtime_reserved": "runtime_reserved_bytes",
    }
    of_device = {name.removesuffix("_ns").removesuffix("_bytes") for name in Device.__dataclass_fields__}
    given = {name: getattr(fitted, name) for name in type(fitted).model_fields if name in of_device}
    return replace(device, **{names.get(name, name): number for name, number in given.items() if number is not None})


def _cluster(table: dict[str, Any], path: Path, depth: int) -> dict[str, Any]:
    """`table` over the profile that its key `like` names: keys replace keys, links and communication are merged, and
    what is taken over becomes assumed."""
    if isinstance(table.get("communication"), dict):
        table["communication"] = _communication(table["communication"], path, depth=0)
    if "like" not in table:
        return table
    if depth > 3 or not isinstance(table["like"], str):
        raise InputError(f"{path}: like: given {table['like']!r}, expected another profile's name")
    other_path = _find(table["like"], "clusters")
    base = {k: _assumed(v, table["like"]) for k, v in _cluster(read_toml(other_path), other_path, depth + 1).items()}
    merged = {k: {**base.get(k, {}), **table[k]} for k in ("links", "communication") if isinstance(table.get(k), dict)}
    without = ("like", "notes", "calibration")
    return (
        {k: v for k, v in base.items() if k not in without} | {k: v for k, v in table.items() if k != "like"} | merged
    )


def _assumed(value: Any, name: str) -> Any:
    """Every number in `value` as one that was taken over from the profile `name`."""
    if isinstance(value, list):
        return [_assumed(v, name) for v in value]
    if not isinstance(value, dict):
        return value
    if "kind" in value and "source" in value:
        return {**value, "kind": "assumed", "source": f"as {name}: {value['source']}"}
    return {k: _assumed(v, name) for k, v in value.items()}


def _communication(table: dict[str, Any], path: Path, depth: int) -> dict[str, Any]:
    """`table` over the [communication] of the profile that its key `like` names, whose numbers become
    assumed.
    """
    if "like" not in table:
        return table
    if depth > 3 or not isinstance(table["like"], str):
        raise InputError(f"{path}: communication.like: given {table['like']!r}, expected another profile's name")
    name = table["like"]
    other_path = _find(name, "clusters")
    other = read_toml(other_path).get("communication", {})
    base = _communication(other, other_path, depth + 1)
    assumed = {
        key: {**entry, "kind": "assumed", "source": f"as {name}: {entry.get('source', '')}"}
        if isinstance(entry, dict)
        else entry
        for key, entry in base.items()
    }
    return assumed | {key: value for key, value in table.items() if key != "like"}


def _folders() -> list[Path]:
    """Where profiles are looked for, first come first served."""
    given = os.environ.get("RTP_SIM_PROFILES", "")
    own = Path(rtp_sim.__file__).resolve().parent.parent / "hardware_profiles"
    return [*(Path(part) for part in given.split(os.pathsep) if part), own]


def _names(what: str) -> list[str]:
    return sorted({path.stem for folder in _folders() for path in (folder / what).glob("*.toml")})


def _find(name_or_path: str, what: str) -> Path:
    """The file of a profile. Raises InputError with the names that come nearest."""
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if path.is_file():
            return path
        raise InputError(f"given the path {name_or_path!r}, expected a file that exists")
    for folder in _folders():
        path = folder / what / f"{name_or_path}.toml"
        if re.fullmatch(r"[\w.-]+", name_or_path) and path.is_file():
            return path
    names = _names(what)
    near = difflib.get_close_matches(name_or_path.lower(), names, n=3, cutoff=0.4) or names
    generic = ', a text such as "generic:h100-sxm,gpus=8,nics=4,nic=200Gb/s"' if what == "clusters" else ""
    raise InputError(
        f"given the unknown {what[:-1]} {name_or_path!r}, expected for example {', '.join(near)}"
        f"{generic} or the path of a .toml file"
    )
