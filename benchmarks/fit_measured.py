"""Fits the `[calibration]` of the machines of published runs to the calibration half of their rows, and writes it.

    python benchmarks/fit_measured.py FOLDER [CLUSTER ...] [--write]
    python benchmarks/fit_measured.py FOLDER [CLUSTER ...] --spread VALIDATE.json

With --spread nothing is fitted: what `rtp-sim validate --all FOLDER --format json` found for the calibration rows gives
the machines' prediction intervals, which are written.

Prints the values, and the errors of both halves: the calibration rows that the fit saw and the validation rows that
it did
not. With --write the tables go into the profiles in hardware_profiles/clusters/. Rows that cannot be predicted, or ran
with a precision that is not calibrated (fp8), are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.validation.accuracy import Errors, errors_of
from rtp_sim.validation.evaluate import evaluate
from rtp_sim.validation.fit import PARAMETERS, Fit, Parameter, fit, link_parameter
from rtp_sim.validation.frameworks import FRAMEWORKS, habits_of
from rtp_sim.validation.interpret import Experiment, Unsupported, interpret
from rtp_sim.validation.measured import Row, read_measured

KERNELS = "matmul_efficiency attention_efficiency memory_efficiency"
FITTED = {
    "mosaic-h100": f"{KERNELS} overlap_slowdown",
    "mosaic-a100-80g-roce": f"{KERNELS} overlap_slowdown",
    "internevo-a100-roce": f"{KERNELS} overlap_slowdown link:roce",
    "selene-a100-80g": "matmul_efficiency memory_efficiency link:nvlink3",
    "rtp-a100-80g": f"{KERNELS} matmul_efficiency_fp32 attention_efficiency_fp32 host_issue link:hdr",
    "rtp-v100-32g": "matmul_efficiency memory_efficiency matmul_efficiency_fp32 host_issue link:edr link:nvlink2",
    "vtrain-a100": "matmul_efficiency=0.88 memory_efficiency=0.75 host_issue=78 host_issue_backward=42 "
    "matmul_efficiency_ragged=0.33 message_issue=290",
    "hf-h100-efa": "matmul_efficiency=0.53 attention_efficiency memory_efficiency host_issue=95 link:efa=0.7 "
    "collective_turn_piped=270 collective_chunk_inter=46",
    "sail-a100-80g-roce": "matmul_efficiency=0.65 memory_efficiency=0.75 host_issue",
    "jeanzay-a100-80g-opa": "matmul_efficiency memory_efficiency blocking_issue=100 link:opa=0.87",
    "ibm-vela-a100": "matmul_efficiency memory_efficiency",
    "ibm-h100": "matmul_efficiency memory_efficiency",
}
"""What each machine's rows can tell, with a start of its own where the usual one is on the wrong side of a bound: the
host costs nothing as long as the device is slower."""
MOST = {"vtrain-a100": 48}
"""So many calibration rows at most are fitted where there are hundreds of a kind, evenly over the file."""
LEAST_FOR_SPREAD = 5
"""Rows that an interval is made from at least: two residuals say nothing about eight of ten."""
PROFILES = Path(__file__).parent.parent / "hardware_profiles" / "clusters"
MARK = "# Fitted by benchmarks/fit_measured.py"


def rows_of(folder: Path, cluster: str) -> list[tuple[Experiment, float, bool]]:
    """(experiment, measured seconds, whether the fit may see it) of the cluster's rows."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        for entry in read_measured(path).entries:
            if not isinstance(entry, Row) or entry.cells.cluster != cluster or entry.cells.step_time_s is None:
                continue
            # What 256 and 512 GPUs on EFA add is the state of that network, a factor of ten between equal runs.
            if entry.cells.cluster == "hf-h100-efa" and entry.cells.gpus > 128:
                continue
            # fp8 is not calibrated; in the Megatron paper's ZeRO-3 rows the network decides, by an unexplained rate.
            if "fp8" in entry.cells.precision or _is_zero3(entry):
                continue
            try:
                found.append((interpret(entry).experiment, entry.cells.step_time_s, entry.calibration))
            except (Unsupported, InputError):
                continue
    return found


def _is_zero3(row: Row) -> bool:
    c = row.cells
    return habits_of(c.framework, c.source, c.tp * c.pp > 1) is FRAMEWORKS["deepspeed-zero3"]


def parameter(text: str) -> Parameter:
    """ "name" or "link:name", with "=start" behind it."""
    name, _, start = text.partition("=")
    found = link_parameter(name[5:]) if name.startswith("link:") else PARAMETERS[name]
    return replace(found, start=float(start)) if start else found


