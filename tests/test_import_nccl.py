"""nccl-tests read as text and as JSON: logs as they come, what they mean, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nccl_tables import HEADER, devices, row, table

from rtp_sim.errors import InputError
from rtp_sim.hardware.importers.nccl_json import parse_json
from rtp_sim.hardware.importers.nccl_tests import read_sweeps
from rtp_sim.hardware.importers.nccl_text import parse_text
from rtp_sim.hardware.importers.sweeps import Row, Sweep, busbw_factor
from rtp_sim.importing.samples import imported

DATA = Path(__file__).parent / "data" / "imports"


def one(text: str, name: str = "run.txt") -> Sweep:
    (found,) = parse_text(text, name)
    return found


# ---- text


def test_a_published_sweep_of_one_node():
    (found,) = read_sweeps(DATA / "nccl_h100_8.txt")
    # No program is named: 2 (n - 1) / n of the busbw says all_reduce.
    assert (found.kind, found.ranks, found.hosts, found.gpu) == ("all_reduce", 8, ("node-a",), "NVIDIA H100 80GB HBM3")
    assert len(found.rows) == 32
    assert found.rows[2] == Row(18, 32, "float", 68.14, 13.52)
    assert found.rows[2].best_us == 13.52
    assert found.rows[-1] == Row(47, 17179869184, "float", 62648.0, 62636.0)


def test_a_published_log_of_two_nodes_with_prose_around_it():
    (found,) = read_sweeps(DATA / "nccl_h100_2x8.txt")
    assert (found.kind, found.ranks, found.hosts) == ("all_reduce", 16, ("node-a", "node-b"))
    assert [d.device for d in found.devices] == [*range(8), *range(8)]
    assert (found.rows[0].size_bytes, found.rows[-1].out_of_place_us) == (8, 47535.0)
    samples, notes = imported([found], gpus=8)
    assert {s.nodes for s in samples} == {2}
    assert samples[-1].sample.times_ns == (47535000,)
    assert notes == []


def test_several_runs_in_one_log_with_warnings_and_prefixes_between():
    log = (
        table("all_gather", 4, lambda s: 10 + s / 1e5, sizes=(8, 1 << 20))
        + "[host:1] NCCL WARN Call to ibv_reg_mr failed\n"
        + table("sendrecv", 2, lambda s: 5 + s / 1e5, sizes=(8, 1 << 26, 1 << 27)).replace("\n", "\n[1,0]<stdout>:")
    )  # fmt: skip
    log = log.replace(f"{1 << 20} {1 << 18} float", f"node-0:12:99 [0] NCCL WARN message\n{1 << 20} {1 << 18} float")
    first, second = parse_text("\x1b[32m" + log, "log")
    assert (first.kind, first.ranks, [r.size_bytes for r in first.rows]) == ("all_gather", 4, [8, 1 << 20])
    assert (second.kind, second.ranks, [r.size_bytes for r in second.rows]) == ("sendrecv", 2, [8, 1 << 26, 1 << 27])


def test_versions_with_fewer_and_with_more_columns():
    old = "\n".join([
        "alltoall_perf -b 1M", devices(2),
        "#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error",
        "     1048576        131072   float            20.00   52.43   26.21  0e+00    21.00   49.93   24.97    N/A",
    ])  # fmt: skip
    assert one(old).rows == (Row(5, 1048576, "float", 20.0, 21.0),)
    spread = "i_min i_max i_p99 i_cv%"
    new = "\n".join([
        "all_reduce_perf", devices(2),
        f"# size count type redop root time algbw busbw #wrong {spread} time algbw busbw #wrong {spread} timestamp",
        "1048576 262144 float sum -1 20.0 52.43 52.43 0 19 22 22 1.5 21.0 49.93 49.93 0 19 22 22 1.5 "
        "2026-01-02 03:04:05",
    ])  # fmt: skip
    assert one(new).rows == (Row(5, 1048576, "float", 20.0, 21.0),)
    in_place = f"all_reduce_perf\n{devices(2)}\n{HEADER}\n1048576 262144 float sum -1 21.0 49.93 49.93 N/A\n"
    assert one(in_place).rows == (Row(6, 1048576, "float", None, 21.0),)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("all_reduce", 14 / 8), ("all_gather", 7 / 8), ("reduce_scatter", 7 / 8), ("alltoall", 7 / 8), ("sendrecv", 1.0),
     ("broadcast", 1.0), ("reduce", 1.0)],
)  # fmt: skip
def test_busbw_as_nccl_tests_define_it(kind: str, factor: float):
    assert busbw_factor(kind, 8) == factor


def test_the_collective_follows_from_program_bandwidth_or_file_name():
    def headless(kind: str, redop: str = "sum") -> str:
        line = row(kind, 8, 1 << 30, 5000.0).replace("sum", redop)
        return f"{devices(8)}\n{HEADER}\n{line}\n"

    assert one(headless("all_reduce")).kind == "all_reduce"
    assert one(headless("reduce_scatter")).kind == "reduce_scatter"
    assert one(headless("all_gather", "none"), "1_2_LOG_all_gather_env1.txt").kind == "all_gather"
    assert one(headless("sendrecv"), "sendrecv.log").kind == "sendrecv"
    with pytest.raises(InputError, match="line 10: nothing says which collective"):
        one(headless("all_gather", "none"))


@pytest.mark.parametrize(("algbw", "busbw", "ranks"), [(239.74, 449.51, 16), (297.16, 586.06, 72), (203.01, 405.74, 0)])
def test_ranks_that_are_not_listed_follow_from_the_busbw_or_stay_open(algbw: float, busbw: float, ranks: int):
    # 2 (n - 1) / n = busbw / algbw; for the last one 1,440 ranks and its neighbours round alike.
    found = one(
        f"all_reduce_perf\n{HEADER}\n1073741824 268435456 float sum -1 4478.8 {algbw} {busbw} 0 4478.8 1 1.9 0\n"
    )
    assert (found.ranks, found.devices) == (ranks, ())


RUN = table("all_reduce", 8, lambda s: 20 + s / 1e5, sizes=(8, 1 << 30))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing here\n", ["run.txt: no table of nccl-tests in 1 lines"]),
        (RUN.split("\n8 ")[0], ["line 15", "the table has no rows"]),
        (RUN.replace("-1 10757.42", "-1 oops"), ["line 17", "time is 'oops'", "expected a number"]),
        (RUN.replace(" 0 20.00", " 3 20.00"), ["line 16", "#wrong is 3"]),
        (RUN.replace("-1 20.00", "-1 0.00"), ["line 16", "time is 0.00"]),
        (RUN.split("# Out")[0][:-40], ["line 17", "the line may be cut off"]),
        (RUN.replace("time ", "cputime "), ["line 15", "of the CPU (-C)"]),
        (RUN.replace("Group  0 Pid 107", "Group  1 Pid 107"), ["Group 1", "NCCL_TESTS_SPLIT"]),
        # 16 ranks are listed where busbw says 8.
        (RUN.replace(devices(8), devices(16)), ["1.750 x algbw", "expected 1.875 for all_reduce among the 16"]),
    ],
)  # fmt: skip
def test_text_that_makes_no_sense_is_refused(text: str, words: list[str]):
    with pytest.raises(InputError) as caught:
        parse_text(text, "run.txt")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "gpus", "words"),
    [
        (RUN, 4, ["8 on node-0", "at most the node's 4 GPUs"]),
        (RUN.replace("on node-0 device  7", "on node-1 device  7"), 8, ["7 on node-0, 1 on node-1", "as many on each"]),
        (RUN.replace(devices(8), ""), 4, ["8 ranks by their busbw", "no line says which host"]),
        (RUN.replace(devices(8), "").replace(f"{1 << 30} ", "-- "), 8, ["the ranks are not listed"]),
    ],
)  # fmt: skip
def test_sweeps_that_cannot_have_run_on_the_node_are_refused(text: str, gpus: int, words: list[str]):
    with pytest.raises(InputError) as caught:
        imported(parse_text(text, "run.txt"), gpus)
    for word in words:
        assert word in str(caught.value)


def test_what_the_model_has_no_word_for_is_noted():
    text = table("all_gather", 4, lambda s: 10.0, sizes=(1 << 30,)).replace("all_gather", "hypercube")
    samples, notes = imported(parse_text(text, "dir/run.txt"), 8)
    assert samples == []
    assert notes == ["hypercube is not part of the model: not used (run.txt)"]


# ---- JSON, as src/util.cu of nccl-tests writes it


def document(**changes: Any) -> dict[str, Any]:
    """Two processes of four GPUs each on two hosts: each process lists its first device only."""
    entry = {"group": 0, "pid": 1, "device": 0, "device_hex": "0000:19:00", "device_info": "NVIDIA H100 80GB HBM3"}
    busbw = 1048576 / 40.0 / 1e3 * 14 / 8
    measured = {"time": 40.0, "alg_bw": 1048576 / 40.0 / 1e3, "bus_bw": busbw, "nwrong": 0.0}
    return {
        "version": 2, "args": ["./build/all_reduce_perf", "-g", "4"], "nccl_version": 22809,
        "config": {
            "nthreads": 1, "ngpus": 4,
            "devices": [{"rank": 4 * h, "hostname": f"h{h}", **entry} for h in (0, 1)],
        },
        "results": [
            {"size": 1048576, "count": 262144, "type": "float", "redop": "sum", "root": "    -1",
             "out_of_place": {**measured, "time": 41.0}, "in_place": {**measured, "nwrong": None}},
            {"size": 8, "count": 2, "type": "float", "redop": "sum", "root": "    -1", "out_of_place": None,
             "in_place": {"time": 13.5, "alg_bw": 0.000593, "bus_bw": 0.001037, "nwrong": None}},
        ],
    } | changes  # fmt: skip


def test_json_counts_the_devices_that_a_process_does_not_list(tmp_path: Path):
    (tmp_path / "r.json").write_text(json.dumps(document()))
    (found,) = read_sweeps(tmp_path / "r.json")
    assert (found.kind, found.ranks, found.hosts) == ("all_reduce", 8, ("h0", "h1"))
    assert [(d.rank, d.host, d.device) for d in found.devices][3:5] == [(3, "h0", 3), (4, "h1", 0)]
    assert found.rows == (Row(1, 1048576, "float", 41.0, 40.0), Row(2, 8, "float", None, 13.5))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The document with one entry replaced."""
    found = document()
    *way, last = path.split(".")
    at: Any = found
    for key in way:
        at = at[int(key)] if key.isdigit() else at[key]
    at[int(last) if last.isdigit() else last] = value
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(document())[:300], ["line 1, column", "may be cut off"]),
        (json.dumps({"traceEvents": []}), ["found traceEvents", '"config" and "results"']),
        (json.dumps([1]), ["found list"]),
        (json.dumps(document(results=[])), ["results is empty"]),
        (json.dumps(document(config={})), ['"config" has no "devices"']),
        (json.dumps(changed("config.ngpus", 0)), ["ngpus 0"]),
        (json.dumps(changed("config.devices.1.group", 1)), ["config.devices[1] is of group 1"]),
        (json.dumps(changed("config.devices.1", {"rank": 1})), ["config.devices[1]", "hostname"]),
        (json.dumps(changed("results.0.size", "big")), ["results[0]: size is 'big'"]),
        (json.dumps(changed("results.0.in_place", {"cpu_time": 1.0})), ["results[0]: in_place", "-C"]),
        (json.dumps(changed("results.0.out_of_place.nwrong", 5.0)), ["results[0]: out_of_place has 5 wrong values"]),
        (json.dumps(changed("results.0.out_of_place.time", "nan")), ["results[0]: out_of_place is"]),
        (json.dumps(changed("results.1.in_place", None)), ["results[1]: neither out_of_place nor in_place"]),
        (json.dumps(changed("config.ngpus", 8)), ["1.750 x algbw", "among the 16 ranks"]),
    ],
)  # fmt: skip
def test_json_that_makes_no_sense_is_refused(text: str, words: list[str]):
    with pytest.raises(InputError) as caught:
        parse_json(text, "r.json")
    for word in ("r.json", *words):
        assert word in str(caught.value)
