"""From samples to the cost model's parameters: least squares on the relative error, nothing negative.

The formulas are those of cost/compute.py and cost/communication.py, solved for their parameters:

    product, attention   floor + FLOPs / rate of the dtype     (attention: half the FLOPs under a causal mask)
    bound by memory      floor + bytes / rate
    shift                base + bytes / bandwidth
    collective           base + steps x step + bytes of an edge / bandwidth

They are linear in the floor, the bases, the step and the reciprocals of the rates. On an accelerator, whose products
come in tiles and waves, they only give the first guess, which `tune` scales until the cost model itself fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import sqrt

import numpy as np
import numpy.typing as npt

from rtp_sim.cost.compute import REREADS, ComputeCost, work
from rtp_sim.errors import InputError
from rtp_sim.executor.calibrate.samples import SHIFT, STEPS, KernelSample, TransferSample, median, typical
from rtp_sim.hardware.spec import Device, Number
from rtp_sim.model.kernels import KERNELS

Matrix = npt.NDArray[np.float64]

CURVE_FROM_SHARE = 0.25
"""A curve begins at the size at which the bytes take this share of the time; below, latency is all that counts."""
CURVE_GAIN = 0.7
"""A size curve is only kept if it brings the relative error (root mean square) below this share of that without."""
LEAST_SIZES = 4
"""Sizes of a kernel that a line of its own needs."""
FASTER_THAN_SEEN = 4.0
ROUNDS = 40
REWEIGHTED = 12


@dataclass(frozen=True, slots=True)
class KernelFit:
    """`rates` are FLOP/s of products by dtype and `best_rates` the highest seen; `attention_rate` FLOP/s of attention
    in `attention_dtype` (None: not measured). `memory_rate` is bytes/s of kernels bound by memory, `best_memory_rate`
    the highest seen of copies and additions."""

    floor_ns: float
    rates: Mapping[str, float]
    best_rates: Mapping[str, float]
    attention_rate: float | None
    attention_dtype: str
    memory_rate: float
    best_memory_rate: float


@dataclass(frozen=True, slots=True)
class Line:
    """A kernel's time: floor + FLOPs x ns_per_flop + bytes x ns_per_byte. `error` is the median relative error over
    `sizes` sizes, `worst` the largest."""

    floor_ns: float
    ns_per_flop: float
    ns_per_byte: float
    sizes: int
    error: float
    worst: float


@dataclass(frozen=True, slots=True)
class KindFit:
    """A collective's time: ring steps x step + bytes of an edge / bandwidth."""

    step_ns: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class TransferFit:
    """Parameters as in hardware.spec.CommunicationParams; the bandwidth is the best that any kind of transfer reaches,
    `kinds` are the collectives by themselves."""

    p2p_base_ns: float
    p2p_efficiency: float
    collective_base_ns: float
    collective_step_ns: float
    bandwidth_bytes_per_s: float
    size_curve: tuple[tuple[int, float], ...]
    kinds: Mapping[str, KindFit]
    core_ns_per_byte: float


def relative_least_squares(columns: Sequence[Sequence[float]], target: Sequence[float]) -> list[float]:
    """The x >= 0 that minimises the sum of (p - t)^2 / (p t) for predictions p = sum of x_j column_j and targets t.

    Twice as long and half as long count alike: (p - t) / t alone would draw fits of uneven data to times too short.
    """
    goal = np.asarray(target, dtype=float)
    matrix = np.column_stack([np.asarray(column, dtype=float) / goal for column in columns])
    scale = np.sqrt((matrix**2).sum(axis=0))
    scale[scale == 0] = 1.0
    matrix = matrix / scale
    weights, x = np.ones(len(goal)), np.zeros(len(columns))
    for _ in range(REWEIGHTED):
        x = _nonnegative(matrix * weights[:, None], weights)
        # With r = p / t the slope of (r - 1)^2 / r is that of w^2 (r - 1)^2 at fixed w^2 = (r + 1) / (2 r^2).
        r = np.clip(matrix @ x, 0.05, 20.0)
        weights = np.sqrt((r + 1) / 2) / r
    return [float(value) for value in x / scale]


