"""The HTML report in a real browser: charts drawn, no script errors, nothing from elsewhere, text escaped."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_helpers import (
    DEVICE_MEMORY_BYTES,
    compute,
    example,
    ops_of,
    profile_of,
    rotation,
    schedule_of,
    sharded,
    timeline_of,
)

from rtp_sim.engine.memory import MemoryProfile
from rtp_sim.errors import InputError
from rtp_sim.metrics import StepMetrics
from rtp_sim.report.areas import memory_areas, stacked
from rtp_sim.report.bars import time_bars
from rtp_sim.report.html import headline, write_report
from rtp_sim.report.timeline_data import chosen_ranks, timeline_data
from rtp_sim.schedule.ir import Hop, Part, Shift

NASTY = "</script><img src=x onerror=alert(1)>&\"'"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1280,2600",
    "--virtual-time-budget=4000",
)  # fmt: skip
FRAMES = "<script>window.requestAnimationFrame = (draw) => setTimeout(draw, 0);</script>"
"""Dumping the DOM, the browser gives no frames once the page stands; redrawing must not wait for one."""

INTERACTION = """
<script>
(() => {
  const root = document.documentElement, canvas = document.getElementById("timeline-canvas");
  const area = () => canvas.getBoundingClientRect();
  root.dataset.fullView = [canvas.dataset.fromNs, canvas.dataset.toNs, canvas.dataset.spansInView].join(" ");
  const pick = document.getElementById("timeline-choice");
  pick.value = "1";
  pick.dispatchEvent(new Event("change"));
  root.dataset.second = [canvas.dataset.strategy, canvas.dataset.spansInView].join(" ");
  const memory = document.getElementById("memory-choice");
  memory.value = "1";
  memory.dispatchEvent(new Event("change"));
  const shown = [...document.querySelectorAll("[data-memory-panel]")].filter((panel) => !panel.hidden);
  root.dataset.panels = shown.map((panel) => panel.dataset.memoryPanel).join(" ");
  // The first span of the first track begins at the left edge of the plot, at 150 px.
  const at = { clientX: area().left + 153, clientY: area().top + 55 };
  canvas.dispatchEvent(new PointerEvent("pointermove", at));
  root.dataset.tip = document.getElementById("tip").textContent;
  const middle = area().left + 150 + 600 / 1170.9 * (area().width - 150);  // 600 us of 1170.9 us
  canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: middle, clientY: area().top + 78 }));
  root.dataset.middle = document.getElementById("tip").textContent;
  canvas.dispatchEvent(new WheelEvent("wheel", {
    deltaY: -300, clientX: area().left + 150, clientY: area().top + 40, cancelable: true,
  }));
  // The page redraws in the next frame; what is asked for now runs right after that.
  requestAnimationFrame(() => {
    root.dataset.zoomed = [canvas.dataset.fromNs, canvas.dataset.toNs].join(" ");
    document.getElementById("zoom-reset").click();
    requestAnimationFrame(() => {
      root.dataset.reset = [canvas.dataset.fromNs, canvas.dataset.toNs].join(" ");
    });
  });
})();
</script>
"""


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    assert found, f"the HTML report is tested in a real browser: install one of {', '.join(BROWSERS)}"
    return found


def run_browser(page: Path, *arguments: str) -> str:
    """The DOM as text after the scripts ran (or what the arguments ask for)."""
    profile = page.parent / "browser-profile"
    command = [browser(), *FLAGS, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


class Elements(HTMLParser):
    """Every element of a document with its attributes, and all its text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, tag: str, css: str = "") -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and (not css or css in a.get("class", "").split())]


