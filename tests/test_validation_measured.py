"""Published runs: reading them, what a row is taken to mean, statistics by hand, and the command as a user meets it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import Answer, documented_keys
from test_report_html import Elements, run_browser

from rtp_sim.cli import main
from rtp_sim.compose.memory import StageMemory
from rtp_sim.cost.lockstep import LockstepCost
from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.longest_path import unshared_ns
from rtp_sim.errors import InputError
from rtp_sim.experiment import built
from rtp_sim.experiment import run as run_step
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.model.kernels import bytes_moved
from rtp_sim.model.layers import Extent, Norm
from rtp_sim.schedule.ir import Collective
from rtp_sim.schedule.layout import make_groups, make_layout
from rtp_sim.validation.accuracy import (
    Errors,
    Fits,
    Inside,
    Outcome,
    errors_of,
    fits_of,
    inside_of,
    rank_correlation,
    spearman,
)
from rtp_sim.validation.evaluate import Estimate, evaluate, setting_of
from rtp_sim.validation.fit import PARAMETERS, fit
from rtp_sim.validation.frameworks import FRAMEWORKS, habits_of
from rtp_sim.validation.interpret import Experiment, Unsupported, interpret
from rtp_sim.validation.measured import Problem, Row, RowFile, calibration_half, read_measured
from rtp_sim.validation.peers import CLAIMS
from rtp_sim.validation.published import predict

PLAIN = {
    "row_id": "r1", "source": "a paper", "cluster": "selene-a100-80g", "framework": "megatron-lm", "model": "GPT-tiny",
    "num_layers": "2", "hidden_size": "1024", "ffn_hidden_size": "4096", "num_heads": "16", "num_kv_heads": "16",
    "vocab_size": "1024", "seq_len": "512", "gated_mlp": "False", "tied_embeddings": "True",
    "learned_positions": "True",
    "attention": "flash", "gpus": "8", "gpus_per_node": "8", "strategy": "ddp", "dp": "8", "tp": "1", "pp": "1",
    "vpp": "1", "cp": "1", "ep": "1", "sequence_parallel": "False", "pipeline_schedule": "", "micro_batch": "2",
    "num_microbatches": "1", "global_batch": "16", "precision": "fp16", "grad_precision": "", "recompute": "none",
    "step_time_s": "0.5", "peak_memory_gib": "2", "memory_metric": "", "status": "ok", "note": "",
}  # fmt: skip
NASTY = "<img src=x onerror=alert(1)>"


@pytest.fixture
def table(tmp_path: Path):
    """Writes rows (changes to a plain one) as a CSV file."""

    def write(*changes: dict[str, str], columns: tuple[str, ...] = tuple(PLAIN), name: str = "runs.csv") -> Path:
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(PLAIN | {"row_id": f"r{i + 1}"} | change for i, change in enumerate(changes))
        return path

    return write


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process."""

    def call(*arguments: str | Path) -> Answer:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


def row(**changes: str) -> Row:
    return Row("runs.csv", 2, RowFile.model_validate({k: v for k, v in (PLAIN | changes).items() if v}))


def experiment(**changes: str) -> Experiment:
    return interpret(row(**changes)).experiment


# ---- the file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"dp": "4"},
            "runs.csv, line 3, column gpus: given 8, but dp x tp x pp x cp = 4 x 1 x 1 x 1 = 4; expected the",
        ),
        ({"strategy": "dpp"}, "runs.csv, line 3, column strategy: given 'dpp'; expected one of single, ddp, zero1"),
        ({"micro_batch": "two"}, "runs.csv, line 3, column micro_batch: given 'two'; input should be a valid integer"),
        ({"hidden_size": ""}, "runs.csv, line 3, column hidden_size: blank; expected a value"),
        ({"step_time_s": "-1"}, "runs.csv, line 3, column step_time_s: given '-1'; input should be greater than 0"),
        ({"row_id": "r1"}, "runs.csv, line 3, column row_id: 'r1' is that of line 2 too"),
    ],
)
def test_a_mistake_is_named_and_the_other_rows_are_read(table: Callable[..., Path], change: dict[str, str], said: str):
    first, second, third = read_measured(table({}, change, {})).entries
    assert isinstance(first, Row)
    assert isinstance(third, Row)
    assert isinstance(second, Problem)
    assert str(second).startswith(said)


