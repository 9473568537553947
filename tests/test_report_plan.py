"""The page about a plan: what it says of plans laid out by hand, and what a browser makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import Answer
from test_report_html import Elements, run_browser

from rtp_sim.cli import main
from rtp_sim.metrics import StepMetrics
from rtp_sim.planner.plan import Bounds, Candidate, Machine, Plan, Price, Row, StageCount
from rtp_sim.planner.workload import Workload
from rtp_sim.report.diff_tables import Grid
from rtp_sim.report.pareto import Axis, Point, pareto_chart
from rtp_sim.report.plan_html import front_grid, others_grid, plan_headline, plan_html, plans_grid, write_plan_report

GIB = 2**30
NASTY = "<img src=x onerror=alert(1)>"
FSDP = Candidate("dgx-a100-80g", 1, 8, "fsdp", 1, 8, 1, 1, "tp-dp-pp", "ddp", False, "auto", "none", 2, 4)
RTP = replace(FSDP, strategy="rtp", inner=8, dp=1, recompute="full")
TP = replace(FSDP, strategy="tp-sp", inner=4, dp=2, dp_sync="zero1", sequence_parallel=True)


def row(candidate: Candidate, step_s: float, gib: float, **other: Any) -> Row:
    """A row whose step is 3/4 compute, 1/4 exposed communication."""
    metrics = StepMetrics(
        candidate.strategy, "", step_s, 1e5 / step_s, 1e4, 0.5, int(gib * GIB), {"weights": int(gib * GIB)}, True,
        0.75 * step_s, 0.25 * step_s, 0.0, 0.0, 0, 0, {},
    )  # fmt: skip
    bounds = Bounds(step_s / 2, step_s * 2, int(gib * GIB) // 2, {})
    price = Price(step_s / 100, step_s / 10, None, None)
    return Row(candidate, "estimate", True, other.pop("reason", ""), bounds, metrics, "composed", price, **other)


def plan_of(*shown: Row, **other: Any) -> Plan:
    machine = Machine("dgx-a100-80g", 1, 8, 80 * GIB, 72 * GIB, 2.5, "assumed: a guess", 400.0, "vendor: data sheet")
    stages = (StageCount("memory", 1200, 200), StageCount("estimate", 1000, 998))
    return Plan(
        Workload(NASTY, 64), (machine,), "time", {"limits": "tp<=4"}, 1200, stages, shown,
        other.get("front", shown[:1]), other.get("others", ()), ("a note",),
    )  # fmt: skip


def test_the_headline_names_the_best_and_what_is_next():
    plan = plan_of(row(FSDP, 2.0, 40, rank=1), row(RTP, 2.5, 20, rank=2))
    assert plan_headline(plan) == (
        "fsdp dp=8 mb=2x4: 2.00 s per step, 50.0K tokens/s, 40.0 GiB per rank; the next, rtp rtp=8 mb=2x4 "
        "recompute=full, takes 2.50 s. Best of 1,200 candidates (shortest step)."
    )
    tied = plan_of(row(FSDP, 2.0, 40, rank=1), row(RTP, 2.5, 20, rank=2, tie=True), row(TP, 3.0, 20, rank=3))
    assert "; 1 more within its uncertainty. Best of" in plan_headline(tied)
    nothing = replace(plan_of(front=()), notes=("nearest miss: fsdp needs 90 GiB of 72",))
    assert plan_headline(nothing) == "None of 1,200 candidates can be used. nearest miss: fsdp needs 90 GiB of 72"


def test_the_table_says_how_plans_stand_to_the_first():
    plan = plan_of(row(FSDP, 2.0, 40, rank=1, interval_s=(1.9, 2.1)), row(RTP, 2.5, 20, rank=2, tie=True))
    grid = plans_grid(plan)
    # Nothing is known of energy: no such column.
    assert grid.header == ("plan", "against the first", "step", "interval", "tokens/s", "MFU", "peak memory",
                           "$ per M tokens", "lower bound")  # fmt: skip
    assert grid.rows[0][:4] == ("1. fsdp dp=8 mb=2x4", "best (tie)", "2.00 s", "1.90 s to 2.10 s")
    assert grid.rows[1][:4] == ("2. rtp rtp=8 mb=2x4 recompute=full", "+25.0 % time, a tie", "2.50 s", "–")
    assert grid.rows[1][-2:] == ("$0.25", "1.25 s")


def test_the_front_beyond_the_plans_has_letters():
    plan = plan_of(row(FSDP, 2.0, 40, rank=1), front=(row(FSDP, 2.0, 40), row(RTP, 2.5, 20), row(TP, 2.6, 19)))
    assert [line[0] for line in front_grid(plan).rows] == [
        "a. rtp rtp=8 mb=2x4 recompute=full",
        "b. tp-sp tp=4 dp=2 sp dp-sync=zero1 mb=2x4",
    ]


def test_why_not_the_others():
    dropped = replace(row(TP, 1, 90, reason="needs 90 GiB of 72: optimizer 60"), metrics=None, stage="memory")
    (line,) = others_grid(plan_of(row(FSDP, 2.0, 40, rank=1), others=(dropped,))).rows
    assert line == (
        "tp-sp tp=4 dp=2 sp dp-sync=zero1 mb=2x4", "memory", "needs 90 GiB of 72: optimizer 60", "–", "–", "45.0 GiB",
    )  # fmt: skip


def test_the_steps_of_the_front_leave_out_what_two_numbers_beat():
    places = [(1, 9, True), (2, 5, True), (3, 7, True), (4, 5, False)]
    points = [Point(x, y, "", "", front) for x, y, front in places]
    drawn = Elements(pareto_chart("front", points, Axis("time", 1), Axis("memory", 1, 8, "allowed")))
    # From the first to the second, right and down; the third is above them (it is there for its cost).
    assert len(drawn.having("line", "diagonal")) == 2
    assert len(drawn.having("line", "limit")) == 1
    (first, corner) = drawn.having("line", "diagonal")
    assert (first["y1"], first["x2"]) == (first["y2"], corner["x1"])
    dots = drawn.having("circle")
    x = {circle["cx"] for circle in dots}
    assert len(dots) == 4
    assert len(x) == 4


def test_points_that_would_overlap_share_their_label():
    points = [Point(100, 50, "1", "", True), Point(100.5, 50.2, "2", "", False), Point(60, 90, "3", "", True)]
    assert "1, 2" in pareto_chart("front", points, Axis("time", 1), Axis("memory", 1))


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(tmp_path: Path, dark: bool):
    page = tmp_path / "plan.html"
    shown = (row(FSDP, 2.0, 40, rank=1), row(RTP, 2.5, 20, rank=2))
    others = (row(TP, 3.0, 15, reason=f"slower {NASTY}"),)
    sensitivity = Grid("sensitivity", "On which numbers the choice hangs", ("number", "wins"), ((NASTY, "rtp"),), 2)
    write_plan_report(page, plan_of(*shown, front=shown, others=others), sensitivity)
    dom = Elements(run_browser(page, "--dump-dom", *(["--force-dark-mode"] if dark else [])))
    (root,) = dom.having("html")
    assert root["data-errors"] == "0"
    # Two plans with two bars of time and one of memory each, and three points.
    assert len(dom.having("circle", "point")) == 3
    assert len(dom.having("rect", "segment")) == 2 * 2 + 2
    assert not dom.having("img")
    headings = [a["id"] for a in dom.having("h2")]
    assert headings == [f"{name}-heading" for name in
                        ("plans", "front", "time", "memory", "sensitivity", "others", "search", "inputs")]  # fmt: skip
    assert "assumed" in dom.text
    assert f"slower {NASTY}" in dom.text


def test_nothing_to_show_is_a_page_too():
    page = Elements(plan_html(replace(plan_of(front=()), notes=("nearest miss: x",))))
    assert "None of 1,200 candidates can be used. nearest miss: x" in page.text
    assert not page.having("svg")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process."""

    def call(*arguments: str | Path) -> Answer:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


def test_a_plan_is_reported_and_exported(run: Any, tmp_path: Path):
    page, folder = tmp_path / "plan.html", tmp_path / "plans"
    answer = run("plan", "--model", "gpt2-tiny", "--gpus", "4", "--global-batch", "8", "--top", "2", "--strategies",
                 "fsdp,rtp", "--jobs", "1", "--format", "json", "--report", page, "--export", folder)  # fmt: skip
    assert answer.code == 0
    shown = json.loads(answer.out)["shown"]
    assert "Best of " in page.read_text(encoding="utf-8")
    for found in shown:
        own = folder / f"{found['rank']}-{found['candidate']['strategy']}"
        notes = (own / "notes.txt").read_text(encoding="utf-8")
        assert notes.startswith(found["label"] + "\n")
        simulate = next(line for line in notes.splitlines() if line.startswith("rtp-sim simulate"))
        # The command gives the plan again, to the nanosecond.
        again = run(*simulate.split()[1:], "--engine", "estimate", "--format", "json")
        assert json.loads(again.out)["row"]["step_time_s"] == found["metrics"]["step_time_s"]
    assert run("plan", "--model", "gpt2-tiny", "--global-batch", "8", "--report", tmp_path / "no" / "x.html").code == 2
