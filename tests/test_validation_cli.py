"""`rtp-sim diff` and `rtp-sim validate` as a user meets them: answers, exit codes, JSON keys, the page, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import Answer, documented_keys
from test_report_html import FRAMES, Elements, root_of, run_browser

from rtp_sim.cli import main
from rtp_sim.cost.model import ClusterCost
from rtp_sim.cost.stated import priced
from rtp_sim.engine.memory import memory_profiles
from rtp_sim.errors import InputError
from rtp_sim.experiment import Request, prepare
from rtp_sim.experiment import run as simulate
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.link import Link
from rtp_sim.metrics import communication_totals
from rtp_sim.schedule.ir import Compute, Shift
from rtp_sim.schedule.serialize import to_json
from rtp_sim.stated import to_json as stated_to_json
from rtp_sim.timeline import RankTimes, Timeline
from rtp_sim.timeline_file import load_timeline, save_timeline
from rtp_sim.validation.predict import Conditions
from rtp_sim.validation.runs import Spread, load_run, spread_of
from rtp_sim.validation.runs import validate as judge

NASTY = "</script><img src=x onerror=alert(1)>"
KIB = 2**10


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process."""

    def call(line: str, *more: str) -> Answer:
        code = main([*line.split(), *more])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def predicted() -> Timeline:
    """A rotation over 4 ranks of one host, every rank simulated."""
    request = Request(
        model="gpt2-tiny", cluster="cpu-local", gpus=4, strategy="rtp", precision="fp32", seq_len=64, micro_batch=4
    )
    return simulate(prepare(request), fold=False).timeline


@pytest.fixture
def directory(tmp_path: Path, predicted: Timeline) -> Path:
    """A run that took exactly twice as long as predicted in every op, and 1 KiB more than predicted on rank 2."""
    schedule, path = predicted.schedule, tmp_path / "run"
    path.mkdir()
    times = {rank: RankTimes(2 * t.start_ns, 2 * t.end_ns) for rank, t in predicted.ranks.items()}
    save_timeline(
        Timeline(schedule, "measured", times, predicted.representative_of, {"host": "h"}), path / "measured.json"
    )
    (path / "schedule.json").write_text(to_json(schedule))
    request = {"steps": 5, "device": NASTY, "training": {"precision": "fp32"}, "network": {"name": "toy", "blocks": []}}
    (path / "request.json").write_text(json.dumps(request))
    totals = [communication_totals(schedule, rank) for rank in range(4)]
    peak = memory_profiles(schedule, predicted.ranks)[0].peak_bytes
    step = predicted.step_time_ns
    result = {
        "step_times_ns": [2 * step, 3 * step, step, 2 * step + 10, 2 * step - 10],
        "bytes_sent": [sent for sent, _, _ in totals],
        "messages": [messages for _, messages, _ in totals],
        "peak_memory_bytes": [peak, peak, peak + KIB, peak],
        "anything": "else",
    }
    (path / "result.json").write_text(json.dumps(result))
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def validate(directory: Path, more: str = "") -> str:
    return f"validate {directory} --profile cpu-local --quiet {more}"


# ---- validate: how it was run


def test_a_run_is_predicted_under_its_own_conditions(directory: Path):
    """With 1 ms and 1 GB/s a hop takes that at least, and the profile's own link does not matter."""
    hop = {"transport": "emulated", "link_latency_ns": 1_000_000, "link_bandwidth_bytes_per_s": 10**9}
    edit(directory / "request.json", lambda data: data.update(hop))
    run = load_run(directory)
    assert run.conditions == Conditions(NASTY, Link(1_000_000, 10**9))
    timeline = judge(run, load_cluster("cpu-local", 1, 4), 0.5).diff.predicted
    spans = [span for span in timeline.spans(0) if isinstance(span.op.action, Shift)]
    assert spans
    for span in spans:
        (hop_,) = span.op.action.hops  # type: ignore[union-attr]
        assert span.end_ns - span.start_ns >= 1_000_000 + hop_.bytes_at(0) + 88_000, "the profile's base of a message"


