"""What the planner's choices among published runs cost: regrets worked out by hand, and the command as a user meets
it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import documented_keys
from test_report_html import Elements, run_browser
from test_validation_measured import NASTY, row, run, table  # noqa: F401

from rtp_sim.compose.memory import StageMemory
from rtp_sim.report.decisions_tables import decision_grids, decision_verdict, plan_of
from rtp_sim.validation.accuracy import Fits, Outcome
from rtp_sim.validation.decisions import decisions_of, quantile, summarise_decisions
from rtp_sim.validation.evaluate import Estimate


def outcome(name: str, predicted: float | None, measured: float | None, fits: bool = True, **changes: str) -> Outcome:
    """A row that was predicted (or not) and ran (or failed)."""
    status = "failed" if measured is None else "ok"
    cells = row(row_id=name, step_time_s="" if measured is None else str(measured), status=status, **changes).cells
    stages, room = (StageMemory({"weights": 1}),), 2 if fits else 0
    estimate = None if predicted is None else Estimate(predicted, predicted, 0, 0, 0, 0, stages, room)
    return Outcome("runs.csv", 2, name, cells, False, estimate)


def test_the_regret_of_the_first_in_rank():
    (d,), left = decisions_of([outcome("a", 3, 10), outcome("b", 1, 12), outcome("c", 2, 8)])
    assert (d.pick and d.pick.row_id, d.best.row_id, d.attempts, left) == ("b", "c", 1, 0)
    # 12 s where 8 s were to be had; c is second in rank. The median run takes 10 s.
    assert (d.regret, d.regret_of_tries, d.blind) == (1.5, 1.0, 1.25)
    # Ranks of the predictions 3 1 2, of the times 2 3 1: 1 - 6 (1 + 4 + 1) / (3 (9 - 1)) = -0.5.
    assert d.correlation == pytest.approx(-0.5)
    assert [o.row_id for o in d.ranked] == ["b", "c", "a"]


def test_picks_that_failed_are_attempts():
    rows = [outcome("a", 1, None), outcome("b", 2, None), outcome("c", 3, 10), outcome("d", 4, 8), outcome("e", 5, 9)]
    (d,), _ = decisions_of(rows)
    assert (d.pick and d.pick.row_id, d.attempts, d.regret) == ("c", 3, 1.25)
    # Three tries end with c.
    assert d.regret_of_tries == 1.25
    s = summarise_decisions(rows)
    assert (s.first_pick_failed, s.best_found, s.fits) == (1, 0, Fits(3, 2, 0, 0))
    assert s.fits_right == 0.6


def test_what_is_predicted_not_to_fit_is_not_picked():
    rows = [outcome("a", 1, 5, fits=False), outcome("b", 2, 6), outcome("c", 9, None, fits=False)]
    (d,), _ = decisions_of(rows)
    # Rightly ruled out: c. Wrongly: a, the best, which counts all the same.
    assert (d.pick and d.pick.row_id, d.best.row_id, d.regret) == ("b", "a", 1.2)
    assert d.fits == Fits(true_fit=1, false_fit=0, true_fail=1, false_fail=1)


def test_no_pick_is_infinitely_bad_and_not_left_out():
    rows = [outcome("a", 1, 5, fits=False), outcome("b", 2, 6, fits=False)]
    (d,), _ = decisions_of(rows)
    assert (d.pick, d.regret) == (None, math.inf)
    s = summarise_decisions(rows)
    assert (s.no_pick, s.median, s.within_bars) == (1, math.inf, False)
    assert "median regret no pick" in decision_verdict(rows)


def test_ties_cost_their_mean():
    (d,), _ = decisions_of([outcome("a", 1, 8), outcome("b", 1, 12), outcome("c", 2, 10)])
    assert d.regret == 1.25


def test_the_best_may_have_no_prediction():
    (d,), _ = decisions_of([outcome("a", None, 4), outcome("b", 1, 6)])
    assert (d.best.row_id, d.regret, d.predicted, d.measured) == ("a", 1.5, 1, 2)


def test_groups_are_what_the_issue_says():
    rows = [
        outcome("a", 1, 6), outcome("b", 2, 5),
        outcome("c", 1, 6, gpus="16", dp="16", global_batch="32"),
        outcome("d", 2, 3, gpus="16", dp="16", global_batch="32"),
        outcome("e", 1, 9, global_batch="32", num_microbatches="2"),
        outcome("f", 1, 9, seq_len="1024"), outcome("g", 1, 9, model="another"), outcome("h", 1, 9, source="another"),
    ]  # fmt: skip
    found, left = decisions_of(rows)
    assert [(d.group.gpus, d.group.global_batch, d.regret) for d in found] == [(8, 16, 1.2), (16, 32, 2.0)]
    assert left == 4
    s = summarise_decisions(rows)
    assert (s.decisions, s.median, s.p90, s.worst) == (2, pytest.approx(1.6), pytest.approx(1.92), 2.0)


def test_a_blank_global_batch_is_worked_out():
    # 2 sequences x 3 micro-batches x 8 replicas.
    rows = [outcome("a", 1, 6, global_batch="", num_microbatches="3"), outcome("b", 2, 5, global_batch="48")]
    (d,), _ = decisions_of(rows)
    assert d.group.global_batch == 48


@given(st.lists(st.floats(1, 10), min_size=1, max_size=12), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], share: float):
    import numpy as np

    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_quantiles_with_infinity():
    assert quantile([1, 2, math.inf], 0.5) == 2
    assert quantile([1, math.inf], 0.5) == math.inf
    assert quantile([], 0.5) is None


def test_the_costliest_decision_shows_both_sides():
    rows = [outcome("a", 3, 10, dp="4", tp="2"), outcome("b", 1, 12), outcome("c", 2, 8)]
    grids = {grid.name: grid for grid in decision_grids(rows, 5)}
    assert [line[1:6] for line in grids["sides"].rows] == [
        ("picked", "ddp dp=8 mb=2x1", "12.0 s", "1.00 s", "-91.7 %"),
        ("best", "ddp dp=8 mb=2x1", "8.00 s", "2.00 s", "-75.0 %"),
    ]
    assert plan_of(rows[0]) == "ddp + tp dp=4 tp=2 mb=2x1"


def test_the_command(run: Any, table: Callable[..., Path], tmp_path: Path):  # noqa: F811
    # Full recompute is predicted to be slower than none, and was measured to be faster.
    path = table({"step_time_s": "0.5"}, {"step_time_s": "0.4", "recompute": "full"}, {"model": NASTY}, {"gpus": "3"})
    answer = run("validate", "--decisions", path, "--format", "json", "--quiet")
    document = json.loads(answer.out)
    # The row with a mistake is named, the others are judged.
    assert answer.code == 1
    assert "line 5, column gpus: given 3" in answer.err
    assert list(document) == documented_keys("validate --decisions")
    assert list(document["summary"]) == documented_keys("The summary of decisions")
    (decision,) = document["decisions"]
    assert list(decision) == documented_keys("A decision")
    assert (decision["pick"], decision["best"], decision["regret"]) == ("r1", "r2", 1.25)
    assert (document["summary"]["decisions"], document["summary"]["left_out"]) == (1, 1)
    page = tmp_path / "page.html"
    answer = run("validate", "--decisions", path, "--report", page)
    assert "1 decisions (1 groups with fewer than two measured runs left out): median regret 1.250" in answer.out
    dom = Elements(run_browser(page, "--dump-dom"))
    assert "ddp dp=8 mb=2x1 recompute=full" in dom.text
    assert not dom.having("img")
