"""The rules of the planner against the strategies themselves: what they refuse, and nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest
from planner_helpers import small_model

from rtp_sim.errors import InputError
from rtp_sim.experiment import prepare
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.planner.plan import Row, candidate_from_json, row_json
from rtp_sim.planner.rules import broken_rules
from rtp_sim.planner.space import EVERY_STRATEGY, make_space
from rtp_sim.planner.workload import Workload


@pytest.mark.parametrize(("gpus", "batch"), [(1, 4), (6, 18), (8, 16)])
def test_rules_are_the_strategies_own(tmp_path, gpus: int, batch: int):
    """3 key/value heads, 5 blocks and 500 tokens: little divides by anything."""
    model = small_model(tmp_path, num_attention_heads=6, num_key_value_heads=3, hidden_size=96, head_dim=16,
                        num_hidden_layers=5, intermediate_size=130, vocab_size=101)  # fmt: skip
    workload = Workload(model, batch, 50)
    network, cluster = workload.network(), load_cluster("dgx-a100-80g", 1, gpus)
    space = make_space(network, cluster.name, 1, gpus, gpus, batch, EVERY_STRATEGY)
    wrong = np.logical_or.reduce([np.zeros(len(space), dtype=bool), *(b.who for b in broken_rules(space, network))])
    assert wrong.any() or gpus == 1
    picked = random.Random(1).sample(range(len(space)), min(70, len(space)))
    for i in picked:
        request = space.candidate(i).request(workload)
        try:
            prepare(request, cluster, network)
            refused = False
        except InputError:
            refused = True
        assert refused == wrong[i], space.candidate(i)


def test_candidates_are_read_back_from_json():
    space = make_space(Workload("gpt2", 8, 64).network(), "dgx-a100-80g", 1, 4, 4, 8)
    for i in (0, len(space) // 2, len(space) - 1):
        candidate = space.candidate(i)
        row = row_json(Row(candidate, "bounds", None, "", None, None, "", None))
        assert candidate_from_json(row["candidate"]) == candidate


def test_a_layout_is_listed_once():
    space = make_space(Workload("gpt2", 8, 64).network(), "dgx-a100-80g", 2, 16, 8, 16)
    seen = [space.candidate(i) for i in range(len(space))]
    assert len(set(seen)) == len(seen)
    # 16 = 2^4: hsdp shards over 2, 4 or 8 of the ranks, and a replica's one sequence is one micro-batch.
    assert sorted({c.inner for c in seen if c.strategy == "hsdp"}) == [2, 4, 8]
    assert {(c.micro_batch, c.micro_batches) for c in seen if c.strategy == "fsdp"} == {(1, 1)}
