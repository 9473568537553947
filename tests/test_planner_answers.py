"""What a plan says: hand-counted memory, prices, reasons, contradictions, the nearest miss, the same bytes twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from planner_helpers import question, search, small_model

from rtp_sim.cli import main
from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.planner import answer
from rtp_sim.planner.answer import make_plan
from rtp_sim.planner.capacity import Need, offers
from rtp_sim.planner.constraints import parse_limit
from rtp_sim.planner.memory_bounds import by_category
from rtp_sim.planner.money import machine_of, price_of
from rtp_sim.planner.nearest_miss import nearest_miss
from rtp_sim.planner.pareto import apart, front_of
from rtp_sim.planner.plan import plan_json
from rtp_sim.planner.space import EVERY_STRATEGY
from rtp_sim.planner.what_if import break_even, scaled

# The small model: embedding and head 4096 x 512 each; a block 2 norms of 512, qkv 512 x (8 + 2 x 4) 64, out 512 x 512,
# gate and up 512 x 2816, down 1408 x 512; a last norm.
BLOCK = 2 * 512 + 512 * 1024 + 512 * 512 + 512 * 2816 + 1408 * 512
PARAMETERS = 2 * 4096 * 512 + 4 * BLOCK + 512


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        # bf16: 2 bytes of weights and gradients, 12 of optimizer state (fp32 master, two moments), 4 ranks.
        ("zero1", 2 * PARAMETERS, 2 * PARAMETERS, PARAMETERS // 4 * 12),
        ("fsdp", PARAMETERS // 4 * 2, 0, PARAMETERS // 4 * 12),
    ],
)
def test_states_are_those_of_the_zero_table(tmp_path, strategy: str, weights: int, gradients: int, optimizer: int):
    """One micro-batch: under fsdp gradients come after the peak, zero1 keeps them all the time."""
    searched = search(question(small_model(tmp_path), 4, 4, (strategy,), limits=(parse_limit("recompute=none"),)))
    site = searched.sites[0]
    assert len(site.space) == 1
    held = by_category(site.memory[:, 0])
    assert (held["weights"], held["gradients"], held["optimizer"]) == (weights, gradients, optimizer)


def test_a_pipelines_first_stage_holds_a_micro_batch_per_later_stage(tmp_path):
    """1F1B on 4 stages: 4 micro-batches under way on the first, and a block each."""
    limits = (parse_limit("pp=4"), parse_limit("micro-batch=1"), parse_limit("recompute=none"))
    searched = search(question(small_model(tmp_path), 4, 8, ("1f1b", "gpipe"), limits=limits))
    site = searched.sites[0]
    one = next(p for p in range(len(site.space)) if EVERY_STRATEGY[site.space.strategy[p]] == "1f1b")
    kept = site.model.activations.kept("tp", 1, "none")
    expected = 4 * (kept.first_bytes + kept.block_bytes) + kept.backward_bytes
    assert by_category(site.memory[:, one])["activations"] == expected
    # First stage: the embedding and a block.
    assert by_category(site.memory[:, one])["weights"] == 2 * (4096 * 512 + BLOCK)


def test_prices_are_gpus_times_time():
    """8 H100s at 6.88 USD and 700 W for 1800 s and 36 million tokens: half an hour of 55.04 USD/h and 5.6 kW."""
    cluster = load_cluster("dgx-h100", 1)
    machine = machine_of(cluster, 0.25, {})
    price = price_of(machine, 1800.0, 36e6)
    assert price.usd_per_step == pytest.approx(27.52)
    assert price.kwh_per_step == pytest.approx(2.8)
    assert price.usd_per_million_tokens == pytest.approx(27.52 / 36)
    assert machine.allowed_bytes == int(machine.memory_bytes * 0.75)
    assert machine_of(cluster, 0.0, {"": 2.0}).price_usd_per_gpu_hour == 2.0
    assert machine_of(cluster, 0.0, {"": 2.0, "dgx-h100": 3.0}).price_usd_per_gpu_hour == 3.0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (["tp=8", "tp*pp=4"], "tp=8 and tp*pp=4 cannot both hold on 8 GPUs"),
        (["tp=3"], "tp=3 cannot hold on 8 GPUs: tp can be 1, 2, 4, 8"),
        (["dp>=2", "micro-batch=1", "tp*pp=8", "recompute=none"], "dp>=2 and tp*pp=8 cannot both hold on 8 GPUs"),
        (["dp<=2", "tp<=2", "pp<=1", "rtp=1"], "dp<=2, tp<=2, pp<=1 and rtp=1 cannot all hold on 8 GPUs"),
    ],
)
def test_contradictions_are_named(tmp_path, limits: list[str], message: str):
    asked = question(small_model(tmp_path), 8, 8, ("fsdp", "rtp", "tp", "1f1b"))
    with pytest.raises(InputError) as caught:
        search(replace(asked, limits=tuple(parse_limit(text) for text in limits)))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", ["tp", "tq=3", "tp=0", "tp<=1,2", "recompute<full", "recompute=some", "tp*recompute=2"]
)
def test_limits_that_make_no_sense(text: str):
    with pytest.raises(InputError, match="limit"):
        parse_limit(text)


def test_nothing_fits_and_what_would_make_it_fit(tmp_path):
    """With 99.9 % of the memory kept free nothing fits; without that it does."""
    asked = question(small_model(tmp_path), 2, 4, ("fsdp", "ddp"), headroom=0.999)
    searched = search(asked)
    plan, miss = make_plan(searched), nearest_miss(searched)
    assert plan.shown == ()
    assert miss.candidate is not None
    assert miss.candidate.strategy == "fsdp"
    assert miss.reason.startswith("needs 0.")
    assert any(remedy.startswith("without the memory head-room of 99.9%: ") for remedy in miss.remedies)
    reasons = {row.candidate.strategy: row.reason for row in plan.others}
    assert reasons["ddp"].startswith("needs at least ")
    assert "optimizer" in reasons["ddp"]


def test_the_stages_add_up_and_the_same_question_gives_the_same_bytes(tmp_path):
    asked = question(small_model(tmp_path), 4, 8, top=3, front=True)
    plan = make_plan(search(asked))
    again, two = (json.dumps(plan_json(make_plan(search(replace(asked, processes=n))))) for n in (1, 2))
    assert json.dumps(plan_json(plan)) == again == two
    assert plan.stages[0].entered == plan.candidates
    for before, after in zip(plan.stages, plan.stages[1:], strict=False):
        assert before.entered - before.dropped == after.entered
    assert plan.stages[-1].entered - plan.stages[-1].dropped == len(plan.shown) == 3
    assert {row.candidate.strategy for row in (*plan.shown, *plan.others)} >= {"ddp", "fsdp", "rtp", "tp", "1f1b"}


def test_plans_near_the_memory_are_named(tmp_path, monkeypatch):
    searched = search(question(small_model(tmp_path), 4, 8, top=3))
    most = sorted(one.metrics.peak_memory_bytes for one in searched.lines[:3])[-2]
    monkeypatch.setattr(answer, "TIGHT", most / searched.sites[0].machine.memory_bytes)
    plan = make_plan(searched)
    (rank,) = [row.rank for row in plan.shown if row.tight]
    assert plan.shown[rank - 1].metrics.peak_memory_bytes > most
    assert plan.notes[0].startswith(f"plan {rank} needs more than ")
    monkeypatch.setattr(answer, "TIGHT", 1.0)
    assert not any("of the memory" in note for note in make_plan(searched).notes)


def test_fronts_are_what_nothing_beats():
    points = [(1.0, 9.0, 1.0), (2.0, 5.0, 2.0), (2.0, 6.0, 2.0), (3.0, 5.0, 3.0), (1.0, 9.0, 1.0)]
    assert front_of(points) == [0, 1]


def test_near_copies_of_a_faster_plan_are_left_out():
    """2 % less memory than all that is kept says something new, 1 % does not."""
    points = [(1.0, 100.0, 1.0), (1.01, 99.0, 1.01), (1.02, 97.9, 1.02), (1.03, 97.0, 1.03), (2.0, 95.9, 2.0)]
    assert apart(points) == [0, 2, 4]


def test_a_run_takes_tokens_over_tokens_per_second(tmp_path):
    """The offer's time is steps x step time; its cost follows; a deadline that one node misses takes more."""
    asked = question(small_model(tmp_path), 8, 64, ("zero1", "fsdp"), cluster="dgx-h100")
    (offer,) = offers(asked, ["dgx-h100"], Need(1e9, None, None), 4)
    assert offer.row is not None
    assert offer.row.metrics is not None
    steps = 1e9 / (64 * 512)
    assert offer.nodes == 1
    assert offer.seconds == pytest.approx(steps * offer.row.metrics.step_time_s)
    assert offer.usd == pytest.approx(offer.seconds / 3600 * 8 * 6.88)
    (tight,) = offers(asked, ["dgx-h100"], Need(1e9, offer.seconds * 0.7, None), 4)
    assert tight.nodes > 1
    (poor,) = offers(asked, ["dgx-h100"], Need(1e9, None, offer.usd * 0.5), 1)
    assert poor.why.startswith("costs ")
    (late,) = offers(asked, ["dgx-h100"], Need(1e9, offer.seconds * 0.001, None), 2)
    assert late.row is None
    assert late.why.startswith("no plan reaches")