def write_example(path: Path, layers: int = 6) -> list[StepMetrics]:
    rtp, rtp_memory, rtp_row = example(rotation(layers=layers), 41_000, 30_000)
    fsdp, fsdp_memory, fsdp_row = example(sharded(layers=layers), 170_000, 150_000)
    rows = [rtp_row, fsdp_row, replace(fsdp_row, strategy="ddp", peak_memory_bytes=10**9, fits=False)]
    write_report(
        path,
        title=f"rotation against sharding {NASTY}",
        rows=rows,
        timelines={"rtp": rtp, f"fsdp {NASTY}": fsdp},
        memory={"rtp": rtp_memory[0], f"fsdp {NASTY}": fsdp_memory[0]},
        inputs=[
            ("device", "bandwidth", "3.35 TB/s", "vendor", "data sheet"),
            ("device", "efficiency", "0.7", "measured", NASTY),
            ("device", "floor", "3 us", "assumed", "guess"),
            ("training", "sequence", "1024", "given", "command line"),
        ],
        provenance={"version": "0.1.0", "command": NASTY},
        device_memory_bytes=DEVICE_MEMORY_BYTES,
    )
    return rows


@pytest.fixture(scope="module")
def dom(tmp_path_factory: pytest.TempPathFactory) -> Elements:
    """The page after its scripts and the user's actions of INTERACTION ran."""
    page = tmp_path_factory.mktemp("report") / "report.html"
    write_example(page)
    text = page.read_text(encoding="utf-8")
    text = text.replace("</head>", FRAMES + "</head>").replace("</body>", INTERACTION + "</body>")
    page.write_text(text, encoding="utf-8")
    return Elements(run_browser(page, "--dump-dom"))


def root_of(dom: Elements) -> dict[str, str]:
    return dom.having("html")[0]


def test_scripts_ran_without_errors(dom: Elements) -> None:
    assert root_of(dom)["data-errors"] == "0"
    assert "data-last-error" not in root_of(dom)
    assert root_of(dom)["data-ready"] == "true"


def test_charts_are_there_with_names(dom: Elements) -> None:
    charts = dom.having("svg", "chart")
    assert [c["class"].split()[1] for c in charts] == ["bars", "bars", "areas", "areas"]
    assert charts[0]["aria-label"].startswith(
        "Step time by strategy. rtp rtp=4: 985 us; fsdp fsdp=4: 1.17 ms"
    )
    assert all(c["role"] == "img" and c["aria-label"] for c in charts)
    # Time: rtp is compute and bubble, fsdp and ddp are compute, exposed communication and bubble.
    # Memory: weights, optimizer, activations and communication, three times.
    assert len(dom.having("rect", "segment")) + len(dom.having("rect", "sliver")) == 2 + 3 + 3 + 3 * 4
    # The peaks are 120 and 296 MiB: only the bars reach the device's 600 MiB, twice the peak does not.
    assert len(dom.having("line", "limit")) == 1
    assert len(dom.having("path", "area")) == 2 * 4
    assert len(dom.having("circle", "peak")) == 2


def test_timeline_is_drawn_zooms_and_tells_about_spans(dom: Elements) -> None:
    root = root_of(dom)
    assert root["data-full-view"] == f"0 984900 {4 * 48}"
    assert root["data-second"] == f"fsdp {NASTY} {4 * 12}"
    tip = root["data-tip"].split("\n")
    assert tip[0] == "gather.0"
    assert tip[1] == "all_gather over ring, 64.0 MiB, sends 48.0 MiB"
    assert tip[2] == "0.000 us to 150.000 us, 150.000 us long"
    assert tip[3] == "rank 0, gather, op 0"
    # Linear number i starts after the first gather and i linears: number 2 runs from 490 to 660 us.
    middle = root["data-middle"].split("\n")
    assert middle[0] == "linear.2"
    assert middle[2] == "490.000 us to 660.000 us, 170.000 us long"
    # One notch shrinks the window by e about the pointer, at the left edge; 6 x 170 + 150 us, 0.9 us late.
    step_ns = 6 * 170_000 + 150_000 + 900
    assert root["data-zoomed"] == f"0 {round(step_ns / np.e)}"
    assert root["data-reset"] == f"0 {step_ns}"
    canvas = dom.having("canvas")[0]
    assert canvas["data-tracks"] == "8"
    assert canvas["aria-label"].startswith("Timeline of fsdp")


