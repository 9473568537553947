"""`rtp-sim hardware import`: what made a table is found again, and profiles miss tables by what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from nccl_tables import table
from test_cli import Answer, documented_keys

from rtp_sim.cli import main
from rtp_sim.cost.communication import CommunicationCost
from rtp_sim.hardware.importers.nccl_tests import read_sweeps
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster

DATA = Path(__file__).parent / "data" / "imports"
H100 = f"--topo {DATA}/topo_h100.txt --device h100-sxm"
RAILS = f"--topo {DATA}/topo_rail.txt --device h100-sxm"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `hardware import` in this process, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> Answer:
        code = main(f"hardware import {line} --quiet".split())
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def us(*terms: float, rate_gb_s: float, edge: float) -> Callable[[int], float]:
    """Latencies in us, and `edge` times the size at a rate."""
    return lambda size: sum(terms) + edge * size / rate_gb_s / 1e3


# ---- what made the table is found again


def test_bases_steps_and_rates_of_a_switch_are_found(run):
    # 8 ranks: all_reduce takes 14 steps and 14/8 S, all_gather 7 steps and 7/8 S; a sendrecv is one message of S.
    files = [
        write("ar.txt", table("all_reduce", 8, us(8, 14 * 1.5, rate_gb_s=240, edge=14 / 8))),
        write("ag.txt", table("all_gather", 8, us(8, 7 * 1.5, rate_gb_s=240, edge=7 / 8))),
        write("sr.txt", table("sendrecv", 8, us(9, rate_gb_s=200, edge=1))),
    ]
    topo = f"--topo {DATA}/topo_half_attached.txt --device a100-sxm-40gb"
    answer = run(f"{topo} --nccl-tests {' '.join(files)} -o my.toml")
    assert (answer.code, answer.err) == (0, "")
    p = load_cluster("my.toml").communication
    assert p.collective_base_ns.value == pytest.approx(8000, rel=0.01)
    assert p.collective_step_intra_ns.value == pytest.approx(1500, rel=0.01)
    assert p.p2p_base_ns.value == pytest.approx(9000, rel=0.01)
    assert p.p2p_efficiency.value == pytest.approx(200 / 240, rel=0.005)
    assert {n.kind for n in (p.collective_base_ns, p.collective_step_intra_ns, p.p2p_base_ns)} == {"measured"}
    assert (p.size_curve, p.in_switch_reduction_min_ranks) == ((), None)
    assert "in-switch" not in p.algorithms
    # NV12 is 12 x 25 GB/s.
    (link,) = {(x.raw_bandwidth_bytes_per_s, x.bandwidth_bytes_per_s) for x in links(load_cluster("my.toml"), "nvlink")}
    assert link[0] == 300 * 10**9
    assert link[1] == pytest.approx(240e9, rel=0.002)
    assert max(residuals(answer).values()) < 0.005


def links(cluster: Cluster, kind: str) -> list:
    return [link for link in cluster.topology.links if link.kind == kind]


def residuals(answer: Answer) -> dict[str, float]:
    """By group, the 90 % quantile that was printed."""
    lines = re.findall(r"^  (\S.*?)  +.*90 % below ([\d.]+)%$", answer.out, re.MULTILINE)
    return {group: float(p90) / 100 for group, p90 in lines}


def test_a_tree_of_pcie_switches_needs_no_formula_of_its_own(run):
    # Two pairs below a switch each: on the ring 0 1 2 3 every link carries one edge, PCIe 4 x16 has 31 GB/s.
    file = write("ar.txt", table("all_reduce", 4, us(6.6, 6 * 2.0, rate_gb_s=12.4, edge=6 / 4)))
    assert run(f"--topo {DATA}/topo_l40s.txt --device l40s --nccl-tests {file} -o my.toml").code == 0
    cluster = load_cluster("my.toml")
    (rate,) = {link.bandwidth_bytes_per_s for link in links(cluster, "pcie")}
    assert rate == pytest.approx(12.4e9, rel=0.005)
    # One kind of collective does not tell base and step apart: the base is NCCL's own.
    assert cluster.communication.collective_base_ns.kind == "vendor"
    assert cluster.communication.collective_base_ns.value == 6600
    assert cluster.communication.collective_step_intra_ns.value == pytest.approx(2000, rel=0.01)


def test_reduction_in_the_switch_is_told_from_the_ring(run):
    # Alone, a ring of 450 GB/s ports could not do it: 1 GiB in 4.0 ms is a busbw of 470 GB/s.
    ring, switch = us(8, 14 * 1.0, rate_gb_s=360, edge=14 / 8), us(8, 20, 2 * 1.0, rate_gb_s=270, edge=1)
    files = [
        write("ar.txt", table("all_reduce", 8, lambda s: min(ring(s), switch(s)))),
        write("ag.txt", table("all_gather", 8, us(8, 7 * 1.0, rate_gb_s=360, edge=7 / 8))),
    ]
    answer = run(f"{H100} --nccl-tests {' '.join(files)} -o my.toml")
    p = load_cluster("my.toml").communication
    assert p.in_switch_reduction_min_ranks is not None
    assert p.in_switch_reduction_min_ranks.value == 8
    assert p.in_switch_base_ns is not None
    assert p.in_switch_base_ns.value == pytest.approx(20000, rel=0.03)
    assert p.in_switch_efficiency is not None
    assert p.in_switch_efficiency.value == pytest.approx(270 / 450, rel=0.01)
    assert p.collective_step_intra_ns.value == pytest.approx(1000, rel=0.03)
    assert max(residuals(answer).values()) < 0.02


def test_a_size_curve_gives_back_a_rate_that_grows_with_the_size(run):
    file = write("ar.txt", table("all_reduce", 8, lambda s: 21 + 14 / 8 * s / 240e3 + (s / 1e3) ** 0.5))
    answer = run(f"--topo {DATA}/topo_half_attached.txt --device a100-sxm-40gb --nccl-tests {file} -o my.toml")
    assert load_cluster("my.toml").communication.size_curve
    assert residuals(answer)["all_reduce, 8 ranks on 1 node"] < 0.05


def test_the_step_between_nodes_and_the_nics_are_found(run):
    """The table is what the model says of a cluster that is known: two nodes, 20 GB/s a NIC, 5 us between nodes."""
    inside = write("in.txt", table("all_reduce", 8, us(6.6, 14 * 1.0, rate_gb_s=360, edge=14 / 8)))
    assert run(f"{RAILS} --nccl-tests {inside} -o start.toml").code == 0
    text = Path("start.toml").read_text()
    text = re.sub(r"(\[links.nic\].*?bandwidth = \{ value = )\"50 GB/s\"", r'\1"20 GB/s"', text, flags=re.DOTALL)
    text = re.sub(r"(\[links.nic\].*?efficiency = \{ value = )[\d.]+", r"\g<1>1.0", text, flags=re.DOTALL)
    text = re.sub(r"(collective_step_inter = \{ value = )\"\d+ ns\"", r'\1"5000 ns"', text)
    cost = CommunicationCost(load_cluster(write("known.toml", text), 2))
    ranks = tuple(range(16))
    across = table(
        "all_reduce", 16, lambda s: cost.alone_ns(cost.collective("all_reduce", ranks, s, "fp32")) / 1e3, hosts=2
    )
    answer = run(f"{RAILS} --nccl-tests {inside} {write('across.txt', across)} -o my.toml")
    found = load_cluster("my.toml", 2)
    assert links(found, "nic")[0].bandwidth_bytes_per_s == pytest.approx(20e9, rel=0.02)
    assert found.communication.collective_step_inter_ns.value == pytest.approx(5000, rel=0.02)
    assert residuals(answer)["all_reduce, 16 ranks on 2 nodes"] < 0.02


def test_messages_alone_leave_collectives_as_they_were_lent(run):
    file = write("sr.txt", table("sendrecv", 8, us(9, rate_gb_s=300, edge=1)))
    assert run(f"{RAILS} --nccl-tests {file} -o my.toml").code == 0
    cluster, lent = load_cluster("my.toml"), load_cluster("dgx-h100").communication
    p = cluster.communication
    assert p.p2p_base_ns.value == pytest.approx(9000, rel=0.01)
    assert p.p2p_efficiency.value == 1
    assert links(cluster, "nvlink")[0].bandwidth_bytes_per_s == pytest.approx(300e9, rel=0.005)
    assert (p.collective_base_ns.value, p.collective_base_ns.kind) == (lent.collective_base_ns.value, "assumed")
    assert p.algorithms == lent.algorithms

    # Between nodes every rank has a NIC of its own, so a message is bound by one: 40 GB/s.
    across = write("across.txt", table("sendrecv", 16, us(20, rate_gb_s=40, edge=1), hosts=2))
    assert run(f"{RAILS} --nccl-tests {file} {across} -o my.toml").code == 0
    found = load_cluster("my.toml", 2)
    assert links(found, "nic")[0].bandwidth_bytes_per_s == pytest.approx(40e9, rel=0.02)
    assert found.communication.collective_step_inter_ns.kind == "assumed"


def test_a_switch_that_did_not_reduce_is_not_said_to(run):
    """Four GPUs say nothing about eight; eight that were no quicker than a ring do."""
    for ranks, algorithms in ((4, True), (8, False)):
        steps = 2 * (ranks - 1)
        file = write("ar.txt", table("all_reduce", ranks, us(8, steps * 1.0, rate_gb_s=360, edge=steps / ranks)))
        assert run(f"{H100} --nccl-tests {file} -o my.toml").code == 0
        assert ("in-switch" in load_cluster("my.toml").communication.algorithms) == algorithms


# ---- published measurements


@pytest.mark.parametrize(
    ("files", "nodes", "topo"), [(["nccl_h100_8.txt"], 1, H100), (["nccl_h100_8.txt", "nccl_h100_2x8.txt"], 2, RAILS)]
)
def test_predictions_miss_a_published_sweep_by_what_was_printed(run, files: list[str], nodes: int, topo: str):
    answer = run(f"{topo} --nccl-tests {' '.join(str(DATA / f) for f in files)} -o my.toml")
    assert answer.code == 0
    (sweep,) = read_sweeps(DATA / files[-1])
    cost = CommunicationCost(load_cluster("my.toml", nodes))
    errors = []
    for row in sweep.rows:
        phases = cost.collective("all_reduce", tuple(range(8 * nodes)), row.size_bytes, "fp32")
        errors.append(abs(cost.alone_ns(phases) / (row.best_us * 1e3) - 1))
    group = f"all_reduce, {8 * nodes} ranks on {nodes} node{'s' if nodes > 1 else ''}"
    found = re.search(rf"{group} +(\d+) sizes, residual median ([\d.]+)%, 90 % below ([\d.]+)%", answer.out)
    assert found is not None
    assert int(found[1]) == len(errors)
    assert float(found[2]) == pytest.approx(100 * median(errors), abs=0.06)
    assert float(found[3]) == pytest.approx(100 * float(np.quantile(errors, 0.9)), abs=0.06)
    # Bandwidth is about large messages: those are met.
    assert max(e for e, r in zip(errors, sweep.rows, strict=True) if r.size_bytes >= 1 << 30) < 0.12
    stored = json.loads(Path("my.import.json").read_text())
    assert stored["residuals"][group]["median"] == pytest.approx(median(errors), abs=1e-4)
    assert {s["source"] for s in stored["samples"]} == set(files)


def test_the_profile_is_shown_compared_and_read_back(run, capsys: pytest.CaptureFixture[str]):
    assert run(f"{H100} --nccl-tests {DATA}/nccl_h100_8.txt -o my.toml").code == 0
    assert main(["hardware", "show", "my.toml", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    shown = {row["name"]: row for row in rows}
    assert shown["collective_step_intra_ns"]["kind"] == "measured"
    assert "nccl_h100_8.txt" in shown["collective_step_intra_ns"]["source"]
    compare = ["compare", "--cluster", "my.toml", "--model", "gpt2-tiny", "--strategies", "ddp,rtp", "--quiet"]
    assert main([*compare, "--format", "json"]) == 0
    assert all(row["step_time_s"] > 0 for row in json.loads(capsys.readouterr().out)["rows"])


def test_a_topology_alone_measures_nothing(run):
    answer = run(f"{RAILS} --nic 200Gb/s -o my.toml")
    assert answer.code == 0
    text = Path("my.toml").read_text()
    assert 'kind = "measured"' not in text
    assert "no transfers were imported" in answer.out.lower()
    (nic,) = {link.raw_bandwidth_bytes_per_s for link in links(load_cluster("my.toml"), "nic")}
    assert nic == 25 * 10**9
    assert not Path("my.import.json").exists()


def test_json_has_the_documented_keys_and_other_gpus_are_noted(run):
    answer = run(f"--topo {DATA}/topo_h100.txt --device a100-sxm-80gb --nccl-tests {DATA}/nccl_h100_8.txt -o my.toml "
                 "--format json")  # fmt: skip
    document = json.loads(answer.out)
    assert list(document) == documented_keys("hardware import")
    assert (document["schema"], document["samples"]) == ("rtp-sim/import/1", 32)
    assert "nccl-tests ran on NVIDIA H100 80GB HBM3; the device profile is a100-sxm-80gb" in document["notes"]


def test_a_device_profile_of_ones_own_is_found_from_the_written_file(run, tmp_path: Path):
    source = Path(__file__).parent.parent / "hardware_profiles" / "devices" / "h100-sxm.toml"
    write("mine.toml", source.read_text(encoding="utf-8"))
    assert run(f"--topo {DATA}/topo_h100.txt --device mine.toml -o my.toml").code == 0
    assert load_cluster("my.toml").device.name == "mine"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{H100} -o my.txt", ["-o my.txt", "ends in .toml"]),
        (f"{H100} -o none/my.toml", ["-o none/my.toml", "directory that exists"]),
        (f"--topo {DATA}/topo_h100.txt --device h100 -o my.toml", ["unknown device 'h100'", "h100-sxm"]),
        (f"{H100} --nic fast -o my.toml", ["fast"]),
        (f"{H100} --like nobody -o my.toml", ["unknown cluster 'nobody'"]),
        (f"{H100} --nccl-tests {DATA}/nccl_h100_2x8.txt -o my.toml", ["ran on 2 nodes", "lists no NICs"]),
        (f"{H100} --nccl-tests {DATA}/topo_h100.txt -o my.toml", ["topo_h100.txt: no table of nccl-tests"]),
        (f"--topo {DATA}/nccl_h100_8.txt --device h100-sxm -o my.toml", ["nccl_h100_8.txt: no line with the columns"]),
        ("--device h100-sxm -o my.toml", ["--topo"]),
    ],
)
def test_bad_requests_are_told_in_one_message(run, line: str, words: list[str]):
    answer = run(line)
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    for word in words:
        assert word in answer.err
    assert not Path("my.toml").exists()