def test_a_missing_column_is_named(table: Callable[..., Path]):
    path = table({}, columns=tuple(name for name in PLAIN if name != "seq_len"))
    with pytest.raises(InputError, match=r"runs\.csv, line 1: lacks the column seq_len; expected row_id, cluster"):
        read_measured(path)


def test_the_calibration_half_is_fixed_and_never_more_than_half():
    # First bytes of SHA-256: a ca, b 3e, c 2e, d 18, e 3f, f 25 (sha256sum); below 80 and the three lowest: d, f, c.
    assert calibration_half(["a", "b", "c", "d", "e", "f"]) == {"c", "d", "f"}
    assert calibration_half(["a", "b"]) == {"b"}
    assert calibration_half(["a"]) == set()


# ---- what a row means


def test_blanks_are_filled_by_stated_rules():
    found = interpret(row(vocab_size="", num_heads="", num_kv_heads="", framework="megatron-deepspeed"))
    assert (found.experiment.model.vocab_size, found.experiment.model.num_heads) == (50257, 8)
    split = interpret(row(vocab_size="", framework="megatron-deepspeed", tp="2", dp="4"))
    assert split.experiment.model.vocab_size == 51200
    assert "vocab_size is blank: 50257 assumed" in found.assumptions
    assert "num_heads is blank: 8 assumed (heads of about 128)" in found.assumptions


def test_layers_follow_from_the_parameters_in_the_name():
    # 12 h^2 = 12,582,912 a layer; 0.1 billion less 1024 x 1024 embeddings are 7.86 layers: 8.
    assert experiment(num_layers="", model="GPT-0.1B").model.num_layers == 8


def test_equal_runs_are_one_experiment():
    assert experiment(row_id="r1", step_time_s="1") == experiment(row_id="r2", step_time_s="2", note="again")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cp": "2", "dp": "4"}, "context and expert parallelism (cp=2, ep=1) are not supported"),
        ({"strategy": "fsdp", "tp": "2", "dp": "4"},
         "tensor and pipeline parallelism with fsdp on the data-parallel axis are not supported"),
        ({"dp": "4", "pp": "2", "pipeline_schedule": "gppe"},
         "pipeline schedule 'gppe' is not known: did you mean gpipe?"),
        ({"num_layers": "", "model": "mine"}, "num_layers is blank and the model's name tells no parameter count"),
        ({"recompute": "some"}, "recompute 'some' is not known: expected none, selective or full"),
    ],
)
def test_what_cannot_be_predicted_says_why(change: dict[str, str], reason: str):
    with pytest.raises(Unsupported) as raised:
        interpret(row(**change))
    assert str(raised.value) == reason


def test_an_unknown_cluster_is_named_with_its_place():
    with pytest.raises(InputError, match=r"runs\.csv, line 2, column cluster: unknown cluster 'selene-a100-80'"):
        interpret(row(cluster="selene-a100-80"))


# ---- estimates


@pytest.mark.parametrize(
    "change",
    [
        {"dp": "8"},
        {"strategy": "fsdp", "framework": "composer-fsdp"},
        {"strategy": "hsdp", "gpus": "16", "dp": "16"},
        {"strategy": "zero2", "tp": "2", "dp": "4"},
        {"tp": "8", "dp": "1", "sequence_parallel": "True"},
        {"tp": "2", "dp": "2", "pp": "2", "strategy": "zero1"},
        {"dp": "4", "pp": "2", "pipeline_schedule": "ZB-1p"},
    ],
)
def test_an_estimate_is_close_to_the_events_of_the_whole_step(change: dict[str, str]):
    seven = experiment(num_microbatches="7", **change)
    found, whole = evaluate(seven), run_step(built(setting_of(seven))).metrics
    assert found.step_s == pytest.approx(whole.step_time_s, rel=0.02)
    assert found.peak_bytes == pytest.approx(whole.peak_memory_bytes, rel=0.01)
    assert found.compute_s + found.exposed_s + found.bubble_s == pytest.approx(found.step_s)
    assert 0 <= found.host_s < found.step_s