def _nonnegative(matrix: Matrix, goal: Matrix) -> Matrix:
    """The x >= 0 with the least |matrix x - goal|^2: the best of the solutions without negative entries on all subsets
    of the columns (ten or so at most)."""
    count = matrix.shape[1]
    best, best_error = np.zeros(count), float((goal**2).sum())
    for size in range(count, 0, -1):
        for chosen in combinations(range(count), size):
            x = np.linalg.lstsq(matrix[:, chosen], goal, rcond=None)[0]
            error = float(((matrix[:, chosen] @ x - goal) ** 2).sum())
            if (x >= 0).all() and error < best_error * (1 - 1e-12):
                best, best_error = np.zeros(count), error
                best[list(chosen)] = x
        if size == count and best.any():
            break  # nothing was negative: no subset is better
    return best


# ---- kernels


@dataclass(frozen=True, slots=True)
class _Row:
    """One sample as the formulas see it. `group` is the rate that its work is done at."""

    group: str
    work: float
    memory_bytes: float
    time_ns: float


def fit_kernels(samples: Sequence[KernelSample]) -> KernelFit:
    """Floor and rates. InputError if there are no products or no kernels bound by memory among the samples."""
    rows = [_row(sample) for sample in samples]
    products = sorted({row.group for row in rows if row.group.startswith("matmul ")})
    if not products or all(row.group != "memory" for row in rows):
        raise InputError("calibration: given no products or no memory-bound kernels, expected times of both")
    groups = [*products, *sorted({row.group for row in rows} - {*products, "memory"}), "memory"]
    memory_bound = [row.group == "memory" for row in rows]
    x: list[float] = []
    for _ in range(ROUNDS):
        floors = [
            1.0 if row.group == "memory" or not bound else 0.0 for row, bound in zip(rows, memory_bound, strict=True)
        ]
        columns = [floors]
        for group in groups:
            columns.append([_work(row, group, bound) for row, bound in zip(rows, memory_bound, strict=True)])
        x = relative_least_squares(columns, [row.time_ns for row in rows])
        ns_per = dict(zip(groups, x[1:], strict=True))
        before = memory_bound
        memory_bound = [
            row.group == "memory" or row.memory_bytes * ns_per["memory"] > x[0] + row.work * ns_per[row.group]
            for row in rows
        ]
        if memory_bound == before:
            break
    rate = {group: 1e9 / max(ns, 1e-12) for group, ns in zip(groups, x[1:], strict=True)}
    attention = next((group for group in groups if group.startswith("attention ")), None)
    return KernelFit(
        floor_ns=x[0],
        rates={group.split()[1]: rate[group] for group in products},
        best_rates={
            group.split()[1]: max(r.work / r.time_ns * 1e9 for r in rows if r.group == group) for group in products
        },
        attention_rate=rate[attention] if attention else None,
        attention_dtype=attention.split()[1] if attention else "",
        memory_rate=rate["memory"],
        best_memory_rate=max(
            row.memory_bytes / row.time_ns * 1e9
            for row, sample in zip(rows, samples, strict=True)
            if sample.kernel in ("copy", "add") and row.memory_bytes >= min(1 << 22, _largest(samples))
        ),
    )


def _largest(samples: Sequence[KernelSample]) -> int:
    return max(KERNELS[s.kernel].bytes_moved(dict(s.dims), s.dtype) for s in samples if s.kernel in ("copy", "add"))


def _work(row: _Row, group: str, bound: bool) -> float:
    """What the row does at the group's rate."""
    if bound:
        return row.memory_bytes if group == "memory" else 0.0
    return row.work if group == row.group else 0.0


def _row(sample: KernelSample) -> _Row:
    kernel, sizes = KERNELS[sample.kernel], dict(sample.dims)
    memory = kernel.bytes_moved(sizes, sample.dtype) * REREADS.get(sample.kernel, 1.0)
    group = "memory" if kernel.kind == "memory" else f"{kernel.kind} {sample.dtype}"
    return _Row(group, work(kernel, sizes), memory, typical(sample.times_ns))


def fit_lines(samples: Sequence[KernelSample]) -> dict[tuple[str, str], Line]:
    """Floor and slopes of every kernel and dtype of which enough sizes were measured; of one size there is no line."""
    by_kernel: dict[tuple[str, str], list[KernelSample]] = {}
    for sample in samples:
        by_kernel.setdefault((sample.kernel, sample.dtype), []).append(sample)
    return {key: _line(sizes) for key, sizes in by_kernel.items() if len(sizes) >= LEAST_SIZES}


