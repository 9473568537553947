"""A real run under torch.profiler, two ranks on gloo: its traces tell of every op what the executor's clocks tell."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtp_sim.cli import main
from rtp_sim.errors import InputError
from rtp_sim.executor.rundir import RunDirectory
from rtp_sim.timeline_file import load_timeline
from rtp_sim.traces.kineto import read_trace
from rtp_sim.traces.ops import step_of
from rtp_sim.validation.traced import traced_timeline

pytestmark = pytest.mark.alone

STEPS, WARMUP = 2, 1
CLOCK_ERROR_NS = 100_000
"""A range opens after the executor has read its clock and closes before it does so again, so it lies between the two
readings, to within how well the profiler's clock is known: an anchor's own delay, some us, rarely more."""
TYPICAL_NS = 500_000
"""What entering and leaving a range take at the median, with room: 5 us on an idle core."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's directory. Rotation has kernels, shifts and collectives."""
    found = tmp_path_factory.mktemp("traced") / "run"
    line = (
        "run --model gpt2-tiny --strategy rtp --nproc-per-node 2 --precision fp32 --seq-len 32 --micro-batch 2 "
        f"--steps {STEPS} --warmup {WARMUP} --profile-trace -o {found} --quiet --format json"
    )
    assert main(line.split()) == 0
    return found


def edited(path: Path, to: Path, rank: int, change: Any) -> Path:
    """A copy of the run with one rank's trace changed."""
    shutil.copytree(path, to)
    file = to / "ranks" / str(rank) / "trace.json.gz"
    data = json.loads(gzip.decompress(file.read_bytes()))
    change(data)
    file.write_bytes(gzip.compress(json.dumps(data).encode()))
    return to


def test_times_of_trace_and_executor_agree_op_by_op(path: Path):
    run = RunDirectory(path)
    schedule, _ = run.load()
    for rank in range(2):
        ops = schedule.program(rank).ops
        records, times = run.read_steps(rank, len(ops))
        assert [r["step"] for r in records] == [0, 1, 2, 3]
        start_ns, end_ns = times[-1]
        found = step_of(read_trace(run.of_rank(rank, "trace.json.gz")))
        assert found.step == WARMUP + STEPS
        assert {i: o.name for i, o in found.ops.items()} == {op.index: op.name for op in ops}
        traced = np.array([(found.ops[op.index].start_ns, found.ops[op.index].end_ns) for op in ops]).T
        assert (traced[0] >= start_ns - CLOCK_ERROR_NS).all()
        assert (traced[1] <= end_ns + CLOCK_ERROR_NS).all()
        assert (traced[0] <= traced[1]).all()
        assert np.median(np.abs(traced[0] - start_ns)) < TYPICAL_NS
        assert np.median(np.abs(traced[1] - end_ns)) < TYPICAL_NS


def test_the_traced_step_counts_for_no_number_of_the_run(path: Path):
    result = json.loads((path / "result.json").read_text())
    assert len(result["step_times_ns"]) == STEPS
    assert result["steps_finished"] == WARMUP + STEPS == len(result["loss"])
    assert result["timeline_step"] < WARMUP + STEPS


def test_the_timeline_of_the_traces_is_of_the_same_schedule(path: Path, tmp_path: Path):
    assert main(["trace", str(path), "--timeline", str(tmp_path / "t.json"), "--quiet", "--format", "json"]) == 0
    timeline, measured = load_timeline(tmp_path / "t.json"), load_timeline(path / "measured.json")
    assert timeline.schedule == measured.schedule
    assert (timeline.kind, timeline.meta["clocks"], timeline.meta["step"]) == ("measured", "torch.profiler", 3)
    assert min(int(t.start_ns.min()) for t in timeline.ranks.values()) >= 0
    # A shift moves data both ways between the two ranks: it begins when the later one is there, on both.
    shifts = [op.index for op in timeline.schedule.program(0).ops if op.stream.startswith("ring")]
    both = np.stack([timeline.times(rank).start_ns for rank in range(2)])[:, shifts]
    ends = np.stack([timeline.times(rank).end_ns for rank in range(2)])[:, shifts]
    assert shifts
    ready = both.max(axis=0)
    assert (both == np.minimum(ready, ends)).all()


