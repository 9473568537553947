"""Sweeps: axes and keys, rows against the estimate, folders that go on, workers and sweeps that are killed."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sweep_points
from sweep_points import FOLDER, InThisProcess, calls, tiny_grid
from test_cli import documented_keys

from rtp_sim.cli import main
from rtp_sim.compose.estimate import estimate
from rtp_sim.errors import InputError
from rtp_sim.experiment import Request
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.metrics import metrics_row
from rtp_sim.sweep.axes import read_axis
from rtp_sim.sweep.crossings import Crossing, crossings
from rtp_sim.sweep.drive import Progress, progress_text
from rtp_sim.sweep.points import Point, key_of
from rtp_sim.sweep.run import run_sweep
from rtp_sim.sweep.schedulers import LocalProcesses
from rtp_sim.sweep.table import Table

ROOT = Path(__file__).parent.parent
PROFILES = ROOT / "hardware_profiles" / "clusters"
TINY = "sweep --model gpt2-tiny --strategies ddp,fsdp --gpus 2,4 --vary micro-batch=1,2 --workers 1"
FILES = ("sweep.json", "points.jsonl", "table.json", "table.csv")
"""What is the same from run to run."""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which calls of `sweep_points` are counted, for this process and its workers."""
    folder = tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv(FOLDER, str(folder))
    return folder


def here(
    folder: Path | None, grid: tuple[list, list] | None = None, evaluate: Callable = sweep_points.counted
) -> Table:
    axes, points = grid or tiny_grid()
    return run_sweep(axes, points, folder, InThisProcess, {"engine": "estimate"}, evaluate_point=evaluate)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def metrics_of(table: Table) -> dict[tuple[str, ...], float]:
    return {at: row["metrics"]["step_time_s"] for at, row in table.rows.items() if row["status"] == "ok"}


# ---- axes


def test_values_without_a_unit_take_that_of_the_last() -> None:
    axis = read_axis("link.ib.bandwidth=100, 200,0.05 TB/s,800Gb/s")
    assert [v.text for v in axis.values] == ["100Gb/s", "200Gb/s", "0.05 TB/s", "800Gb/s"]
    # 0.05 TB/s = 50 GB/s = 400 Gb/s.
    assert [v.number for v in axis.values] == [100, 200, 400, 800]
    assert (axis.unit, axis.is_numeric) == ("Gb/s", True)


def test_plain_numbers_and_words() -> None:
    numbers, words = read_axis("micro-batch=1,2,8"), read_axis("recompute=none,full")
    assert ([v.number for v in numbers.values], numbers.unit) == ([1, 2, 8], "")
    assert ([v.number for v in words.values], words.is_numeric) == ([None, None], False)
    assert not read_axis("model=gpt2,llama2-7b").is_numeric
    assert not read_axis("x=1,two").is_numeric


@pytest.mark.parametrize("text", ["micro-batch", "micro-batch=", "micro-batch=1,,2", "=1,2", "micro-batch=1,1"])
def test_bad_axes(text: str) -> None:
    with pytest.raises(InputError, match="expected"):
        read_axis(text)


# ---- profile numbers by name


def test_links_are_changed_by_name_and_by_kind() -> None:
    by_kind = load_cluster("dgx-a100-80g", changes={"link.ib.bandwidth": "400 Gb/s"})
    by_name = load_cluster("dgx-a100-80g", changes={"link.hdr.bandwidth": "400 Gb/s"})
    rates = {link.raw_bandwidth_bytes_per_s for link in by_kind.topology.links if link.kind == "nic"}
    assert rates == {50 * 10**9}
    assert by_kind.topology.links == by_name.topology.links


