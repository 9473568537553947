"""The inputs of an experiment as rows for people: section, name, value, kind of provenance, source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from rtp_sim.experiment import Request
from rtp_sim.hardware.spec import Cluster, Device, Number
from rtp_sim.units import format_bandwidth, format_bytes, format_count, format_time

Row = tuple[str, str, str, str, str]


def input_rows(request: Request, meta: Mapping[str, object], cluster: Cluster) -> list[Row]:
    """Everything a prediction rests on: request, facts of the schedule, device, wires, communication library."""
    rows: list[Row] = [("Model and training", "model", request.model, "", "")]
    for name in (
        "parameters",
        "tokens",
        "global_batch",
        "micro_batch",
        "num_microbatches",
        "seq_len",
        "clip_norm",
        "loss_scale",
        "dropout",
        "notes",
    ):
        if meta.get(name) is not None:
            rows.append(("Model and training", name, str(meta[name]), "", ""))
    for name in ("precision", "recompute", "optimizer", "attention"):
        rows.append(("Model and training", name, str(getattr(request, name)), "", ""))
    rows += [("Strategy", f.name, str(getattr(request.options, f.name)), "", "") for f in fields(request.options)]
    return rows + cluster_rows(cluster)


def cluster_rows(cluster: Cluster) -> list[Row]:
    """A cluster's numbers with their sources."""
    shape = f"{cluster.nodes} x {cluster.gpus_per_node} devices"
    rows: list[Row] = [("Cluster", cluster.name, shape, "", cluster.description)]
    rows += [("Cluster", "note", note, "", "") for note in cluster.notes]
    rows += device_rows(cluster.device)
    seen = set()
    for link in cluster.topology.links:
        key = (link.kind, link.bandwidth_bytes_per_s, link.latency_ns, link.provenance)
        if key not in seen:
            seen.add(key)
            value = (
                f"{format_bandwidth(link.bandwidth_bytes_per_s)} of {format_bandwidth(link.raw_bandwidth_bytes_per_s)}"
            )
            kind, _, source = link.provenance.partition(": ")
            rows.append(
                (
                    "Links",
                    f"{link.kind} ({link.name})",
                    f"{value}, {format_time(link.latency_ns)}",
                    kind,
                    source,
                )
            )
    params = cluster.communication
    for f in fields(params):
        value = getattr(params, f.name)
        if f.name == "size_curve_provenance" and isinstance(value, Number):
            points = f"{len(params.size_curve)} points"
            rows.append(("Communication library", "size_curve", points, value.kind, value.source))
        elif isinstance(value, Number):
            rows.append(("Communication library", f.name, _shown(f.name, value.value), value.kind, value.source))
    rows.append(("Communication library", "algorithms", ", ".join(params.algorithms), "", ""))
    return rows


def device_rows(device: Device) -> list[Row]:
    """A device's numbers with their sources."""
    rows: list[Row] = [("Device", device.name, device.description, "", "")]
    for f in fields(device):
        value = getattr(device, f.name)
        if isinstance(value, Number):
            rows.append(("Device", f.name, _shown(f.name, value.value), value.kind, value.source))
    for dtype, peak in device.peak_flops.items():
        rows.append(("Device", f"peak {dtype}", f"{format_count(peak.value)}FLOP/s", peak.kind, peak.source))
    return rows


def _shown(name: str, value: float) -> str:
    """The value in the unit its name ends in."""
    if name.endswith("bytes_per_s"):
        return format_bandwidth(value)
    if name.endswith("_bytes"):
        return format_bytes(round(value))
    if name.endswith("_ns"):
        return format_time(value)
    return f"{value:g}"