def test_break_even_lies_where_the_faster_strategy_changes(tmp_path):
    """Bisection of the slowest link between rotation, which sends weights, and tensor parallelism, which sends
    activations: at the ends and beside the point found the order is what it says."""
    from rtp_sim.planner.what_if import _best_s, with_change

    asked = question(small_model(tmp_path), 2, 16, ("ddp", "fsdp"), limits=(parse_limit("recompute=none"),))
    found = break_even(asked, "device.kernel_floor", "ddp", "fsdp", 4.0)
    ends = {v: [_best_s(with_change(asked, found.key, v), s) for s in ("ddp", "fsdp")] for v in (found.low, found.high)}
    low = "ddp" if ends[found.low][0] <= ends[found.low][1] else "fsdp"
    high = "ddp" if ends[found.high][0] <= ends[found.high][1] else "fsdp"
    assert found.below == low
    assert (found.at is None) == (low == high)


def test_numbers_are_scaled_in_their_own_unit():
    assert scaled("25 GB/s", 1.2, "link.ib.bandwidth") == "30 GB/s"
    assert scaled(0.9, 1.2, "device.matmul_efficiency") == 1.0
    assert scaled(1.1, 0.8, "device.overlap_slowdown") == 1.0
    assert scaled(100, 1.2, "device.compute_units") == pytest.approx(120)


