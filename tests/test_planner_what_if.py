"""Objectives from end to end, what fits at most, and their place in the reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planner_helpers import question, search, small_model

from rtp_sim.cli import main
from rtp_sim.errors import InputError
from rtp_sim.planner.capacity import Need, Offer
from rtp_sim.planner.constraints import parse_limit
from rtp_sim.planner.searched import Question
from rtp_sim.planner.what_if import largest_model, longest_sequence
from rtp_sim.report.capacity_html import capacity_headline, capacity_html, offers_grid

LIMITS = (parse_limit("recompute=none"), parse_limit("micro-batch=1"))


def asked(model: str) -> Question:
    return question(model, 2, 2, ("ddp",), limits=LIMITS)


def allowing(given: Question, peak_bytes: int) -> Question:
    """The question with so much memory and a few bytes."""
    usable = search(given).sites[0].machine.memory_bytes
    return replace(given, headroom=1 - (peak_bytes + 64) / usable)


def peak_bytes(model: str) -> int:
    return search(asked(model)).best[0].metrics.peak_memory_bytes


def test_the_largest_model_is_the_one_whose_memory_is_there(tmp_path: Path):
    """With exactly the memory that a model of 6 blocks needs; and that of 12 heads instead of 8, which is 1.5 times the
    hidden size, the MLP and the blocks."""
    small = small_model(tmp_path)
    (tmp_path / "other").mkdir()
    taller = peak_bytes(small_model(tmp_path / "other", num_hidden_layers=6))
    found = largest_model(allowing(asked(small), taller), "layers")
    assert found is not None
    assert (found.value, found.next_value, found.memory_bytes) == (6, 7, taller)
    wider = peak_bytes(small_model(
        tmp_path / "other", num_attention_heads=12, num_key_value_heads=6, hidden_size=768, intermediate_size=2112,
        num_hidden_layers=6,
    ))  # fmt: skip
    found = largest_model(allowing(asked(small), wider), "model")
    assert found is not None
    assert (found.value, found.next_value, found.memory_bytes) == (12, 14, wider)
    assert found.means.startswith("6 blocks, hidden size 768, 12 heads, 0.0")
    assert largest_model(allowing(asked(small), 1 << 20), "layers") is None


def test_a_list_of_layers_has_no_proportions():
    with pytest.raises(InputError):
        largest_model(asked("examples/models/mnist-cnn.json"), "model")


def test_the_longest_sequence_fits_and_the_next_does_not(tmp_path: Path):
    model = small_model(tmp_path)
    given = allowing(asked(model), peak_bytes(model) + (64 << 20))
    found = longest_sequence(given)
    assert found is not None
    assert found.value % 256 == 0
    assert found.next_value == found.value + 256
    for seq_len, fits in ((found.value, True), (found.next_value, False)):
        again = search(replace(given, workload=replace(given.workload, seq_len=seq_len)))
        assert bool(again.best) == fits


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        ("gpus", lambda row: row["candidate"]["gpus"]),
        ("cost", lambda row: row["price"]["usd_per_step"]),
        ("energy", lambda row: row["price"]["kwh_per_step"]),
        ("memory", lambda row: row["metrics"]["peak_memory_bytes"]),
        ("time", lambda row: row["metrics"]["step_time_s"]),
    ],
)
def test_objectives_order_the_plans(tmp_path: Path, objective: str, key: Any, capsys: pytest.CaptureFixture[str]):
    """On 2 and on 4 GPUs; each plan is no better in the objective than the one before, and equals are told apart by
    time."""
    line = ["plan", "--model", small_model(tmp_path), "--gpus", "2,4", "--global-batch", "8", "--seq-len", "256",
            "--strategies", "fsdp,tp", "--top", "3", "--jobs", "1", "--quiet", "--format", "json"]  # fmt: skip
    assert main([*line, "--objective", objective, "--variants"]) == 0
    rows = json.loads(capsys.readouterr().out)["shown"]
    values = [(key(row), row["metrics"]["step_time_s"]) for row in rows]
    assert values == sorted(values)
    assert len(rows) == 3
    assert all(row["how"] == "simulated" for row in rows)
    if objective in ("gpus", "time"):
        assert {row["candidate"]["gpus"] for row in rows} == ({2} if objective == "gpus" else {4})


def test_what_if_answers_are_in_the_page_and_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "plan.html"
    line = ["plan", "--model", small_model(tmp_path), "--gpus", "2", "--global-batch", "2", "--seq-len", "256",
            "--strategies", "ddp,fsdp", "--micro-batch", "1", "--recompute", "none", "--jobs", "1",
            "--quiet"]  # fmt: skip
    assert main([*line, "--largest", "micro-batch", "--break-even", "link.nvlink.bandwidth:ddp,fsdp",
                 "--report", str(page)]) == 0  # fmt: skip
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith(("break-even: ", "largest "))]
    assert len(said) == 2
    text = page.read_text(encoding="utf-8")
    assert "What if" in text
    assert all(sentence.replace("'", "&#x27;") in text for sentence in said)


def test_the_page_of_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "run.html"
    line = ["plan", "--model", small_model(tmp_path), "--clusters", "dgx-a100-80g", "--global-batch", "64", "--seq-len",
            "256", "--strategies", "fsdp", "--tokens", "1e9", "--max-nodes", "1", "--jobs", "1", "--quiet"]  # fmt: skip
    assert main([*line, "--report", str(page)]) == 0
    capsys.readouterr()
    assert "8 GPUs of dgx-a100-80g train 1.00B tokens in " in page.read_text(encoding="utf-8")
    need = Need(1e12, 30 * 86400.0, 1000.0)
    late = Offer("dgx-h100", 2, 16, None, None, None, None, "does not fit into memory")
    assert capacity_headline(need, [late]) == "No machine trains 1.00T tokens within what is asked."
    assert offers_grid([late]).rows == (("dgx-h100", "–", "does not fit into memory", "16", "–", "–", "–", "–"),)
    assert "30 days" in capacity_html(question("gpt2", 2, 2).workload, need, [late])
