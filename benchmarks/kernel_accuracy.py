"""Predicted against measured kernel times: python benchmarks/kernel_accuracy.py PATH [--worst 3] [--step 1].

PATH is a folder with gemm_ett_a100_gh200.csv, gemm_misc.csv, ops_ett_a100_gh200.csv and adam_ett_a100_gh200.csv.
Nothing is fitted here: the device profiles and the constants of `rtp_sim/cost/compute.py` are used as they stand.
Errors are predicted / measured - 1: the median and the mean of their size, and the bias, which is their median.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median

from rtp_sim.cost.compute import ComputeCost
from rtp_sim.hardware.profiles import load_device
from rtp_sim.hardware.spec import Number
from rtp_sim.schedule.ir import Dims

Launch = tuple[str, str, Dims]
"""Kernel, dtype, sizes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: `launches` together took `measured_ns` on `device`."""

    group: str
    device: str
    label: str
    launches: tuple[Launch, ...]
    measured_ns: float


DEVICES = {
    "A100-SXM4-80GB": "a100-sxm-80gb",
    "GH200-120GB (H100 96GB-class)": "gh200",
    "V100-SXM2 (DGX-1)": "v100-sxm2-16gb",
    "A100-PCIE-80GB": "a100-pcie-80gb",
    "B200-SXM": "b200",
}

ADAM_BYTES = 28
"""Per parameter, all in fp32: weight, gradient and two moments read, weight and moments written."""
VOCABULARY = 50257


@cache
def costs(device: str) -> ComputeCost:
    """The model of a device. GH200 is the H100 profile with the memory bandwidth of its HBM3 stacks."""
    if device != "gh200":
        return ComputeCost(load_device(device))
    memory = Number(4000e9, "vendor", "GH200 96 GB HBM3 datasheet")
    return ComputeCost(replace(load_device("h100-sxm"), memory_bandwidth_bytes_per_s=memory))


def launch(kernel: str, dtype: str, **sizes: int) -> Launch:
    """A launch with its sizes as the schedule writes them."""
    return kernel, dtype, tuple(sizes.items())


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file below its comment lines."""
    with path.open(encoding="utf-8") as file:
        yield from csv.DictReader(line for line in file if not line.startswith("#"))


def whole(row: dict[str, str], *names: str) -> list[int]:
    """Columns as integers."""
    return [int(float(row[name])) for name in names]


def transformer_products(folder: Path) -> Iterator[Row]:
    """Linear layers and the batched products of attention, forward and backward, on A100 and GH200. Those "+ C" are
    torch.baddbmm, which also has a third operand to differentiate: traffic that the model's kernel does not have."""
    for row in rows_of(folder / "gemm_ett_a100_gh200.csv"):
        batch, m, k, n = whole(row, "batch", "M", "K", "N")
        device, dtype = DEVICES[row["gpu"]], row["dtype"]
        label = f"{row['op']} {batch} x ({m} x {k} x {n})"
        forward: tuple[Launch, ...]
        backward: tuple[Launch, ...]
        if row["op"] in ("bmm", "baddbmm"):
            kernel = "attn.context" if row["op"] == "bmm" else "attn.scores"
            width, kv = (n, k) if row["op"] == "bmm" else (k, n)
            sizes = {"batch": 1, "heads": batch, "kv_heads": batch, "q": m, "kv": kv, "head_dim": width}
            forward = (launch(kernel, dtype, **sizes),)
            backward = (launch(f"{kernel}.bwd", dtype, **sizes),)
            name = "batched product" if row["op"] == "bmm" else "batched product + C"
        else:
            sizes = {"m": m, "k": k, "n": n}
            forward = (launch("linear", dtype, **sizes),)
            backward = tuple(launch(f"linear.{part}", dtype, **sizes) for part in ("dgrad", "wgrad"))
            name = "linear"
        yield Row(f"{name} forward", device, label, forward, float(row["fwd_us"]) * 1e3)
        if row["bwd_us"]:
            yield Row(f"{name} backward", device, label, backward, float(row["bwd_us"]) * 1e3)


def other_products(folder: Path) -> Iterator[Row]:
    """Single and grouped products on V100, A100 PCIe and B200. Rows that give an efficiency only are left out."""
    for row in rows_of(folder / "gemm_misc.csv"):
        if row["gpu"] not in DEVICES or "gemm" not in row["op"] or "max" in row["op"] or not row["time_us"]:
            continue
        groups, m, n, k = whole(row, "batch", "M", "N", "K")
        dtype = row["dtype"].split()[0]
        stage = row["op"].removeprefix("grouped gemm").strip()
        kernel = {"bwd_grad_w": "linear.wgrad", "bwd_grad_act": "linear.dgrad"}.get(stage, "linear")
        name = "grouped " + kernel if groups > 1 else f"product {dtype}"
        label = f"{groups} x ({m} x {k} x {n}) {row['note'][:30]}"
        sizes = launch(kernel, dtype, m=m * groups, k=k, n=n, groups=groups)
        yield Row(name, DEVICES[row["gpu"]], label, (sizes,), float(row["time_us"]) * 1e3)