def test_published_names_of_pipelines():
    def named(**change: str) -> tuple[str, int]:
        found = experiment(dp="1", pp="8", num_layers="30", num_microbatches="16", **change)
        return found.strategy, found.options.vpp

    assert named(pipeline_schedule="1F1B") == ("1f1b", 1)
    assert named(pipeline_schedule="ZB-2p sync") == ("zb-2p", 1)
    # 30 blocks, embedding and head over 8 stages: four chunks of one.
    assert named(pipeline_schedule="1F1B-I") == ("interleaved", 4)
    assert named(pipeline_schedule="", vpp="3") == ("interleaved", 3)
    assert named(pipeline_schedule="") == ("1f1b", 1)


def test_memory_of_pure_half_precision_with_the_optimizers_scratch():
    """Plain Adam of everything in fp16: at the optimizer weights, gradients, two moments, DDP's buckets and one scratch
    number per parameter, 2 bytes each; small batches peak there."""
    found = experiment(
        framework="rtp-repo", cluster="rtp-a100-80g", micro_batch="1", seq_len="64", tied_embeddings="False"
    )
    e = evaluate(found)
    parameters = found.network().parameter_count()
    optimizer = 6 * 2 * parameters
    assert optimizer <= e.peak_bytes < optimizer * 1.01


def test_groups_that_share_an_adapter_wait_for_each_other():
    """Eight rings of two ranks between two nodes over four adapters: each adapter carries two of them, so that 4 GiB
    (where the size curve is 1) take twice as long as for one ring alone."""
    cluster = load_cluster("vtrain-a100", gpus=16)
    groups = make_groups(make_layout("tp", 16, 8, 2), cluster.topology)
    alone, together = ClusterCost(cluster), LockstepCost(cluster, groups)
    ring = groups["dp"].instances[0]
    assert len(groups["dp"].instances) == 8
    times = [
        sum(unshared_ns(p, cost) - p.latency_ns for p in cost.collective("all_gather", ring, 4 << 30, "fp16"))
        for cost in (alone, together)
    ]
    assert times[1] == pytest.approx(2 * times[0], rel=1e-6)


def test_a_fit_finds_the_efficiency_behind_the_rows():
    runs = [experiment(micro_batch=str(n), hidden_size=h, ffn_hidden_size="") for n in (4, 8) for h in ("2048", "4096")]
    truth = {"calibration.matmul_efficiency": 0.61}
    seconds = [evaluate(x, load_cluster(x.cluster, gpus=8, changes=truth)).step_s for x in runs]
    found = fit(list(zip(runs, seconds, strict=True)), [PARAMETERS["matmul_efficiency"]], iterations=4, workers=1)
    assert found.values["calibration.matmul_efficiency"] == pytest.approx(0.61, abs=0.01)


# ---- statistics


def outcome(
    predicted: float, measured: float | None, fits: bool = True, status: str = "ok", name: str = "r"
) -> Outcome:
    cells = row(row_id=name, step_time_s="" if measured is None else str(measured), status=status).cells
    estimate = Estimate(
        predicted, predicted, 0, 0, 0, 0, (StageMemory({"weights": 1 << 30}),), (2 << 30) if fits else 1
    )
    return Outcome("runs.csv", 2, name, cells, False, estimate)


def test_errors_by_hand():
    assert errors_of([0.1, -0.2, None, 0.3]) == Errors(3, pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.28),
                                                       pytest.approx(0.2 / 3))  # fmt: skip
    assert errors_of([None]) == Errors(0, None, None, None, None)
    assert outcome(1.5, 1.0).step_time_error == pytest.approx(0.5)
    assert outcome(1.5, 1.0).peak_memory_error == pytest.approx(-0.5)


def test_ranks_by_hand():
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 (16 - 1)) = 0.8.
    assert spearman([(1, 10), (2, 30), (3, 20), (4, 40)]) == pytest.approx(0.8)
    # A tie at the mean of its ranks: 1 2.5 2.5 against 1 2 3.
    assert spearman([(1, 1), (2, 2), (2, 3)]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)
    assert spearman([(1, 1), (1, 2), (1, 3)]) is None
    assert rank_correlation([outcome(t, m) for t, m in ((1, 3), (2, 2), (3, 1))]) == pytest.approx(-1)
    assert rank_correlation([outcome(1, 1), outcome(2, 2)]) is None