def test_the_times_that_ranks_slept_are_those_of_the_prediction(directory: Path):
    run = load_run(directory)
    edit(directory / "request.json", lambda data: data.update(stated=True))
    with pytest.raises(InputError, match=r"stated\.json is missing"):
        load_run(directory)
    cluster = load_cluster("cpu-local", 1, 4)
    times = priced(run.schedule, ClusterCost(cluster), 2.0, {})
    (directory / "stated.json").write_text(stated_to_json(times))
    found = judge(load_run(directory), cluster, 0.5)
    kernels = {key: 2 * ClusterCost(cluster).compute(*key).duration_ns for key in times.kernels}
    for span in found.diff.predicted.spans(0):
        action = span.op.action
        if isinstance(action, Compute):
            assert span.end_ns - span.start_ns == kernels[action.kernel, action.dtype, action.dims]
    assert any("ranks slept for the times in stated.json" in note for note in found.notes)


@pytest.mark.parametrize("value", [None, "fast", 0])
def test_an_emulated_link_that_is_none(run, directory: Path, value: object):
    link = {"transport": "emulated", "link_latency_ns": 1, "link_bandwidth_bytes_per_s": value}
    edit(directory / "request.json", lambda data: data.update(link))
    answer = run(validate(directory))
    assert (answer.code, answer.out) == (2, "")
    assert "bandwidth" in answer.err


# ---- validate: answers


def test_a_run_twice_as_slow_is_out_of_tolerance(run, directory: Path, predicted: Timeline):
    answer = run(validate(directory, "--format json --worst 3"))
    assert (answer.code, answer.err) == (1, "")
    document = json.loads(answer.out)
    assert list(document) == documented_keys("validate")
    assert document["schema"] == "rtp-sim/validate-run/1"
    assert (document["passed"], document["tolerance"], document["profile"]) == (False, 0.15, "cpu-local")
    step, memory, sent, messages = document["checks"]
    assert list(step) == documented_keys("A check")
    assert step["predicted"] == pytest.approx(predicted.step_time_ns / 1e9)
    assert step["measured"] == pytest.approx(2 * predicted.step_time_ns / 1e9)
    assert (step["relative_error"], step["passed"]) == (-0.5, False)
    assert memory["measured"] == memory["predicted"] + KIB
    assert (sent["passed"], sent["limit"], sent["predicted"]) == (True, 0, sent["measured"])
    assert messages["passed"]
    # Of the steps 1, 2 - d, 2, 2 + d, 3: a tenth of four intervals is 0.4 of the first, or of the last.
    spread = {key: value / step["predicted"] for key, value in document["measured_step_time"].items() if key != "steps"}
    assert spread == pytest.approx({"median_s": 2, "p10_s": 1.4, "p90_s": 2.6}, rel=1e-5)


def test_every_difference_is_documented_and_exact(run, directory: Path):
    document = json.loads(run(validate(directory, "--format json --worst 3")).out)["diff"]
    assert list(document) == documented_keys("diff")
    assert document["relative_error"] == -0.5
    assert [list(rank) for rank in document["ranks"]] == [documented_keys("A compared rank")] * 4
    for rank in document["ranks"]:
        for key in (
            "end_time_s",
            "compute_time_s",
            "exposed_communication_s",
            "overlapped_communication_s",
            "bubble_s",
        ):
            assert rank["measured"][key] == pytest.approx(2 * rank["predicted"][key])
        assert rank["measured"]["bytes_sent"] == rank["predicted"]["bytes_sent"] > 0
    for groups in (document["kernel_classes"], document["layer_kinds"]):
        assert list(groups[0]) == documented_keys("A group of ops")
        assert {g["relative_error"] for g in groups} == {-0.5}
        explained_s = sum(g["error_s"] for g in groups)
        assert explained_s + document["remainder_s"] == pytest.approx(document["error_s"])
    assert len(document["worst_ops"]) == 3
    assert list(document["worst_ops"][0]) == documented_keys("A compared op")
    assert document["only_predicted"] == document["only_measured"] == []


def test_the_median_of_an_even_number_of_steps_is_one_that_took_place():
    # 30 % of the way from the first to the second, and from the last but one to the last, back.
    assert spread_of([40, 10, 30, 20]) == Spread(4, 20, pytest.approx(13), pytest.approx(37))


@pytest.mark.parametrize(("tolerance", "code"), [("0.49", 1), ("0.5", 0)])
def test_the_tolerance_decides(run, directory: Path, tolerance: str, code: int):
    answer = run(validate(directory, f"--tolerance {tolerance}"))
    assert answer.code == code
    assert ("All checks passed." in answer.out) == (code == 0)


