"""The command line as a user meets it: every command, its streams, exit codes, files, and bad input."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from rtp_sim.cli import main
from rtp_sim.metrics import StepMetrics

ROOT = Path(__file__).parent.parent
TINY = "--model gpt2-tiny --seq-len 64 --cluster dgx-a100-80g --gpus 4 --quiet"
SIMULATE = f"simulate {TINY} --strategy rtp"
COMPARE = f"compare {TINY} --jobs 1"
SCHEDULE = f"schedule {TINY.removesuffix(' --quiet')} --strategy rtp"
ALL = "rtp,rtp-inplace,ddp,zero1,zero2,fsdp,tp,tp-sp"
ROW_KEYS = list(StepMetrics.__annotations__)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process."""

    def call(line: str, *more: str) -> Answer:
        code = main([*line.split(), *more])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


def process(line: str, *more: str, **environment: str) -> Answer:
    """Runs the real command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "rtp_sim", *line.split(), *more],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    return Answer(done.returncode, done.stdout, done.stderr)


def documented_keys(section: str) -> list[str]:
    """The first column of the table below a heading of docs/json.md."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    table = text.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


# ---- answers


def test_the_real_command_compares_and_keeps_the_streams_apart():
    answer = process(f"compare {TINY.removesuffix(' --quiet')} --strategies rtp,ddp --format json")
    assert answer.code == 0
    document = json.loads(answer.out)
    assert [row["strategy"] for row in document["rows"]] == ["rtp", "ddp"]
    assert all(line.startswith("rtp-sim: ") for line in answer.err.splitlines())
    assert "ddp (2 of 2)" in answer.err


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    outputs = []
    for seed in ("1", "2"):
        trace, report = tmp_path / f"{seed}.json", tmp_path / f"{seed}.html"
        answer = process(f"{SIMULATE} --format json --trace {trace} --report {report}", PYTHONHASHSEED=seed)
        assert answer.code == 0, answer.err
        outputs.append((answer.out, trace.read_bytes(), report.read_bytes()))
    assert outputs[0] == outputs[1]


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m rtp_sim {SCHEDULE} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.startswith("rtp: rank 0 of 4")
    assert done.stderr == ""


def test_compare_as_json(run):
    answer = run(f"{COMPARE} --micro-batch 2 --strategies {ALL} --format json")
    assert (answer.code, answer.err) == (0, "")
    document = json.loads(answer.out)
    assert list(document) == documented_keys("compare")
    assert document["schema"] == "rtp-sim/compare/1"
    assert document["inputs"]["global_batch"] == 8
    for row in document["rows"]:
        assert list(row) == documented_keys("A row") == ROW_KEYS
        parts_s = row["compute_time_s"] + row["exposed_communication_s"] + row["bubble_s"]
        assert parts_s == pytest.approx(row["step_time_s"], rel=1e-9)
        # Every strategy does the same work: 2 sequences x 4 GPUs x 64 tokens.
        assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(2 * 4 * 64)
        assert row["tokens_per_s_per_gpu"] == pytest.approx(row["tokens_per_s"] / 4)
        assert row["peak_memory_bytes"] == sum(row["memory_by_category"].values())
        assert sum(row["cost_provenance"].values()) == pytest.approx(1)


def test_ddp_sends_what_a_ring_all_reduce_of_the_gradients_sends(run):
    shown = json.loads(run("models show gpt2-tiny --format json").out)
    (parameters,) = [row["value"] for row in shown if row["name"] == "total"]
    row = json.loads(run(f"{COMPARE} --strategies ddp --format json").out)["rows"][0]
    gradient_bytes = 2 * int(parameters.replace(",", ""))
    # 2 (n - 1) / n of them, rounded up to a byte per bucket.
    assert 0 <= row["bytes_sent_per_rank"] - 2 * 3 / 4 * gradient_bytes < row["messages_per_rank"]