def test_fits_by_hand():
    rows = [outcome(1, 1), outcome(1, None, status="failed"), outcome(1, None, False, "failed"), outcome(1, 1, False)]
    assert fits_of([*rows, rows[0]]) == Fits(true_fit=2, false_fit=1, true_fail=1, false_fail=1)


def test_intervals_by_hand():
    # Steps of 1 s with 0.9 to 1.2 around: 0.9 and 1.2 are inside, 0.89 is not.
    rows = [replace(outcome(1, m), spread=(0.9, 1.2)) for m in (0.9, 1.2, 0.89, None)]
    assert rows[0].interval_s == (0.9, 1.2)
    assert [o.in_interval for o in (*rows, outcome(1, 1))] == [True, True, False, None, None]
    assert inside_of(rows) == Inside(3, 2, pytest.approx(1.2 / 0.9))
    assert inside_of([outcome(1, 1)]) == Inside(0, 0, None)


def test_the_interval_of_a_row_is_that_of_its_machine(table: Callable[..., Path]):
    (found,) = predict([read_measured(table({}))])
    left = load_cluster("selene-a100-80g", gpus=8).residuals
    assert left is not None
    assert found.spread == (left.low.value, left.high.value)


def test_peers_stand_beside_the_rows_that_they_are_about():
    assert [c.covers("vtrain.csv", row(pp="2").cells) for c in CLAIMS] == [False, False, True, True]
    assert CLAIMS[0].covers("megatron_sc21.csv", row(tp="2").cells)
    assert not CLAIMS[0].covers("megatron_sc21.csv", row().cells)
    text = (Path(__file__).parent.parent / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for claim in CLAIMS:
        stated = [line for line in text.splitlines() if line.startswith(f"| {claim.rows} | {claim.peer} | ")]
        assert len(stated) == 1
        assert float(stated[0].split(" | ")[2].removesuffix(" %")) == pytest.approx(100 * claim.mape)


# ---- habits


def test_what_ran_is_read_from_the_source_too():
    sc21 = "Narayanan et al. SC'21: Table 2 (PTD-P vs ZeRO-3)"
    assert habits_of("megatron-lm", sc21, splits_model=False) is FRAMEWORKS["deepspeed-zero3"]
    assert habits_of("megatron-lm", sc21, splits_model=True) is FRAMEWORKS["megatron-lm-2021"]
    assert habits_of("megatron-lm", "another", splits_model=False) is FRAMEWORKS["megatron-lm"]
    assert habits_of("unheard of", sc21, splits_model=False) is None


def test_zero3_of_2021_gathers_three_times_in_one_ring():
    ran = experiment(source="PTD-P vs ZeRO-3", recompute="full", gpus="16", dp="16")
    setting = setting_of(ran)
    ops = built(setting).schedule.programs[0].ops
    gathers = [op.name for op in ops if isinstance(op.action, Collective) and op.action.kind == "all_gather"]
    # Two blocks in F, R and B; embedding and head are one unit, gathered once a pass.
    assert [name.removeprefix("m0.gather.") for name in gathers] == [
        "F.root", "F.h0", "F.h1", "B.root", "R.h1", "B.h1", "R.h0", "B.h0",
    ]  # fmt: skip
    # A node has eight adapters, and a ring over two nodes crosses one of each.
    flowing_ns = []
    for cluster in (setting.cluster, load_cluster("selene-a100-80g", gpus=16)):
        cost = ClusterCost(cluster)
        (phase,) = cost.collective("all_gather", tuple(range(16)), 1 << 30, "fp16")
        flowing_ns.append(unshared_ns(phase, cost) - phase.latency_ns)
    assert flowing_ns[0] / flowing_ns[1] == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("overlaps", [True, False])
def test_the_input_gradient_is_reduced_beside_the_weight_gradients_or_behind_them(overlaps: bool):
    ran = experiment(tp="2", dp="4", source="" if overlaps else "Narayanan et al. SC'21")
    ops = built(setting_of(ran)).schedule.programs[0].ops
    reduce = next(op for op in ops if op.name == "m0.h1.mlp.B.reduce.h1.norm2.y")
    last = next(op for op in reversed(ops) if op.name.startswith("m0.h1.mlp.B") and op.name.endswith("linear.wgrad"))
    # The weight gradient of the first product is issued behind the reduction, or before it.
    assert (last.index > reduce.index) == overlaps


def test_the_host_waits_behind_every_pass_of_a_micro_batch():
    ops = built(setting_of(experiment(tp="2", dp="4", num_microbatches="2", gpus="8"))).schedule.programs[0].ops
    # Forward, backward, forward, backward; what comes last in each.
    waited_for = [op.name.split(".")[:2] for op in ops if op.blocks_host]
    assert waited_for == [["m0", "head"], ["m0", "embed"], ["m1", "head"], ["m1", "embed"]]


def test_compiled_rows_have_no_chains_of_elementwise_kernels():
    def passes(**cells: str) -> int:
        ran = experiment(framework="fms-fsdp", strategy="fsdp", gated_mlp="True", **cells)
        return sum(c.kernel == "passes" for x in ran.network().layers() for c in x.op.lower(Extent(1, 8)).calls)

    # Two norms and one rotation in each of two blocks, and the last norm.
    assert passes() == 7
    assert passes(note="torch.compile; 400 Gb/s per node") == 0


def test_chains_move_so_many_words_of_fp32():
    (norm, chain) = Norm("rmsnorm", 64, passes=(7, 14)).lower(Extent(2, 8)).calls
    assert norm.outputs == chain.inputs == chain.outputs == ("y",)
    assert bytes_moved("passes", chain.dims, "bf16") == 4 * 7 * 1024
    assert bytes_moved("passes.bwd", chain.dims, "bf16") == 4 * 14 * 1024


# ---- the command


def test_json_has_the_documented_keys_and_names_bad_rows(run: Any, table: Callable[..., Path]):
    path = table({}, {"gpus": "16"}, {"cp": "2", "dp": "4"}, {"cluster": "nowhere"}, {"micro_batch": "4"},
                 {"num_heads": "30"})  # fmt: skip
    answer = run("validate", "--measured", path, "--format", "json", "--quiet")
    document = json.loads(answer.out)
    assert answer.code == 1
    assert "runs.csv, line 3, column gpus: given 16" in answer.err
    assert "runs.csv, line 5, column cluster: unknown cluster 'nowhere'" in answer.err
    assert "runs.csv, line 7: model 'GPT-tiny': num_heads is 30" in answer.err
    assert document["schema"] == "rtp-sim/validate/1"
    assert [r["predicted_step_time_s"] is not None for r in document["rows"]] == [True, *[False] * 3, True, False]
    assert document["rows"][2]["skipped_reason"].startswith("context and expert parallelism")
    summary = document["summary"]
    assert (summary["rows"], summary["predicted"], summary["skipped"], summary["invalid"]) == (6, 2, 4, 3)
    documented = set(documented_keys("validate --measured"))
    assert set(document) | set(document["rows"][0]) | set(summary) <= documented


def test_table_report_and_results_kept(run: Any, table: Callable[..., Path], tmp_path: Path):
    path, page, kept = table({"model": NASTY}, {"micro_batch": "4"}), tmp_path / "page.html", tmp_path / "kept"
    answer = run("validate", "--measured", path, "--report", page, "--output", kept)
    assert answer.code == 0
    assert "2 of 2 rows predicted" in answer.out
    assert "2 of 2 different experiments predicted" in answer.err
    lines = (kept / "estimates.jsonl").read_text().splitlines()
    assert len(lines) == 2
    (kept / "estimates.jsonl").write_text("\n".join([lines[0], lines[1][:20]]) + "\n")
    again = run("validate", "--measured", path, "--output", kept)
    assert again.out == answer.out
    assert len((kept / "estimates.jsonl").read_text().splitlines()) == 3
    dom = Elements(run_browser(page, "--dump-dom"))
    # Two rows, once by their step time and once by their memory.
    assert len(dom.having("circle", "point")) == 4
    assert not dom.having("img")
    assert NASTY in dom.text


def test_unreadable_files_are_one_message(run: Any, tmp_path: Path):
    answer = run("validate", "--measured", tmp_path / "none.csv")
    assert (answer.code, answer.err) == (
        2,
        f"rtp-sim: {tmp_path / 'none.csv'}: cannot be read: No such file or directory\n",
    )
    answer = run("validate", "--all", tmp_path)
    assert answer.code == 2
    assert "no CSV files" in answer.err