def test_a_changed_number_stands_above_the_calibration() -> None:
    """selene's calibration replaces the device's efficiency and that of its links."""
    fitted = load_cluster("selene-a100-80g")
    assert fitted.device.matmul_efficiency.value != 0.5
    changes = {"device.matmul_efficiency": 0.5, "link.nvlink.efficiency": 0.25, "device.memory": "40 GB"}
    cluster = load_cluster("selene-a100-80g", changes=changes)
    assert (cluster.device.matmul_efficiency.value, cluster.device.memory_bytes.value) == (0.5, 40e9)
    nvlinks = [link for link in cluster.topology.links if link.kind == "nvlink"]
    assert {link.bandwidth_bytes_per_s * 4 for link in nvlinks} == {nvlinks[0].raw_bandwidth_bytes_per_s}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("link.ibb.bandwidth", "unknown link 'ibb'"),
        ("link.ib.bandwith", "did you mean bandwidth"),
        ("device.memry", "memry"),
        ("device.peak_flops.bf17", "bf16"),
        ("fabric.kind", "no number"),
        ("gpus_per_node", "link.NAME.FIELD"),
        ("links", "link.NAME.FIELD"),
    ],
)
def test_unknown_numbers_are_told(key: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_cluster("dgx-a100-80g", changes={key: "1 GB/s"})
    with pytest.raises(InputError, match="generic"):
        load_cluster("generic:h100-sxm,gpus=8", changes={key: "1 GB/s"})


# ---- keys


def test_a_key_holds_everything_that_the_result_follows_from(tmp_path: Path) -> None:
    original = (PROFILES / "dgx-a100-80g.toml").read_text(encoding="utf-8")
    assert 'value = "200 Gb/s"' in original

    def key(profile: str, **changes: object) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(profile, encoding="utf-8")
        # The contents of a profile are remembered as long as a process lives; ask by another name each time.
        other = tmp_path / f"mine{len(list(tmp_path.iterdir()))}.toml"
        shutil.copy(path, other)
        given = {"at": (), "request": Request("gpt2", str(other), "ddp", gpus=2)} | changes
        return key_of(Point(**given))  # type: ignore[arg-type]

    first = key_of(Point((), Request("gpt2", "dgx-a100-80g", "ddp", gpus=2)))
    assert first == key_of(Point(("elsewhere",), Request("gpt2", "dgx-a100-80g", "ddp", gpus=2)))
    different = {
        first,
        key_of(Point((), Request("gpt2", "dgx-a100-80g", "ddp", gpus=4))),
        key_of(Point((), Request("gpt2-medium", "dgx-a100-80g", "ddp", gpus=2))),
        key_of(Point((), Request("gpt2", "dgx-a100-80g", "ddp", gpus=2), engine="simpy")),
        key_of(Point((), Request("gpt2", "dgx-a100-80g", "ddp", gpus=2), (("link.ib.bandwidth", "400Gb/s"),))),
        key_of(Point((), Request("gpt2", "dgx-a100-80g", "ddp", gpus=2), (("device.memory", "40GB"),))),
        key_of(Point((), Request("gpt2", "dgx-h100", "ddp", gpus=2))),
    }
    assert len(different) == 7
    assert key(original) != key(original.replace('"200 Gb/s"', '"400 Gb/s"'))


def test_a_model_file_counts_by_what_is_in_it(tmp_path: Path) -> None:
    source = (ROOT / "examples" / "models" / "mnist-cnn.json").read_text(encoding="utf-8")
    one, two, other = (tmp_path / f"{name}.json" for name in ("one", "two", "other"))
    one.write_text(source, encoding="utf-8")
    two.write_text(source, encoding="utf-8")
    other.write_text(source + " ", encoding="utf-8")
    keys = [key_of(Point((), Request(str(path), "dgx-a100-80g", "ddp"))) for path in (one, two, other)]
    assert keys[0] == keys[1] != keys[2]


# ---- rows


def test_rows_are_the_estimates_of_the_points() -> None:
    table = here(None, evaluate=sweep_points.really)
    assert list(table.rows) == [(b, s) for b in "123" for s in ("ddp", "fsdp")]
    for (batch, strategy), row in table.rows.items():
        # As compare does: micro-batch x GPUs sequences for every strategy.
        request = Request(
            "gpt2-tiny", "dgx-a100-80g", strategy, gpus=2, micro_batch=int(batch), global_batch=2 * int(batch)
        )
        expected = json.loads(json.dumps(metrics_row(estimate(request).metrics)))
        assert (row["status"], row["gpus"], row["global_batch"]) == ("ok", 2, 2 * int(batch))
        assert row["metrics"] == expected


def test_equal_points_are_computed_once(counting: Path) -> None:
    """tp says nothing about ddp: all values of that axis are one point."""
    axes, points = tiny_grid(1)
    doubled = [replace(p, at=(n, *p.at)) for n in ("2", "4") for p in points]
    table = here(None, ([read_axis("tp=2,4"), *axes], doubled))
    assert len(table.rows) == 4
    assert sum(calls().values()) == 2


def test_a_point_that_cannot_be_laid_out_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    line = "sweep --model gpt2-tiny --strategies tp,ddp --gpus 4,8,12 --workers 1 --quiet --format json"
    assert main(line.split()) == 0
    document = json.loads(capsys.readouterr().out)
    found = {(row["at"]["gpus"], row["at"]["strategy"]): row for row in document["rows"]}
    assert {at: row["status"] for at, row in found.items()} == {
        ("4", "tp"): "ok", ("4", "ddp"): "ok", ("8", "tp"): "cannot", ("8", "ddp"): "ok",
        ("12", "tp"): "cannot", ("12", "ddp"): "cannot",
    }  # fmt: skip
    assert "4 heads over 8 ranks" in found["8", "tp"]["reason"]
    assert "12 / 8 = 1.5 nodes" in found["12", "ddp"]["reason"]
    assert document["schema"] == "rtp-sim/sweep/1"
    assert list(document) == documented_keys("sweep")
    assert all(list(row) == documented_keys("A point") for row in document["rows"])
    # ddp, at 4 and at 8 GPUs.
    assert document["fastest"] == {"tp": 0, "ddp": 2}


# ---- crossings


def test_crossings_by_hand() -> None:
    """a is 10 throughout; b falls from 20 to 0 between 100 and 200: they meet at 150."""
    found = crossings([100, 200, 400], {"a": [10, 10, 10], "b": [20, 0, 0]})
    assert found == [Crossing(150, 10, "b", "a", True)]
    # From 4 above to 8 below between 100 and 400: a third of the way.
    assert crossings([100, 400], {"a": [5, 9], "b": [9, 1]}) == [Crossing(200, pytest.approx(19 / 3), "b", "a", True)]


def test_a_crossing_behind_a_third_does_not_lead() -> None:
    found = crossings([0, 2], {"a": [3, 5], "b": [5, 3], "c": [1, 1]})
    assert found == [Crossing(1, 4, "b", "a", False)]


def test_lines_that_touch_or_end_do_not_cross() -> None:
    assert crossings([0, 1, 2], {"a": [1, 2, 1], "b": [3, 2, 3]}) == []
    assert crossings([0, 1], {"a": [1, 1], "b": [1, 1]}) == []
    assert crossings([0, 1, 2], {"a": [1, None, 3], "b": [2, 2, 2]}) == []
    # Through a common point of the grid it is one crossing, there.
    assert crossings([0, 1, 2], {"a": [1, 2, 3], "b": [3, 2, 1]}) == [Crossing(1, 2, "b", "a", True)]


# ---- folders


def test_a_folder_goes_on_and_shares_points(tmp_path: Path, counting: Path) -> None:
    first = here(tmp_path / "s")
    before = contents(tmp_path / "s")
    assert calls() == {f"{b}-{s}": 1 for b in "123" for s in ("ddp", "fsdp")}
    assert metrics_of(here(tmp_path / "s")) == metrics_of(first)
    assert contents(tmp_path / "s") == before
    # A larger grid takes what is there and computes the rest.
    here(tmp_path / "s", tiny_grid(4))
    assert Counter(calls().values()) == {1: 8}


def test_a_torn_line_is_dropped_and_computed_again(tmp_path: Path, counting: Path) -> None:
    here(tmp_path / "s")
    before = contents(tmp_path / "s")
    data = before["points.jsonl"]
    for cut in (1, 40, len(data.splitlines()[-1])):
        (tmp_path / "s" / "points.jsonl").write_bytes(data[:-cut])
        here(tmp_path / "s")
        assert contents(tmp_path / "s") == before
    assert calls()["3-fsdp"] == 4
    assert sum(calls().values()) == 6 + 3


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path, counting: Path) -> None:
    here(tmp_path / "s", tiny_grid(1))
    axes, points = tiny_grid(1)
    others = [replace(p, request=replace(p.request, gpus=4)) for p in points]
    with pytest.raises(InputError, match=r"holds another sweep: none of its 2 points is one of this sweep's 2 \("):
        here(tmp_path / "s", (axes, others))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(InputError, match=r"holds cat\.jpg and no sweep\.json"):
        here(tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot use the folder"):
        here(tmp_path / "file")


def test_one_sweep_at_a_time(tmp_path: Path, counting: Path) -> None:
    def nested(point: Point) -> sweep_points.Answer:
        with pytest.raises(InputError, match="in use by another sweep"):
            here(tmp_path / "s")
        return sweep_points.really(point)

    assert len(here(tmp_path / "s", tiny_grid(1), nested).rows) == 2


# ---- workers


def test_a_worker_dies_and_nothing_is_lost(tmp_path: Path, counting: Path) -> None:
    axes, points = tiny_grid()
    table = run_sweep(
        axes, points, tmp_path / "s", lambda: LocalProcesses(2), {}, evaluate_point=sweep_points.deadly_once
    )
    made = calls()
    assert metrics_of(table) == metrics_of(here(None))
    assert made.pop("2-ddp") == 2
    # At most the one that was in flight beside it was computed again.
    assert sorted(made.values()) in ([1] * 5, [1] * 4 + [2])


def test_a_deadly_point_is_named_and_the_others_are_computed(tmp_path: Path, counting: Path) -> None:
    axes, points = tiny_grid()
    table = run_sweep(axes, points, tmp_path / "s", lambda: LocalProcesses(2), {}, evaluate_point=sweep_points.deadly)
    row = table.rows["2", "ddp"]
    assert (row["status"], row["metrics"]) == ("failed", None)
    assert row["reason"] == "its worker died 3 times while it computed nothing but this point"
    assert len(metrics_of(table)) == 5
    # Once beside another, three times alone.
    assert calls()["2-ddp"] in (3, 4)
    # A failure is tried again by the next run; it is the only one.
    before = Counter(calls())
    again = run_sweep(axes, points, tmp_path / "s", InThisProcess, {}, evaluate_point=sweep_points.counted)
    assert len(metrics_of(again)) == 6
    assert Counter(calls()) - before == {"2-ddp": 1}


def test_a_point_that_raises_is_a_named_failure(counting: Path) -> None:
    table = here(None, evaluate=sweep_points.raising)
    assert table.rows["2", "ddp"]["reason"] == "ZeroDivisionError: of the test"
    assert len(metrics_of(table)) == 5


def test_a_worker_with_other_profiles_is_found_out(counting: Path) -> None:
    def elsewhere(point: Point) -> sweep_points.Answer:
        return sweep_points.really(replace(point, changes=(("link.ib.bandwidth", "1Gb/s"),)))

    with pytest.raises(InputError, match="computes something else"):
        here(None, evaluate=elsewhere)


# ---- a sweep that is killed


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rtp_sim", *TINY.split(), "-o", str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, f"{path} got no {count} lines"
        time.sleep(0.002)


def test_a_killed_sweep_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--vary", "seq-len=16,32,64", "--format", "csv", "--report")
    uninterrupted = start(whole, *more, str(tmp_path / "whole.html"))
    expected, _ = uninterrupted.communicate(timeout=120)
    assert uninterrupted.returncode == 0
    process = start(killed, *more, str(tmp_path / "killed.html"))
    wait_for_lines(killed / "points.jsonl", 3)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    kept = (killed / "points.jsonl").read_bytes().count(b"\n")
    assert 3 <= kept < 24
    assert not (killed / "table.json").exists()
    (worker,) = {json.loads(line)["worker"] for line in (killed / "log.jsonl").read_text(encoding="utf-8").splitlines()}
    resumed = start(killed, *more, str(tmp_path / "killed.html"))
    out, err = resumed.communicate(timeout=120)
    assert (resumed.returncode, out) == (0, expected)
    assert f"{kept} of 24 points are in" in err
    log = [json.loads(line)["key"] for line in (killed / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(log) == len(set(log)) == 24
    assert contents(killed) == contents(whole)
    assert (tmp_path / "killed.html").read_bytes() == (tmp_path / "whole.html").read_bytes()
    # The worker of the killed sweep has ended, too.
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists() or not Path("/proc").exists()


# ---- the command


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--vary micro-batc=1,2", "did you mean micro-batch"),
        ("--vary link.ibb.bandwidth=1,2Gb/s", "unknown link 'ibb'"),
        ("--vary link.ib.bandwidth=1,2", "expected a bandwidth: a number"),
        ("--vary seq-len=16,two", "'two'"),
        ("--vary strategy=ddp", "--strategies"),
        ("--vary gpus=2", "gpus is varied twice"),
        ("--vary no-dp-overlap=1", "expected no or yes"),
        ("--strategies fdsp", "fsdp"),
        ("--strategies ,", "expected"),
        ("--nodes 2", "--gpus and --nodes"),
        ("--report nowhere/x.html", "no directory nowhere"),
        ("--gpus 2,x", "'x'"),
        ("--model gpt3", "gpt3"),
        ("--cluster dgx-z100", "dgx-z100"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    assert main([*TINY.split(), "--quiet", *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (message,) = captured.err.splitlines()
    assert words in message


def test_switches_profiles_and_clusters_are_varied(capsys: pytest.CaptureFixture[str]) -> None:
    line = "sweep --model gpt2-tiny --strategies fsdp --gpus 16 --workers 1 --quiet --format csv"
    varied = ("--vary", "cluster=dgx-a100-80g,dgx-h100", "--vary", "no-fsdp-prefetch=no,yes", "--vary",
              "link.network.bandwidth=10,400Gb/s")  # fmt: skip
    assert main([*line.split(), *varied]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    steps = {
        tuple(row[n] for n in ("cluster", "no-fsdp-prefetch", "link.network.bandwidth")): row["step_time_s"]
        for row in rows
    }
    assert len(steps) == len(set(steps.values())) == 8
    assert float(steps["dgx-h100", "no", "10Gb/s"]) > float(steps["dgx-h100", "no", "400Gb/s"])


def test_nothing_fits_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    line = "sweep --model llama2-70b --strategies ddp --gpus 2 --workers 1 --quiet"
    assert main(line.split()) == 1
    assert "1 points: 0 fit, 1 do not fit. Nothing fits." in capsys.readouterr().out


def test_progress_says_rate_and_rest() -> None:
    assert progress_text(37, 187, 30, 10.0) == "37 of 187 points, 3 points/s, about 50 s left"
    assert progress_text(187, 187, 150, 60.0) == "187 of 187 points, 2.5 points/s, 60 s"
    assert progress_text(7, 187, 0, 10.0) == "7 of 187 points"
    told: list[str] = []
    progress = Progress(2, 0, told.append, every_s=1e9)
    progress.tick()
    progress.count()
    progress.tick()
    assert told == []
    progress.count()
    progress.tick()
    progress.tick()
    assert len(told) == 1
    assert told[0].startswith("2 of 2 points, ")


def test_the_seam_keeps_the_environment_of_this_process() -> None:
    assert FOLDER not in os.environ
