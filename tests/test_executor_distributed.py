"""Schedules on real gloo processes against the reference interpreter, the simulator's counts, and values by hand.

Each case runs twice in the same processes: in double precision for two steps, whose losses, gradients and weights must
be those of the reference interpreter (a single process, no torch.distributed), and in the precision of the schedule, of
which traffic, memory and timeline are looked at.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from executor_helpers import Case, prepared, work_off
from executor_shared import exchanges, parcel, transfers
from schedule_helpers import Row, kernel, program, shift
from strategy_helpers import FlatCost, build, stack

from rtp_sim.engine.longest_path import longest_path
from rtp_sim.engine.memory import memory_profiles
from rtp_sim.executor.batches import random_batch
from rtp_sim.executor.collect import collect
from rtp_sim.executor.compare import gradient_errors
from rtp_sim.executor.dense import dense_loss
from rtp_sim.executor.distributed import ordered_after, touched_after
from rtp_sim.executor.machine import Machine, replicas
from rtp_sim.executor.parameters import Parameters, Share, assembled, initial_parameters
from rtp_sim.executor.reference import ReferenceResult, combine, run_reference, run_step
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import Record, RunDirectory
from rtp_sim.metrics import communication_totals
from rtp_sim.model.layers import Activation, Linear
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Collective, Compute, Recv
from rtp_sim.timeline import Timeline
from rtp_sim.timeline_file import load_timeline

HIDDEN = (("rtp_hide_gradient_hop", True),)
CLIPPED = (("clip_norm", 0.5),)
SCALED = (*CLIPPED, ("loss_scale", "dynamic"))
CASES = (
    Case("rtp", "rtp", 4),
    Case("rtp-hidden-hop", "rtp", 4, options=HIDDEN, optimizer="sgd-momentum"),
    Case("rtp-inplace", "rtp-inplace", 4, options=(("rtp_chunk_bytes", 12_000),)),
    Case("two-level", "rtp", 4, dims=(2, 2)),
    Case("rtp-dp", "rtp", 2, dp=2, micros=2),
    Case("fsdp", "fsdp", 4, micros=2),
    Case("zero1", "zero1", 4),
    Case("zero2", "zero2", 4, micros=2),
    Case("ddp", "ddp", 4),
    Case("tp", "tp", 4),
    Case("tp-sp", "tp-sp", 4),
    # Three ranks: 4 heads, 64 features, 256 words and 16 tokens split unevenly.
    Case("rtp-uneven", "rtp", 3, micros=2),
    Case("rtp-inplace-uneven", "rtp-inplace", 3, options=(("rtp_chunk_bytes", 12_000),)),
    Case("fsdp-uneven", "fsdp", 3),
    Case("tp-sp-uneven", "tp-sp", 3),
    Case("rtp-pair", "rtp", 2, options=HIDDEN),
    Case("pipeline-tp", "1f1b", 2, pp=2, micros=3, options=(("sequence_parallel", True),)),
    Case("pipeline-dp", "1f1b", 1, dp=2, pp=2, micros=2, options=(("dp_sync", "zero1"),)),
    Case("pipeline-pair", "zb-h1", 1, pp=2, micros=4),
    Case("zero1-pair", "zero1", 2),
    # What real steps add: clipping, a loss scale, dropout.
    Case("rtp-dp-clipped", "rtp", 2, dp=2, micros=2, options=(("dp_sync", "zero1"),), changes=SCALED),
    Case("fsdp-clipped", "fsdp", 3, micros=2, changes=SCALED),
    Case("tp-sp-dropout", "tp-sp", 3, changes=CLIPPED, dropout=0.2),
    Case("rtp-dropout", "rtp", 3, changes=(*SCALED, ("recompute", "full")), dropout=0.2),
    Case("ddp-clipped", "ddp", 2, changes=CLIPPED),
    Case("rtp-recomputed", "rtp", 3, micros=2, recompute="full"),
)
# From 2^26 on, fp16 gradients overflow until the scale has come down.
OVERFLOWING = Case("overflowing", "zero2", 2, changes=(("precision", "fp16"), ("loss_scale", f"dynamic:{2**26}")))
EVALUATIONS = tuple(
    Case(f"{strategy}-eval{k}", strategy, n, options=(("eval_passes", k),))
    for strategy, n in (("rtp", 2), ("rtp-inplace", 3))
    for k in range(1, n + 2)
)
"""1 to n + 1 forward passes, each case run for two steps: the second begins where the first left the weights."""

WIDE = stack([Activation("relu", 2048), Linear(2048, 2049)], input_numel=2048)
"""On two ranks a shard of 2048 x 1024 weights and 1024 biases: more than 8 MiB in fp32."""

TURNS = 20
STEPS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, on three sets of processes."""
    torch.set_num_threads(1)  # for the reference: its tensors are small, and cores are few
    path = tmp_path_factory.mktemp("runs")
    for ranks in (2, 3, 4):
        jobs: list[dict[str, object]] = []
        for case in (c for c in CASES if c.ranks == ranks):
            exact = prepared(path / f"{case.name}.exact", case, steps=STEPS, warmup=0, float_dtype="fp64",
                             save_tensors=True)  # fmt: skip
            memory = prepared(path / f"{case.name}.shm", case, steps=STEPS, warmup=0, float_dtype="fp64",
                              save_tensors=True, transport="shm")  # fmt: skip
            own = prepared(path / case.name, case, steps=3, warmup=1)
            seen = {"partners": str(path / f"{case.name}.partners")} if case.dp > 1 else {}
            jobs += [{"run": str(exact.path)} | seen, {"run": str(memory.path)}, {"run": str(own.path)}]
        for case in (c for c in EVALUATIONS if c.n == ranks):
            run = prepared(path / case.name, case, steps=STEPS, warmup=0, float_dtype="fp64")
            jobs.append({"run": str(run.path)})
        jobs.append({"shared": str(path / f"shared{ranks}")})
        if ranks == 3:
            jobs.append({"moves": str(path / "moves")})
        if ranks == 2:
            for strategy in ("rtp", "rtp-inplace"):
                run = RunDirectory(path / f"wide-{strategy}")
                spec = TrainingSpec(1, 1, precision="fp32", optimizer="sgd")
                schedule = build(strategy, WIDE, 2, spec, rtp_chunk_bytes=1_000_000)
                run.prepare(schedule, RunRequest(WIDE, spec, steps=TURNS, warmup=0, save_tensors=True))
                jobs.append({"run": str(run.path)})
            shifted = prepared(path / "shifted", Case("shifted", "zero1", 2), steps=1, warmup=0)
            jobs.append({"run": str(shifted.path), "shift_ns": 5_000_000_000})
            overflowing = prepared(path / "overflowing", OVERFLOWING, steps=14, warmup=1, check=True)
            jobs.append({"run": str(overflowing.path)})
        work_off(jobs, ranks, path)
    return path


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def result_of(path: Path) -> Record:
    run = RunDirectory(path)
    return collect(run, *run.load())


