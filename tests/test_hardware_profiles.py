"""Profiles: every file loads, every number says where it comes from, and mistakes are told clearly."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rtp_sim.errors import InputError
from rtp_sim.hardware.generic import generic_cluster
from rtp_sim.hardware.profiles import list_clusters, list_devices, load_cluster, load_device

ROOT = Path(__file__).resolve().parent.parent / "hardware_profiles"
FILES = sorted(ROOT.glob("*/*.toml"))
COUNTS = {"gpus_per_node", "count", "nodes_per_leaf"}
"""Keys that describe the wiring and not a measurable quantity: they need no source."""

DEVICE = """
description = "a device"
compute_units = { value = 100, kind = "vendor", source = "datasheet" }
memory = { value = "80 GB", kind = "vendor", source = "datasheet" }
memory_bandwidth = { value = "2 TB/s", kind = "vendor", source = "datasheet" }
matmul_efficiency = { value = 0.8, kind = "measured", source = "a bench" }
attention_efficiency = { value = 0.5, kind = "assumed", source = "a guess" }
memory_efficiency = { value = 0.9, kind = "measured", source = "a bench" }
kernel_floor = { value = "2.5 us", kind = "measured", source = "a bench" }
host_issue = { value = "5 us", kind = "assumed", source = "a guess" }
overlap_slowdown = { value = 1.1, kind = "assumed", source = "a guess" }
runtime_reserved = { value = "1 GiB", kind = "assumed", source = "a guess" }

[peak_flops]
bf16 = { value = "300 TFLOP/s", kind = "vendor", source = "datasheet" }
"""

CLUSTER = """
description = "two devices on a wire"
device = "mine.toml"
gpus_per_node = 2

[links.wire]
kind = "nvlink"
bandwidth = { value = "100 GB/s", kind = "vendor", source = "datasheet" }
efficiency = { value = 0.8, kind = "measured", source = "a bench" }
latency = { value = "1 us", kind = "assumed", source = "a guess" }

[[intra]]
link = "wire"
pairs = ["gpu0-gpu1 x2"]

[communication]
like = "dgx-a100-80g"
"""


def numbers(table: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of a profile with its key: a sourced table as a whole, anything else number by number."""
    if isinstance(table, dict) and ("value" in table or "points" in table):
        yield key, table
    elif isinstance(table, dict):
        for name, entry in table.items():
            yield from numbers(entry, name)
    elif isinstance(table, list):
        for entry in table:
            yield from numbers(entry, key)
    elif isinstance(table, int | float) and not isinstance(table, bool):
        yield key, table