def test_what_does_not_fit_has_bounds_as_well(capsys):
    workload = ["--model", "llama2-7b", "--gpus", "8", "--global-batch", "8"]
    limits = ["--strategies", "ddp,fsdp", "--micro-batch", "1", "--recompute", "none", "--dp-sync", "ddp"]
    assert main(["plan", *workload, *limits, "--top", "1", "--format", "json", "--quiet", "--jobs", "1"]) == 0
    (ddp,) = json.loads(capsys.readouterr().out)["others"]
    assert (ddp["stage"], ddp["feasible"]) == ("memory", False)
    assert main(["simulate", *workload, "--micro-batch", "1", "--strategy", "ddp", "--format", "json"]) in (0, 1)
    simulated = json.loads(capsys.readouterr().out)
    step_s = simulated["row"]["step_time_s"]
    assert 0.9 * step_s < ddp["bounds"]["lower_s"] <= step_s <= ddp["bounds"]["upper_s"]


def test_the_command_line(tmp_path, capsys):
    model = small_model(tmp_path)
    base = ["plan", "--model", model, "--gpus", "4", "--global-batch", "8", "--seq-len", "512", "--quiet", "--jobs=1"]
    assert main([*base, "--strategies", "fsdp,tp", "--top", "2", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["schema"] == "rtp-sim/plan/1"
    assert [row["rank"] for row in plan["shown"]] == [1, 2]
    assert plan["shown"][0]["metrics"]["step_time_s"] <= plan["shown"][1]["metrics"]["step_time_s"]
    assert plan["shown"][0]["bounds"]["lower_s"] <= plan["shown"][0]["metrics"]["step_time_s"]
    assert main([*base, "--strategies", "ddp", "--memory-headroom", "99.99%"]) == 1
    assert "nearest miss: ddp" in capsys.readouterr().out
    assert main([*base, "--strategies", "tp", "--tp", "4", "--where", "tp*pp=2"]) == 2
    assert "tp=4 and tp*pp=2 cannot both hold on 4 GPUs" in capsys.readouterr().err
    assert main([*base, "--strategies", "fsdp", "--tokens", "1e9", "--deadline", "1h", "--max-nodes", "1"]) in (0, 1)
    assert "tokens/s" in capsys.readouterr().out
