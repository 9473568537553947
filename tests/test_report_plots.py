"""Plots for papers: written in each format, with the right colours, and clear errors."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_helpers import DEVICE_MEMORY_BYTES, example, rotation, sharded

from rtp_sim.errors import InputError
from rtp_sim.report import plots

SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_each_plot_in_each_format_and_reproducible(tmp_path: Path, suffix: str) -> None:
    timeline, memory, row = example(rotation(layers=2), 41_000, 30_000)
    for name in "ab":
        plots.plot_comparison([row, row], tmp_path / f"comparison-{name}{suffix}", DEVICE_MEMORY_BYTES)
        plots.plot_memory(
            memory[0], tmp_path / f"memory-{name}{suffix}", title="rtp", device_memory_bytes=10**9
        )
        plots.plot_timeline(timeline, tmp_path / f"timeline-{name}{suffix}", ranks=[0, 1])
    for plot in ("comparison", "memory", "timeline"):
        first = (tmp_path / f"{plot}-a{suffix}").read_bytes()
        assert first.startswith(SIGNATURES[suffix])
        assert first == (tmp_path / f"{plot}-b{suffix}").read_bytes()


def test_painted_areas_are_the_times(tmp_path: Path) -> None:
    timeline = example(sharded(), 170_000, 150_000)[0]
    pixels = import_module("matplotlib.image").imread
    plots.plot_timeline(timeline, tmp_path / "t.png", ranks=[0])
    image = np.round(pixels(tmp_path / "t.png")[..., :3] * 255).astype(int)

    def painted(colour: tuple[int, int, int]) -> int:
        return int((np.abs(image - colour).max(axis=-1) <= 1).sum())

    # Six linears of 170 us against six gathers of 150 us, in bars of the same height: areas as 1020 to 900
    # (the two patches of the key add the same to both).
    assert painted((0, 0x72, 0xB2)) / painted((0xD5, 0x5E, 0)) == pytest.approx(1020 / 900, rel=0.03)


def test_settings_outside_are_left_alone(tmp_path: Path) -> None:
    before = dict(import_module("matplotlib").rcParams)
    plots.plot_comparison([example(rotation(), 41_000, 30_000)[2]], tmp_path / "x.svg")
    assert dict(import_module("matplotlib").rcParams) == before


def test_missing_extra_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(plots, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install rtp-sim\[plots\]"):
        plots.plot_comparison([example(rotation(), 41_000, 30_000)[2]], tmp_path / "x.png")


def test_input_errors(tmp_path: Path) -> None:
    row = example(rotation(), 41_000, 30_000)[2]
    with pytest.raises(InputError, match=r"expected a name ending in .png, .pdf, .svg"):
        plots.plot_comparison([row], tmp_path / "x.docx")
    with pytest.raises(InputError, match="at least one row"):
        plots.plot_comparison([], tmp_path / "x.png")
    with pytest.raises(InputError, match="cannot write the plot"):
        plots.plot_comparison([row], tmp_path / "no" / "x.png")