def cluster_files(folder: Path, cluster: str = CLUSTER, device: str = DEVICE) -> str:
    """A cluster file with its device beside it; the path of the cluster."""
    (folder / "mine.toml").write_text(device)
    path = folder / "pair.toml"
    path.write_text(cluster)
    return str(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_has_a_kind_and_a_source(path: Path) -> None:
    found = list(numbers(tomllib.loads(path.read_text())))
    assert found
    for key, entry in found:
        if isinstance(entry, dict):
            assert entry["kind"] in {"measured", "vendor", "assumed"}, key
            assert entry["source"].strip(), key
        else:
            assert key in COUNTS, f"{key} = {entry} has no source"


@pytest.mark.parametrize("name", list_devices())
def test_every_device_loads_and_makes_sense(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert 8e9 <= device.memory_bytes.value <= 300e9
    assert device.runtime_reserved_bytes.value < device.memory_bytes.value / 4
    assert 0 < device.matmul_efficiency.value <= 1
    assert 0 < device.attention_efficiency.value <= device.matmul_efficiency.value
    assert 0 < device.memory_efficiency.value <= 1
    assert device.overlap_slowdown.value >= 1
    assert "fp32" in device.peak_flops
    assert 1e2 <= device.kernel_floor_ns.value <= 1e4
    assert device.host_issue_ns.value > device.kernel_floor_ns.value


@pytest.mark.parametrize("name", list_clusters())
def test_every_cluster_loads_and_reaches_every_pair(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    for target in range(1, cluster.world_size):
        assert cluster.topology.bandwidth(0, target) > 10**9
        assert cluster.topology.bandwidth(target, 0) == cluster.topology.bandwidth(0, target)
    assert all(link.provenance for link in cluster.topology.links)
    assert all(
        link.bandwidth_bytes_per_s <= link.raw_bandwidth_bytes_per_s for link in cluster.topology.links
    )


def test_the_asked_for_presets_are_there() -> None:
    assert {"v100-sxm2-32gb", "a100-sxm-80gb", "h100-sxm", "h200", "mi300x", "cpu-core"} <= set(
        list_devices()
    )
    assert {"dgx-1-v100", "dgx-a100-80g", "dgx-h100", "pcie-4x3090", "cpu-local"} <= set(list_clusters())


def test_units_come_out_in_base_units() -> None:
    device = load_device("a100-sxm-80gb")
    assert device.memory_bytes.value == 85_100_068_864
    assert device.memory_bandwidth_bytes_per_s.value == 2_039_000_000_000
    assert device.peak_flops["bf16"].value == 312 * 10**12
    assert device.kernel_floor_ns.value == 2620
    link = load_cluster("dgx-a100-80g").topology.links[0]
    assert link.raw_bandwidth_bytes_per_s == 300 * 10**9
    assert link.bandwidth_bytes_per_s == 232_800_000_000  # 0.776 of it


@pytest.mark.parametrize(("name", "measured_us"), [("dgx-a100-80g", 22.96), ("dgx-h100", 15.99)])
def test_small_all_reduces_come_back_from_the_fit(name: str, measured_us: float) -> None:
    # nccl-tests, 8 ranks, median up to 1 KiB; ring: base + 2 (n - 1) (step + latency of one hop's route).
    cluster = load_cluster(name)
    step = cluster.communication.collective_step_intra_ns.value + cluster.topology.route(0, 1).latency_ns
    predicted_ns = cluster.communication.collective_base_ns.value + 14 * step
    assert predicted_ns / 1e3 == pytest.approx(measured_us, rel=0.02)


def test_the_tree_step_between_nodes_comes_back_from_the_fit() -> None:
    # nccl-tests, 16 nodes of 8 A100, 8 B: 57.9 us = tree base 6.8 + 14 steps inside + 2 log2(16) between.
    cluster = load_cluster("dgx-a100-80g", nodes=16)
    params, topology = cluster.communication, cluster.topology
    inside = params.collective_step_intra_ns.value + topology.route(0, 1).latency_ns
    between = params.collective_step_inter_ns.value + topology.route(0, 8).latency_ns
    assert (6800 + 14 * inside + 8 * between) / 1e3 == pytest.approx(57.9, rel=0.02)


@pytest.mark.parametrize(
    ("size_mib", "measured_us"), [(1, 37.89), (16, 213.3), (64, 615.7), (256, 2218.2), (1024, 8244.5)]
)
def test_the_size_curve_gives_the_measured_sweep_back(size_mib: int, measured_us: float) -> None:
    # nccl-tests all_reduce on 8x A100: latency + 2 (n - 1) / n S / (bandwidth x fraction(S)).
    cluster = load_cluster("dgx-a100-80g")
    fraction = dict(cluster.communication.size_curve)[size_mib * 2**20]
    bandwidth = cluster.topology.bandwidth(0, 1) * fraction
    transfer_us = 1.75 * size_mib * 2**20 / bandwidth * 1e6
    assert 22.96 + transfer_us == pytest.approx(measured_us, rel=0.02)


def test_borrowed_numbers_become_assumed() -> None:
    borrowed = load_cluster("mi300x-8x").communication
    assert borrowed.collective_step_intra_ns.kind == "assumed"
    assert borrowed.collective_step_intra_ns.source.startswith("as dgx-a100-80g: ")
    own = load_cluster("dgx-h200").communication.in_switch_reduction_min_ranks
    assert own is not None
    assert (own.value, own.kind) == (5, "measured")


@pytest.mark.parametrize(
    ("nodes", "gpus", "shape"),
    [(1, None, (1, 8)), (4, None, (4, 8)), (1, 3, (1, 3)), (1, 8, (1, 8)), (1, 24, (3, 8)), (2, 4, (2, 2))],
)
def test_gpus_choose_the_shape(nodes: int, gpus: int | None, shape: tuple[int, int]) -> None:
    cluster = load_cluster("dgx-h100", nodes, gpus)
    assert (cluster.nodes, cluster.gpus_per_node) == shape
    assert cluster.world_size == cluster.topology.world_size == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("nodes", "gpus", "reason"),
    [
        (1, 12, "12 / 8 = 1.5 nodes"),
        (2, 5, "5 / 2 = 2.5"),
        (2, 32, "32 / 2 = 16"),
        (0, None, "given 0 nodes"),
        (1, 0, "0 GPUs"),
    ],
)
def test_shapes_that_do_not_divide_show_the_equation(nodes: int, gpus: int | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_cluster("dgx-h100", nodes, gpus)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"given the unknown cluster 'dgx-h10', expected for example dgx-h100"
    ):
        load_cluster("dgx-h10")
    with pytest.raises(
        InputError, match=r"given the unknown device 'A100-SXM-80G', expected for example a100"
    ):
        load_device("A100-SXM-80G")
    with pytest.raises(InputError, match="expected a file that exists"):
        load_device("nowhere.toml")
    with pytest.raises(InputError, match="given the unknown device"):
        load_device("../devices/h200")


def test_own_files_load_by_path_and_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = load_cluster(cluster_files(tmp_path))
    assert cluster.device.name == "mine"
    assert cluster.topology.bandwidth(0, 1) == 160 * 10**9  # two wires of 100 GB/s at 0.8
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "h100-sxm.toml").write_text(DEVICE)
    monkeypatch.setenv("RTP_SIM_PROFILES", str(tmp_path))
    assert load_device("h100-sxm").description == "a device"
    assert "a100-sxm-80gb" in list_devices()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('value = "80 GB"', "value = 80", "memory: value: given 80, expected a size"),
        ('value = "80 GB"', 'value = "80"', "memory: value: given '80' without a unit"),
        ('value = "80 GB"', 'value = "-80 GB"', "memory: value: given the negative '-80 GB'"),
        ('value = "80 GB"', 'value = "0 GB"', "memory: value: given '0 GB', expected more than 0"),
        ("value = 0.8", "value = -0.8", "matmul_efficiency: value: given -0.8, expected more than 0"),
        ("value = 0.8", "value = 1.8", "matmul_efficiency: value: given 1.8, expected at most 1"),
        ("value = 1.1", "value = 0.9", "overlap_slowdown: value: given 0.9, expected at least 1"),
        ("value = 0.8", "value = nan", "matmul_efficiency: value: given nan, expected a plain number"),
        ("value = 0.8", "value = true", "matmul_efficiency: value: given True, expected a plain number"),
        (
            'kind = "measured"',
            'kind = "recalled"',
            "kind: given 'recalled', expected one of measured, vendor, assumed",
        ),
        ('source = "a bench"', 'source = " "', "matmul_efficiency: source: given ' '"),
        (
            'value = "300 TFLOP/s"',
            'value = "300 TFLOPS"',
            "peak_flops.bf16: value: given '300 TFLOPS' with the unknown",
        ),
        ("host_issue =", "host_isue =", "host_issue: missing, expected this key"),
        ("[peak_flops]", "typo = 1\n[peak_flops]", "typo: given an unknown key, expected one of description"),
        (
            "memory_bandwidth = {",
            "memory_bandwidth = 5 #{",
            "memory_bandwidth: given 5, expected a table such as",
        ),
    ],
)
def test_a_bad_device_names_file_key_and_expectation(tmp_path: Path, old: str, new: str, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(DEVICE.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_device(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("gpu0-gpu1 x2", "gpu0-gpu2", "intra.0.pairs: given 'gpu2', expected gpu0 to gpu1"),
        ("gpu0-gpu1 x2", "gpu0 gpu1", "intra.0.pairs: given 'gpu0 gpu1', expected two vertices"),
        ("gpu0-gpu1 x2", "gpu0-gpu1 x0", "intra.0.pairs: given 'gpu0-gpu1 x0'"),
        ("gpu0-gpu1 x2", "gpu0-gpu0", "a wire to itself"),
        ('pairs = ["gpu0-gpu1 x2"]', "", "intra.0: given neither a hub with members nor pairs"),
        ('link = "wire"', 'link = "wires"', "intra.0.link: given 'wires', expected one of the links wire"),
        ('kind = "nvlink"', 'kind = "rope"', "links.wire.kind: given 'rope', expected one of nvlink"),
        ("value = 0.8", "value = 1.2", "links.wire.efficiency: value: given 1.2, expected at most 1"),
        ("gpus_per_node = 2", "gpus_per_node = 0", "gpus_per_node: given 0"),
        ('like = "dgx-a100-80g"', 'like = "dgx-z100"', "given the unknown cluster 'dgx-z100'"),
        (
            'like = "dgx-a100-80g"',
            'like = "dgx-a100-80g"\nalgorithms = ["star"]',
            "given star, expected some of ring",
        ),
        (
            'like = "dgx-a100-80g"',
            'like = "dgx-a100-80g"\nsize_curve = { kind = "measured", source = "x", points = [["1", 0.5]] }',
            "pair.toml: communication.size_curve.points: given '1' without a unit",
        ),
        (
            'like = "dgx-a100-80g"',
            'like = "dgx-a100-80g"\nsize_curve = { kind = "vendor", source = "y", points = [["1 B", 1.5]] }',
            "expected rising bytes and fractions in (0, 1]",
        ),
        ("mine.toml", "h300", "given the unknown device 'h300'"),
    ],
)
def test_a_bad_cluster_names_key_and_expectation(tmp_path: Path, old: str, new: str, reason: str) -> None:
    path = cluster_files(tmp_path, CLUSTER.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    assert reason in str(caught.value)


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text('description = "fine"\nmemory = = 3\n')
    with pytest.raises(InputError, match=r"broken\.toml: not valid TOML at line 2, column 10"):
        load_device(str(path))


def test_a_generic_cluster_by_text_and_by_call() -> None:
    by_text = load_cluster("generic:h100-sxm,gpus=8,nics=4,nic=200Gb/s", gpus=16)
    by_call = generic_cluster("h100-sxm", 8, 4, 25 * 10**9, gpus=16)
    assert by_text.topology.links == by_call.topology.links
    assert (by_text.nodes, by_text.gpus_per_node) == (2, 8)
    assert by_text.topology.template.port_of_gpu == (0, 0, 1, 1, 2, 2, 3, 3)
    scale_up = by_text.topology.links[by_text.topology.route(0, 1).links[0]]
    assert scale_up.raw_bandwidth_bytes_per_s == 450 * 10**9  # from the device profile
    faster = load_cluster("generic:h100-sxm,scaleup=900 GB/s")
    assert (
        faster.topology.links[faster.topology.route(0, 1).links[0]].raw_bandwidth_bytes_per_s == 900 * 10**9
    )
    pcie = load_cluster("generic:l4,gpus=4,nics=0")
    assert {pcie.topology.links[i].kind for i in pcie.topology.route(0, 3).links} == {"pcie"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("generic:h100-sxm,gpu=8", "given 'gpu=8'"),
        ("generic:h100-sxm,gpus=eight", "given gpus=eight"),
        ("generic:h100-sxm,gpus=8,gpus=4", "at most once"),
        ("generic:h100-sxm,nic=200", "without a unit"),
        ("generic:h100-sxm,gpus=0", "expected gpus >= 1"),
        ("generic:h100-sxm,oversubscription=0.5", "oversubscription >= 1"),
        ("generic:h100-sxm,oversubscription=nan", "oversubscription"),
        ("generic:h1000", "given the unknown device 'h1000'"),
    ],
)
def test_generic_mistakes(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_cluster(text)
