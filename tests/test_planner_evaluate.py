"""Finalists: what simulations of long steps leave out changes little, and what is replayed changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planner_helpers import question, search, small_model

from rtp_sim.compose.estimate import PASSES
from rtp_sim.experiment import Request, Setting, built, run, settle
from rtp_sim.model.network import transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.planner import evaluate as evaluation
from rtp_sim.planner.answer import make_plan
from rtp_sim.planner.evaluate import WHOLE, evaluate
from rtp_sim.planner.plan import Candidate
from rtp_sim.planner.search import Queue, _best_first, add
from rtp_sim.planner.searched import Found, Searched
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.strategies.pipeline import Repeats


def setting(strategy: str, vocabulary: int = 50304, **changes: object) -> Setting:
    network = transformer_network(find_model("gpt2-medium", num_layers=8, vocab_size=vocabulary), 512)
    return settle(Request("gpt2-medium", "dgx-a100-80g", strategy, **changes), network=network)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("1f1b", {"pp": 2, "inner": 2, "nodes": 1}),
        ("interleaved", {"pp": 2, "inner": 2, "nodes": 1,
                         "options": Options(vpp=2, sequence_parallel=True, dp_sync="zero1")}),
        ("gpipe", {"pp": 2, "recompute": "full", "options": Options(pp_scatter_gather=True), "inner": 2, "nodes": 1}),
        ("1f1b", {"pp": 4, "gpus": 4, "options": Options(pp_overlap=False)}),
        ("1f1b", {"pp": 2, "gpus": 2, "attention": "materialised", "recompute": "selective", "dropout": 0.1}),
        ("zb-h1", {"pp": 2, "gpus": 2}),
        ("zb-v", {"pp": 2, "gpus": 2}),
    ],
)  # fmt: skip
def test_replayed_actions_are_the_same_ops(strategy: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    given = setting(strategy, micro_batches=6, micro_batch=2, **changes)
    schedule = built(given).schedule
    monkeypatch.setattr(Repeats, "played", lambda *_: False)
    assert built(given).schedule == schedule


def test_ranks_taken_alike_are_close_to_ranks_folded_exactly():
    """Two stages on 12 nodes each, of 20 that share a switch: pairs of a stage differ in how far away the other is."""
    options = Options(vpp=2, sequence_parallel=True, dp_sync="zero1")
    prepared = built(setting("interleaved", pp=2, inner=2, nodes=24, micro_batches=4, options=options))
    exact, alike = run(prepared), run(prepared, alike=True)
    assert len(alike.timeline.ranks) == 2 < len(exact.timeline.ranks)
    assert alike.metrics.step_time_s == pytest.approx(exact.metrics.step_time_s, rel=5e-4)
    assert alike.metrics.bytes_sent_per_rank == exact.metrics.bytes_sent_per_rank


def test_ranks_with_other_shards_and_whom_they_send_to_are_not_taken_alike():
    """A vocabulary that two ranks cannot share evenly: first and last stage have two kinds of ranks, and each sends to
    one of the two of the stages between them, which are the same otherwise."""
    prepared = built(setting("1f1b", vocabulary=50257, pp=4, inner=2, nodes=1, micro_batches=6))
    exact, alike = run(prepared), run(prepared, alike=True)
    assert len(alike.timeline.ranks) == 8
    assert alike.timeline.step_time_ns == exact.timeline.step_time_ns
    even = run(built(setting("1f1b", pp=4, inner=2, nodes=1, micro_batches=6)), alike=True)
    assert len(even.timeline.ranks) == 4


def test_ranks_whose_messages_differ_are_not_taken_alike():
    """Six ranks on nodes of four: the second stage's messages go within a node for some and across for others."""
    prepared = built(setting("1f1b", pp=3, gpus=6, nodes=None, micro_batches=3))
    assert run(prepared, alike=True).timeline.step_time_ns == run(prepared).timeline.step_time_ns


