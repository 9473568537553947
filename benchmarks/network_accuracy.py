"""Predicted against measured collectives: python benchmarks/network_accuracy.py PATH [--worst 3].

PATH is a folder with collective_sweeps.csv, allreduce_lut_a100.csv and nccl_nvls_scaling.csv (nccl-tests output as
CSV; times are out of place). Each sweep is priced on the cluster profile of its machine. Some profiles took their
size curve and efficiency from one of these sweeps ("source"): such a line says how well the model can hold what it was
given, the others are checks. Errors are predicted / measured - 1: median and mean of their size, and their median.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median

from rtp_sim.cost.communication import CommunicationCost
from rtp_sim.hardware.generic import generic_cluster
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.units import format_bytes

BANDS = ((0, 64 << 10), (64 << 10, 16 << 20), (16 << 20, 1 << 40))
"""Message sizes in bytes: bound by latency, in between, bound by bandwidth."""
KINDS = {"alltoall": "all_to_all", "sendrecv": "sendrecv"}
HDR_BYTES_PER_S = 25 * 10**9


@dataclass(frozen=True, slots=True)
class Sweep:
    """One measured sweep: the cluster to price it on and what is worth knowing about it."""

    cluster: str
    nodes: int
    note: str


SWEEPS = {
    "1": Sweep("dgx-a100-80g", 1, "one process"),
    "2": Sweep("dgx-a100-80g", 1, "source of the profile"),
    "18": Sweep("dgx-a100-80g", 1, ""),
    "10": Sweep("dgx-a100-80g", 1, ""),
    "27": Sweep("a100-2nic", 16, "two HDR ports a node assumed; source of its latency"),
    "20": Sweep("dgx-h100", 1, "source of the profile"),
    "28": Sweep("dgx-h100", 1, "one process"),
    "29": Sweep("dgx-h100", 1, "one process; source of the profile"),
    "30": Sweep("dgx-h100", 1, "one process"),
    "31": Sweep("dgx-h100", 1, "one process"),
    "32": Sweep("dgx-h200", 1, "torch, not nccl-tests"),
    "33": Sweep("dgx-b200", 1, "torch, not nccl-tests"),
    "14": Sweep("pcie-4x4090", 1, "another machine; source of its size curve"),
}
"""Left out: machines without a profile, machines that were broken or driver-patched (7, 8, 9, 13), and 3, which
reduced inside the InfiniBand switches."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement of a sweep."""

    sweep: str
    ranks: int
    kind: str
    size_bytes: int
    measured_ns: float
    cluster: str
    nodes: int
    note: str


@cache
def cost(cluster: str, nodes: int) -> CommunicationCost:
    """The model of a cluster. "a100-2nic": 8 A100 per node as in dgx-a100-80g, but with two HDR ports."""
    if cluster == "a100-2nic":
        return CommunicationCost(generic_cluster("a100-sxm-80gb", 8, 2, HDR_BYTES_PER_S, nodes=nodes))
    return CommunicationCost(load_cluster(cluster, nodes=nodes))


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file below its comment lines."""
    with path.open(encoding="utf-8") as file:
        yield from csv.DictReader(line for line in file if not line.startswith("#"))


def sweeps(folder: Path) -> Iterator[Row]:
    """The sweeps over message sizes on whole nodes."""
    for row in rows_of(folder / "collective_sweeps.csv"):
        found = SWEEPS.get(row["sweep"])
        if found is not None:
            kind = KINDS.get(row["op"], row["op"])
            size, ranks, took_ns = int(row["size_bytes"]), int(row["n_gpus"]), float(row["time_us"]) * 1e3
            name = f"{row['gpu'].removeprefix('RTX-')[:4].strip()} {kind}"
            yield Row(name, ranks, kind, size, took_ns, found.cluster, found.nodes, found.note)


def group_sizes(folder: Path) -> Iterator[Row]:
    """All-reduces of 2 to 8 GPUs of one node."""
    for row in rows_of(folder / "allreduce_lut_a100.csv"):
        if row["gpu"] == "A100":
            size, ranks, took_ns = int(row["size_bytes"]), int(row["n_gpus"]), float(row["time_us"]) * 1e3
            yield Row("A100 groups", ranks, "all_reduce", size, took_ns, "dgx-a100-80g", 1, "vTrain tables")
    clusters = {"H200-141GB": "dgx-h200", "B200 (AWS p6-b200.48xlarge)": "dgx-b200"}
    for row in rows_of(folder / "nccl_nvls_scaling.csv"):
        n, kind, default = int(row["n_gpus"]), row["op"], "NVLS_ENABLE=0" not in row["note"]
        if row["gpu"] in clusters and default and ("off" not in row["algo"]) and row["size_bytes"]:
            size = int(row["size_bytes"])
            factor = 2 * (n - 1) / n if kind == "all_reduce" else (n - 1) / n
            took_ns = size * factor / float(row["busbw_gb_s"])
            name = f"{row['gpu'][:4]} groups {kind}"
            yield Row(name, n, kind, size, took_ns, clusters[row["gpu"]], 1, "large messages")


def predicted_ns(row: Row) -> float:
    """The model's time, with the links to itself. A sendrecv is a hop around the ring of all ranks."""
    model = cost(row.cluster, row.nodes)
    if row.kind == "sendrecv":
        return model.alone_ns((model.point_to_point(0, 1, row.size_bytes, None),))
    return model.alone_ns(model.collective(row.kind, tuple(range(row.ranks)), row.size_bytes, "fp32"))


def line(found: list[tuple[float, Row]]) -> str:
    """Rows and error statistics of all sizes, then the bias in each band of sizes."""
    sizes = [abs(e) for e, _ in found]
    text = f"{len(found):>5}{median(sizes):>8.1%}{fmean(sizes):>8.1%}{median(e for e, _ in found):>+8.1%}"
    for low, high in BANDS:
        inside = [e for e, row in found if low <= row.size_bytes < high]
        text += f"{median(inside):>+9.1%}" if inside else f"{'-':>9}"
    return text


def main() -> None:
    """Print one line per sweep and group size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="folder of the measured collectives")
    parser.add_argument("--worst", type=int, default=0, help="rows to show below each sweep")
    args = parser.parse_args()
    grouped: dict[tuple[str, int, str, str], list[tuple[float, Row]]] = {}
    for row in (*sweeps(args.path), *group_sizes(args.path)):
        key = (row.sweep, row.ranks, row.cluster, row.note)
        grouped.setdefault(key, []).append((predicted_ns(row) / row.measured_ns - 1, row))
    bands = "".join(f"{name:>9}" for name in ("<64K", "<16M", "larger"))
    print(f"{'sweep':<26}{'GPUs':>5} {'cluster':<14}{'rows':>5}{'median':>8}{'MAPE':>8}{'bias':>8}{bands}  note")
    for (sweep, ranks, cluster, note), found in grouped.items():
        print(f"{sweep:<26}{ranks:>5} {cluster:<14}{line(found)}  {note}")
        for e, row in sorted(found, key=lambda pair: -abs(pair[0]))[: args.worst]:
            print(f"    {e:>+8.1%}  {row.measured_ns / 1e3:>10.1f} us  {format_bytes(row.size_bytes)}")


if __name__ == "__main__":
    main()
