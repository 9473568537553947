"""What nanotron refuses to start: stages without parameters, too few micro-batches; what becomes of such rows."""

from __future__ import annotations

import pytest
from test_validation_measured import PLAIN, row

from rtp_sim.model.network import Network, transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.report.accuracy_tables import row_json
from rtp_sim.schedule.options import Options
from rtp_sim.validation.accuracy import Fits, fits_of, summarise
from rtp_sim.validation.decisions import decisions_of
from rtp_sim.validation.interpret import interpret
from rtp_sim.validation.measured import Table
from rtp_sim.validation.published import predict
from rtp_sim.validation.refusals import refusal

BY_COST = Options(pp_balance="cost")


def llama(tied: bool) -> Network:
    """16 blocks of 67.1 M weights, and a head that counts two of them (tests/test_strategies_pipeline.py): 18 over 16
    stages fill 15 with the logits, and the loss is left alone on the last; over 8 all have blocks or the head."""
    model = find_model("llama2-7b", num_layers=16, hidden_size=2048, ffn_hidden_size=8192, vocab_size=131072,
                       num_heads=32, num_kv_heads=32, tied_embeddings=tied)  # fmt: skip
    return transformer_network(model, 64)


@pytest.mark.parametrize(
    ("tied", "pp", "micros", "zero1", "said"),
    [
        (True, 1, 1, False, ""),
        (True, 8, 7, False, ""),
        (True, 8, 6, False, "6 micro-batches are fewer than the 7 that 1F1B wants on 8 stages"),
        (False, 16, 15, False, "stage 15 of 16 has no parameters to optimise"),
        (False, 16, 15, True, ""),
        (True, 16, 15, True, "stage 15 of 16 has no parameters, and embedding and head are one"),
    ],
)
def test_what_nanotron_refuses(tied: bool, pp: int, micros: int, zero1: bool, said: str) -> None:
    assert refusal(llama(tied), "1f1b", pp, micros, BY_COST, zero1=zero1) == said


def test_more_stages_than_pieces_are_refused() -> None:
    assert refusal(llama(False), "1f1b", 32, 31, BY_COST, zero1=True).startswith("stages without blocks: ")


NANOTRON = {"framework": "nanotron", "cluster": "hf-h100-efa", "gated_mlp": "True", "precision": "bf16",
            "grad_precision": "fp32", "num_layers": "4", "dp": "2", "pp": "4", "gpus": "8", "global_batch": "",
            "status": "failed", "step_time_s": "", "peak_memory_gib": ""}  # fmt: skip


def test_only_frameworks_with_such_checks_refuse() -> None:
    few = NANOTRON | {"num_microbatches": "2"}
    assert "2 micro-batches are fewer" in interpret(row(**few)).refused
    assert interpret(row(**few | {"num_microbatches": "3"})).refused == ""
    assert interpret(row(**few | {"framework": "megatron-lm"})).refused == ""


def test_a_refused_row_is_predicted_to_fail(tmp_path) -> None:
    """It counts as predicted, as a right verdict where it failed, and is never picked."""
    rows = [row(**NANOTRON | {"row_id": "a", "num_microbatches": "2"})]
    for name, micros, seconds in (("b", "3", "0.2"), ("c", "4", "0.3")):
        ran = {"row_id": name, "num_microbatches": micros, "step_time_s": seconds, "status": "ok"}
        rows.append(row(**NANOTRON | ran | {"global_batch": "16"}))
    rows[0] = row(**NANOTRON | {"row_id": "a", "num_microbatches": "2", "global_batch": "16"})
    outcomes = predict([Table(tmp_path / "runs.csv", tuple(rows))], workers=1)
    refused = outcomes[0]
    assert (refused.fits, refused.estimate, refused.peak_bytes, refused.skipped) == (False, None, None, "")
    assert fits_of([refused]) == Fits(0, 0, 1, 0)
    summary = summarise(outcomes, grouped=False)
    assert (summary.predicted, summary.skipped) == (3, 0)
    document = row_json(refused)
    assert (document["predicted_fits"], document["predicted_step_time_s"]) == (False, None)
    assert document["refused_reason"] == refused.refused != ""
    ((decision,), _) = decisions_of(outcomes)
    assert (decision.predicted, [o.row_id for o in decision.ranked if o.row_id == "a"]) == (3, [])
    assert PLAIN["framework"] == "megatron-lm"