def test_a_long_pipeline_is_simulated_by_its_passes(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """What its estimate composed, its simulation takes; with every op the step is the same within two thousandths."""
    searched = search(question(small_model(tmp_path), 8, 64, ("1f1b",), top=1))
    site, workload = searched.sites[0], searched.question.workload
    monkeypatch.setattr(evaluation, "SMALL_OPS", 0)
    monkeypatch.setattr(evaluation, "EXACT_OPS", 0)
    places = [p for p in range(len(site.space)) if site.space.candidate(p).pp == 4]
    for place in places[:: len(places) // 3]:
        candidate = site.space.candidate(place)
        whole = run(built(settle(candidate.request(workload), site.cluster, searched.network))).metrics
        estimated, how = evaluate(workload, candidate, site.cluster, searched.network, site.model)
        assert (how, list(site.model.composed)) == ("composed", [candidate])
        found, how = evaluate(workload, candidate, site.cluster, searched.network, site.model, simulated=True)
        assert how.startswith(PASSES)
        assert not site.model.composed
        assert found.step_time_s == pytest.approx(whole.step_time_s, rel=2e-3)
        assert found.peak_memory_bytes == estimated.peak_memory_bytes
        split = found.compute_time_s + found.exposed_communication_s + found.bubble_s
        assert split == pytest.approx(found.step_time_s)


def test_short_steps_are_simulated_at_once(tmp_path):
    searched = search(question(small_model(tmp_path), 4, 4, ("1f1b",), top=2))
    site = searched.sites[0]
    for one in searched.found:
        candidate = site.space.candidate(one.place)
        whole = run(built(settle(candidate.request(searched.question.workload), site.cluster, searched.network)))
        assert (one.metrics, one.how) == (whole.metrics, WHOLE)
        assert one.estimated_s is None
    longer, how = evaluate(searched.question.workload, replace(candidate, micro_batches=400), site.cluster,
                           searched.network, site.model)  # fmt: skip
    assert how == "composed"
    assert longer.step_time_s > 50 * one.metrics.step_time_s


# ---- the order of estimates and simulations, with made-up numbers


def empty_search(tmp_path, **changes: object) -> Searched:
    """A search that has evaluated nothing yet."""
    asked = question(small_model(tmp_path), 8, 16, ("fsdp", "tp", "1f1b", "interleaved"), **changes)
    found = search(replace(asked, top=1, simulate=False))
    found.question = asked
    found.found, found.best, found.lines, found.waiting = [], [], [], []
    return found


def play(searched: Searched, simulated: np.ndarray, estimated: np.ndarray, lower: np.ndarray) -> list[list[int]]:
    """The search over made-up times by place; which places were simulated."""
    metrics = run(built(setting("ddp", gpus=2))).metrics
    asked: list[list[int]] = [[], []]

    def evaluated(places, whole: bool) -> list[Found]:
        asked[whole] += [place for _, place in places]
        times = simulated if whole else estimated
        return [Found(0, p, replace(metrics, step_time_s=float(times[p])), "", True, True, None, whole, False)
                for _, p in places]  # fmt: skip

    order = np.argsort(lower, kind="stable")
    _best_first(searched, Queue(np.zeros_like(order), order, lower[order], np.zeros(len(order))), evaluated)
    return asked


@pytest.mark.parametrize("seed", range(8))
def test_the_plans_shown_are_those_of_simulating_everything(tmp_path, seed: int):
    """Estimates up to 2 % below the simulation, bounds up to 3 % below the estimate."""
    searched = empty_search(tmp_path, top=5, variants=True)
    draw, n = np.random.default_rng(seed), len(searched.sites[0].space)
    simulated = 1 + 0.3 * draw.random(n)
    estimated = simulated * (1 - 0.02 * draw.random(n))
    tried, whole = play(searched, simulated, estimated, estimated * (1 - 0.03 * draw.random(n)))
    assert [one.place for one in searched.lines[:5]] == np.argsort(simulated)[:5].tolist()
    assert all(one.final for one in searched.lines[:5])
    assert len(tried) < n
    assert 5 <= len(whole) < len(tried)
    plan = make_plan(searched)
    assert [row.rank for row in plan.shown] == [1, 2, 3, 4, 5]
    assert [(s.stage, s.entered) for s in plan.stages[-2:]] == [("estimate", len(tried)), ("simulate", len(whole))]
    assert [row.estimated_s for row in plan.shown] == [estimated[one.place] for one in searched.lines[:5]]


def test_a_kind_has_one_line_and_counts_its_variants(tmp_path):
    """Of each kind the best is shown; those of a kind whose bound is above it are never looked at."""
    searched = empty_search(tmp_path, top=3)
    site = searched.sites[0]
    kinds = [searched.kind(0, p) for p in range(len(site.space))]
    distinct = list(dict.fromkeys(kinds))
    big = next(k for k in distinct if kinds.count(k) >= 4)
    members = [p for p, k in enumerate(kinds) if k == big]
    # The kind's four first take 1.00, 1.01, 1.02 and, by its bound, at least 1.5; all other kinds 2, 3, 4, ...
    times = np.array([2.0 + distinct.index(k) for k in kinds])
    lower = times.copy()
    times[members] = lower[members] = 1.5
    times[members[:3]], lower[members[:3]] = [1.0, 1.01, 1.02], 0.9
    tried, _ = play(searched, times, times, lower)
    assert searched.lines[0].place == members[0]
    assert set(tried) & set(members) == set(members[:3])
    row = make_plan(searched).shown[0]
    assert [step_s for _, step_s in row.variants.seen] == [1.01, 1.02]
    assert row.variants.within == pytest.approx(0.02)
    assert row.variants.beaten_by_bounds == len(members) - 3
    assert len({searched.kind(0, one.place) for one in searched.lines[:3]}) == 3


def test_intervals_that_meet_are_a_tie(tmp_path):
    """Residuals 0.9 to 1.2: 10 s may be 9 to 12 s. 13.3 s may be 11.97 s: a tie; 13.34 s is at least 12.006 s: none."""
    from rtp_sim.hardware.spec import Number, Residuals

    searched = empty_search(tmp_path, top=5, variants=True)
    site = searched.sites[0]
    residuals = Residuals(Number(0.9, "measured", "a test"), Number(1.2, "measured", "a test"))
    searched.sites[0] = replace(site, cluster=replace(site.cluster, residuals=residuals))
    metrics = run(built(setting("ddp", gpus=2))).metrics
    add(searched, [Found(0, p, replace(metrics, step_time_s=t), WHOLE, True, True, None, True, True)
                   for p, t in enumerate([13.5, 10.0, 13.3, 13.34])])  # fmt: skip
    rows = make_plan(searched).shown
    assert [(row.metrics.step_time_s, row.tie) for row in rows if row.metrics] == [
        (10.0, False), (13.3, True), (13.34, False), (13.5, False),
    ]  # fmt: skip
    assert rows[0].interval_s == pytest.approx((9.0, 12.0))


def test_on_many_gpus_fewer_ops_are_simulated_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation, "about_ops", lambda candidate, model: 10_000)
    few = Candidate("dgx-a100-80g", 1, 8, "1f1b", 1, 4, 2, 1, "tp-dp-pp", "ddp", False, "auto", "none", 1, 8)
    many = [replace(few, gpus=gpus) for gpus in (8, 1_024, 2_048, 2_049)]
    assert [evaluation.short(one, None) for one in many] == [True, True, True, False]  # type: ignore[arg-type]
