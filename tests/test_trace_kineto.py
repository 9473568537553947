"""Traces of PyTorch's profiler read, summed up and matched with ops: worked out by hand, in Kineto's form.

Fields as in the public sample tests/data/call_stack/backward_thread.json of facebookresearch/HolisticTraceAnalysis.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import documented_keys

from rtp_sim.cli import main
from rtp_sim.errors import InputError
from rtp_sim.traces.classes import class_of_name, collective_of
from rtp_sim.traces.intervals import length, minus, union
from rtp_sim.traces.kineto import KERNEL, Event, read_trace
from rtp_sim.traces.ops import step_of
from rtp_sim.traces.summary import Busy, RankSummary, summarise

Raw = dict[str, Any]


def event(cat: str, name: str, start: float, dur: float, pid: int = 1, tid: int = 1, **args: Any) -> Raw:
    """One complete event; times in us."""
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": start, "dur": dur, "args": args}


def kernel(name: str, start: float, dur: float, stream: int = 7, correlation: int = 0, **args: Any) -> Raw:
    return event("kernel", name, start, dur, 0, stream, correlation=correlation, stream=stream, **args)


def save(path: Path, events: list[Raw], rank: int | None = 0) -> Path:
    document: Raw = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "NVIDIA H100"}], "traceEvents": events}
    if rank is not None:
        document["distributedInfo"] = {"backend": "nccl", "rank": rank, "world_size": 2}
    text = json.dumps(document).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


# ---- any program


def test_a_device_by_hand(tmp_path: Path):
    events = [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "python"}},
        event("cpu_op", "aten::mm", 0, 5),
        kernel("nvjet_hsh_128x192_64x7_h_bz_TNN", 1000, 100),
        kernel("void at::native::vectorized_elementwise_kernel<4, at::native::GeluFunctor>", 1100, 30),
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 1080, 100, stream=20),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 1200, 10, 0, 7),
        kernel("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", 1210, 50),
        event("gpu_user_annotation", "nccl:all_reduce", 1080, 100, 0, 20),
    ]
    (found,) = summarise([read_trace(save(tmp_path / "t.json.gz", events, rank=3))])
    # Computing 1000 to 1130 and 1200 to 1260, communication 1080 to 1180, the window ends at 1260.
    assert (found.rank, found.kind, found.window_ns) == (3, "device", 260_000)
    assert (found.computing_ns, found.communication_ns) == (190_000, 100_000)
    assert (found.exposed_ns, found.idle_ns, found.hidden) == (50_000, 20_000, 0.5)
    assert found.classes == {
        "matmul": Busy(1, 100_000), "attention": Busy(1, 50_000), "communication": Busy(1, 100_000),
        "memory-bound": Busy(2, 40_000),
    }  # fmt: skip
    assert found.collectives == {"all_reduce": Busy(1, 100_000)}
    assert [(s.device, s.stream, s.busy_ns) for s in found.streams] == [
        ("0 (NVIDIA H100)", "7", 190_000), ("0 (NVIDIA H100)", "20", 100_000),
    ]  # fmt: skip
    assert [k[1:] for k in found.kernels[:3]] == [
        ("communication", 1, 100_000), ("matmul", 1, 100_000), ("attention", 1, 50_000),
    ]  # fmt: skip


def test_the_kernel_of_a_public_sample(tmp_path: Path):
    # Facts of the sample: a product of 45 us on stream 7, launched from aten::mm with correlation 2131433.
    name = "void cutlass::Kernel<cutlass_80_tensorop_s1688gemm_128x128_32x3_nn_align4>"
    events = [
        event("cpu_op", "aten::mm", 1666149715364330, 58, 3914, 24922),
        kernel(name, 1666149715428509, 45, correlation=2131433),
        event("cuda_runtime", "cudaLaunchKernel", 1666149715364374, 10, 3914, 24922, correlation=2131433),
    ]
    (found,) = summarise([read_trace(save(tmp_path / "t.json", events))])
    assert (found.rank, found.window_ns, found.idle_ns) == (0, 45_000, 0)
    assert found.classes == {"matmul": Busy(1, 45_000)}


def test_a_host_counts_every_op_without_those_that_it_calls(tmp_path: Path):
    events = [
        event("cpu_op", "MyStep", 0, 100),
        event("cpu_op", "aten::linear", 10, 50),
        event("cpu_op", "aten::add", 20, 15),
        event("cpu_op", "c10d::allreduce_", 60, 30),
        event("cpu_op", "aten::mm", 70, 40, tid=2),
        event("user_annotation", "gloo:send", 200, 20, tid=3),
        event("user_annotation", "gloo:recv", 210, 20, tid=3),
    ]
    (found,) = summarise([read_trace(save(tmp_path / "t.json", events, rank=None))])
    # Thread 1: MyStep 0-10 and 90-100, linear 10-20 and 35-60, add 20-35, all_reduce 60-90. Two of gloo's overlap.
    assert (found.rank, found.kind, found.window_ns) == (0, "host", 230_000)
    assert found.classes == {
        "matmul": Busy(2, 35_000 + 40_000), "communication": Busy(3, 30_000 + 30_000),
        "memory-bound": Busy(1, 15_000), "other": Busy(1, 20_000),
    }  # fmt: skip
    # Something computes from 0 to 60 and from 70 to 110; communication 60-90 and 200-230.
    assert (found.computing_ns, found.exposed_ns, found.idle_ns) == (100_000, 10_000 + 30_000, 90_000)
    assert found.collectives == {"all_reduce": Busy(1, 30_000), "send/recv": Busy(2, 30_000)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "matmul"),
        ("sm80_xmma_fprop_implicit_gemm_f32f32", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>", "matmul"),
        ("Cijk_Ailk_Bljk_HHS_BH_MT128x128x16", "matmul"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_f16", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("ncclKernel_AllGather_RING_LL_Sum_int8_t", "communication"),
        ("void vllm::cross_device_reduce_1stage<__half, 2>", "communication"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "memory-bound"),
        ("triton_poi_fused_add_mul_0", "memory-bound"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 9, true, false>", "memory-bound"),
        ("_ZN5myops6kernelE", "other"),
    ],
)
def test_classes_of_kernels(name: str, expected: str):
    assert class_of_name(name) == expected


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "", "reduce_scatter"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float", "", "all_reduce"),
        ("ncclDevKernel_AllGather_RING_LL", "_allgather_base", "all_gather"),
        # NCCL does an all-to-all with its kernel for sends and receives; newer profilers say what it was for.
        ("ncclDevKernel_SendRecv", "", "send/recv"),
        ("ncclDevKernel_SendRecv", "all_to_allv", "all_to_all"),
        ("ncclDevKernel_Broadcast_RING_LL", "", "broadcast"),
        ("ncclDevKernel_Reduce_Sum_f32_RING_LL", "", "reduce"),
    ],
)
def test_kinds_of_collectives(name: str, said: str, expected: str):
    assert collective_of(Event(KERNEL, name, ("0", "7"), 0, 1, collective=said)) == expected


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda p: (min(p), max(p))), max_size=8)


@given(SPANS, SPANS)
def test_unions_and_differences_are_those_of_sets_of_moments(a: list[tuple[int, int]], b: list[tuple[int, int]]):
    moments_a, moments_b = ({t for s, e in spans for t in range(s, e)} for spans in (a, b))
    assert length(union(a)) == len(moments_a)
    assert {t for s, e in minus(union(a), union(b)) for t in range(s, e)} == moments_a - moments_b


# ---- our own ops on a device


def clock(ts: float, ahead_ns: int) -> Raw:
    """A reading: the range opens `ahead_ns` later on the profiler's clock than on the rank's."""
    return event("user_annotation", f"rtp-sim clock {round(ts * 1000) - ahead_ns}", ts, 1)


def test_ops_last_from_their_first_to_their_last_kernel(tmp_path: Path):
    events = [
        # The second reading before the step is the quicker one; the clocks drift 1 us in 1000 us.
        clock(0, 5_900), clock(10, 5_000), clock(1010, 6_000), clock(1020, 7_000),
        event("user_annotation", "rtp-sim step 4", 100, 800),
        event("user_annotation", "rtp-sim %0 h0.attn.qkv", 110, 20),
        event("cuda_runtime", "cudaLaunchKernel", 112, 3, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 120, 3, correlation=2),
        event("user_annotation", "rtp-sim %1 grads", 130, 10),
        event("cpu_op", "c10d::allreduce_", 131, 8, **{"External id": 77}),
        event("user_annotation", "rtp-sim %2 nothing", 140, 5),
        kernel("gemm", 210, 50, correlation=1),
        kernel("vectorized_elementwise_kernel", 240, 60, stream=8, correlation=2),
        # Its launch was not recorded: the host's op names it. The next belongs to nobody.
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 310, 100, stream=20, correlation=9, **{"External id": 77}),
        kernel("stray", 500, 10, correlation=10),
    ]  # fmt: skip
    step = step_of(read_trace(save(tmp_path / "t.json", events)))
    assert (step.step, step.clock_error_ns) == (4, 1_000)
    # At time t us of the trace the rank's clock shows t - 5 - (t - 10) / 1000 us.
    assert {i: (o.name, o.start_ns, o.end_ns, o.busy_ns) for i, o in step.ops.items()} == {
        0: ("h0.attn.qkv", 204_800, 294_710, 90_000),
        1: ("grads", 304_700, 404_600, 100_000),
        2: ("nothing", 139_865, 139_865, 0),
    }


def test_two_ops_do_not_share_a_kernel_launched_where_one_ends(tmp_path: Path):
    events = [
        clock(0, 0), clock(1000, 0), event("user_annotation", "rtp-sim step 0", 1, 900),
        event("user_annotation", "rtp-sim %0 a", 10, 10), event("user_annotation", "rtp-sim %1 b", 20, 10),
        event("cuda_runtime", "cudaLaunchKernel", 20, 1, correlation=1),
        kernel("gemm", 100, 10, correlation=1),
    ]  # fmt: skip
    step = step_of(read_trace(save(tmp_path / "t.json", events)))
    assert (step.ops[0].busy_ns, step.ops[1].busy_ns) == (0, 10_000)


# ---- on the command line


def test_trace_prints_tables_and_documented_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for rank in (0, 1):
        save(
            tmp_path / f"r{rank}.json",
            [kernel("gemm", 0, 10), kernel("ncclDevKernel_SendRecv", 10, 10 * rank + 10)],
            rank,
        )
    assert main(["trace", str(tmp_path), "--format", "json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == documented_keys("trace")
    assert document["schema"] == "rtp-sim/trace/1"
    for rank, entry in enumerate(document["ranks"]):
        assert list(entry) == documented_keys("A traced rank")
        assert entry["rank"] == rank
        assert entry["exposed_communication_s"] == pytest.approx((10 * rank + 10) / 1e6)
        parts = entry["computing_s"] + entry["exposed_communication_s"] + entry["idle_s"]
        assert parts == pytest.approx(entry["window_s"])
    assert main(["trace", str(tmp_path / "r1.json"), str(tmp_path / "r0.json")]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("reading") == 2
    assert "20.0 us (66.7 %)" in shown.out
    assert "send/recv" in shown.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"traceEvents": [{"ph": "X", "cat": "kernel"', ["line 1, column", "may be cut off"]),
        (gzip.compress(b'{"traceEvents": []}', mtime=0)[:-6], ["gzip file is cut off or broken"]),
        (b"\x1f\x8bnot gzip", ["t.json"]),
        (b"plain text", ["line 1, column 1"]),
        (b'{"schema": "rtp-sim/run/1", "steps": 3}', ["found keys schema, steps", '"traceEvents"']),
        (b'"text"', ["found str"]),
        (b'{"traceEvents": []}', ["none of the 0 events"]),
        (b'{"traceEvents": [{"ph": "X", "cat": "python_function", "ts": 1, "dur": 1}, 5]}', ["none of the 2 events"]),
        (json.dumps([event("kernel", "k", "soon", 1)]).encode(), ["traceEvents[0] (k): ts is 'soon'"]),  # type: ignore[arg-type]
        (json.dumps([event("kernel", "k", 1, -1)]).encode(), ["traceEvents[0]: dur is -1"]),
        (json.dumps([event("cuda_runtime", "cudaLaunchKernel", 1, 1)]).encode(), ["no kernels and no ops"]),
    ],
)
def test_files_that_are_no_trace_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: list[str]
):
    (tmp_path / "t.json").write_bytes(content)
    assert main(["trace", str(tmp_path / "t.json"), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for word in ("t.json", *words):
        assert word in told


def test_wrong_files_and_ranks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    a, b = (save(tmp_path / f"{name}.json", [kernel("gemm", 0, 1)], 1) for name in "ab")
    for arguments, word in (
        ([tmp_path / "none.json"], "cannot be read: No such file"),
        ([tmp_path / "empty"], "holds no traces"),
        ([a, b], "are both of rank 1"),
        ([a, "--timeline", tmp_path / "t.json"], "expected a single directory"),
    ):
        assert main(["trace", *map(str, arguments), "--quiet"]) == 2
        assert word in capsys.readouterr().err


def test_ranks_that_are_not_said_are_the_places_of_the_files(tmp_path: Path):
    traces = [read_trace(save(tmp_path / f"{i}.json", [kernel("gemm", 0, i + 1)], None)) for i in range(3)]
    found: list[RankSummary] = summarise(traces)
    assert [(r.rank, r.window_ns) for r in found] == [(0, 1000), (1, 2000), (2, 3000)]


STEP = [event("user_annotation", "rtp-sim step 0", 1, 9)]


@pytest.mark.parametrize(
    ("events", "word"),
    [
        ([kernel("gemm", 0, 1)], "0 ranges 'rtp-sim step N'"),
        ([*STEP, *STEP], "2 ranges 'rtp-sim step N'"),
        ([*STEP, clock(0, 0)], "1 readings of the rank's clock"),
        ([*STEP, clock(0, 0), clock(9, 0)], "no ranges of ops"),
        ([*STEP, clock(0, 0), clock(9, 0), *[event("user_annotation", "rtp-sim %3 x", 2, 1)] * 2], "op %3 (x) has two"),
    ],
)
def test_a_trace_without_a_step_of_ours_is_refused(tmp_path: Path, events: list[Raw], word: str):
    with pytest.raises(InputError) as caught:
        step_of(read_trace(save(tmp_path / "t.json", events)))
    assert word in str(caught.value)