def test_choosing_shows_one_memory_chart(dom: Elements) -> None:
    assert root_of(dom)["data-panels"] == "1"


def test_tables_hold_metrics_inputs_and_badges(dom: Elements) -> None:
    assert len(dom.having("table")) == 3  # metrics, device inputs, training inputs
    assert [b["class"] for b in dom.having("span", "badge")] == [
        "badge vendor", "badge measured", "badge assumed", "badge other",
    ]  # fmt: skip
    assert "no: needs 954 MiB of 600 MiB" in dom.text  # 10^9 bytes
    assert (
        "2 of 3 fit. Fastest is rtp (rtp=4) with 985 us per step, 1.19 times as fast as the next" in dom.text
    )


def test_text_is_escaped_everywhere(dom: Elements) -> None:
    assert not dom.having("img")
    assert dom.text.count(NASTY) >= 5  # title, heading, source, provenance, names of strategies
    scripts = [tag for tag, _ in dom.elements if tag == "script"]
    assert len(scripts) == 5  # error count, data, the page's own, and two of this test


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_example(page)
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?://|//[a-z]+\.[a-z]|@import|url\(", text)
    parsed = Elements(text)
    assert not [t for t, a in parsed.elements if {"src", "href", "srcset", "action"} & set(a)]
    policy = next(a["content"] for a in parsed.having("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_paint_the_spans_in_the_palette(tmp_path: Path, dark: bool) -> None:
    image = import_module("matplotlib.image")
    page = tmp_path / "report.html"
    write_example(page)
    run_browser(
        page,
        f"--screenshot={tmp_path / 'shot.png'}",
        f"--blink-settings=preferredColorScheme={int(not dark)}",
    )
    pixels = np.round(image.imread(tmp_path / "shot.png")[..., :3] * 255).astype(int)

    def share(hex_colour: str) -> float:
        wanted = [int(hex_colour[i : i + 2], 16) for i in (1, 3, 5)]
        return float((np.abs(pixels - wanted).max(axis=-1) <= 2).mean())

    background, compute_colour, other = (
        ("#14171b", "#4aa3df", "#0072b2") if dark else ("#ffffff", "#0072b2", "#4aa3df")
    )
    assert share(background) > 0.5
    assert share(compute_colour) > 0.02
    assert share(other) < 0.002


def test_same_input_same_bytes(tmp_path: Path) -> None:
    write_example(tmp_path / "a.html")
    write_example(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_twenty_thousand_spans_are_drawn(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_example(page, layers=620)  # 620 layers x 4 turns x 2 ops = 4,960 spans per rank, 19,840 in all
    assert page.stat().st_size < 3_000_000
    dom = Elements(run_browser(page, "--dump-dom"))
    assert dom.having("canvas")[0]["data-spans-in-view"] == "19840"
    assert root_of(dom)["data-errors"] == "0"


def test_thinning_is_said(tmp_path: Path) -> None:
    ops = ops_of(*((f"op{i}", "s", compute()) for i in range(100)))
    # Lengths 1 to 100 ns, one after the other.
    ends = np.cumsum(np.arange(1, 101)).tolist()
    timeline = timeline_of(schedule_of(ops), {0: list(zip([0, *ends], ends, strict=False))})
    data: dict[str, Any] = timeline_data("x", timeline, max_spans=40)
    assert [entry[0] for entry in data["tables"][0]] == [f"op{i}" for i in range(60, 100)]
    assert data["note"] == "60 of the 100 spans of rank 0, all shorter than 61 ns, are left out."


def test_ranks_are_left_out_before_spans_and_the_critical_one_never() -> None:
    ops = ops_of(("a", "s", compute()), ("b", "s", compute()))
    spans = {rank: [(0, 1), (1, 2 + (rank == 3))] for rank in range(4)}
    timeline = timeline_of(schedule_of(ops, 4), spans)
    assert chosen_ranks(timeline, 100, 8) == [0, 1, 2, 3]
    assert chosen_ranks(timeline, 100, 2) == [0, 3]
    assert chosen_ranks(timeline, 5, 8) == [0, 3]
    assert timeline_data("x", timeline, max_spans=5)["note"] == "2 of 4 represented ranks shown."


def test_ranks_share_a_table_unless_their_sizes_differ() -> None:
    even: dict[str, Any] = timeline_data("x", example(rotation(), 41_000, 30_000)[0])
    assert [rank["table"] for rank in even["ranks"]] == [0, 0, 0, 0]
    # Ranks 0 and 1 send the shards of 10 and 20 bytes.
    shift = Shift("ring", (Hop((1,), (10, 20), Part("ring", (0,))),))
    timeline = timeline_of(schedule_of(ops_of(("r", "ring", shift))), {0: [(0, 5)], 1: [(0, 5)]})
    uneven: dict[str, Any] = timeline_data("x", timeline)
    assert [rank["table"] for rank in uneven["ranks"]] == [0, 1]
    assert uneven["details"] == ["shift over ring, 10 B, sends 10 B", "shift over ring, 20 B, sends 20 B"]


def test_memory_thinning_keeps_the_peak_and_is_said() -> None:
    held = np.arange(4000, dtype=np.int64) % 977
    held[2345] = 5000
    profile = MemoryProfile(
        np.arange(4000, dtype=np.int64), {"weights": held}, 5000, 2345, {"weights": 5000}, ()
    )
    stack = stacked(profile)
    assert (stack.time_ns.size, stack.left_out) == (1500, 2500)
    assert 5000 in stack.upper_bytes[0]
    assert "Thinned: 1500 of 4000 points" in memory_areas("x", profile, 4000, None)
    assert "Thinned" not in memory_areas("x", profile_of(10), 100, None)


def test_capacity_line_or_words() -> None:
    assert 'class="limit"' in memory_areas("x", profile_of(100), 100, 150)
    far = memory_areas("x", profile_of(100), 100, 201)
    assert 'class="limit"' not in far
    assert "The device has 201 B, beyond this scale." in far


def test_bar_lengths_are_proportional_to_time() -> None:
    m = replace(
        example(rotation(), 41_000, 30_000)[2],
        step_time_s=10.0, compute_time_s=5.0, exposed_communication_s=3.0, bubble_s=2.0,
    )  # fmt: skip
    widths = [float(w) for w in re.findall(r'<rect class="segment"[^>]* width="([\d.]+)"', time_bars([m]))]
    assert widths == pytest.approx([5 * 61, 3 * 61, 2 * 61], abs=0.01)  # 610 units wide in all


def test_headlines() -> None:
    row = replace(example(rotation(), 41_000, 30_000)[2], step_time_s=0.5, peak_memory_bytes=2**30)
    assert headline([row]) == "rtp (rtp=4): 500 ms per step, 1.00 GiB per rank."
    worse = replace(row, fits=False)
    assert headline([worse, worse]) == "Nothing fits: rtp (rtp=4) needs least, 1.00 GiB per rank."
    assert headline([row, worse]) == "1 of 2 fit. Fastest is rtp (rtp=4) with 500 ms per step."


def test_errors_are_input_errors(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"timelines": {}, "memory": {}, "inputs": [], "provenance": {}}
    with pytest.raises(InputError, match="at least one row"):
        write_report(tmp_path / "x.html", title="t", rows=[], **empty)
    row = example(rotation(), 41_000, 30_000)[2]
    with pytest.raises(InputError, match="cannot write the report"):
        write_report(tmp_path / "no" / "x.html", title="t", rows=[row], **empty)
    write_report(tmp_path / "bare.html", title="t", rows=[row], **empty)
    dom = Elements(run_browser(tmp_path / "bare.html", "--dump-dom"))
    assert (root_of(dom)["data-errors"], root_of(dom)["data-ready"]) == ("0", "true")
