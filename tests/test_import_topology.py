"""`nvidia-smi topo -m` read and turned into wiring: real outputs, against profiles that ship and hand counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_hardware_topology import CUBE_MESH

from rtp_sim.errors import InputError
from rtp_sim.hardware.importers.node_tree import HubWires, NodeTree, node_tree
from rtp_sim.hardware.importers.topo_matrix import parse_topo, read_topo
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.importing.draft import first_draft

DATA = Path(__file__).parent / "data" / "imports"


def tree(name: str) -> NodeTree:
    return node_tree(read_topo(DATA / name))


def cluster(name: str, device: str) -> Cluster:
    return first_draft(tree(name), device, name, None, None).cluster()


def cells(*rows: str, header: str = "") -> str:
    """A matrix of GPUs without anything around it."""
    columns = header or " ".join(f"GPU{i}" for i in range(len(rows)))
    return "\n".join([columns, *(f"GPU{i} {row}" for i, row in enumerate(rows))])


# ---- machines


def test_dgx1_has_the_links_and_ports_of_the_profile_that_ships():
    found, known = cluster("topo_dgx1.txt", "v100-sxm2-32gb"), load_cluster("dgx-1-v100")
    assert {(a, b): n for a, b, n in tree("topo_dgx1.txt").pairs} == {
        (a, b): CUBE_MESH[a][b] for a in range(8) for b in range(a + 1, 8) if CUBE_MESH[a][b]
    }
    mine, theirs = found.topology.template, known.topology.template
    assert mine.direct_count == theirs.direct_count
    # The NICs are listed in another order (mlx5_0, _2, _1, _3): GPU pairs use the one on their own switch.
    assert [tree("topo_dgx1.txt").nics[p][0] for p in mine.port_of_gpu] == [
        "mlx5_0", "mlx5_0", "mlx5_1", "mlx5_1", "mlx5_2", "mlx5_2", "mlx5_3", "mlx5_3",
    ]  # fmt: skip
    for a in range(8):
        for b in range(8):
            assert len(mine.route(a, b)) == len(theirs.route(a, b)) + (
                1 if not CUBE_MESH[a][b] and a // 4 != b // 4 else 0
            )


def test_dgx_a100_deals_its_nics_as_the_profile_that_ships():
    found = tree("topo_dgx_a100.txt")
    assert found.switch_links == 12
    assert found.left_out == ("mlx5_4", "mlx5_5", "mlx5_10", "mlx5_11")
    assert found.nics == tuple(
        (f"mlx5_{i}", f"bridge{k}") for i, k in zip((0, 1, 2, 3, 6, 7, 8, 9), (0, 0, 1, 1, 2, 2, 3, 3), strict=True)
    )
    made = cluster("topo_dgx_a100.txt", "a100-sxm-80gb").topology.template
    assert made.port_of_gpu == load_cluster("dgx-a100-80g").topology.template.port_of_gpu == tuple(range(8))


def test_rails_give_every_gpu_its_own_nic_and_sockets_join():
    found = tree("topo_rail.txt")
    assert found.nics == tuple((f"mlx5_{i + 1}", f"pcie{i}") for i in range(8))
    assert found.hubs[-3:] == (
        HubWires("numa0", ("host0", "host1", "host2", "host3"), "node"),
        HubWires("numa1", ("host4", "host5", "host6", "host7"), "node"),
        HubWires("smp0", ("numa0", "numa1"), "socket"),
    )
    assert cluster("topo_rail.txt", "h100-sxm").topology.template.port_of_gpu == tuple(range(8))


def test_gpus_without_a_near_nic_share_those_of_the_other_socket():
    found = tree("topo_half_attached.txt")
    assert found.left_out == ()
    assert found.nics == (("mlx5_0", "bridge0"), ("mlx5_1", "bridge0"), ("mlx5_2", "bridge1"), ("mlx5_3", "bridge1"))
    ports = cluster("topo_half_attached.txt", "a100-sxm-40gb").topology.template.port_of_gpu
    assert ports[:4] == (0, 1, 2, 3)
    assert sorted(ports) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pcie_only_pairs_below_switches():
    assert tree("topo_l40s.txt").hubs == (
        HubWires("pcie0", ("gpu0", "gpu1"), "pcie"),
        HubWires("pcie1", ("gpu2", "gpu3"), "pcie"),
        HubWires("host0", ("pcie0",), "pcie"),
        HubWires("host1", ("pcie1",), "pcie"),
        HubWires("numa0", ("host0", "host1"), "node"),
    )
    topology = cluster("topo_l40s.txt", "l40s").topology
    assert [len(topology.route(0, b).links) for b in (1, 2, 3)] == [2, 6, 6]


def test_old_drivers_say_soc_and_a_lonely_nic_has_its_own_host_bridge():
    found = tree("topo_old_driver.txt")
    assert found.nics == (("mlx5_0", "host1"),)
    assert HubWires("bridge0", ("pcie0", "pcie1"), "pcie") in found.hubs
    assert found.hubs[-1] == HubWires("smp0", ("host0", "host1"), "socket")


@pytest.mark.parametrize(
    ("gpus", "links", "switch"),
    [(8, 18, 18), (8, 12, 12), (16, 6, 6), (4, 12, 12), (4, 4, 0), (4, 6, 0), (4, 2, 0), (3, 12, 12), (2, 12, 0)],
)
def test_links_end_at_a_switch_where_a_gpu_has_not_enough_for_all_pairs(gpus: int, links: int, switch: int):
    rows = [" ".join("X" if a == b else f"NV{links}" for b in range(gpus)) for a in range(gpus)]
    found = node_tree(parse_topo(cells(*rows), "t"))
    assert (found.switch_links, len(found.pairs)) == (switch, 0 if switch else gpus * (gpus - 1) // 2)


# ---- what surrounds a matrix


def test_colours_prompts_and_another_equal_node_are_passed_over():
    text = cells("X NV4", "NV4 X")
    plain = parse_topo(text, "t")
    dressed = "root@a:~# nvidia-smi topo -m\r\n\x1b[4m" + text.replace("GPU1", "\x1b[1mGPU1\x1b[0m").replace(
        "\n", "\r\n"
    )
    assert parse_topo(f"{dressed}\n\nLegend:\n\n  X    = Self\n\n{text}\n", "t") == plain
    assert plain.nvlinks(0, 1) == 4


def test_numa_and_affinity_follow_the_cells():
    text = cells("X SYS 0-7 0 N/A", "SYS X 8-15 1 N/A", header="GPU0 GPU1 CPU Affinity NUMA Affinity GPU NUMA ID")
    found = parse_topo(text, "t")
    assert (found.numa, found.affinity) == ((0, 1), ("0-7", "8-15"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello\n", ["topo.txt: no line with the columns GPU0", "nvidia-smi topo -m"]),
        ("", ["no line with the columns", "0 lines"]),
        (cells("X NV4", "NV4 X").rsplit("\n", 1)[0], ["row of GPU1 is missing below line 1", "each of 2 GPUs"]),
        (cells("X NV4", "NV4"), ["line 3", "row of GPU1 has 1 cells", "expected 2"]),
        (cells("X OK", "OK X"), ["line 2", "GPU0 to GPU1 is 'OK'", "NV#, PIX, PXB, PHB, NODE, SYS"]),
        (cells("PIX PIX", "PIX X"), ["line 2", "GPU0 to GPU0 is 'PIX'", '"X" between a device and itself']),
        (cells("X NV4", "PIX X"), ["GPU0 to GPU1 is NV4, GPU1 to GPU0 is PIX"]),
        (cells("X NV4", "NV4 X", header="GPU0 GPU2"), ["line 1", "columns GPU0 GPU2", "GPU0, GPU1"]),
        (cells("X PIX", "PIX X") + "\n" + cells("X SYS", "SYS X"), ["line 4", "second matrix", "line 1"]),
        ("====== ROCm System Management Interface ======\n", ["line 1", "AMD's rocm-smi"]),
        ("  GPU0 GPU1\nGPU0 0 XGMI\nGPU1 XGMI 0\n", ["line 2", "AMD's rocm-smi"]),
        ("         GPU 0/0|GPU 1/0|CPU Affinity\nGPU 0/0 |S |XL4 |0-31\n", ["line 1", "Intel's xpu-smi"]),
    ],
)
def test_what_is_no_matrix_is_refused(tmp_path: Path, text: str, words: list[str]):
    path = tmp_path / "topo.txt"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_topo(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.txt: cannot be read: No such file"):
        read_topo(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="it is not text"):
        read_topo(tmp_path / "binary")