def test_compare_as_a_table_and_its_notes(run):
    answer = run(f"{COMPARE} --strategies rtp,fsdp")
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert lines[0].split()[:2] == ["strategy", "layout"]
    assert lines[1].startswith("rtp ")
    assert "rtp=4 dp=1" in lines[1]
    assert lines[2].startswith("fsdp ")


def test_uneven_splits_are_said(run):
    answer = run("simulate --model gpt2 --cluster dgx-a100-80g --gpus 8 --strategy rtp --quiet")
    assert "12 heads over rtp=8 are uneven: 2 on some ranks, 1 on others" in answer.out


def test_compare_as_csv(run):
    answer = run(f"{COMPARE} --strategies rtp,ddp --format csv")
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert [row["strategy"] for row in rows] == ["rtp", "ddp"]
    as_json = json.loads(run(f"{COMPARE} --strategies rtp,ddp --format json").out)["rows"]
    for row, same in zip(rows, as_json, strict=True):
        assert float(row["step_time_s"]) == same["step_time_s"]
        assert int(row["memory_by_category.weights"]) == same["memory_by_category"]["weights"]
    assert list(dict.fromkeys(key.split(".")[0] for key in rows[0])) == ROW_KEYS


def test_simulate_as_json(run):
    answer = run(f"{SIMULATE} --format json")
    document = json.loads(answer.out)
    assert list(document) == documented_keys("simulate")
    assert list(document["row"]) == ROW_KEYS
    # Without --global-batch every replica does one micro-batch; on a ring each rank is a replica.
    assert document["inputs"]["global_batch"] == 4
    assert document["inputs"]["strategy"] == "rtp"


def test_simulate_as_a_summary(run):
    answer = run(SIMULATE)
    assert answer.code == 0
    assert {"step", "compute", "bubble", "fits"} <= {line.split()[0] for line in answer.out.splitlines()}


def test_gradient_accumulation_multiplies_the_tokens(run):
    row = json.loads(run(f"{SIMULATE} --micro-batch 2 --global-batch 24 --format json").out)["row"]
    assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(24 * 64)


def test_evaluation_passes_hop_only_forward(run):
    training = json.loads(run(f"{SIMULATE} --format json").out)["row"]
    evaluation = json.loads(run(f"{SIMULATE} --eval-passes 2 --format json").out)["row"]
    assert evaluation["step_time_s"] < training["step_time_s"]
    assert evaluation["memory_by_category"]["gradients"] == 0


def test_without_folding_and_on_the_longest_path_the_step_is_the_same(run):
    folded, unfolded, path = (
        json.loads(run(f"{SIMULATE} {flags} --format json").out)["row"]
        for flags in ("", "--no-fold", "--engine longest-path")
    )
    assert folded == unfolded
    assert path["step_time_s"] <= folded["step_time_s"]


# ---- files


@pytest.mark.parametrize("name", ["step.json", "step.json.gz"])
def test_the_trace_loads_and_spans_on_a_track_do_not_overlap(run, tmp_path: Path, name: str):
    path = tmp_path / name
    answer = run(SIMULATE, "--trace", str(path))
    assert answer.code == 0, answer.err
    data = path.read_bytes()
    trace = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
    assert {pid for pid, _ in tracks} <= set(range(4))
    for spans in tracks.values():
        spans.sort()
        for (start, duration), (following, _) in pairwise(spans):
            # Microseconds with three decimals; the sum may miss by a rounding of floating point.
            assert start + duration <= following + 1e-6


def test_the_report_is_one_file_that_names_model_and_strategies(run, tmp_path: Path):
    path = tmp_path / "report.html"
    answer = run(f"{COMPARE} --strategies rtp,ddp", "--report", str(path))
    assert answer.code == 0, answer.err
    text = path.read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert "gpt2-tiny" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["']?https?:""", text)


# ---- schedules and catalogues