def attention(row: dict[str, str]) -> tuple[Launch, Launch]:
    """Flash attention without a mask; `heads` is counted before the division by tp."""
    batch, seq, hidden, heads, tp = whole(row, "b", "seq", "hidden", "heads", "tp")
    own = heads // tp
    sizes = {"batch": batch, "heads": own, "kv_heads": own, "q": seq, "kv": seq, "head_dim": hidden // heads}
    return launch("sdpa", "fp16", **sizes), launch("sdpa.bwd", "fp16", **sizes)


def normalised(row: dict[str, str]) -> tuple[Launch, Launch]:
    """A layer norm over the hidden size."""
    batch, seq, hidden = whole(row, "b", "seq", "hidden")
    sizes = {"rows": batch * seq, "width": hidden}
    return launch("layernorm", "fp16", **sizes), launch("layernorm.bwd", "fp16", **sizes)


def activated(row: dict[str, str]) -> tuple[Launch, Launch]:
    """GELU over a rank's share of the 4 x hidden inner layer."""
    batch, seq, hidden, tp = whole(row, "b", "seq", "hidden", "tp")
    numel = batch * seq * 4 * hidden // tp
    return launch("gelu", "fp16", numel=numel), launch("gelu.bwd", "fp16", numel=numel)


def added(row: dict[str, str]) -> tuple[Launch]:
    """A residual addition (its backward column repeats the forward)."""
    batch, seq, hidden = whole(row, "b", "seq", "hidden")
    return (launch("add", "fp16", numel=batch * seq * hidden),)


def masked_softmax(row: dict[str, str]) -> tuple[Launch, Launch]:
    """A fused causal softmax over all heads' scores."""
    batch, seq, heads, tp = whole(row, "b", "seq", "heads", "tp")
    sizes = {"rows": batch * heads // tp * seq, "width": seq}
    return launch("softmax", "fp16", **sizes), launch("softmax.bwd", "fp16", **sizes)


OPERATORS: dict[str, tuple[str, Callable[[dict[str, str]], tuple[Launch, ...]]]] = {
    "flash_atten": ("flash attention", attention),
    "layernorm": ("layer norm", normalised),
    "gelu": ("gelu", activated),
    "res_add": ("add", added),
    "ScaledUpperTriangMaskedSoftmax": ("softmax", masked_softmax),
}
"""Operators that are one fused kernel each way. The rest of the file runs several eager kernels per operator."""


def operators(folder: Path) -> Iterator[Row]:
    """Fused attention, norms, activations, additions and softmax on A100 and GH200."""
    for row in rows_of(folder / "ops_ett_a100_gh200.csv"):
        if row["op"] not in OPERATORS:
            continue
        name, read = OPERATORS[row["op"]]
        label = " ".join(f"{key}={row[key]}" for key in ("tp", "b", "seq", "hidden", "heads") if row[key])
        for way, one, column in zip(("forward", "backward"), read(row), ("fwd_us", "bwd_us"), strict=False):
            if row[column]:
                yield Row(f"{name} {way}", DEVICES[row["gpu"]], label, (one,), float(row[column]) * 1e3)


def optimizer(folder: Path) -> Iterator[Row]:
    """Adam on A100, from 10^9 parameters on one device: below, the host's work per tensor sets the time, which on
    GH200 is so at every size."""
    for row in rows_of(folder / "adam_ett_a100_gh200.csv"):
        tp, hidden, layers = whole(row, "tp", "hidden", "n_layers")
        vocabulary = 0 if row["op"].startswith("middle") else VOCABULARY * hidden
        numel = (12 * hidden * hidden * layers + vocabulary) // tp
        if DEVICES[row["gpu"]] == "a100-sxm-80gb" and numel >= 10**9:
            sizes = launch("optimizer", "fp32", numel=numel, state_bytes=ADAM_BYTES)
            yield Row("adam", DEVICES[row["gpu"]], f"{numel / 1e9:.2f}e9", (sizes,), float(row["time_us"]) * 1e3)


def error(row: Row) -> float:
    """predicted / measured - 1."""
    cost = costs(row.device).cost
    return sum(cost(*one).duration_ns for one in row.launches) / row.measured_ns - 1


def report(rows: list[Row], worst: int) -> None:
    """One line per class and device, below it its worst rows."""
    print(f"{'class':<30}{'device':<16}{'rows':>7}{'median':>9}{'MAPE':>9}{'bias':>9}")
    grouped: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row in rows:
        grouped.setdefault((row.group, row.device), []).append((error(row), row))
    for (group, device), found in sorted(grouped.items()):
        sizes = [abs(e) for e, _ in found]
        bias = median(e for e, _ in found)
        print(f"{group:<30}{device:<16}{len(found):>7}{median(sizes):>9.1%}{fmean(sizes):>9.1%}{bias:>+9.1%}")
        for e, row in sorted(found, key=lambda pair: -abs(pair[0]))[:worst]:
            print(f"    {e:>+8.1%}  {row.measured_ns / 1e3:>10.1f} us  {row.label}")


def main() -> None:
    """Read all files, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="folder of the measured kernels")
    parser.add_argument("--worst", type=int, default=0, help="rows to show below each class")
    parser.add_argument("--step", type=int, default=1, help="take every step-th row")
    args = parser.parse_args()
    readers = (transformer_products, other_products, operators, optimizer)
    report([row for read in readers for row in list(read(args.path))[:: args.step]], args.worst)


if __name__ == "__main__":
    main()
