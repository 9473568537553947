"""`rtp-sim calibrate`: measure this machine, fit the cost model's parameters, write a profile."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rtp_sim.errors import InputError
from rtp_sim.executor.calibrate.fit import fit_kernels, fit_lines, fit_transfers, tune
from rtp_sim.executor.calibrate.residuals import Residual, residuals
from rtp_sim.executor.calibrate.samples import Measurements
from rtp_sim.executor.calibrate.shapes import ISSUE_SHAPE, QUICK_SHAPES, SHAPES
from rtp_sim.executor.calibrate.write import Files, Fitted, matmul_efficiency, samples_json, write_profiles
from rtp_sim.experiment import Request, find_network, prepare
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.model.network import Network

if TYPE_CHECKING:
    from rtp_sim.executor.calibrate.probe import Probe

ISSUE_MODEL, ISSUE_TOKENS = "gpt2-tiny", 32
CLOSEST_RANKS = 8
"""The most ranks that the cpu-local profile, which probes are laid out on, has room for."""


def calibrate(a: Namespace) -> int:
    """Measures, writes FILE.toml, FILE-device.toml and FILE.calibration.json, and prints the residuals."""
    files = Files(Path(a.output))
    _check(a, files)
    # Imported here: it imports torch, which the checks before may find missing.
    from rtp_sim.executor.calibrate.worker import Plan, check_device, measure

    check_device(a.device, a.nproc)
    plan = Plan(
        a.device, a.nproc, a.threads, a.pin, a.quick, a.timeout, a.transport, issue_probe(a.device),
        probes(a.nproc, a.quick) if a.device == "cpu" else (),
    )  # fmt: skip
    measured = measure(plan, lambda text: None if a.quiet else print(f"rtp-sim: {text}", file=sys.stderr))
    options = {key: getattr(a, key) for key in ("device", "nproc", "threads", "pin", "transport", "quick", "timeout")}
    cluster, _, left = write_calibration(files, measured, options)
    print(f"wrote {files.cluster}, {files.device.name} and {files.samples.name}")
    for name, residual in left.items():
        print(f"  {name:<22} {residual}")
    for note in cluster.notes:
        print(f"note: {note}")
    return 0


def write_calibration(
    files: Files, measured: Measurements, options: dict[str, object]
) -> tuple[Cluster, Fitted, dict[str, Residual]]:
    """Fits and writes; returns the profile as it loads, its parameters, and what is left between both."""
    fitted = fit(measured)
    with tempfile.TemporaryDirectory() as folder:
        # Written once without residuals, so that it is the loaded profile that they are the residuals of.
        draft = Files(Path(folder) / files.cluster.name)
        write_profiles(draft, measured, fitted, {})
        left = residuals(load_cluster(str(draft.cluster)), measured)
    try:
        write_profiles(files, measured, fitted, left)
        cluster = load_cluster(str(files.cluster))
        files.samples.write_text(samples_json(measured, fitted, left, cluster, options), encoding="utf-8")
    except OSError as error:
        raise InputError(f"-o {files.cluster}: cannot be written: {error.strerror}") from None
    return cluster, fitted, left


def fit(measured: Measurements) -> Fitted:
    """The parameters. Those of an accelerator are scaled until the cost model's tiles and waves fit, too."""
    transfers = fit_transfers(measured.transfers) if measured.transfers else None
    kernels = fit_kernels(measured.kernels)
    if measured.host.compute_units > 1:
        with tempfile.TemporaryDirectory() as folder:
            draft = Files(Path(folder) / "draft.toml")
            write_profiles(draft, measured, Fitted(kernels, transfers), {})
            device = tune(load_cluster(str(draft.cluster)).device, measured.kernels)
        efficiency = matmul_efficiency(kernels)
        rates = {dtype: peak.value * efficiency for dtype, peak in device.peak_flops.items()}
        attention = None
        if kernels.attention_rate is not None:
            attention = device.peak_flops[kernels.attention_dtype].value * device.attention_efficiency.value
        best = {dtype: max(rate, kernels.best_rates[dtype]) for dtype, rate in rates.items()}
        kernels = replace(kernels, rates=rates, best_rates=best, attention_rate=attention)
    return Fitted(kernels, transfers, fit_lines(measured.steps))


def issue_probe(device: str) -> Probe:
    """A step on one rank, which shows what the executor's host adds to ops: on CUDA of a tiny model, whose kernels it
    does not wait for; on CPUs of a larger one, after whose kernels the host finds its caches full of their data."""
    if device == "cuda":
        return _probe(find_network(ISSUE_MODEL, ISSUE_TOKENS), "ddp", 1, 1)
    return _probe(ISSUE_SHAPE.network(), "ddp", 1, ISSUE_SHAPE.micro_batch)


def probes(ranks: int, quick: bool) -> tuple[Probe, ...]:
    """Steps of small GPT and Llama models, whole and sharded over `ranks` ranks, for the times of their kernels. Tensor
    parallelism only where every rank gets a head."""
    found = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        sharded = ("rtp", "tp-sp") if shape.heads >= ranks else ("rtp",)
        for strategy in ("ddp", *sharded) if ranks > 1 and not quick else ("ddp",):
            found.append(_probe(shape.network(), strategy, ranks, shape.micro_batch))
    return tuple(found)


def _probe(network: Network, strategy: str, ranks: int, micro_batch: int) -> Probe:
    from rtp_sim.executor.calibrate.probe import Probe

    cluster = load_cluster("cpu-local", 1, ranks) if ranks <= CLOSEST_RANKS else load_cluster("cpu-local", 1, 1)
    request = Request("", "cpu-local", strategy, micro_batch=micro_batch, precision="fp32")
    step = prepare(request, cluster, network)
    return Probe(step.schedule, step.network, step.training)


def _check(a: Namespace, files: Files) -> None:
    """InputError for what cannot work, before anything is measured."""
    if files.cluster.suffix != ".toml":
        raise InputError(f"-o {a.output}: expected a file name that ends in .toml, for example my-machine.toml")
    if not files.cluster.parent.is_dir():
        raise InputError(f"-o {a.output}: there is no directory {files.cluster.parent}")
    for path in (files.cluster, files.device, files.samples):
        if path.is_dir():
            raise InputError(f"-o {a.output}: {path} is a directory; expected a file name")
    if not a.timeout > 0:
        raise InputError(f"--timeout {a.timeout:g}: expected seconds, for example 120")
    if importlib.util.find_spec("torch") is None:
        raise InputError("calibrate measures with torch, which is not installed: pip install rtp-sim[torch]")
