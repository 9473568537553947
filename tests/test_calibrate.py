"""Calibration: fits give back known parameters, profiles what was measured, and processes never stay behind."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from calibrate_ranks import job

from rtp_sim import commands_calibrate
from rtp_sim.cli import main
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
from rtp_sim.executor.calibrate.launch import run_ranks
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
from rtp_sim.executor.calibrate.shapes import Shape
from rtp_sim.executor.calibrate.write import Files
from rtp_sim.hardware.profiles import load_cluster, load_device

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


# ---- measuring


def test_a_transfer_counts_from_the_last_rank_that_was_ready() -> None:
    torch = pytest.importorskip("torch")
    assert torch
    from rtp_sim.executor.calibrate.transfers import RankTimes, combined

    early = RankTimes("shift", 64, (100, 1000), (180, 1090), (), (30, 90, 40))
    late = RankTimes("shift", 64, (150, 1000), (190, 1060), (), (50, 60))
    # Computing lost 40 and 55 in the median, on each of as many cores as the two ranks have.
    (sample,) = combined([[early], [late]], shared_clock=True, cores=8)
    assert sample == TransferSample("shift", 2, 64, (40, 90), 95)
    (sample,) = combined([[early], [late]], shared_clock=True, cores=1)
    assert sample.core_ns == 48
    # Each device knows only its own times: the rank that waited least saw the transfer alone.
    (sample,) = combined([[early], [late]], shared_clock=False)
    assert sample.times_ns == (40, 60)


def test_transfers_beside_a_slow_core_count_only_where_there_are_no_others() -> None:
    pytest.importorskip("torch")
    from rtp_sim.executor.calibrate.transfers import RankTimes, combined

    start, usual = (0,) * 8, (100,) * 8
    first = RankTimes("shift", 64, start, (40, 41, 42, 43, 90, 45, 46, 47), (*usual[:4], 170, *usual[:3]))
    second = RankTimes("shift", 64, start, (40, 41, 42, 99, 44, 45, 46, 47), (*usual[:3], 150, 100, 110, 100, 100))
    disturbed = RankTimes("shift", 128, (0,), (70,), (160,))
    quiet = RankTimes("shift", 128, (0,), (60,), usual[:1])
    small, large = combined([[first, disturbed], [second, quiet]], shared_clock=True)
    # The fourth and the fifth had a rank that was slow; 10 % off is as usual. The only one of 128 bytes stays.
    assert small.times_ns == (40, 41, 42, 45, 46, 47)
    assert large.times_ns == (70,)


def test_kernels_in_slow_steps_count_only_where_no_other_step_has_them() -> None:
    pytest.importorskip("torch")
    from rtp_sim.executor.calibrate.probe import ProbeTimes, gathered

    def step(pace_ns: int, took_ns: int, issue_ns: int, kernel: str = "add") -> ProbeTimes:
        return ProbeTimes((KernelSample(kernel, "fp32", (("numel", 8),), (took_ns,)),), (issue_ns,), pace_ns)

    steps = [step(70, 5, 1), step(115, 9, 2), step(72, 6, 3), step(120, 30, 4, "gelu"), step(71, 7, 5)]
    samples, issue = gathered(steps)
    assert {s.kernel: s.times_ns for s in samples} == {"add": (5, 6, 7), "gelu": (30,)}
    assert issue == [1, 3, 5]


def test_the_usual_pace_is_what_the_cores_have_most_of_the_time() -> None:
    from rtp_sim.executor.pace import pace_ns, steady, usual_ns

    assert usual_ns([160, 101, 100, 155, 102]) == 101  # one in five is faster
    assert usual_ns([]) == 0
    # 15 % either way: 86.7 to 117.3.
    assert [reading for reading in (86, 87, 117, 118) if steady(reading, 102)] == [87, 117]
    assert steady(10**9, 0)
    assert pace_ns() > 0


def test_a_quick_calibration_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    profile = tmp_path / "here.toml"
    assert main(["calibrate", "-o", str(profile), "--nproc", "2", "--quick"]) == 0
    said = capsys.readouterr()
    assert "memory-bound kernels" in said.out
    assert "all_reduce" in said.err
    assert not multiprocessing.active_children()
    kept = json.loads((tmp_path / "here.calibration.json").read_text())
    assert {t["kind"] for t in kept["transfers"]} == {"shift", "all_reduce", "all_gather", "reduce_scatter"}
    assert {t["ranks"] for t in kept["transfers"]} == {2}
    assert {k["kernel"] for k in kept["kernels"]} >= {"linear", "copy", "add", "gelu", "layernorm", "sdpa", "sdpa.bwd"}
    # What the file states is what the loaded profile gives.
    cluster = load_cluster(str(profile))
    errors = [
        abs(
            ClusterCost(cluster).compute(k["kernel"], k["dtype"], tuple(k["dims"].items())).duration_ns / k["mean_ns"]
            - 1
        )
        for k in kept["steps"]
        if k["kernel"].startswith("linear")
    ]
    assert median(errors) == pytest.approx(kept["residuals"]["products fp32 in steps"]["median"], abs=1e-3)
    assert cluster.host is not None
    assert cluster.host.cores.value == os.cpu_count()
    for strategy in ("ddp", "rtp"):
        command = ["simulate", "--cluster", str(profile), "--model", "gpt2-tiny", "--strategy", strategy]
        assert main([*command, "--precision", "fp32", "--format", "json", "--quiet"]) == 0
        assert json.loads(capsys.readouterr().out)


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "nowhere/mine.toml"], "there is no directory nowhere"),
        (["-o", "mine.json"], "expected a file name that ends in .toml"),
        (["-o", "mine.toml", "--nproc", "0"], "not a whole number"),
        (["-o", "mine.toml", "--timeout", "-1"], "expected seconds"),
        ([], "-o/--output"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_torch_it_names_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["calibrate", "-o", str(tmp_path / "mine.toml")]) == 2
    assert "pip install rtp-sim[torch]" in capsys.readouterr().err


def test_without_cuda_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["calibrate", "-o", str(tmp_path / "mine.toml"), "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["calibrate", "-o", str(tmp_path / "mine.toml"), "--device", "cuda", "--nproc", "2"]) == 2
    assert "a rank for each" in capsys.readouterr().err


def test_the_command_needs_torch_only_to_measure() -> None:
    code = "import sys, rtp_sim.commands_calibrate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- processes


def test_results_come_back_in_order() -> None:
    said: list[str] = []
    assert run_ranks(job, "", 3, 30, said.append) == [0, 10, 20]
    assert len(said) == 3


@pytest.mark.parametrize(
    ("what", "timeout_s", "message"),
    [
        ("die", 30, r"rank 1 died \(exit code 7\)"),
        ("kill", 30, r"rank 1 died \(signal 9\)"),
        ("fail", 30, "rank 1 failed: RuntimeError: no luck"),
        ("hang", 3, "no rank has reported for 3 s|BrokenBarrierError"),
    ],
)
def test_a_rank_that_is_lost_ends_the_calibration(what: str, timeout_s: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_ranks(job, what, 2, timeout_s, lambda _: None)
    assert not multiprocessing.active_children()


def test_ranks_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    where = tmp_path / "pid"
    code = (
        "from calibrate_ranks import job; from rtp_sim.executor.calibrate.launch import run_ranks; "
        f"run_ranks(job, {str(where)!r}, 1, 60, print)"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        until = time.monotonic() + 30
        while not (where.is_file() and where.read_text()):
            assert time.monotonic() < until
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    rank = int(where.read_text())
    until = time.monotonic() + 10
    while _runs(rank):
        assert time.monotonic() < until, "the rank outlived its parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie that nobody has collected."""
    status = Path(f"/proc/{pid}/status")
    try:
        os.kill(pid, 0)
        return not (status.is_file() and "State:\tZ" in status.read_text())
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(("ranks", "with_tensor_parallelism"), [(2, True), (4, False)])
def test_probes_split_heads_only_where_every_rank_gets_one(
    monkeypatch: pytest.MonkeyPatch, ranks: int, with_tensor_parallelism: bool
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(commands_calibrate, "SHAPES", (Shape("gpt", 96, 2, 400, 160, 24),))
    names = [probe.schedule.name for probe in commands_calibrate.probes(ranks, quick=False)]
    assert names == ["ddp", "rtp", *(["tp-sp"] if with_tensor_parallelism else [])]