def test_schedule_prints_a_program(run):
    answer = run(f"{SCHEDULE} --rank 3 --limit 2")
    assert answer.out.startswith("rtp: rank 3 of 4")
    assert "%1 " in answer.out
    assert "%2 " not in answer.out


def test_a_schedule_needs_no_cluster(run):
    assert run("schedule --model gpt2 --strategy rtp --rtp 3 --limit 1").out.startswith("rtp: rank 0 of 3")


@pytest.mark.parametrize("form", ["text", "json"])
def test_stored_schedules_read_back(run, form: str):
    from rtp_sim.schedule.serialize import from_json
    from rtp_sim.schedule.text import from_text

    answer = run(f"{SCHEDULE} --format {form}")
    schedule = from_json(answer.out) if form == "json" else from_text(answer.out)
    assert schedule.world_size == 4
    assert schedule.meta["model"] == "gpt2-tiny"


def test_hardware_list_and_show(run):
    names = json.loads(run("hardware list --format json").out)
    assert "dgx-h100" in names["clusters"]
    assert "rtx-4090" in names["devices"]
    assert "  dgx-h100\n" in run("hardware list").out
    rows = json.loads(run("hardware show a100-sxm-80gb --format json").out)
    assert {row["kind"] for row in rows} <= {"measured", "vendor", "assumed", ""}
    assert all(row["source"] for row in rows if row["kind"])
    assert "100 GB/s" in run("hardware show generic:h100-sxm,gpus=4,nics=2,nic=800Gb/s").out


def test_models_list_and_show(run):
    assert "gpt2-xl" in json.loads(run("models list --format json").out)["models"]
    # GPT-2's published count, OpenAI's "124M".
    assert "124,439,808" in run("models show gpt2").out


def test_help_and_version(capsys: pytest.CaptureFixture[str]):
    for line in ("--help", "compare --help", "simulate --help", "schedule --help", "--version"):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        assert stop.value.code == 0
    assert "rtp-sim" in capsys.readouterr().out


# ---- the answer is no


def test_a_step_that_does_not_fit_is_exit_code_1(run):
    answer = run("simulate --model llama2-70b --cluster dgx-a100-80g --gpus 1 --strategy single --quiet")
    assert answer.code == 1
    assert re.search(r"no: needs [\d.]+ TiB of [\d.]+ GiB", answer.out)
    machine = "--cluster dgx-a100-80g --gpus 2 --jobs 1 --quiet"
    assert run(f"compare --model llama2-70b {machine} --strategies ddp,zero1").code == 1


# ---- bad input: exit code 2, one message on stderr, nothing on stdout