def written(result: Fit, parts: str) -> str:
    """The fit as tables of a profile."""
    e = result.errors
    source = f"fit to {result.rows} calibration rows of {parts}: median error {e.median_ape:.1%}, mean {e.mape:.1%}"
    tables: dict[str, list[str]] = {}
    spread = {"calibration.residual_p10": round(result.low, 4), "calibration.residual_p90": round(result.high, 4)}
    spread = spread if result.rows >= LEAST_FOR_SPREAD else {}
    for key, value in {**spread, **result.values}.items():
        table, _, name = key.rpartition(".")
        shown = f'"{value}"' if isinstance(value, str) else f"{value:g}"
        tables.setdefault(table, []).append(f'{name} = {{ value = {shown}, kind = "measured", source = "{source}" }}')
    return MARK + "\n" + "\n\n".join("\n".join([f"[{table}]", *lines]) for table, lines in tables.items()) + "\n"


def put(cluster: str, text: str) -> None:
    """Replaces the fitted tables at the end of the profile."""
    path = PROFILES / f"{cluster}.toml"
    kept = re.split(rf"\n*{re.escape(MARK)}", path.read_text(encoding="utf-8"))[0].rstrip("\n")
    path.write_text(f"{kept}\n\n{text}", encoding="utf-8")


def put_spread(cluster: str, ratios: list[float]) -> None:
    """Writes the 10th and 90th percentile of measured / predicted into the profile's [calibration]."""
    path, low, high = PROFILES / f"{cluster}.toml", *(float(q) for q in np.quantile(ratios, (0.1, 0.9)))
    source = f"{len(ratios)} calibration rows of {cluster}: 8 of 10 lie between"
    lines = [
        f'residual_{name} = {{ value = {value:.3f}, kind = "measured", source = "{source}" }}'
        for name, value in (("p10", low), ("p90", high))
    ]
    kept = [x for x in path.read_text(encoding="utf-8").split("\n") if not x.startswith("residual_p")]
    if "[calibration]" not in kept:
        kept += ["[calibration]"] if kept[-1] else [MARK, "[calibration]", ""]
    at = kept.index("[calibration]") + 1
    path.write_text("\n".join(kept[:at] + lines + kept[at:]), encoding="utf-8")


def spread(folder: Path, clusters: list[str], validated: Path) -> None:
    """The prediction intervals of the clusters from a document of `rtp-sim validate`."""
    rows = {(r["file"], r["row_id"]): r for r in json.loads(validated.read_text(encoding="utf-8"))["rows"]}
    for cluster in clusters:
        ratios = []
        for path in sorted(folder.glob("*.csv")):
            for entry in read_measured(path).entries:
                if isinstance(entry, Row) and entry.calibration and entry.cells.cluster == cluster:
                    error = rows.get((path.name, entry.cells.row_id), {}).get("step_time_error")
                    ratios += [] if error is None else [1 / (1 + error)]
        if len(ratios) >= LEAST_FOR_SPREAD:
            put_spread(cluster, ratios)
            print(f"{cluster}: {len(ratios)} rows")


def shown(name: str, e: Errors) -> str:
    """One line of errors."""
    return (
        f"  {name}: {e.count} rows, median {e.median_ape:.1%}, mean {e.mape:.1%}, bias {e.bias:+.1%}" if e.count else ""
    )


def main() -> None:
    """Fits what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("clusters", nargs="*", default=list(FITTED))
    parser.add_argument("--most", type=int, default=0, help="fit to so many rows at most, every so many-th")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--spread", type=Path, help="a document of rtp-sim validate --format json")
    a = parser.parse_args()
    if a.spread:
        spread(a.folder, a.clusters, a.spread)
        return
    for cluster in a.clusters:
        rows = rows_of(a.folder, cluster)
        names = FITTED[cluster].split()
        parameters = [parameter(name) for name in names]
        seen = [(experiment, seconds) for experiment, seconds, calibration in rows if calibration]
        most = a.most or MOST.get(cluster, 0)
        if most and len(seen) > most:
            seen = seen[:: -(-len(seen) // most)]
        if not seen:
            continue
        print(f"{cluster}: {len(seen)} of {len(rows)} rows", flush=True)
        result = fit(seen, parameters, a.iterations, tell=lambda text: print(f"  {text}", file=sys.stderr, flush=True))
        for key, value in result.values.items():
            print(f"  {key} = {value}")
        print(shown("calibration", result.errors))
        if a.write:
            put(cluster, written(result, cluster))
        other = [(experiment, seconds) for experiment, seconds, calibration in rows if not calibration]
        changed = {e.gpus: load_cluster(cluster, gpus=e.gpus, changes=result.values) for e, _ in other}
        print(shown("validation", errors_of(evaluate(e, changed[e.gpus]).step_s / s - 1 for e, s in other)), flush=True)


if __name__ == "__main__":
    main()