def _line(samples: Sequence[KernelSample]) -> Line:
    rows = [
        (work(k, dict(s.dims)), float(k.bytes_moved(dict(s.dims), s.dtype)), typical(s.times_ns))
        for s in samples for k in (KERNELS[s.kernel],)
    ]  # fmt: skip
    flops, moved, times = ([row[i] for row in rows] for i in range(3))
    x = relative_least_squares([[1.0] * len(rows), flops, moved], times)
    errors = [abs((x[0] + x[1] * f + x[2] * b) / t - 1) for f, b, t in rows]
    return Line(x[0], x[1], x[2], len(rows), median(errors), max(errors))


def tune(device: Device, samples: Sequence[KernelSample]) -> Device:
    """`device` with the rates of products (per dtype) and of attention scaled so that the cost model's tiles and waves
    give the measured times: least squares on the relative error over the samples that are not all latency."""
    for _ in range(6):
        cost = ComputeCost(device)
        peaks = dict(device.peak_flops)
        for dtype in peaks:
            scale = _scale(cost, [s for s in samples if KERNELS[s.kernel].kind == "matmul" and s.dtype == dtype])
            peaks[dtype] = _scaled(peaks[dtype], 1 / scale)
        attention = [s for s in samples if KERNELS[s.kernel].kind == "attention"]
        scale = _scale(cost, attention)
        dtype = attention[0].dtype if attention else ""
        # The rate of attention is its efficiency times a peak that has just been scaled.
        moved = device.peak_flops[dtype].value / peaks[dtype].value if dtype in peaks else 1.0
        efficiency = device.attention_efficiency
        value = min(1.0, efficiency.value * moved / scale)
        device = replace(device, peak_flops=peaks, attention_efficiency=replace(efficiency, value=value))
    return device


def _scale(cost: ComputeCost, samples: Sequence[KernelSample]) -> float:
    """The factor on predicted times that fits best."""
    floor_ns = cost.device.kernel_floor_ns.value
    ratios = [
        cost.cost(s.kernel, s.dtype, s.dims).duration_ns / typical(s.times_ns)
        for s in samples
        if typical(s.times_ns) > 4 * floor_ns
    ]
    return sum(ratios) / sum(r * r for r in ratios) if ratios else 1.0


def _scaled(number: Number, factor: float) -> Number:
    return replace(number, value=number.value * factor)


# ---- transfers


@dataclass(frozen=True, slots=True)
class _Move:
    """One transfer sample: kind, ring steps, bytes over an edge, and its size for the curve."""

    kind: str
    steps: int
    edge_bytes: float
    size_bytes: int
    time_ns: float

    @property
    def collective(self) -> bool:
        """Whether all ranks take part in one operation."""
        return self.kind != SHIFT


def fit_transfers(samples: Sequence[TransferSample]) -> TransferFit:
    """Bases, step, bandwidth and, where there is one, the size curve. InputError without shifts or collectives."""
    moves = [_move(sample) for sample in samples]
    if not any(move.collective for move in moves) or all(move.collective for move in moves):
        raise InputError("calibration: given no ring shifts or no collectives, expected times of both")
    flat, flat_error = _fit_moves(moves, {})
    curve = _size_curve(moves, flat)
    if curve:
        curved, curved_error = _fit_moves(moves, curve)
        if curved_error < CURVE_GAIN * flat_error:
            flat = curved
    message_rate = flat.bandwidth_bytes_per_s * flat.p2p_efficiency
    return replace(flat, core_ns_per_byte=core_share(samples) / message_rate * 1e9)


def core_share(samples: Sequence[TransferSample]) -> float:
    """How many cores each rank keeps busy while a transfer lasts: the median of what computing beside it lost over its
    time alone (0 if no sample knows). More than one where threads that take turns empty each other's caches."""
    shares = [s.core_ns / s.ranks / typical(s.times_ns) for s in samples if s.core_ns > 0]
    return median(shares) if shares else 0.0


def _move(sample: TransferSample) -> _Move:
    if sample.kind == SHIFT:
        return _Move(sample.kind, 1, sample.size_bytes, sample.size_bytes, typical(sample.times_ns))
    steps = STEPS[sample.kind] * (sample.ranks - 1)
    edge_bytes = sample.size_bytes * steps / sample.ranks
    return _Move(sample.kind, steps, edge_bytes, sample.size_bytes, typical(sample.times_ns))


