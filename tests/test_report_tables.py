"""Tables and documents: what is printed, in which words, and that JSON and CSV hold the same rows."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest
from report_helpers import DEVICE_MEMORY_BYTES, MIB, example, rotation, sharded
from rich.console import Console

from rtp_sim.metrics import StepMetrics, metrics_row
from rtp_sim.report.axis import ticks
from rtp_sim.report.format import digits, format_percent, format_seconds, format_shares, size_unit, time_unit
from rtp_sim.report.tables import (
    compare_json,
    comparison_table,
    fits_text,
    print_table,
    simulate_json,
    summary_table,
    write_csv,
    write_json,
)


@pytest.fixture
def rows() -> list[StepMetrics]:
    rtp = example(rotation(), 41_000, 30_000)[2]
    fsdp = example(sharded(), 170_000, 150_000)[2]
    too_big = replace(fsdp, strategy="ddp", peak_memory_bytes=700 * MIB, fits=False, step_time_s=1e-4)
    return [rtp, fsdp, too_big]


def test_comparison_goes_to_stdout_in_full(
    rows: list[StepMetrics], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(comparison_table(rows, DEVICE_MEMORY_BYTES))
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    assert "\x1b" not in printed.out
    assert [line.split()[0] for line in lines] == ["strategy", "rtp", "fsdp", "ddp"]
    # 24 linears of 41 us in a row, on a rank 900 ns late: 984.9 us; the transfers of 30 us hide behind them.
    assert "985 us" in lines[1]
    assert lines[1].rstrip().endswith("yes")
    assert lines[3].rstrip().endswith("no: needs 700 MiB of 600 MiB")


def styled(rows: list[StepMetrics], monkeypatch: pytest.MonkeyPatch, no_color: bool) -> str:
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=240, color_system="standard").print(comparison_table(rows))
    return out.getvalue()


def test_best_of_what_fits_is_highlighted(rows: list[StepMetrics], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = styled(rows, monkeypatch, no_color=False)
    assert re.search(r"\x1b\[1;32m *985 us\x1b", printed)  # ddp's 100 us is faster and does not fit
    assert not re.search(r"\x1b\[1;32m *100 us", printed)
    assert "\x1b[1;31mno: needs 700 MiB\x1b[0m" in printed


def test_no_color_keeps_the_words_and_drops_the_colour(
    rows: list[StepMetrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = styled(rows, monkeypatch, no_color=True)
    assert re.search(r"\x1b\[1m *985 us\x1b", printed)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", printed)
    assert "no: needs 700 MiB" in printed


def test_summary_splits_the_step_and_the_memory(rows: list[StepMetrics]) -> None:
    out = io.StringIO()
    print_table(summary_table(rows[1], DEVICE_MEMORY_BYTES), out)
    lines = [line.split() for line in out.getvalue().splitlines()]
    # Six gathers of 150 us, the first alone; six linears of 170 us; the last rank starts 0.9 us late.
    assert ["exposed", "comm.", "150", "us", "12.8", "%"] in lines
    assert ["compute", "1.02", "ms", "87.1", "%"] in lines
    assert ["weights", "16.0", "MiB", "5.4", "%"] in lines  # of 296 MiB
    assert ["costs", "rest", "on", "measured", "70", "%,", "assumed", "30", "%"] in lines
    assert not any(line[0] == "gradients" for line in lines if line)


def test_markup_in_names_is_printed_as_it_is(rows: list[StepMetrics]) -> None:
    out = io.StringIO()
    print_table(comparison_table([replace(rows[0], strategy="[red]x[/red]", layout="[tp]")]), out)
    assert "[red]x[/red]" in out.getvalue()
    assert "[tp]" in out.getvalue()


def test_documents_hold_schema_rows_and_inputs(rows: list[StepMetrics]) -> None:
    out = io.StringIO()
    write_json(compare_json(rows, {"model": "gpt2"}), out)
    document = json.loads(out.getvalue())
    assert list(document) == ["schema", "rows", "inputs"]
    assert document["schema"] == "rtp-sim/compare/1"
    assert document["rows"] == [metrics_row(m) for m in rows]
    assert document["inputs"] == {"model": "gpt2"}
    single = simulate_json(rows[0], {})
    assert (single["schema"], single["row"]) == ("rtp-sim/simulate/1", metrics_row(rows[0]))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"x": float("nan")}, out)


def test_csv_has_one_column_per_number(rows: list[StepMetrics]) -> None:
    rows = [replace(rows[0], cost_provenance={"measured": 1.0}), replace(rows[1], mfu=None)]
    out = io.StringIO()
    write_csv(rows, out)
    first, second = csv.DictReader(io.StringIO(out.getvalue()))
    assert first["strategy"] == "rtp"
    assert int(first["memory_by_category.optimizer"]) == 64 * MIB
    assert float(first["step_time_s"]) == rows[0].step_time_s
    assert second["mfu"] == ""
    assert (first["cost_provenance.measured"], first["cost_provenance.assumed"]) == ("1.0", "")
    assert (second["cost_provenance.measured"], second["cost_provenance.assumed"]) == ("0.7", "0.3")


def test_fits_says_what_is_needed(rows: list[StepMetrics]) -> None:
    assert fits_text(rows[0], 1) == "yes"
    assert fits_text(rows[2], None) == "no: needs 700 MiB"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (0.99996, "1.00"), (9.996, "10.0"), (12.34, "12.3"), (123.4, "123")],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_missing_values_and_units() -> None:
    assert (format_seconds(None), format_percent(None), format_shares({})) == ("–", "–", "–")
    assert format_percent(0.4567) == "45.7 %"
    assert format_shares({"assumed": 0.2, "measured": 0.8}) == "measured 80 %, assumed 20 %"
    assert (time_unit(2e-3), time_unit(0.0), size_unit(2**30)) == ((1e-3, "ms"), (1e-9, "ns"), (2**30, "GiB"))


def test_ticks_are_round_numbers_in_the_unit() -> None:
    assert ticks(2.2e-3, 1e-3) == [(i * 0.5e-3, f"{i / 2:.1f}") for i in range(5)]
    assert [label for _, label in ticks(80 * 2**30, 2**30)] == ["0", "20", "40", "60", "80"]
    assert ticks(0, 1) == [(0.0, "0")]