def test_memory_out_of_tolerance_is_a_no(run, directory: Path):
    edit(directory / "result.json", lambda d: d["peak_memory_bytes"].__setitem__(1, 10**9))
    answer = run(validate(directory, "--tolerance 0.6"))
    assert answer.code == 1
    assert "Not as predicted: peak memory." in answer.out


@pytest.mark.parametrize("key", ["bytes_sent", "messages"])
def test_one_byte_or_message_more_is_a_no_whatever_the_tolerance(run, directory: Path, key: str):
    before = json.loads((directory / "result.json").read_text())[key][3]

    def swap(data: dict[str, Any]) -> None:
        """The sums stay what they are: ranks 2 and 3 differ, one by one more, one by one less."""
        data[key][3] += 1
        data[key][2] -= 1

    edit(directory / "result.json", swap)
    answer = run(validate(directory, "--tolerance 9"))
    assert answer.code == 1
    assert f"Not as predicted: {key.replace('_', ' ')}." in answer.out
    assert f"no: rank 2: {before} predicted, {before - 1} measured" in answer.out


def test_what_was_not_measured_is_not_judged(run, directory: Path):
    nothing = {"bytes_sent": None, "messages": [], "peak_memory_bytes": None}
    edit(directory / "result.json", lambda d: d.update(nothing))
    document = json.loads(run(validate(directory, "--tolerance 1 --format json")).out)
    assert [check["name"] for check in document["checks"]] == ["step time"]
    assert document["passed"]


def test_a_folded_prediction_is_compared_with_every_rank(run, directory: Path):
    document = json.loads(run(validate(directory, "--format json")).out)
    assert document["diff"]["predicted"]["meta"]["simulated_ranks"] == 1
    assert [rank["predicted_rank"] for rank in document["diff"]["ranks"]] == [0, 0, 0, 0]


def test_the_prediction_is_written_and_diffs_alike(run, directory: Path, tmp_path: Path):
    written = tmp_path / "predicted.json"
    first = json.loads(run(validate(directory, f"--format json --predicted {written}")).out)["diff"]
    assert load_timeline(written).meta["cluster"] == "cpu-local"
    answer = run(f"diff {written} {directory / 'measured.json'} --format json")
    assert answer.code == 0
    second = json.loads(answer.out)
    assert list(second) == documented_keys("diff")
    for key in ("error_s", "kernel_classes", "layer_kinds", "worst_ops", "remainder_s", "critical_rank"):
        assert second[key] == first[key]
    assert second["ranks"][0]["measured"]["bytes_sent"] is None


def test_longest_path_predicts_too(run, directory: Path):
    document = json.loads(run(validate(directory, "--engine longest-path --format json")).out)
    assert document["diff"]["predicted"]["meta"]["engine"] == "longest_path"


def test_tables_for_people(run, directory: Path):
    answer = run(f"validate {directory} --profile cpu-local")
    assert answer.code == 1
    assert "rtp-sim: simulating rtp on cpu-local, 4 ranks" in answer.err
    lines = answer.out.splitlines()
    assert lines[0].startswith("rtp on cpu-local: ")
    assert lines[0].endswith(", -50.0 %. Not as predicted: step time.")
    for title in ("Checks", "Ranks: predicted / measured", "Kernel classes on rank 0", "The worst ops"):
        assert title in lines
    (shift,) = [line for line in lines if line.startswith("shift ")]
    assert "-50.0 %" in shift


def test_a_run_in_double_precision_is_said_to_be_no_measurement(run, directory: Path):
    edit(directory / "request.json", lambda d: d.update(float_dtype="fp64"))
    assert "note: the run computed in fp64, whatever the schedule says" in run(validate(directory)).out


def test_a_run_that_broke_off_later_is_compared_and_said(run, directory: Path):
    edit(directory / "result.json", lambda d: d.update(failure="rank 1 died"))
    assert "note: the run broke off: rank 1 died" in run(validate(directory)).out


# ---- diff: answers


def test_diff_for_people(run, directory: Path, predicted: Timeline, tmp_path: Path):
    save_timeline(predicted, tmp_path / "p.json")
    answer = run(f"diff {tmp_path / 'p.json'} {directory / 'measured.json'} --worst 2")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines()[0].endswith("(-50.0 %).")
    assert len(answer.out.split("The worst ops\n")[1].strip().splitlines()) == 1 + 2