def _fit_moves(moves: Sequence[_Move], curve: Mapping[int, float]) -> tuple[TransferFit, float]:
    """The fit for a given curve, and its relative error: one bandwidth for messages, one for collectives, and each kind
    of collective by itself."""
    target = [move.time_ns for move in moves]
    bases = [
        [0.0 if move.collective else 1.0 for move in moves],
        [1.0 if move.collective else 0.0 for move in moves],
        [float(move.steps) if move.collective else 0.0 for move in moves],
    ]
    smallest = curve[min(curve)] if curve else 1.0
    flow = [move.edge_bytes / curve.get(move.size_bytes, smallest) for move in moves]
    mine = [0.0 if move.collective else f for move, f in zip(moves, flow, strict=True)]
    theirs = [f if move.collective else 0.0 for move, f in zip(moves, flow, strict=True)]
    columns = [*bases, mine, theirs]
    x = relative_least_squares(columns, target)
    predicted = [sum(value * column[i] for value, column in zip(x, columns, strict=True)) for i in range(len(moves))]
    error = sqrt(sum((p / t - 1) ** 2 for p, t in zip(predicted, target, strict=True)) / len(target))
    kinds = {
        kind: _kind(*zip(*((m.steps, f, m.time_ns) for m, f in zip(moves, flow, strict=True) if m.kind == kind),
                         strict=True))
        for kind in sorted({move.kind for move in moves if move.collective})
    }  # fmt: skip
    floors = [
        _least_ns_per_byte(*zip(*((f, m.time_ns) for m, f in zip(moves, flow, strict=True) if m.collective == which),
                                strict=True))
        for which in (False, True)
    ]  # fmt: skip
    message_rate, rate = (1e9 / max(ns_per_byte, least) for ns_per_byte, least in zip(x[3:], floors, strict=True))
    best = max(message_rate, rate, *(kind.bandwidth_bytes_per_s for kind in kinds.values()))
    fit = TransferFit(
        x[0], message_rate / best, x[1], x[2], best,
        tuple(sorted((size, fraction) for size, fraction in curve.items())), kinds, 0.0,
    )  # fmt: skip
    return fit, error


def _kind(steps: Sequence[int], flow: Sequence[float], times_ns: Sequence[float]) -> KindFit:
    step_ns, ns_per_byte = relative_least_squares([[float(n) for n in steps], flow], times_ns)
    return KindFit(step_ns, 1e9 / max(ns_per_byte, _least_ns_per_byte(flow, times_ns)))


def _least_ns_per_byte(flow: Sequence[float], times_ns: Sequence[float]) -> float:
    """Where latency hides what bytes cost, they are taken to pass at most this many times faster than was seen."""
    return min(t / f for f, t in zip(flow, times_ns, strict=True)) / FASTER_THAN_SEEN


def _size_curve(moves: Sequence[_Move], fit: TransferFit) -> dict[int, float]:
    """By size, the fraction of the bandwidth reached that fits best, alternating with the other parameters."""
    share = {move.size_bytes: 0.0 for move in moves}
    for move in moves:
        share[move.size_bytes] = max(share[move.size_bytes], move.edge_bytes / _rate(move, fit) / move.time_ns)
    first = min((size for size, part in share.items() if part > CURVE_FROM_SHARE), default=None)
    sizes = sorted(size for size in share if first is not None and size >= first)
    curve: dict[int, float] = {}
    for _ in range(ROUNDS if len(sizes) > 2 else 0):
        slowness = {size: _slowness([move for move in moves if move.size_bytes == size], fit) for size in sizes}
        fastest = min(slowness.values())
        curve = {size: fastest / slowness[size] for size in sizes}
        # No message takes less time than a smaller one: as cost/communication.py reads curves.
        for smaller, size in pairwise(sizes):
            curve[size] = min(curve[size], curve[smaller] * size / smaller)
        fit, _ = _fit_moves(moves, curve)
    return curve


def _slowness(moves: Sequence[_Move], fit: TransferFit) -> float:
    """How many times longer than at the fit's full bandwidth the bytes of these transfers take."""
    above = below = 0.0
    for move in moves:
        kind = fit.kinds.get(move.kind)
        latency_ns = fit.p2p_base_ns if kind is None else move.steps * kind.step_ns
        share = move.edge_bytes / _rate(move, fit) / move.time_ns
        above += share * (1 - latency_ns / move.time_ns)
        below += share * share
    return min(50.0, max(above / below, 0.02))


def _rate(move: _Move, fit: TransferFit) -> float:
    """Bytes per ns of a large transfer."""
    kind = fit.kinds.get(move.kind)
    return (fit.bandwidth_bytes_per_s * fit.p2p_efficiency if kind is None else kind.bandwidth_bytes_per_s) / 1e9
