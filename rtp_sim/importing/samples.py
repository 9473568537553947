"""From tables of nccl-tests to transfer samples of the node that a topology describes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from rtp_sim.errors import InputError
from rtp_sim.executor.calibrate.samples import SHIFT, TransferSample
from rtp_sim.hardware.importers.sweeps import Sweep

KINDS = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "broadcast": "broadcast", "reduce": "reduce", "sendrecv": SHIFT,
}  # fmt: skip
"""What nccl-tests call it, and what we do. sendrecv sends to the next rank while it receives from the one before."""


@dataclass(frozen=True, slots=True)
class Imported:
    """One message size of one kind among `nodes` equal nodes; several runs of it are several times."""

    nodes: int
    sample: TransferSample
    source: str

    @property
    def time_ns(self) -> float:
        """The median over the runs."""
        return median(self.sample.times_ns)

    @property
    def group(self) -> str:
        """What is reported together: "all_reduce, 16 ranks on 2 nodes"."""
        where = f"{self.nodes} nodes" if self.nodes > 1 else "1 node"
        return f"{self.sample.kind.replace(SHIFT, 'sendrecv')}, {self.sample.ranks} ranks on {where}"


def imported(sweeps: Sequence[Sweep], gpus: int) -> tuple[list[Imported], list[str]]:
    """The samples, and notes about tables that are of no use here. InputError for a sweep that cannot have run on
    nodes of `gpus` GPUs, or that does not say where it ran."""
    times: dict[tuple[str, int, int, int], list[int]] = {}
    files: dict[tuple[str, int, int, int], dict[str, None]] = {}
    notes = []
    for sweep in sweeps:
        if sweep.kind not in KINDS:
            notes.append(f"{sweep.kind} is not part of the model: not used ({_name(sweep.file)})")
            continue
        nodes = nodes_of(sweep, gpus)
        if sweep.ranks < 2:
            notes.append(f"{sweep.kind} of a single rank moves nothing: not used ({_name(sweep.file)})")
            continue
        for row in sweep.rows:
            key = KINDS[sweep.kind], nodes, sweep.ranks, row.size_bytes
            times.setdefault(key, []).append(round(row.best_us * 1e3))
            files.setdefault(key, {})[_name(sweep.file)] = None
    found = [
        Imported(nodes, TransferSample(kind, ranks, size, tuple(t)), ", ".join(files[kind, nodes, ranks, size]))
        for (kind, nodes, ranks, size), t in sorted(times.items())
    ]
    return found, notes


def nodes_of(sweep: Sweep, gpus: int) -> int:
    """How many nodes a sweep ran on. InputError as in `imported`."""
    where = f"{sweep.file}, line {sweep.line}"
    if not sweep.ranks:
        raise InputError(
            f"{where}: the ranks are not listed, and the bandwidths leave their number open; expected a line "
            "'# Rank  0 ... device  0 ...' for each"
        )
    if not sweep.devices:
        if sweep.ranks <= gpus:
            return 1
        raise InputError(
            f"{where}: {sweep.ranks} ranks by their busbw, more than the {gpus} GPUs of a node, and no line says which "
            "host each is on; expected a line '# Rank  0 ... on HOST device  0 ...' for each"
        )
    per_host = {host: sum(1 for d in sweep.devices if d.host == host) for host in sweep.hosts}
    if len(set(per_host.values())) > 1 or max(per_host.values()) > gpus:
        shown = ", ".join(f"{count} on {host}" for host, count in list(per_host.items())[:4])
        raise InputError(f"{where}: ranks are {shown}; expected as many on each host, at most the node's {gpus} GPUs")
    return len(per_host)


def other_gpu(sweeps: Iterable[Sweep], device: str) -> str:
    """What the GPUs of a sweep call themselves, where that does not go with the device profile; else ""."""
    models = ("gb200", "b200", "h200", "h100", "h20", "a100", "v100", "l40s", "4090", "3090", "a10", "l4")
    for sweep in sweeps:
        named = next((m for m in models if m in sweep.gpu.lower().replace(" ", "")), "")
        wanted = next((m for m in models if m in device.lower()), "")
        if named and wanted and named != wanted:
            return sweep.gpu
    return ""


def _name(file: str) -> str:
    return file.replace("\\", "/").rsplit("/", 1)[-1]