def reference(case: Case) -> ReferenceResult:
    schedule, training = case.schedule(), case.training
    batches = [
        [random_batch(case.network, 2, case.micros, replica, step) for replica in range(replicas(schedule))]
        for step in range(STEPS)
    ]
    return run_reference(schedule, case.network, training, initial_parameters(case.network), batches)


def saved(path: Path, what: str) -> list[list[Share]]:
    ranks = sorted((path / "ranks").iterdir(), key=lambda p: int(p.name))
    return [torch.load(rank / "tensors.pt", weights_only=False)[what] for rank in ranks]


def assert_close(ours: Parameters, expected: Parameters, atol: float = 1e-12) -> None:
    assert ours.keys() == expected.keys()
    for layer, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours[layer][name], tensor, rtol=1e-10, atol=atol, msg=f"{layer}.{name}")


# ---- the same numbers


def test_losses_gradients_and_weights_are_those_of_the_reference(runs: Path, case: Case):
    expected = reference(case)
    network = expected.machines[0].network
    for path in (runs / f"{case.name}.exact", runs / f"{case.name}.shm"):
        assert result_of(path)["loss"] == pytest.approx(expected.losses, rel=1e-12)
        assert_close(assembled(case.schedule(), network, saved(path, "gradients")), expected.gradients)
        # Where a gradient is zero but for rounding (biases of keys), Adam divides one rounding error by another.
        assert_close(assembled(case.schedule(), network, saved(path, "weights")), expected.parameters, atol=1e-10)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_shared_memory_moves_what_the_reference_moves(runs: Path, n: int):
    """Collectives of every kind, dtype and two sizes, shifts and sends, twice, without and with an emulated link."""
    found = [torch.load(f"{runs}/shared{n}.{rank}") for rank in range(n)]
    expected: list[list[torch.Tensor]] = [[] for _ in range(n)]
    for op in exchanges(n).programs[0].ops:
        if isinstance(op.action, Collective):
            parcels = [parcel(op, n, rank) for rank in range(n)]
            combine(parcels)
            for received, p in zip(expected, parcels, strict=True):
                received.append(p.receive)
        else:
            # What a receive brings is what the op after it, a send, takes away.
            after = exchanges(n).programs[0].ops[op.index + 1] if isinstance(op.action, Recv) else op
            sent = [transfers(after, n, rank) for rank in range(n)]
            for rank in range(n):
                for j, t in enumerate(transfers(op, n, rank)):
                    expected[rank].append(sent[t.source][j].send if t.receive.numel() else t.receive)
    for rank in range(n):
        assert len(found[rank]) == 4 * len(expected[rank]) > 0
        for ours, theirs in zip(found[rank], 4 * expected[rank], strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_copies_of_a_parameter_and_its_gradient_are_the_same_bits_on_all_ranks(runs: Path):
    """Norms and positions after two steps, on ranks with data of their own."""
    for name in ("rtp", "rtp-inplace", "rtp-uneven", "two-level", "tp", "tp-sp"):
        for what in ("weights", "gradients"):
            everyone = saved(runs / f"{name}.exact", what)
            copies = [[s for s in shares if not any(h.split for h in s.holds)] for shares in everyone]
            # Two norms per block, one at the end; positions.
            assert len(copies[0]) == 6
            for others in copies[1:]:
                assert [s.holds for s in others] == [s.holds for s in copies[0]]
                assert all(torch.equal(a.content, b.content) for a, b in zip(copies[0], others, strict=True)), name


@pytest.mark.parametrize("case", EVALUATIONS, ids=lambda case: case.name)
def test_evaluation_passes_give_the_losses_of_their_batches(runs: Path, case: Case):
    """k = 1 ... n + 1 passes on every rank, and once more."""
    network, k = case.network, dict(case.options)["eval_passes"]
    assert isinstance(k, int)
    parameters = {n: {p: t.double() for p, t in ps.items()} for n, ps in initial_parameters(network).items()}
    ops = len(case.schedule().programs[0].ops)
    for rank in range(case.n):
        found = [record["loss"] for record in RunDirectory(runs / case.name).read_steps(rank, ops)[0]]
        for step in range(STEPS):
            batches = random_batch(network, 2, k, rank, step)
            expected = sum(float(dense_loss(network, parameters, batch, 2)) for batch in batches) / k
            assert found[step] == pytest.approx(expected, rel=1e-12)


def test_a_large_shard_in_place_gives_the_bits_of_out_of_place(runs: Path):
    """Shards of 8 MiB through a buffer of 1 MB, 20 steps: losses of every step and weights after the last."""
    assert 2048 * 1024 * 4 >= 8 << 20
    out, inplace = (result_of(runs / f"wide-{s}") for s in ("rtp", "rtp-inplace"))
    assert len(set(out["loss"])) == TURNS
    assert out["loss"] == inplace["loss"]
    for a, b in zip(saved(runs / "wide-rtp", "weights"), saved(runs / "wide-rtp-inplace", "weights"), strict=True):
        assert torch.equal(a[-1].content, b[-1].content)


def test_rings_keep_to_themselves(runs: Path):
    """Two rings of two ranks: no hop leaves its ring."""
    found = [json.loads(Path(f"{runs}/rtp-dp.partners.{rank}").read_text(encoding="utf-8")) for rank in range(4)]
    assert found == [[1], [0], [3], [2]]
def test_norms_are_those_of_the_reference(runs: Path, case: Case):
    """Per step; none where the schedule measures none. Every rank has the same."""
    norms = result_of(runs / f"{case.name}.exact")["grad_norm"]
    assert norms == [None if n is None else pytest.approx(n, rel=1e-12) for n in reference(case).grad_norms]
    assert (None in norms) == (not case.changes)


def test_ranks_leave_out_the_same_updates(runs: Path):
    """Every step of fp16 training is as the reference interpreter has it: scale, left out or not. The check takes place
    in the first step that updates."""
    schedule, steps = OVERFLOWING.schedule(), 15
    batches = [[random_batch(OVERFLOWING.network, 2, 1, r, s) for r in range(2)] for s in range(steps)]
    machines = [
        Machine(schedule, r, OVERFLOWING.network, OVERFLOWING.training, initial_parameters(OVERFLOWING.network))
        for r in range(2)
    ]
    expected = []
    for step in batches:
        scale = machines[0].watch.scale
        run_step(schedule, machines, step)
        expected.append((scale, machines[0].watch.skipped))
    result = result_of(runs / "overflowing")
    assert list(zip(result["loss_scale"], result["skipped"], strict=True)) == expected
    assert 2 <= sum(result["skipped"]) < 12
    assert result["check"]["passed"], result["check"]
    for rank in range(2):
        records, _ = RunDirectory(runs / "overflowing").read_steps(rank, len(schedule.program(rank).ops))
        assert [(r["loss_scale"], r["skipped"]) for r in records] == expected


# ---- the same traffic, memory and ops


def test_bytes_and_messages_are_those_of_the_simulator(runs: Path, case: Case):
    schedule, result = case.schedule(), result_of(runs / case.name)
    totals = [communication_totals(schedule, rank) for rank in range(schedule.world_size)]
    assert result["bytes_sent"] == [size for size, _, _ in totals]
    assert result["messages"] == [count for _, count, _ in totals]


def test_the_timeline_has_the_ops_of_the_schedule_and_keeps_their_order(runs: Path, case: Case):
    result_of(runs / case.name)
    timeline, schedule = load_timeline(runs / case.name / "measured.json"), case.schedule()
    assert timeline.kind == "measured"
    assert timeline.schedule == schedule
    for rank in range(schedule.world_size):
        spans = timeline.spans(rank)
        assert [span.op for span in spans] == list(schedule.program(rank).ops)
        assert min(span.start_ns for span in spans) >= 0
        ends: dict[str, int] = {}
        for span in spans:
            assert span.end_ns >= span.start_ns
            # Ops of one stream follow one another, and those in `after` come before.
            assert span.start_ns >= ends.get(span.op.stream, 0), span.op.name
            ends[span.op.stream] = span.end_ns
            assert all(spans[i].end_ns <= span.start_ns for i in span.op.after), span.op.name


def test_a_step_lasts_as_long_as_its_timeline(runs: Path, case: Case):
    result = result_of(runs / case.name)
    timeline = load_timeline(runs / case.name / "measured.json")
    times = result["step_times_ns"]
    assert len(times) == 3
    assert result["median_step_time_ns"] == sorted(times)[1] == times[result["timeline_step"] - 1]
    # The last op ends a little before the interpreter has noticed.
    assert 0.5 * sorted(times)[1] < timeline.step_time_ns <= sorted(times)[1]


def test_communication_overlaps_with_compute_where_the_schedule_lets_it(runs: Path):
    result_of(runs / "rtp-pair")
    timeline = load_timeline(runs / "rtp-pair" / "measured.json")
    assert overlaps(timeline) > 0
    result_of(runs / "rtp-inplace")
    assert overlaps(load_timeline(runs / "rtp-inplace" / "measured.json")) == 0


def overlaps(timeline: Timeline) -> int:
    """Pairs of a kernel and a transfer of rank 0 that were under way at the same time."""
    spans = timeline.spans(0)
    kernels = [s for s in spans if isinstance(s.op.action, Compute)]
    others = [s for s in spans if not isinstance(s.op.action, Compute)]
    return sum(a.start_ns < b.end_ns and b.start_ns < a.end_ns for a in kernels for b in others)


def test_memory_without_overlap_is_that_of_the_simulator(runs: Path):
    """In place nothing runs at the same time, so what is held does not depend on times."""
    schedule = next(c for c in CASES if c.name == "rtp-inplace").schedule()
    predicted = longest_path(schedule, FlatCost({}, 1, 1), fold=False)
    profiles = memory_profiles(schedule, predicted.ranks)
    result = result_of(runs / "rtp-inplace")
    assert result["peak_memory_bytes"] == [profiles[rank].peak_bytes for rank in range(4)]
    assert [sum(held.values()) for held in result["memory_by_category"]] == result["peak_memory_bytes"]


# ---- clocks


def test_clocks_of_different_machines_are_brought_together(runs: Path):
    """Rank 1's clock is 5 s ahead and says that it is another machine's."""
    result = result_of(runs / "shifted")
    first, second = result["ranks"]
    assert (first["clock_offset_ns"], first["clock_error_ns"]) == (0, 0)
    assert 0 < second["clock_error_ns"] < 50_000_000
    assert abs(second["clock_offset_ns"] - 5_000_000_000) <= second["clock_error_ns"]
    timeline = load_timeline(runs / "shifted" / "measured.json")
    assert timeline.step_time_ns < 4_000_000_000
    assert timeline.meta["clock_offset_ns.1"] == second["clock_offset_ns"]


def test_ranks_of_one_machine_share_its_clock(runs: Path):
    result = result_of(runs / "ddp")
    assert [r["clock_offset_ns"] for r in result["ranks"]] == [0] * 4
    assert result["clock_error_ns"] == 0


# ---- movements by hand: rank r has 10 r + (0 .. 5); in the group's ring rank 2 comes first, then 0, then 1


@pytest.fixture(scope="module")
def moved(runs: Path) -> list[dict[str, list[object]]]:
    return [json.loads(Path(f"{runs}/moves.{rank}").read_text(encoding="utf-8")) for rank in range(3)]


def row(rank: int, numel: int = 6, first: int = 0) -> list[int]:
    return [10 * rank + i for i in range(first, first + numel)]


BEFORE = {0: 2, 1: 0, 2: 1}


@pytest.mark.parametrize("rank", range(3))
class TestMovements:
    def test_the_ring_keeps_its_order(self, moved, rank: int):
        assert (moved[rank]["position"], moved[rank]["source"]) == ([1, 2, 0][rank], BEFORE[rank])

    def test_a_shift_sends_one_message(self, moved, rank: int):
        assert moved[rank]["shift"] == [row(BEFORE[rank]), 24, 1]

    def test_shards_of_different_size_go_through_a_small_buffer(self, moved, rank: int):
        source = BEFORE[rank]
        content = row(source, 4 + source) + row(rank, 2 - source, 4 + source)
        assert moved[rank]["in place"] == [content, 4 * (4 + rank), [2, 3, 3][rank]]

    def test_two_hops_at_once(self, moved, rank: int):
        after = {v: k for k, v in BEFORE.items()}[rank]
        assert moved[rank]["two hops"] == [row(BEFORE[rank]) + row(after, 2), 32, 2]

    def test_a_hop_to_itself_sends_nothing(self, moved, rank: int):
        assert moved[rank]["to itself"] == [row(rank), 0, 0]

    def test_sends_along_a_line_do_not_wrap_around(self, moved, rank: int):
        source = BEFORE[rank]
        assert moved[rank]["line"] == (row(source) if rank == 2 else [2 * x for x in row(source)])

    def test_all_reduce(self, moved, rank: int):
        assert moved[rank]["all_reduce sum"] == [[30 + 3 * i for i in range(6)], 32, 4]
        assert moved[rank]["all_reduce max"] == [row(2), 32, 4]

    def test_roots_are_positions(self, moved, rank: int):
        assert moved[rank]["broadcast sum"] == [row(0), 24, 1]
        if rank == 0:
            assert moved[rank]["reduce sum"] == [[30 + 3 * i for i in range(6)], 24, 1]

    def test_pieces_lie_in_order_of_position(self, moved, rank: int):
        position = [1, 2, 0][rank]
        assert moved[rank]["all_gather"] == [row(2) + row(0) + row(1), 48, 2]
        assert moved[rank]["reduce_scatter"] == [[30 + 6 * position, 33 + 6 * position], 16, 2]
        assert moved[rank]["all_to_all"] == [[x for r in (2, 0, 1) for x in row(r, 2, 2 * position)], 16, 2]


# ---- what an op waits for


ROWS = (
    Row("a", "compute", kernel(), "x", "y"),
    Row("hop1", "ring", shift(), "y", "in1"),
    Row("b", "compute", kernel(), "x", "z"),
    Row("hop2", "ring", shift(), "z", "in2"),
    Row("c", "compute", kernel(), "in1", "y"),
    Row("d", "compute", kernel(), "in2", "out"),
)


def test_ops_wait_for_transfers_on_their_stream_and_in_their_after():
    assert [sorted(needed) for needed in ordered_after(program("p", ROWS))] == [[], [], [], [1], [1], [3]]


def test_ops_wait_for_transfers_whose_buffers_they_touch():
    # c overwrites y, which hop1 sends; hop2 has no buffer in common with hop1.
    assert [sorted(needed) for needed in touched_after(program("p", ROWS))] == [[], [], [], [], [1], [3]]


def test_times_are_whole_ns(runs: Path):
    result_of(runs / "tp")
    timeline = load_timeline(runs / "tp" / "measured.json")
    assert all(t.start_ns.dtype == np.int64 for t in timeline.ranks.values())


def test_a_gradient_that_is_no_number_counts_as_wrong():
    expected = {"a": {"weight": torch.tensor([3.0, 4.0])}, "b": {"bias": torch.tensor([1.0])}}
    ours = {"a": {"weight": torch.tensor([3.0, 4.5])}, "b": {"bias": torch.tensor([float("nan")])}}
    # |(0, 0.5)| / |(3, 4)| = 0.1
    assert gradient_errors(ours, expected) == {"a.weight": pytest.approx(0.1), "b.bias": 1e300}
