"""Calibration: fits give back known parameters, and profiles what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rtp_sim.commands_calibrate import write_calibration
from rtp_sim.cost.compute import ComputeCost
from rtp_sim.cost.model import ClusterCost
from rtp_sim.errors import InputError
from rtp_sim.executor.calibrate.fit import (
    core_share,
    fit_kernels,
    fit_lines,
    fit_transfers,
    relative_least_squares,
    tune,
)
from rtp_sim.executor.calibrate.residuals import predicted_ns, residuals
from rtp_sim.executor.calibrate.samples import (
    HostSample,
    KernelSample,
    Measurements,
    TransferSample,
    median,
    quantile,
    spread,
)
from rtp_sim.executor.calibrate.write import Files
from rtp_sim.hardware.profiles import load_device

FLOOR_NS, FP32, BF16, MEMORY, ATTENTION = 3_000, 80e9, 160e9, 20e9, 30e9
SIZES = (64, 4096, 65_536, 1 << 20, 1 << 24)


def product(dtype: str, rate: float, m: int, k: int, n: int, kernel: str = "linear") -> KernelSample:
    ns = FLOOR_NS + 2 * m * k * n / rate * 1e9
    return KernelSample(kernel, dtype, (("m", m), ("k", k), ("n", n)), (round(ns),))


def kernels() -> list[KernelSample]:
    """Times by the formulas, with bytes and FLOPs counted by hand."""
    samples = [product("fp32", FP32, n, n, n) for n in (256, 512, 1024)]
    samples += [product("bf16", BF16, n, n, n) for n in (512, 1024)]
    samples.append(product("fp32", FP32, 512, 256, 1024, "linear.wgrad"))
    samples.append(KernelSample("add", "fp32", (("numel", 16),), (FLOOR_NS + round(3 * 4 * 16 / MEMORY * 1e9),)))
    for numel in (1 << 12, 1 << 16, 1 << 20):
        for kernel, operands in (("copy", 2), ("add", 3), ("gelu", 2), ("gelu.bwd", 3)):
            ns = FLOOR_NS + operands * 4 * numel / MEMORY * 1e9
            samples.append(KernelSample(kernel, "fp32", (("numel", numel),), (round(ns),)))
        # A norm reads its input twice: half as much again as x, y and two fp32 statistics per row.
        rows = numel // 1024
        ns = FLOOR_NS + 1.5 * (2 * 4 * numel + 2 * 4 * rows) / MEMORY * 1e9
        samples.append(KernelSample("layernorm", "fp32", (("rows", rows), ("width", 1024)), (round(ns),)))
    for tokens in (128, 256):
        dims = (
            ("batch", 2),
            ("heads", 4),
            ("kv_heads", 4),
            ("q", tokens),
            ("kv", tokens),
            ("head_dim", 64),
            ("causal", 1),
        )
        for kernel, products in (("sdpa", 2), ("sdpa.bwd", 5)):
            flops = products * 2 * 2 * 4 * tokens * tokens * 64 / 2
            samples.append(KernelSample(kernel, "fp32", dims, (round(FLOOR_NS + flops / ATTENTION * 1e9),)))
    return samples


def transfers(
    n: int,
    p2p_ns: float,
    base_ns: float,
    step_ns: float,
    rate: float,
    p2p_rate: float,
    curve: dict[int, float] | None = None,
) -> list[TransferSample]:
    """Ring algorithms: 2 (n-1) steps of an n-th for an all-reduce, n-1 for the others."""
    samples = []
    for size in SIZES:
        fraction = (curve or {}).get(size, 1.0)
        ns = p2p_ns + size / (p2p_rate * fraction) * 1e9
        samples.append(TransferSample("shift", n, size, (round(ns),), round(0.75 * n * ns)))
        for kind, rounds in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)):
            steps = rounds * (n - 1)
            ns = base_ns + steps * step_ns + size * steps / n / (rate * fraction) * 1e9
            samples.append(TransferSample(kind, n, size, (round(ns),)))
    return samples


def measurements(n: int = 2) -> Measurements:
    host = HostSample((900, 1_000, 1_100), 8 * 10**9, 250 * 10**6, 1, (100, 110), (132, 121))
    facts = {
        "date": "2026-01-02T03:04:05+00:00", "device": 'A "fast" core', "cores": 2, "system": "Linux x86_64",
        "torch": "2.13", "threads": 1, "backend": "gloo", "pinned": False, "quick": False, "foreign_load": 0.0,
        "pace_ns": 123_456,
    }  # fmt: skip
    moved = transfers(n, 90_000, 50_000, 40_000, 1.2e9, 0.9e9) if n > 1 else []
    return Measurements("cpu", n, tuple(kernels()), tuple(moved), host, facts)


# ---- statistics


def test_quantiles_lie_between_neighbours() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5
    assert quantile([0, 10], 0.3) == 3.0
    assert spread(list(range(11))) == (1, 9)
    with pytest.raises(ValueError, match="no values"):
        median([])


# ---- fits


def test_least_squares_finds_an_exact_answer_and_never_a_negative_one() -> None:
    ones, x = [1.0] * 4, [1.0, 2.0, 5.0, 10.0]
    assert relative_least_squares([ones, x], [3 + 2 * v for v in x]) == pytest.approx([3, 2])
    # A line through (1, 1), (2, 3) starts at -1: through zero the slope is between 1 and 1.5.
    intercept, slope = relative_least_squares([[1.0, 1.0], [1.0, 2.0]], [1.0, 3.0])
    assert intercept == 0
    # Symmetric in the relative error: the geometric mean of both.
    assert slope == pytest.approx(1.5**0.5, rel=1e-3)


def test_too_long_and_too_short_count_alike() -> None:
    assert relative_least_squares([[1.0, 1.0]], [1.0, 4.0])[0] == pytest.approx(2.0, rel=1e-3)


def test_kernels_give_back_floor_and_rates() -> None:
    fit = fit_kernels(kernels())
    assert fit.floor_ns == pytest.approx(FLOOR_NS, rel=1e-3)
    assert fit.rates == pytest.approx({"fp32": FP32, "bf16": BF16}, rel=1e-4)
    assert fit.memory_rate == pytest.approx(MEMORY, rel=1e-4)
    assert fit.attention_rate == pytest.approx(ATTENTION, rel=1e-4)
    # The best rates seen still hold the floor: an addition of 2^20 moves 12 MiB in 3 us + 629 us.
    assert fit.best_memory_rate == pytest.approx(3 * 4 * 2**20 / (3_000 + 3 * 4 * 2**20 / 20) * 1e9, rel=1e-4)
    assert fit.best_rates["fp32"] < FP32


def test_a_product_bound_by_memory_tells_nothing_of_the_rate_of_products() -> None:
    # One row through a 4096 x 4096 matrix: 67 MB at 20 GB/s are 3.4 ms, its FLOPs 0.4 ms.
    elements = 4096 + 4096 * 4096 + 4096
    thin = KernelSample("linear", "fp32", (("m", 1), ("k", 4096), ("n", 4096)), (round(elements * 4 / MEMORY * 1e9),))
    fit = fit_kernels([*kernels(), thin])
    assert fit.rates["fp32"] == pytest.approx(FP32, rel=1e-3)
    assert fit.memory_rate == pytest.approx(MEMORY, rel=1e-3)


@pytest.mark.parametrize("n", [2, 4])
def test_transfers_give_back_latencies_and_bandwidth(n: int) -> None:
    fit = fit_transfers(transfers(n, 90_000, 50_000, 40_000, 1.5e9, 1.2e9))
    assert fit.p2p_base_ns == pytest.approx(90_000, rel=1e-4)
    assert fit.collective_base_ns == pytest.approx(50_000, rel=1e-3)
    assert fit.collective_step_ns == pytest.approx(40_000, rel=1e-3)
    assert fit.bandwidth_bytes_per_s == pytest.approx(1.5e9, rel=1e-4)
    assert fit.p2p_efficiency == pytest.approx(0.8, rel=1e-4)
    assert fit.size_curve == ()
    # Each kind by itself: its base spread over its steps, of which an all-reduce has twice as many.
    assert fit.kinds["all_reduce"].step_ns == pytest.approx(50_000 / (2 * (n - 1)) + 40_000, rel=1e-4)
    assert fit.kinds["all_gather"].step_ns == pytest.approx(50_000 / (n - 1) + 40_000, rel=1e-4)
    assert [kind.bandwidth_bytes_per_s for kind in fit.kinds.values()] == [pytest.approx(1.5e9, rel=1e-4)] * 3


def test_the_bandwidth_is_that_of_the_fastest_transfers() -> None:
    fit = fit_transfers(transfers(2, 90_000, 50_000, 40_000, 1.0e9, 2.0e9))
    assert fit.bandwidth_bytes_per_s == pytest.approx(2.0e9, rel=1e-4)
    assert fit.p2p_efficiency == pytest.approx(1.0, rel=1e-4)
    assert fit.kinds["reduce_scatter"].bandwidth_bytes_per_s == pytest.approx(1.0e9, rel=1e-4)


def test_a_line_gives_back_floor_and_slopes() -> None:
    """Products of known rate and traffic: 3 us + FLOPs at 80 GFLOP/s + bytes at 10 GB/s."""
    samples = []
    for m, k, n in ((64, 64, 64), (128, 64, 256), (512, 512, 512), (32, 1024, 64), (256, 96, 700)):
        moved = 4 * (m * k + k * n + m * n)
        ns = 3_000 + 2 * m * k * n / 80 + moved / 10
        samples.append(KernelSample("linear", "fp32", (("m", m), ("k", k), ("n", n)), (round(ns),)))
    line = fit_lines(samples)["linear", "fp32"]
    assert line.floor_ns == pytest.approx(3_000, rel=1e-3)
    assert 1 / line.ns_per_flop == pytest.approx(80, rel=1e-3)
    assert 1 / line.ns_per_byte == pytest.approx(10, rel=1e-3)
    assert fit_lines(samples[:3]) == {}, "three sizes are no line"


def test_a_size_curve_is_found_where_there_is_one() -> None:
    curve = {65_536: 0.2, 1 << 20: 0.5}
    fit = fit_transfers(transfers(4, 9_000, 5_000, 4_000, 1.5e9, 1.5e9, curve))
    assert dict(fit.size_curve)[65_536] == pytest.approx(0.2, rel=0.02)
    assert dict(fit.size_curve)[1 << 20] == pytest.approx(0.5, rel=0.02)
    assert dict(fit.size_curve)[1 << 24] == pytest.approx(1.0, rel=0.02)
    assert fit.bandwidth_bytes_per_s == pytest.approx(1.5e9, rel=0.02)


def test_core_time_is_that_of_the_cores_kept_busy() -> None:
    # Three quarters of a core while 2 GB/s pass: 0.375 ns of core time a byte.
    samples = transfers(4, 1, 1, 1, 1e9, 2e9)
    assert core_share(samples) == pytest.approx(0.75, rel=1e-3)
    assert fit_transfers(samples).core_ns_per_byte == pytest.approx(0.375, rel=1e-2)
    assert core_share([]) == 0.0


def test_fits_need_both_sides() -> None:
    with pytest.raises(InputError, match="no products"):
        fit_kernels([s for s in kernels() if s.kernel == "copy"])
    with pytest.raises(InputError, match="no ring shifts"):
        fit_transfers([s for s in transfers(2, 1, 1, 1, 1e9, 1e9) if s.kind != "shift"])


def test_the_rates_of_an_accelerator_are_tuned_through_tiles_and_waves() -> None:
    device = load_device("a100-sxm-80gb")
    cost = ComputeCost(device)
    attention = (
        ("batch", 4),
        ("heads", 16),
        ("kv_heads", 16),
        ("q", 2048),
        ("kv", 2048),
        ("head_dim", 128),
        ("causal", 1),
    )
    work = [("linear", (("m", n), ("k", n), ("n", n))) for n in (1024, 4096, 8192)]
    work += [("sdpa", attention), ("sdpa.bwd", attention)]
    samples = [KernelSample(k, "bf16", dims, (cost.cost(k, "bf16", dims).duration_ns,)) for k, dims in work]
    peak = device.peak_flops["bf16"]
    wrong = replace(
        device, peak_flops={"bf16": replace(peak, value=peak.value * 0.6)},
        attention_efficiency=replace(device.attention_efficiency, value=0.9),
    )  # fmt: skip
    tuned = tune(wrong, samples)
    assert tuned.peak_flops["bf16"].value == pytest.approx(peak.value, rel=1e-3)
    assert tuned.attention_efficiency.value == pytest.approx(device.attention_efficiency.value, rel=1e-3)


# ---- profiles


def test_a_written_profile_gives_back_what_was_measured(tmp_path: Path) -> None:
    measured = measurements()
    cluster, _, left = write_calibration(Files(tmp_path / "mine.toml"), measured, {"nproc": 2})
    assert max(residual.p90 for residual in left.values()) < 1e-3
    for sample in (*measured.kernels, *measured.transfers):
        assert predicted_ns(cluster, sample) == pytest.approx(median(sample.times_ns), rel=1e-3)
    device, wires = cluster.device, cluster.communication
    assert device.kernel_floor_ns.value == FLOOR_NS
    assert device.peak_flops["bf16"].value * device.matmul_efficiency.value == pytest.approx(BF16, rel=1e-3)
    assert device.host_issue_ns.value == 1_000
    assert device.host_pace_ns is not None
    assert device.host_pace_ns.value == 123_456
    assert device.overlap_slowdown.value == pytest.approx(126.5 / 105, rel=1e-3)
    assert wires.collective_step_intra_ns.value == pytest.approx(40_000, abs=30)
    assert wires.p2p_efficiency.value == pytest.approx(0.75, rel=1e-3)
    assert cluster.world_size == 2
    assert ClusterCost(cluster).compute_pool(0) is not None, "ranks on a CPU share its cores"


def test_every_number_is_measured_unless_it_could_not_be(tmp_path: Path) -> None:
    write_calibration(Files(tmp_path / "mine.toml"), measurements(), {})
    text = (tmp_path / "mine.toml").read_text() + (tmp_path / "mine-device.toml").read_text()
    assumed = {line.split(" =")[0] for line in text.splitlines() if 'kind = "assumed"' in line}
    assert assumed == {"compute_units", "latency", "collective_step_inter"}
    for key in ("matmul_efficiency", "memory_efficiency", "kernel_floor", "p2p_base", "collective_base", "bandwidth"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{key} =")]
        assert "residual median" in line, key


def test_the_samples_are_kept_with_their_spread(tmp_path: Path) -> None:
    write_calibration(Files(tmp_path / "mine.toml"), measurements(), {"nproc": 2})
    kept = json.loads((tmp_path / "mine.calibration.json").read_text())
    assert kept["facts"]["date"] == "2026-01-02T03:04:05+00:00"
    assert kept["options"] == {"nproc": 2}
    assert len(kept["kernels"]) == len(kernels())
    numbers = {"median_ns", "mean_ns", "p10_ns", "p90_ns", "predicted_ns", "times_ns", "core_ns"}
    assert kept["transfers"][0].keys() >= numbers
    assert kept["residuals"]["messages"]["count"] == len(SIZES)


def test_one_rank_borrows_its_communication(tmp_path: Path) -> None:
    cluster, _, left = write_calibration(Files(tmp_path / "mine.toml"), measurements(1), {})
    assert cluster.world_size == 1
    assert cluster.communication.p2p_base_ns.kind == "assumed"
    assert "messages" not in left


def test_residuals_tell_a_profile_that_is_wrong(tmp_path: Path) -> None:
    cluster, _, _ = write_calibration(Files(tmp_path / "mine.toml"), measurements(), {})
    twice = replace(measurements(), kernels=tuple(replace(s, times_ns=(2 * s.times_ns[0],)) for s in kernels()))
    left = residuals(cluster, twice)
    assert left["products fp32"].median == pytest.approx(0.5, rel=1e-3)
    assert left["messages"].p90 < 1e-3
