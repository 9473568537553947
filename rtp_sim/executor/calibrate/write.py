"""From fitted parameters to files: the cluster profile, the device profile beside it, and all samples as JSON.

Every number's `source` says what it was measured with and how well the cost model gives the measurements back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rtp_sim.executor.calibrate.fit import KernelFit, Line, TransferFit
from rtp_sim.executor.calibrate.residuals import COLLECTIVES, FLOOR, MEMORY, MESSAGES, Residual, predicted_ns
from rtp_sim.executor.calibrate.samples import KernelSample, Measurements, TransferSample, median, spread, typical
from rtp_sim.hardware.spec import Cluster

SCHEMA = "rtp-sim/calibration/1"
CLOSEST = {"cpu": "cpu-local", "cuda": "dgx-a100-80g"}
"""Whose communication a profile of a single rank borrows, marked as assumed."""


@dataclass(frozen=True, slots=True)
class Files:
    """Where a calibration is written: FILE.toml, FILE-device.toml and FILE.calibration.json."""

    cluster: Path

    @property
    def device(self) -> Path:
        """The device profile that the cluster profile names."""
        return self.cluster.with_name(f"{self.cluster.stem}-device.toml")

    @property
    def samples(self) -> Path:
        """Everything that was measured."""
        return self.cluster.with_name(f"{self.cluster.stem}.calibration.json")


@dataclass(frozen=True, slots=True)
class Fitted:
    """The parameters: kernels, and transfers where there were several ranks."""

    kernels: KernelFit
    transfers: TransferFit | None
    lines: Mapping[tuple[str, str], Line] = field(default_factory=dict)


def write_profiles(files: Files, measured: Measurements, fitted: Fitted, left: Mapping[str, Residual]) -> None:
    """Writes both profiles; `left` are the residuals that the sources state (empty: not known yet)."""
    files.device.write_text(device_toml(measured, fitted, left), encoding="utf-8")
    files.cluster.write_text(cluster_toml(files, measured, fitted.transfers, left), encoding="utf-8")


# ---- device


def device_toml(measured: Measurements, fitted: Fitted, left: Mapping[str, Residual]) -> str:
    """The text of the device profile."""
    host, how, fit = measured.host, _how(measured), fitted.kernels
    efficiency = matmul_efficiency(fit)
    products = "; ".join(f"{dtype}: {left[f'products {dtype}']}" for dtype in fit.rates if f"products {dtype}" in left)
    attention = _attention(fit, efficiency, how, left)
    memory_rate = max(fit.best_memory_rate, fit.memory_rate)
    overlap = max(1.0, median(host.beside_ns) / median(host.alone_ns)) if host.beside_ns else 1.0
    rows = {
        "compute_units": _number(host.compute_units, "measured", "reported by the device")
        if measured.device == "cuda"
        else _number(1, "assumed", "by definition: a rank computes on one core"),
        "memory": _number(f"{host.memory_bytes} B", "measured", "reported by the system, each rank an equal share"),
        "memory_bandwidth": _number(
            f"{memory_rate / 1e9:.6g} GB/s", "measured", f"{how}: best copy or addition beyond the caches"
        ),
        "matmul_efficiency": _number(
            _ratio(efficiency), "measured", f"{how}: fit of products over the best of their dtype; {products}"
        ),
        "attention_efficiency": attention,
        "memory_efficiency": _number(
            _ratio(fit.memory_rate / memory_rate), "measured",
            f"{how}: fit of copies, elementwise kernels, norms and loss{_residual(left, MEMORY)}",
        ),
        "kernel_floor": _number(
            f"{round(fit.floor_ns)} ns", "measured", f"{how}: fit of all kernels together{_residual(left, FLOOR)}"
        ),
        "host_issue": _number(
            f"{round(median(host.issue_ns))} ns", "measured",
            f"{how}: the executor between two ops of a small step{_range(host.issue_ns, 1, 'ns')}",
        ),
        **_communication_issue(host.communication_ns, how),
        **_pace(int(measured.facts.get("pace_ns") or 0), how),
        "overlap_slowdown": _number(_ratio(overlap, most=100.0), *_overlap_source(measured, how)),
        "runtime_reserved": _number(
            f"{host.reserved_bytes} B", "measured", f"{how}: held before anything was measured, most of all ranks"
        ),
    }  # fmt: skip
    peaks = {
        dtype: _number(
            f"{rate / efficiency / 1e9:.6g} GFLOP/s", "measured",
            f"{how}: rate of products over matmul_efficiency; best seen {fit.best_rates[dtype] / 1e9:.4g} GFLOP/s",
        )
        for dtype, rate in fit.rates.items()
    }  # fmt: skip
    lines = [
        f"# Measured by rtp-sim calibrate, {measured.facts['date']}.", "",
        f"description = {_text(_machine(measured))}", *(f"{key} = {value}" for key, value in rows.items()), "",
        "[peak_flops]  # what the best products reach, not a datasheet's peak",
        *(f"{dtype} = {peak}" for dtype, peak in peaks.items()),
        *(_line(key, line, how) for key, line in fitted.lines.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _communication_issue(times_ns: tuple[int, ...], how: str) -> dict[str, str]:
    if not times_ns:
        return {}
    source = f"{how}: taking the data of a communication op and putting it back{_range(times_ns, 1, 'ns')}"
    return {"communication_issue": _number(f"{round(median(times_ns))} ns", "measured", source)}


def _pace(usual_ns: int, how: str) -> dict[str, str]:
    if not usual_ns:
        return {}
    source = f"{how}: CPU time of a fixed piece of work, that of the fastest fifth of all readings (executor/pace.py)"
    return {"host_pace": _number(f"{usual_ns} ns", "measured", source)}


def _line(key: tuple[str, str], line: Line, how: str) -> str:
    """One measured kernel as a table."""
    name, dtype = key
    rows = [f"name = {_text(name)}", f"dtype = {_text(dtype)}", f'floor = "{round(line.floor_ns)} ns"']
    if line.ns_per_flop > 0:
        rows.append(f'rate = "{max(1, round(1e9 / line.ns_per_flop))} FLOP/s"')
    if line.ns_per_byte > 0:
        rows.append(f'bandwidth = "{max(1, round(1e9 / line.ns_per_byte))} B/s"')
    source = (
        f"{how}: fit of {line.sizes} sizes in training steps, "
        f"residual median {line.error:.1%}, largest {line.worst:.1%}"
    )
    return "\n".join(["", "[[kernels]]", *rows, 'kind = "measured"', f"source = {_text(source)}"])


def matmul_efficiency(fit: KernelFit) -> float:
    """The mean, over dtypes, of the fitted over the best rate: peaks are then near the best rates, and peak times
    efficiency is the fitted rate of each dtype exactly."""
    ratios = [min(1.0, fit.rates[dtype] / fit.best_rates[dtype]) for dtype in fit.rates]
    return sum(ratios) / len(ratios)


def _attention(fit: KernelFit, efficiency: float, how: str, left: Mapping[str, Residual]) -> str:
    if fit.attention_rate is None:
        return _number(_ratio(efficiency / 2), "assumed", "half the efficiency of products: no attention was measured")
    peak = fit.rates[fit.attention_dtype] / efficiency
    source = (
        f"{how}: fit of causal attention, forward and backward{_residual(left, f'attention {fit.attention_dtype}')}"
    )
    return _number(_ratio(fit.attention_rate / peak), "measured", source)


def _overlap_source(measured: Measurements, how: str) -> tuple[str, str]:
    if not measured.host.beside_ns:
        return "assumed", "nothing to run beside a product with a single rank on a CPU"
    what = "an all-reduce" if measured.ranks > 1 else "a copy on another stream"
    return "measured", f"{how}: a product beside {what} over the product alone"


# ---- cluster


def cluster_toml(
    files: Files, measured: Measurements, fit: TransferFit | None, left: Mapping[str, Residual]
) -> str:  # fmt: skip
    """The text of the cluster profile."""
    lines = [
        f"# Measured by rtp-sim calibrate, {measured.facts['date']}. All samples: {files.samples.name}", "",
        f"description = {_text(f'{_ranks(measured)} on {_machine(measured)}')}",
        f"device = {_text(files.device.name)}", f"gpus_per_node = {measured.ranks}", "notes = [",
        *(f"    {_text(note)}," for note in notes(measured, fit)), "]", "",
    ]  # fmt: skip
    if fit is None:
        return "\n".join([*lines, "[communication]", f"like = {_text(CLOSEST[measured.device])}"]) + "\n"
    how, kind = _how(measured), "loopback" if measured.device == "cpu" else "pcie"
    sizes = f"{_residual(left, COLLECTIVES)}, messages{_residual(left, MESSAGES).replace('; ', ' ')}"
    lines += [
        f"[links.{kind}]", f"kind = {_text(kind)}",
        "bandwidth = " + _number(
            f"{fit.bandwidth_bytes_per_s / 1e9:.6g} GB/s", "measured",
            f"{how}: fit of large transfers, all ranks at once{sizes}",
        ),
        "efficiency = " + _number(1.0, "measured", "the bandwidth itself is the measured one"),
        "latency = " + _number("0 ns", "assumed", "counted in the base of a message"), "",
        "[[intra]]", f"link = {_text(kind)}", 'hub = "host0"', f'members = ["gpu0..{measured.ranks - 1}"]', "",
        "[communication]", *_communication(fit, how, left), *_host(measured, fit, how),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _communication(fit: TransferFit, how: str, left: Mapping[str, Residual]) -> list[str]:
    messages, collectives = _residual(left, MESSAGES), _residual(left, COLLECTIVES)
    step = f"{round(fit.collective_step_ns)} ns"
    of_collectives = f"{how}: fit of all_reduce, all_gather and reduce_scatter{collectives}"
    lines = [
        "p2p_base = " + _number(f"{round(fit.p2p_base_ns)} ns", "measured", f"{how}: fit of ring shifts{messages}"),
        "p2p_efficiency = "
        + _number(_ratio(fit.p2p_efficiency), "measured", f"{how}: large ring shifts over the fastest transfers"),
        "collective_base = " + _number(f"{round(fit.collective_base_ns)} ns", "measured", of_collectives),
        "collective_step_intra = " + _number(step, "measured", of_collectives),
        "collective_step_inter = " + _number(step, "assumed", "as inside the node: there was no other"),
        'algorithms = ["ring"]',
    ]
    if fit.size_curve:
        points = ", ".join(f'["{size} B", {fraction:.5g}]' for size, fraction in fit.size_curve)
        lines.append(f'size_curve = {{ points = [{points}], kind = "measured", source = {_text(of_collectives)} }}')
    for name, kind in fit.kinds.items():
        source, part = f"{how}: fit of {name}{collectives}", kind.bandwidth_bytes_per_s / fit.bandwidth_bytes_per_s
        lines += [
            "", f"[communication.kinds.{name}]",
            "step = " + _number(f"{round(kind.step_ns)} ns", "measured", source),
            "efficiency = " + _number(_ratio(part), "measured", source),
        ]  # fmt: skip
    return lines


def _host(measured: Measurements, fit: TransferFit, how: str) -> list[str]:
    """The cores that the ranks share, where they are on CPUs."""
    if measured.device != "cpu":
        return []
    core_time = f"{max(1, round(fit.core_ns_per_byte * 1e6))} ns"
    return [
        "", "[host]",
        "cores = " + _number(measured.facts["cores"], "measured", "reported by the system"),
        "core_time_per_megabyte = "
        + _number(core_time, "measured", f"{how}: what computing beside transfers lost; both ends together"),
    ]  # fmt: skip


def notes(measured: Measurements, fit: TransferFit | None) -> list[str]:
    """What a user of the profile should know."""
    found = [f"calibrated for {_ranks(measured)} of this host: more or fewer were not measured"]
    load = measured.facts.get("foreign_load")
    if isinstance(load, float) and load > 0.1:
        found.append(
            f"other programs used {load:.0%} of the cores meanwhile: times are too long and their spread is wide"
        )
    if fit is None:
        found.append(f"one rank: communication is that of {CLOSEST[measured.device]}, assumed")
        return found
    if measured.device == "cuda":
        found.append("links between devices are named pcie, whatever they are: only their speed was measured")
    return found


# ---- samples


def samples_json(
    measured: Measurements,
    fitted: Fitted,
    left: Mapping[str, Residual],
    cluster: Cluster,
    options: Mapping[str, object],
) -> str:
    """Everything: facts, options, parameters, residuals; each sample with its times, median, spread, prediction."""
    document = {
        "schema": SCHEMA,
        "facts": dict(measured.facts),
        "options": dict(options),
        "fit": {
            "kernels": asdict(fitted.kernels),
            "transfers": asdict(fitted.transfers) if fitted.transfers else None,
            "lines": [
                {"kernel": kernel, "dtype": dtype} | asdict(line) for (kernel, dtype), line in fitted.lines.items()
            ],
        },
        "residuals": {name: asdict(residual) for name, residual in left.items()},
        "host": asdict(measured.host),
        "kernels": [
            {"kernel": s.kernel, "dtype": s.dtype, "dims": dict(s.dims)} | _times(s, cluster) for s in measured.kernels
        ],
        "transfers": [
            {"kind": s.kind, "ranks": s.ranks, "size_bytes": s.size_bytes, "core_ns": s.core_ns} | _times(s, cluster)
            for s in measured.transfers
        ],
        "steps": [
            {"kernel": s.kernel, "dtype": s.dtype, "dims": dict(s.dims)} | _times(s, cluster) for s in measured.steps
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def _times(sample: KernelSample | TransferSample, cluster: Cluster) -> dict[str, object]:
    low, high = spread(sample.times_ns)
    return {
        "median_ns": round(median(sample.times_ns)), "mean_ns": round(typical(sample.times_ns)),
        "p10_ns": round(low), "p90_ns": round(high), "predicted_ns": round(predicted_ns(cluster, sample)),
        "times_ns": list(sample.times_ns),
    }  # fmt: skip


# ---- pieces of text


def _number(value: object, kind: str, source: str) -> str:
    shown = _text(value) if isinstance(value, str) else value
    return f'{{ value = {shown}, kind = "{kind}", source = {_text(source)} }}'


def _ratio(value: float, most: float = 1.0) -> float:
    """Five digits, at least a little above zero."""
    return float(f"{min(most, max(1e-4, value)):.5g}")


def _text(text: object) -> str:
    """A TOML basic string; JSON's escapes are among TOML's."""
    return json.dumps(str(text), ensure_ascii=False)


def _machine(measured: Measurements) -> str:
    facts = measured.facts
    return f"a host with {facts['cores']} cores ({facts['device']}, {facts['system']})"


def _how(measured: Measurements) -> str:
    facts = measured.facts
    threads = (
        f", {facts['threads']} thread{'s' if facts['threads'] != 1 else ''} a rank" if measured.device == "cpu" else ""
    )
    pinned = ", pinned" if facts.get("pinned") else ""
    backend = f", {facts['backend']}" if facts.get("backend") else ""
    short = ", quick" if facts.get("quick") else ""
    return f"torch {facts['torch']}{backend}, {_ranks(measured)} at once{threads}{pinned}{short}"


def _ranks(measured: Measurements) -> str:
    return f"{measured.ranks} rank{'s' if measured.ranks > 1 else ''}"


def _residual(left: Mapping[str, Residual], name: str) -> str:
    return f"; {left[name]}" if name in left else ""


def _range(values: tuple[int, ...], scale: float, unit: str) -> str:
    low, high = spread(values)
    return f", 80 % between {low / scale:.0f} and {high / scale:.0f} {unit}"
