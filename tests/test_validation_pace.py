"""`rtp-sim validate` says at what pace the cores ran, and how the steps at the profile's pace compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_validation_cli import directory, edit, predicted, run  # noqa: F401

from rtp_sim.report.format import format_seconds
from rtp_sim.timeline import Timeline


def profile_of_pace(folder: Path, pace: str) -> Path:
    """cpu-local, measured while the fixed piece of work took that long."""
    profiles = Path(__file__).resolve().parent.parent / "hardware_profiles"
    cluster, device = ((profiles / name).read_text() for name in ("clusters/cpu-local.toml", "devices/cpu-core.toml"))
    pace_line = f'host_pace = {{ value = "{pace}", kind = "measured", source = "test" }}'
    (folder / "mine-device.toml").write_text(f"{pace_line}\n{device}")
    (folder / "mine.toml").write_text(cluster.replace('"cpu-core"', '"mine-device.toml"'))
    return folder / "mine.toml"


@pytest.mark.parametrize(
    ("paces", "pace", "words"),
    [
        # Two steps of warm-up, then 2, 3, 1, 2 + d and 2 - d times as long as predicted; 114 is within 15 % of 100.
        ([5, 5, 200, 300, 114, 200, 200], {"slower": 2.0, "usual_steps": 1, "usual_median_s": 1},
         "The slowest core took 2.00 times as long for the same work as when the profile was measured (median); about "
         "as long in 1 step, whose median is {median}: +0.0 %."),
        ([5, 5, 200, 300, 116, 200, 200], {"slower": 2.0, "usual_steps": 0, "usual_median_s": None},
         "(median), and in no step about as long: the profile does not hold for this run."),
        ([5, 5, 100, 90, 114, 100, 100], {"slower": 1.0, "usual_steps": 5, "usual_median_s": 2}, ""),
        ([0, 0, 0, 0, 0, 0, 0], None, ""),
        ([], None, ""),
    ],
)  # fmt: skip
def test_the_pace_of_the_cores_is_told(
    run: Any, directory: Path, predicted: Timeline, tmp_path: Path, paces: list[int],  # noqa: F811
    pace: dict[str, Any] | None, words: str,
):  # fmt: skip
    edit(directory / "result.json", lambda d: d.update(warmup=2, pace_ns=[1000 * p for p in paces]))
    profile = profile_of_pace(tmp_path, "100 us")
    line = f"validate {directory} --profile {profile} --quiet"
    found = json.loads(run(line, "--format", "json").out)["pace"]
    if pace is not None and pace["usual_median_s"] is not None:
        pace = {**pace, "usual_median_s": pytest.approx(pace["usual_median_s"] * predicted.step_time_ns / 1e9)}
    assert found == pace
    out = " ".join(run(line).out.split())
    assert words.format(median=format_seconds(predicted.step_time_ns / 1e9)) in out
    assert ("for the same work" in out) == bool(words)
