"""The bounds of the planner are true, and the search finds what an exhaustive one finds."""

from __future__ import annotations

import random

import numpy as np
import pytest
from planner_helpers import evaluate, question, search, small_model

from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.planner.searched import Question, Searched
from rtp_sim.planner.workload import Workload

FLAT = ("ddp", "zero1", "zero2", "fsdp", "hsdp")
SPACES = {
    "flat": (4, 16, FLAT, "dgx-a100-80g", {}),
    "rotation": (4, 8, ("rtp", "rtp-inplace"), "dgx-a100-80g", {}),
    "tensor": (4, 8, ("tp", "tp-sp"), "dgx-a100-80g", {}),
    "pipelines": (4, 8, ("1f1b", "interleaved"), "dgx-a100-80g", {}),
    "six": (6, 6, ("fsdp", "tp-sp", "1f1b"), "dgx-a100-80g", {"tie_word_embeddings": True}),
    "pcie": (4, 8, ("zero1", "fsdp", "rtp", "tp", "1f1b"), "pcie-4x4090", {"num_hidden_layers": 3}),
}


def _all(searched: Searched) -> list[tuple[float, int, int]]:
    """(step time, peak memory, place) of every candidate that keeps the rules."""
    site, found = searched.sites[0], []
    for place in range(len(site.space)):
        metrics, _ = evaluate(searched.question.workload, site.space.candidate(place), site.cluster, searched.network,
                              site.model, simulated=True)  # fmt: skip
        found.append((metrics.step_time_s, metrics.peak_memory_bytes, place))
    return found


@pytest.mark.parametrize("name", SPACES)
def test_bounds_are_true_and_the_search_is_exhaustive(tmp_path, name: str):
    gpus, batch, strategies, cluster, changes = SPACES[name]
    asked = question(small_model(tmp_path, **changes), gpus, batch, strategies, cluster, top=1)
    searched = search(asked)
    everything, site = _all(searched), searched.sites[0]
    for step_s, peak_bytes, place in everything:
        candidate = site.space.candidate(place)
        assert site.lower_s[place] <= step_s, candidate
        assert site.memory[:, place].sum() <= peak_bytes, candidate
    best = searched.lines[0]
    assert best.metrics.step_time_s == min(everything)[0]
    assert len(searched.found) < len(everything)


@pytest.mark.parametrize("objective", ["time", "memory"])
def test_the_best_few_are_those_of_an_exhaustive_search_in_little_memory(tmp_path, objective: str):
    """Half of the candidates do not fit."""
    from dataclasses import replace

    strategies = ("zero2", "fsdp", "tp-sp", "1f1b")
    model = small_model(tmp_path, num_hidden_layers=2)
    asked = question(model, 4, 8, strategies, top=4, objective=objective, variants=True)
    first = search(asked)
    everything = _all(first)
    allowed = sorted(peak for _, peak, _ in everything)[len(everything) // 2]
    usable = first.sites[0].machine.memory_bytes
    asked = replace(asked, headroom=1 - (allowed + 1) / usable)
    searched = search(asked)
    assert searched.sites[0].machine.allowed_bytes >= allowed
    fitting = [e for e in everything if e[1] <= searched.sites[0].machine.allowed_bytes]
    assert 0 < len(fitting) < len(everything)
    key = (lambda e: (e[0], e[1])) if objective == "time" else (lambda e: (e[1], e[0]))
    wanted = [key(e) for e in sorted(fitting, key=key)[:4]]
    assert [key((o.metrics.step_time_s, o.metrics.peak_memory_bytes)) for o in searched.lines[:4]] == wanted


@pytest.mark.parametrize(
    ("nodes", "gpus", "batch", "seed"), [(2, 12, 24, 1), (2, 16, 32, 2), (3, 12, 24, 3), (2, 8, 16, 4)]
)
def test_bounds_are_true_across_nodes(tmp_path, nodes: int, gpus: int, batch: int, seed: int):
    """A few candidates of every strategy, on nodes that are used in part, in groups that lie across them."""
    model = small_model(tmp_path, num_hidden_layers=6, tie_word_embeddings=seed % 2 == 0)
    cluster = load_cluster("dgx-a100-80g", nodes, gpus)
    asked = Question(Workload(model, batch, 256), (cluster,), processes=1, front=False, top=1)
    searched = search(asked)
    site, picks = searched.sites[0], random.Random(seed)
    for number in np.unique(site.space.strategy):
        mine = np.flatnonzero((site.space.strategy == number) & (site.space.inner <= 8)).tolist()
        for place in picks.sample(mine, min(4, len(mine))):
            candidate = site.space.candidate(place)
            metrics, _ = evaluate(asked.workload, candidate, cluster, searched.network, site.model, True)
            assert site.lower_s[place] <= metrics.step_time_s, candidate
            assert site.memory[:, place].sum() <= metrics.peak_memory_bytes, candidate
