"""Pipelines, hybrid sharding and estimates on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtp_sim.cli import main

TINY = "--model gpt2-tiny --seq-len 64 --cluster dgx-a100-80g --gpus 4 --quiet"


def answer(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = main(line.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def row(capsys: pytest.CaptureFixture[str], line: str) -> dict[str, object]:
    code, out, _ = answer(capsys, f"{line} --format json")
    assert code == 0
    found: dict[str, object] = json.loads(out)["row"]
    return found


def test_degrees_and_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    found = row(capsys, f"simulate {TINY} --strategy 1f1b --pp 2 --micro-batches 8")
    assert found["layout"] == "tp=1 dp=2 pp=2"
    same = row(capsys, f"simulate {TINY} --strategy 1f1b --pp 2 --global-batch 16")
    assert found["step_time_s"] == same["step_time_s"]


def test_an_estimate_is_close_and_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"simulate {TINY} --strategy zb-h1 --pp 2 --tp 2 --micro-batches 8"
    whole, found = row(capsys, line), row(capsys, f"{line} --engine estimate")
    assert float(str(found["step_time_s"])) == pytest.approx(float(str(whole["step_time_s"])), rel=0.01)
    _, out, _ = answer(capsys, f"{line} --engine estimate")
    assert "note: zb-h1 was composed" in out


def test_pipelines_beside_other_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"compare {TINY} --strategies ddp,hsdp,1f1b,interleaved --pp 2 --fsdp 2 --global-batch 16 --jobs 1"
    code, out, _ = answer(capsys, f"{line} --format json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [r["layout"] for r in rows] == ["dp=4", "fsdp=2 dp=2", "tp=1 dp=2 pp=2", "tp=1 dp=2 pp=2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--strategy ddp --pp 2", "strategy ddp has no --pp axis: leave --pp 2 out"),
        ("--strategy 1f1b --pp 2 --rtp 2", "strategy 1f1b has no --rtp axis: leave --rtp 2 out"),
        ("--strategy 1f1b --pp 3", "--tp x --pp 3 does not divide 4 GPUs"),
        ("--strategy 1f1b --pp 2 --pp-layers 2,x", "argument --pp-layers: 'x' is not a whole number"),
        ("--strategy interleaved --pp 4 --vpp 2 --micro-batches 4", "2 blocks are too few for 4 stages with 2 chunks"),
        ("--strategy interleaved --pp 2 --vpp 1 --micro-batches 2 --global-batch 4", "are both given"),
        ("--strategy 1f1b --pp 2 --engine estimate --trace t.json", "--engine estimate has no timeline for --trace"),
    ],
)
def test_bad_input_is_one_message(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    code, out, err = answer(capsys, f"simulate {TINY} {words}")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_stage_is_printed_and_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    from rtp_sim.schedule.parse import from_text

    line = "schedule --model gpt2-tiny --seq-len 64 --strategy 1f1b --pp 2 --micro-batches 2"
    _, listing, _ = answer(capsys, f"{line} --rank 1")
    assert listing.startswith("1f1b: rank 1 of 2, program '1f1b.stage1' of rank 1")
    _, text, _ = answer(capsys, f"{line} --format text")
    assert [p.name for p in from_text(text).programs] == ["1f1b.stage0", "1f1b.stage1"]


def test_a_pipeline_runs_on_processes_and_trains_as_dense(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = "run --model gpt2-tiny --seq-len 8 --precision fp32 --strategy 1f1b --pp 2 --micro-batches 3 --steps 1"
    code = main([*line.split(), "--warmup", "1", "--check", "--quiet", "--format", "json", "-o", str(tmp_path / "run")])
    result = json.loads(capfd.readouterr().out)
    assert code == 0
    assert result["check"]["passed"]
    assert len(result["loss"]) == 2
    # 8 tokens of width 64 in fp32, three times: activations one way, their gradients back; and half of the shared table
    # of 256 x 64 in each of the two rounds of a ring of two.
    assert result["bytes_sent"] == [3 * 8 * 64 * 4 + 256 * 64 * 4] * 2
