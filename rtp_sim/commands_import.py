"""`rtp-sim hardware import`: a cluster profile from what other programs measured."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rtp_sim.errors import InputError
from rtp_sim.hardware.importers.nccl_tests import read_sweeps
from rtp_sim.hardware.importers.node_tree import node_tree
from rtp_sim.hardware.importers.topo_matrix import read_topo
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Number
from rtp_sim.importing.draft import Draft, first_draft, profile_toml
from rtp_sim.importing.fit_profile import Fitted, fit
from rtp_sim.importing.samples import Imported, imported, other_gpu
from rtp_sim.units import parse_bandwidth

SCHEMA = "rtp-sim/import/1"


def hardware_import(a: Namespace) -> int:
    """Reads, fits, writes FILE.toml and FILE.import.json, and prints how well the profile gives the measurements
    back."""
    output = _output(a)
    nic = None if a.nic is None else Number(parse_bandwidth(a.nic), "vendor", "given with --nic")
    device = str(Path(a.device).resolve()) if a.device.endswith(".toml") else a.device
    draft = first_draft(node_tree(read_topo(Path(a.topo))), device, Path(a.topo).name, nic, a.like)
    sweeps = [sweep for path in a.nccl_tests for sweep in read_sweeps(Path(path))]
    samples, notes = imported(sweeps, draft.tree.gpus)
    if gpu := other_gpu(sweeps, a.device):
        notes.append(f"nccl-tests ran on {gpu}; the device profile is {a.device}")
    fitted = Fitted(draft, (), {})
    if samples:
        _progress(a, f"fitting {len(samples)} measurements of {len(sweeps)} tables")
        fitted = fit(draft, samples)
    elif sweeps:
        raise InputError(f"--nccl-tests: the {len(sweeps)} tables hold nothing that the model has a word for")
    if a.device.endswith(".toml"):
        device = os.path.relpath(device, output.parent.resolve())
    final = replace(fitted.draft, device=device, notes=(*fitted.draft.notes, *notes, *_missing(samples)))
    _write(output, final, samples, fitted, a)
    report = {
        "schema": SCHEMA, "profile": str(output), "samples": len(samples),
        "residuals": {group: asdict(residual) for group, residual in fitted.residuals.items()},
        "notes": list(final.notes),
    }  # fmt: skip
    if a.format == "json":
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return 0
    print(f"wrote {output}" + (f" and {_samples_file(output).name}" if samples else ""))
    for group, residual in fitted.residuals.items():
        print(f"  {group:<36} {residual}")
    for note in final.notes:
        print(f"note: {note}")
    return 0


def _output(a: Namespace) -> Path:
    output = Path(a.output)
    if output.suffix != ".toml":
        raise InputError(f"-o {a.output}: expected a file name that ends in .toml, for example my-cluster.toml")
    if not output.parent.is_dir() or output.is_dir():
        raise InputError(f"-o {a.output}: expected a file in a directory that exists")
    return output


def _missing(samples: Sequence[Imported]) -> list[str]:
    """What nobody measured."""
    kinds = {s.sample.kind for s in samples}
    if not samples:
        return ["No transfers were imported: all rates and latencies are vendor figures or assumed (--nccl-tests)."]
    found = []
    if "shift" not in kinds:
        found.append("No sendrecv was imported: what single messages take is assumed, and rotation lives on them.")
    if all(s.nodes == 1 for s in samples):
        found.append("No run on several nodes was imported: NICs and the steps between nodes are assumed.")
    if kinds <= {"all_reduce"}:
        found.append("Only all_reduce was imported: the size curve of other collectives is taken to be the same.")
    return found


def _samples_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.import.json")


def _write(output: Path, draft: Draft, samples: Sequence[Imported], fitted: Fitted, a: Namespace) -> None:
    """Both files; the profile is read back before it counts as written."""
    document = {
        "schema": SCHEMA,
        "topo": Path(a.topo).name,
        "nccl_tests": [Path(path).name for path in a.nccl_tests],
        "residuals": {group: asdict(residual) for group, residual in fitted.residuals.items()},
        "samples": [
            {
                "kind": s.sample.kind, "ranks": s.sample.ranks, "nodes": s.nodes, "size_bytes": s.sample.size_bytes,
                "measured_ns": list(s.sample.times_ns), "predicted_ns": round(predicted), "source": s.source,
            }
            for s, predicted in zip(samples, fitted.predicted_ns, strict=True)
        ],
    }  # fmt: skip
    try:
        output.write_text(profile_toml(draft), encoding="utf-8")
        if samples:
            _samples_file(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"-o {a.output}: cannot be written: {error.strerror}") from None
    load_cluster(str(output))


def _progress(a: Namespace, message: str) -> None:
    if not a.quiet:
        print(f"rtp-sim: {message}", file=sys.stderr)
