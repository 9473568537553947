"""Numbers of a machine scaled one by one, and which of them change the plan."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_cli import documented_keys
from test_report_plan import FSDP, RTP, plan_of, row, run  # noqa: F401

from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.scaled import numbers_of, scaled
from rtp_sim.planner.search import search
from rtp_sim.planner.searched import Question
from rtp_sim.planner.sensitivity import FACTORS, Swing, swings
from rtp_sim.planner.workload import Workload
from rtp_sim.report.sensitivity_tables import sensitivity_grid

CLUSTER = "dgx-a100-80g"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("device.matmul_efficiency", "calibration.matmul_efficiency"),
        ("device.kernel_floor", "calibration.kernel_floor"),
        ("device.host_issue", "calibration.host_issue"),
        ("communication.p2p_base", "communication.p2p_base"),
        ("communication.collective_step_inter", "communication.collective_step_inter"),
    ],
)
def test_a_scaled_number_is_that_of_a_profile_with_it(name: str, key: str):
    plain = load_cluster(CLUSTER, 2)
    value = dict(numbers_of(plain))[name].value
    text = value * 0.8 if "efficiency" in name else f"{value * 0.8:g} ns"
    changed = load_cluster(CLUSTER, 2, changes={key: text})
    found = scaled(plain, name, 0.8)
    for one, other in ((found.device, changed.device), (found.communication, changed.communication)):
        for field in type(one).__dataclass_fields__:
            a, b = getattr(one, field), getattr(other, field)
            assert getattr(a, "value", a) == pytest.approx(getattr(b, "value", b)) if hasattr(a, "value") else a == b


def test_scaled_links_are_those_of_one_kind():
    plain = load_cluster(CLUSTER, 2)
    slower = scaled(plain, "link.nic.bandwidth", 0.5)
    for before, after in zip(plain.topology.links, slower.topology.links, strict=True):
        share = 2 if before.kind == "nic" else 1
        assert after.bandwidth_bytes_per_s * share == pytest.approx(before.bandwidth_bytes_per_s, abs=1)
    assert plain.topology.links == load_cluster(CLUSTER, 2).topology.links


def test_fractions_end_at_one_and_slowdowns_scale_what_they_add():
    plain = load_cluster(CLUSTER)
    assert scaled(plain, "device.matmul_efficiency", 9.0).device.matmul_efficiency.value == 1
    over = plain.device.overlap_slowdown.value - 1
    assert scaled(plain, "device.overlap_slowdown", 2.0).device.overlap_slowdown.value == pytest.approx(1 + 2 * over)


def test_the_winner_is_never_worse_than_staying():
    question = Question(Workload("gpt2", 4), (load_cluster(CLUSTER, gpus=4),), strategies=("fsdp", "rtp", "zero1"),
                        top=1, front=False, processes=1)  # fmt: skip
    searched = search(question)
    chosen = searched.sites[0].space.candidate(searched.best[0].place)
    found = list(swings(searched))
    assert {s.number for s in found} >= {"device.matmul_efficiency", "link.nvlink.bandwidth", "device.memory"}
    assert len(found) == len(FACTORS) * len({s.number for s in found})
    for s in found:
        assert s.same == (s.winner == chosen)
        assert s.step_s is not None
        assert s.kept_s is not None
        assert s.step_s <= s.kept_s
        assert s.same <= (s.step_s == s.kept_s)
    by = {(s.number, s.factor): s.kept_s for s in found}
    first = searched.best[0].metrics.step_time_s
    assert (by["device.matmul_efficiency", 0.8] or 0) > first > (by["device.matmul_efficiency", 1.2] or 0)
    # Memory is a limit, no time.
    assert by["device.memory", 0.8] == by["device.memory", 1.2] == first


def test_the_table_begins_with_what_changes_the_winner():
    plan = plan_of(row(FSDP, 2.0, 40, rank=1))
    found = [
        Swing("device.a", 0.8, FSDP, 2.5, 2.5, True), Swing("device.a", 1.2, FSDP, 1.8, 1.8, True),
        Swing("link.b", 0.8, RTP, 2.0, 2.2, False), Swing("link.b", 1.2, FSDP, 1.9999, 1.9999, True),
        Swing("device.c", 0.8, None, None, None, False), Swing("device.c", 1.2, FSDP, 2.0, 2.0, True),
    ]  # fmt: skip
    assert sensitivity_grid(plan, found).rows == (
        ("link.b", "rtp rtp=8 mb=2x4 recompute=full (staying costs +10.0 %)", "the same", "+10.0 %", "+0.0 %"),
        ("device.c", "nothing fits", "the same", "–", "+0.0 %"),
        ("device.a", "the same", "the same", "+25.0 %", "-10.0 %"),
    )


def test_the_command_adds_it_to_the_document(run: Any):  # noqa: F811
    line = "plan --model gpt2-tiny --gpus 2 --global-batch 4 --strategies fsdp,ddp --top 1 --jobs 1 --format json"
    document = json.loads(run(*line.split(), "--sensitivity").out)
    assert list(document["sensitivity"][0]) == documented_keys("A change of one number")
    assert "sensitivity" not in json.loads(run(*line.split()).out)