def test_a_real_trace_is_summed_up_like_any_other(path: Path, capsys: pytest.CaptureFixture[str]):
    files = [str(path / "ranks" / str(rank) / "trace.json.gz") for rank in (1, 0)]
    assert main(["trace", *files, "--format", "json", "--quiet"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    # The profiler itself has written which rank each file is of.
    assert [(r["rank"], r["kind"], r["path"]) for r in ranks] == [(0, "host", files[1]), (1, "host", files[0])]
    for rank in ranks:
        parts = rank["computing_s"] + rank["exposed_communication_s"] + rank["idle_s"]
        assert parts == pytest.approx(rank["window_s"])
        # The data move on threads of their own, however they do.
        assert {"matmul", "attention", "memory-bound", "communication"} <= set(rank["classes"])
        assert sum(s["busy_s"] for s in rank["streams"]) >= rank["computing_s"]


def test_validate_and_diff_take_the_traced_step(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", str(path), "--timeline", str(tmp_path / "t.json"), "--quiet"]) == 0
    assert "Ranks: busy time by kernel class" in capsys.readouterr().out
    line = f"validate {path} --profile cpu-local --from-trace --tolerance 1000 --format json --quiet"
    assert main([*line.split(), "--predicted", str(tmp_path / "p.json")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["diff"]["measured"]["meta"]["clocks"] == "torch.profiler"
    assert document["diff"]["measured"]["step_time_s"] == load_timeline(tmp_path / "t.json").step_time_ns / 1e9
    assert any("step under the profiler" in note for note in document["notes"])
    assert main(["diff", str(tmp_path / "p.json"), str(tmp_path / "t.json"), "--quiet"]) == 0


def test_clocks_that_are_apart_are_aligned_with_the_offsets_of_the_run(path: Path, tmp_path: Path):
    ahead_ns = 7_000_000_123

    def later(data: dict[str, Any]) -> None:
        for e in data["traceEvents"]:
            e["name"] = re.sub(
                r"rtp-sim clock (\d+)", lambda m: f"rtp-sim clock {int(m[1]) + ahead_ns}", str(e.get("name"))
            )

    shifted = edited(path, tmp_path / "shifted", 1, later)
    record = json.loads((shifted / "ranks/1/rank.json").read_text())
    (shifted / "ranks/1/rank.json").write_text(json.dumps(record | {"clock_offset_ns": ahead_ns}))
    schedule, _ = RunDirectory(path).load()
    plain, moved = traced_timeline(path, schedule), traced_timeline(shifted, schedule)
    for rank in range(2):
        assert (plain.times(rank).start_ns == moved.times(rank).start_ns).all()
        assert (plain.times(rank).end_ns == moved.times(rank).end_ns).all()


def rename(data: dict[str, Any], old: str, new: str) -> None:
    for e in data["traceEvents"]:
        if str(e.get("name", "")).startswith(old):
            e["name"] = new


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: rename(d, "rtp-sim %0 ", "rtp-sim %0 other"), ["op %0 is 'other'", "same run"]),
        (lambda d: rename(d, "rtp-sim %0 ", "rtp-sim %9999 other"), ["op %9999 is 'other'", "only"]),
        (lambda d: rename(d, "rtp-sim %0 ", "gone"), ["no range of op %0"]),
        (lambda d: rename(d, "rtp-sim step", "rtp-sim step 1"), ["the traces are of the steps 1, 3"]),
    ],
)
def test_traces_of_another_run_are_refused(path: Path, tmp_path: Path, change: Any, words: list[str]):
    other = edited(path, tmp_path / "other", 1, change)
    schedule, _ = RunDirectory(path).load()
    with pytest.raises(InputError) as caught:
        traced_timeline(other, schedule)
    for word in words:
        assert word in str(caught.value)


def test_missing_traces_and_clocks_are_named(path: Path, tmp_path: Path):
    schedule, _ = RunDirectory(path).load()
    copy = edited(path, tmp_path / "copy", 0, lambda _: None)
    (copy / "ranks/1/rank.json").write_text("{}")
    with pytest.raises(InputError, match=r"ranks/1/rank\.json: clock_offset_ns cannot be read"):
        traced_timeline(copy, schedule)
    (copy / "ranks/1/trace.json.gz").unlink()
    with pytest.raises(InputError, match=r"ranks/1/trace\.json\.gz is missing; .*--profile-trace"):
        traced_timeline(copy, schedule)