BAD = {
    "clip norm": (f"{SIMULATE} --clip-norm 0", ["clip_norm is 0.0", "above 0"]),
    "loss scale": (f"{SIMULATE} --loss-scale big", ["loss_scale is 'big'", "static:1024"]),
    "dropout": (f"{SIMULATE} --dropout 1", ["--dropout", "below 1"]),
    "dropout of nothing": (
        "simulate --quiet --model examples/models/mnist-cnn.json --strategy ddp --dropout 0.1",
        ["mnist-cnn has no dropout layer"],
    ),
    "unknown model": ("simulate --quiet --model gpt2-lrge --strategy rtp", ["gpt2-lrge", "gpt2-large"]),
    "unknown cluster": (f"{SIMULATE} --cluster dgx-a100", ["dgx-a100'", "dgx-a100-80g"]),
    "unknown strategy": ("simulate --quiet --model gpt2 --strategy rpt", ["rpt", "did you mean rtp"]),
    "unknown strategy of several": (f"{COMPARE} --strategies rtp,fdsp", ["fdsp", "fsdp"]),
    "no strategy": (f"{COMPARE} --strategies ,", ["--strategies"]),
    "unknown command": ("simulat", ["simulat", "simulate"]),
    "no model": ("simulate --strategy rtp", ["--model"]),
    "degree does not divide": (f"{SIMULATE} --rtp 3", ["--rtp 3", "4 GPUs", "4 / 3 = 1.33"]),
    "product of degrees": (f"{SIMULATE} --rtp 4 --dp 4", ["4 x 4 = 16", "4 GPUs"]),
    "gpus no multiple": (f"{SIMULATE} --gpus 12", ["12 GPUs", "12 / 8 = 1.5"]),
    "gpus and nodes": (f"{SIMULATE} --gpus 7 --nodes 2", ["7 / 2 = 3.5"]),
    "fewer heads than ranks": (
        "simulate --quiet --model gpt2 --gpus 16 --strategy tp",
        ["12", "heads", "16 ranks"],
    ),
    "single on several": (f"simulate {TINY} --strategy single", ["1 GPU", "4"]),
    "negative micro-batch": (f"{SIMULATE} --micro-batch -1", ["--micro-batch", "-1", "at least 1"]),
    "fractional micro-batch": (f"{SIMULATE} --micro-batch 1.5", ["--micro-batch", "1.5"]),
    "global batch no multiple": (f"{SIMULATE} --micro-batch 2 --global-batch 9", ["9", "2 x 4 = 8"]),
    "beyond learned positions": (f"{SIMULATE} --seq-len 128", ["128", "64 learned positions"]),
    "unknown precision": (f"{SIMULATE} --precision fp12", ["fp12", "bf16"]),
    "unknown format": (f"{SIMULATE} --format xml", ["xml", "json"]),
    "two-level ring inside a node": (f"{SIMULATE} --rtp-ring two-level", ["two-level", "4 GPUs of a node"]),
    "rank out of range": ("schedule --model gpt2 --strategy rtp --rtp 4 --rank 4", ["--rank 4", "0 to 3"]),
    "unknown hardware": ("hardware show dgx", ["'dgx'", "dgx-h100"]),
    "unknown preset": ("models show gpt", ["'gpt'", "gpt2"]),
    "generic without a number": (f"{SIMULATE} --cluster generic:h100-sxm,gpus=x", ["gpus=x", "whole number"]),
    "generic with an unknown device": (f"{SIMULATE} --cluster generic:h100,gpus=4", ["'h100'", "h100-sxm"]),
    "missing model file": ("simulate --quiet --model nowhere.json --strategy rtp", ["nowhere.json"]),
    "degree of another axis": ("simulate --quiet --model gpt2 --gpus 4 --strategy fsdp --rtp 4", ["fsdp", "--rtp 4"]),
    "tp beside rotation": (f"{SIMULATE} --tp 2", ["rtp has no --tp axis"]),
    "evaluation without rotation": (
        "simulate --quiet --model gpt2 --gpus 4 --strategy ddp --eval-passes 2",
        ["ddp", "evaluation", "rtp"],
    ),
    "nothing to split": (
        "simulate --quiet --model examples/models/mnist-cnn.json --gpus 4 --strategy tp",
        ["nothing to split", "attention"],
    ),
    "missing profile": ("hardware show nowhere.toml", ["nowhere.toml"]),
}


def assert_bad_input(answer: Answer, expected: list[str]) -> None:
    assert answer.code == 2
    assert answer.out == ""
    (message,) = [line for line in answer.err.splitlines() if line]
    assert message.startswith("rtp-sim: ")
    for words in expected:
        assert words in message


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run, case: str):
    line, expected = BAD[case]
    assert_bad_input(run(line), expected)


def test_bad_input_of_the_real_command():
    assert_bad_input(process(f"{SIMULATE} --rtp 3"), ["4 / 3 = 1.33"])