def test_swapped_files_are_told_apart(run, directory: Path, predicted: Timeline, tmp_path: Path):
    save_timeline(predicted, tmp_path / "p.json")
    answer = run(f"diff {directory / 'measured.json'} {tmp_path / 'p.json'}")
    assert answer.code == 2
    assert "expected them the other way round" in answer.err


def test_timelines_of_other_schedules_are_refused(run, directory: Path, predicted: Timeline, tmp_path: Path):
    program = predicted.schedule.programs[0]
    ops = (*program.ops[:3], replace(program.ops[3], name="another"), *program.ops[4:])
    schedule = replace(predicted.schedule, programs=(replace(program, ops=ops),))
    save_timeline(replace(predicted, schedule=schedule), tmp_path / "p.json")
    answer = run(f"diff {tmp_path / 'p.json'} {directory / 'measured.json'}")
    assert (answer.code, answer.out) == (2, "")
    assert f"op 3 is 'another' in predicted, {program.ops[3].name!r} in measured" in answer.err


# ---- bad input


@pytest.mark.parametrize("name", ["request.json", "schedule.json", "measured.json", "result.json"])
def test_missing_and_truncated_files_are_named(run, directory: Path, name: str):
    whole = (directory / name).read_text()
    (directory / name).write_text(whole[: len(whole) // 2])
    cut = run(validate(directory))
    (directory / name).unlink()
    missing = run(validate(directory))
    for answer in (cut, missing):
        assert (answer.code, answer.out) == (2, "")
        assert str(directory / name) in answer.err
        assert answer.err.count("\n") == 1
    assert "is missing; a measured run holds request.json, schedule.json, measured.json, result.json" in missing.err
    assert "column" in cut.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step_times_ns": []}, "'step_times_ns' is empty, no measured step was finished"),
        (
            {"step_times_ns": [], "failure": "rank 1 died"},
            "no measured step was finished: the run failed (rank 1 died)",
        ),
        (
            {"step_times_ns": ["fast"]},
            "key 'step_times_ns.0' is \"fast\"; expected the time of every measured step in ns",
        ),
        ({"step_times_ns": [5, 0]}, "'step_times_ns' holds 0; expected at least 1 ns"),
        ({"messages": [1, 2]}, "'messages' has 2 entries; expected 4, one per rank"),
        ({"peak_memory_bytes": ["x"]}, "key 'peak_memory_bytes.0' is \"x\"; expected peak memory of each rank"),
    ],
)
def test_results_that_make_no_sense_are_refused(run, directory: Path, change: dict[str, Any], words: str):
    edit(directory / "result.json", lambda d: d.update(change))
    answer = run(validate(directory))
    assert answer.code == 2
    assert words in answer.err
    assert str(directory / "result.json") in answer.err


def test_no_steps_at_all(run, directory: Path):
    edit(directory / "result.json", lambda d: d.pop("step_times_ns"))
    assert "key 'step_times_ns' is missing" in run(validate(directory)).err


def test_files_of_two_runs_are_told_apart(run, directory: Path):
    edit(directory / "schedule.json", lambda d: d["programs"][0]["ops"].pop())
    answer = run(validate(directory))
    assert answer.code == 2
    assert "measured.json and schedule.json do not belong together: on rank 0, measured.json has" in answer.err


def test_a_profile_with_other_ranks_is_refused(run, directory: Path):
    # Four ranks do not spread over three nodes.
    answer = run(f"validate {directory} --profile dgx-2 --nodes 3 --quiet")
    assert answer.code == 2
    assert f"--profile dgx-2 for the 4 ranks of {directory}: " in answer.err
    assert "4 / 3" in answer.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "validate nowhere --profile cpu-local",
            "nowhere is no directory; expected what rtp-sim run -o nowhere leaves",
        ),
        ("validate nowhere", "give --profile, the cluster profile of the machine"),
        ("validate", "one of the arguments RUN --measured --all --decisions is required"),
        ("validate nowhere --profile x --tolerance -1", "'-1' is not a fraction of 1 such as 0.15"),
        ("validate nowhere --profile x --tolerance nan", "'nan' is not a fraction of 1 such as 0.15"),
        ("diff nowhere.json nowhere.json", "nowhere.json"),
        ("diff nowhere.json nowhere.json --worst 0", "'0' is not a whole number of at least 1"),
    ],
)
def test_bad_arguments(run, line: str, words: str):
    answer = run(line)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err


