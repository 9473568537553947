"""The page of a sweep in a real browser: the chart that the choices name, rings where lines meet, all text escaped."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_report_html import NASTY, Elements, root_of, run_browser

from rtp_sim.report.lines import BOTTOM, LEFT, MEASURES, RIGHT, TOP, line_chart
from rtp_sim.report.svg import WIDTH
from rtp_sim.report.sweep_html import write_sweep_report
from rtp_sim.report.sweep_tables import crossing_lines, reason_lines, verdict
from rtp_sim.sweep.axes import Axis, axis_of
from rtp_sim.sweep.evaluate import Row, without_result
from rtp_sim.sweep.table import Table, document, fastest, overtakings

STEP_S = {"rtp": (1.0, 1.0, 1.0), "fsdp": (2.0, 0.5, 0.25)}
"""Over 100, 200, 400 Gb/s with 1,000 tokens a step on 10 GPUs; twice that for the larger micro-batch."""
PICK = """
<script>
(() => {
  const root = document.documentElement;
  const shown = () => root.dataset.sweepShown;
  const pick = (id, value) => {
    const select = document.getElementById(id);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  root.dataset.first = shown();
  pick("sweep-along", "1");
  root.dataset.second = shown();
  root.dataset.disabled = [...document.querySelectorAll("select:disabled")].map((s) => s.id).join(" ");
  pick("sweep-measure", "2");
  pick("sweep-axis-0", "2");
  root.dataset.third = shown();
})();
</script>
"""


def row(strategy: str, step_s: float, fits: bool = True) -> Row:
    rate = 1000 / step_s
    metrics = {
        "strategy": strategy, "layout": "dp=10", "step_time_s": step_s, "tokens_per_s": rate,
        "tokens_per_s_per_gpu": rate / 10,
        "mfu": None, "peak_memory_bytes": 2**30, "fits": fits,
    }  # fmt: skip
    return {
        "key": "",
        "status": "ok",
        "reason": "",
        "how": "simulated",
        "gpus": 10,
        "global_batch": 1,
        "metrics": metrics,
    }


def table(**replaced: Row) -> Table:
    axes = (axis_of("link.ib.bandwidth", ["100", "200", "400Gb/s"]), axis_of("micro-batch", ["1", "2"]),
            axis_of("strategy", list(STEP_S)))  # fmt: skip
    rows = {
        (bandwidth.text, batch.text, name): replaced.get(f"{name}{i}", row(name, STEP_S[name][i] * int(batch.text)))
        for i, bandwidth in enumerate(axes[0].values)
        for batch in axes[1].values
        for name in STEP_S
    }
    return Table(axes, rows)


def numbers_in(pattern: str, chart: str) -> list[tuple[float, ...]]:
    return [tuple(float(n) for n in found) for found in re.findall(pattern, chart)]


def test_crossings_of_the_table_and_in_words() -> None:
    # 2 to 0.5 meets 1 at two thirds of the way from 100 to 200.
    found = overtakings(table())
    assert [(o.x, o.setting, round(o.crossing.at, 6)) for o in found] == [
        ("link.ib.bandwidth", {"micro-batch": "1"}, 166.666667), ("link.ib.bandwidth", {"micro-batch": "2"}, 166.666667)
    ]  # fmt: skip
    # Seconds of one GPU per token: 1 s x 10 GPUs / 1,000 tokens.
    assert found[0].crossing.value == pytest.approx(0.01)
    lines = crossing_lines(table())
    assert lines[0] == "2 crossings (straight lines between neighbouring points of the grid):"
    assert lines[1] == "  micro-batch=1: above link.ib.bandwidth 166.7Gb/s fsdp beats rtp"
    assert fastest(table()) == {"rtp": 2, "fsdp": 4}
    assert verdict(table()) == "12 points: 12 fit. Fastest of what fits, in 6 settings: fsdp in 4, rtp in 2."


def test_what_does_not_fit_neither_wins_nor_crosses() -> None:
    without = table(fsdp1=row("fsdp", 0.5, fits=False), fsdp2=without_result("", "cannot", "too many"))
    assert overtakings(without) == []
    assert fastest(without) == {"rtp": 6, "fsdp": 0}
    assert verdict(without).startswith("12 points: 8 fit, 2 do not fit, 2 cannot be laid out.")
    assert reason_lines(without) == ["(1) too many"]
    assert document(without, {})["crossings"] == []


def chart(axis: Axis, steps: dict[str, list[float]], measure: int = 1) -> str:
    rows = {name: [row(name, s) for s in along] for name, along in steps.items()}
    grid = Table((axis, axis_of("strategy", list(steps))),
                 {(v.text, n): rows[n][i] for i, v in enumerate(axis.values) for n in steps})  # fmt: skip
    x = [v.number or 0.0 for v in axis.values]
    return line_chart(axis, x, grid.lines(axis.name, {}), MEASURES[measure], [o.crossing for o in overtakings(grid)])


def test_points_and_rings_lie_where_they_should() -> None:
    """Linear from 0 to 4: step times of 4 and 2 against 3 and 3, so they meet in the middle at 3 s."""
    drawn = chart(axis_of("x", ["1", "5"]), {"a": [4.0, 2.0], "b": [3.0, 3.0]})
    ((x, y),) = numbers_in(r'class="crossing leads" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert x == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.06)
    top = 4 * 1.04
    assert y == pytest.approx(BOTTOM - 3 / top * (BOTTOM - TOP), abs=0.06)
    points = numbers_in(r'class="point" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert points[0] == pytest.approx((LEFT, BOTTOM - 4 / top * (BOTTOM - TOP)), abs=0.06)
    assert len(points) == 4
    assert "above 3 a beats b" in drawn


def test_a_ring_lies_on_both_curves_of_a_logarithmic_axis() -> None:
    """Rates are no straight lines, nor is the axis; the ring is still on the pieces drawn around it."""
    drawn = chart(axis_of("x", ["10", "100Gb/s"]), {"a": [4.0, 1.0], "b": [2.0, 2.0]}, measure=0)
    ((x, y),) = numbers_in(r'class="crossing leads" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    for path in re.findall(r'class="line" d="M([^"]+)"', drawn):
        places = [tuple(float(n) for n in place.split()) for place in path.split("L")]
        (x0, y0), (x1, y1) = next(
            pair for pair in pairwise(places) if pair[0][0] <= x <= pair[1][0]
        )
        assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=0.5)
    # Two thirds of the way in bandwidth, 70 Gb/s, is log10(7) of the way along the axis.
    assert x == pytest.approx(LEFT + 0.845098 * (WIDTH - RIGHT - LEFT), abs=0.06)


def test_labels_do_not_cover_each_other() -> None:
    drawn = chart(axis_of("x", ["1", "2"]), {name: [1.0, 1.0 + i / 1000] for i, name in enumerate("abcd")})
    heights = sorted(y for _, y in numbers_in(r'class="swatch-dot" cx="([\d.]+)" cy="([\d.]+)"', drawn))
    assert all(high - low >= 14.9 for low, high in pairwise(heights))


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    base: dict[str, Any] = {"model": NASTY, "cluster": "toy", "options": {"vpp": 1}}
    hollow = table(fsdp1=row("fsdp", 0.5, fits=False), rtp2=without_result("", "cannot", NASTY))
    page = tmp_path / "sweep.html"
    write_sweep_report(page, hollow, base)
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PICK + "</body>"), encoding="utf-8")
    dom = Elements(run_browser(page, "--dump-dom"))
    root = root_of(dom)
    assert (root["data-errors"], root["data-ready"]) == ("0", "true")
    # Two axes to draw along, three measures: 2 x 3 charts along the bandwidth, 3 x 3 along micro-batches.
    assert len(dom.having("svg", "lines")) == 15
    assert root["data-first"] == "0 0 * 0"
    assert root["data-second"] == "1 0 0 *"
    assert root["data-disabled"] == "sweep-axis-1"
    assert root["data-third"] == "1 2 2 *"
    visible = [f for f in dom.having("figure") if "data-sweep-panel" in f and "hidden" not in f]
    assert [f["data-sweep-panel"] for f in visible] == ["1 2 2 *"]
    assert dom.having("circle", "hollow")
    assert not dom.having("img")
    assert NASTY in dom.text
    write_sweep_report(tmp_path / "again.html", hollow, base)
    write_sweep_report(tmp_path / "same.html", hollow, base)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "same.html").read_bytes()


def test_words_are_drawn_as_points_without_lines(tmp_path: Path) -> None:
    axes = (axis_of("recompute", ["none", "full"]), axis_of("strategy", ["ddp"]))
    words = Table(axes, {("none", "ddp"): row("ddp", 1.0), ("full", "ddp"): row("ddp", 2.0)})
    write_sweep_report(tmp_path / "w.html", words, {"model": "m", "cluster": "c"})
    text = (tmp_path / "w.html").read_text(encoding="utf-8")
    assert text.count('<circle class="point"') == 2 * len(MEASURES)
    assert 'class="line"' not in text