def test_a_truncated_config(run, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2", "n_embd"')
    answer = run("simulate --quiet --strategy rtp --model", str(path))
    assert_bad_input(answer, ["config.json", "line 1", "not valid JSON"])


PROFILE = (ROOT / "hardware_profiles" / "clusters" / "dgx-h100.toml").read_text(encoding="utf-8")
BANDWIDTH = 'value = "450 GB/s"'
DEVICE = 'device = "h100-sxm"\n'
BAD_PROFILES = {
    "negative number": (PROFILE.replace(BANDWIDTH, 'value = "-450 GB/s"'), ["bandwidth", "'-450 GB/s'"]),
    "no unit": (PROFILE.replace(BANDWIDTH, 'value = "450"'), ["bandwidth", "'450' without a unit"]),
    "missing key": (PROFILE.replace(DEVICE, ""), ["device", "missing"]),
    "unknown key": (DEVICE.replace("device", "devise") + PROFILE, ["devise", "unknown key"]),
    "unknown device": (PROFILE.replace(DEVICE, 'device = "h1000"\n'), ["h1000", "h100-sxm"]),
    "no TOML": ("links = [", ["not valid TOML"]),
}


@pytest.mark.parametrize("case", BAD_PROFILES)
def test_a_bad_profile(run, tmp_path: Path, case: str):
    text, expected = BAD_PROFILES[case]
    assert text != PROFILE
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    assert_bad_input(run("hardware show", str(path)), expected)


@pytest.mark.parametrize("flag", ["--trace", "--report", "--plot"])
def test_a_missing_directory_for_an_output_file(run, tmp_path: Path, flag: str):
    """Told before any work is done, not after it."""
    assert_bad_input(run(SIMULATE, flag, str(tmp_path / "nowhere" / "step.png")), [flag, "nowhere"])
    assert_bad_input(run(SIMULATE, flag, str(tmp_path)), [flag, "is a directory"])


def test_compare_shows_what_works_and_says_what_does_not(run):
    answer = run("compare --quiet --model gpt2 --gpus 8 --strategies ddp,rtp --rtp 3 --format json")
    assert answer.code == 2
    assert [row["strategy"] for row in json.loads(answer.out)["rows"]] == ["ddp"]
    assert "8 / 3 = 2.66667" in answer.err


def test_a_short_model_gets_a_short_sequence(run):
    """gpt2-tiny has 64 positions: without --seq-len it is not asked for 1024."""
    answer = run("simulate --quiet --model gpt2-tiny --gpus 2 --strategy ddp --format json")
    assert answer.code == 0
    row = json.loads(answer.out)["row"]
    assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(2 * 64)


def test_a_rate_taken_from_another_dtype_is_said(run):
    answer = run("simulate --quiet --model gpt2 --cluster dgx-1-v100 --strategy ddp --precision bf16")
    assert "v100-sxm2-32gb states no rate for bf16: that of fp32 is used" in answer.out


def test_clipping_scaling_and_dropout_are_asked_for(run):
    """The op that each brings, and what was asked for in the schedule's meta; without, nothing of it."""
    flags = "--clip-norm 0.5 --loss-scale dynamic:1024 --dropout 0.1"
    plain, asked = (run(f"{SCHEDULE} --format text {more}").out for more in ("", flags))
    for words in ("grad_norm[", "loss_scale[", "dropout[", "meta clip_norm = 0.5", 'meta loss_scale = "dynamic:1024"',
                  "meta dropout = 0.1"):  # fmt: skip
        assert words in asked
        assert words not in plain
    assert "dropout[" not in run(f"{SCHEDULE} --format text --eval-passes 2 --dropout 0.1").out


def test_a_schedule_needs_no_machine(run):
    """As many ranks as the degrees say, whatever a node of the default cluster has."""
    assert "rank 0 of 12" in run("schedule --model gpt2 --strategy rtp --rtp 12 --limit 1").out


def test_more_ranks_than_heads_is_fine_in_a_ring(run):
    answer = run("simulate --quiet --model gpt2 --cluster dgx-a100-80g --nodes 2 --strategy rtp")
    assert answer.code == 0
    assert "12 heads over rtp=16 are uneven: 1 on some ranks, 0 on others" in answer.out