def test_an_unknown_profile_and_a_report_that_cannot_be_written(run, directory: Path):
    unknown = run(f"validate {directory} --profile cpu-locl --quiet")
    assert unknown.code == 2
    assert "cpu-local" in unknown.err
    answer = run(validate(directory, "--report nowhere/x.html"))
    assert (answer.code, answer.out) == (2, "")
    assert "cannot write the report to 'nowhere/x.html'" in answer.err


# ---- the page


INTERACTION = """<script>
(() => {
  const root = document.documentElement, canvas = document.getElementById("timeline-canvas");
  root.dataset.first = [canvas.dataset.strategy, canvas.dataset.tracks, canvas.dataset.spansInView].join(",");
  const pick = document.getElementById("timeline-choice");
  root.dataset.ranks = [...pick.options].map((option) => option.textContent).join(",");
  pick.value = "3";
  pick.dispatchEvent(new Event("change"));
  root.dataset.fourth = [canvas.dataset.strategy, canvas.dataset.toNs].join(",");
  const area = canvas.getBoundingClientRect();
  // The first span of the first track begins at the left edge of the plot, at 150 px, below axis and heading.
  canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: area.left + 152, clientY: area.top + 55 }));
  root.dataset.tip = document.getElementById("tip").textContent;
})();
</script>"""


@pytest.fixture
def dom(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Elements:
    """The page of a validation after its scripts and INTERACTION ran."""
    page = tmp_path / "report.html"
    assert main([*validate(directory).split(), "--report", str(page)]) == 1
    capsys.readouterr()
    text = page.read_text(encoding="utf-8")
    text = text.replace("</head>", FRAMES + "</head>").replace("</body>", INTERACTION + "</body>")
    page.write_text(text, encoding="utf-8")
    return Elements(run_browser(page, "--dump-dom"))


def test_the_page_shows_both_sides(dom: Elements, predicted: Timeline):
    root = root_of(dom)
    assert (root["data-errors"], root["data-ready"]) == ("0", "true")
    assert "Not as predicted: step time." in dom.text
    charts = dom.having("svg", "chart")
    assert [c["class"].split()[1] for c in charts] == ["bars", "scatter"]
    # Ten classes and the others, each predicted and measured, the predicted one half as long.
    bars = [a for t, a in dom.elements if t == "rect" and a["class"] in ("segment", "sliver")]
    assert len(bars) == 2 * 11
    for above, below in zip(bars[::2], bars[1::2], strict=True):
        assert (above["fill"], below["fill"]) == ("var(--predicted)", "var(--measured)")
        assert 2 * float(above["width"]) == pytest.approx(float(below["width"]), abs=0.02)
    assert len(dom.having("circle", "point")) > 10
    assert len(dom.having("line", "diagonal")) == 1
    ops, streams = len(predicted.schedule.program(0).ops), len(predicted.schedule.program(0).streams)
    assert root["data-first"] == f"rank 0,{2 * streams},{2 * ops}"
    assert root["data-ranks"] == "rank 0,rank 1,rank 2,rank 3"
    assert root["data-fourth"] == f"rank 3,{2 * predicted.step_time_ns}"
    first = predicted.schedule.program(0).ops[0].name
    assert root["data-tip"].split("\n")[0] == first
    assert root["data-tip"].split("\n")[3].startswith("predicted, rank 3, ring, op 0")
    assert not dom.having("img")
    assert NASTY in dom.text


def test_the_page_of_a_diff_stands_without_a_run(directory: Path, predicted: Timeline, tmp_path: Path):
    save_timeline(predicted, tmp_path / "p.json")
    reports = []
    for name in ("a.html", "b.html"):
        line = ["diff", str(tmp_path / "p.json"), str(directory / "measured.json"), "--quiet"]
        assert main([*line, "--report", str(tmp_path / name)]) == 0
        reports.append((tmp_path / name).read_bytes())
    assert reports[0] == reports[1]
    dom = Elements(run_browser(tmp_path / "a.html", "--dump-dom"))
    assert root_of(dom)["data-errors"] == "0"
    assert "error -" in dom.text
    assert "Checks" not in dom.text
