"""Small questions for the planner: a model of a few narrow blocks, machines of a few GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.planner.evaluate import evaluate
from rtp_sim.planner.rules import broken_rules
from rtp_sim.planner.search import search
from rtp_sim.planner.searched import Question, Searched
from rtp_sim.planner.space import DEFAULT_STRATEGIES, Space
from rtp_sim.planner.workload import Workload

SMALL = {
    "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 1408, "vocab_size": 4096, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


def small_model(folder: Path, **changes: object) -> str:
    """The path of a config.json of a small model."""
    path = folder / "config.json"
    path.write_text(json.dumps(SMALL | changes), encoding="utf-8")
    return str(path)


def question(
    model: str, gpus: int, batch: int, strategies: tuple[str, ...] = DEFAULT_STRATEGIES, cluster: str = "dgx-a100-80g",
    **changes: object,
) -> Question:  # fmt: skip
    """A question on one node of `gpus` devices, answered in this process."""
    asked = Question(Workload(model, batch, 512), (load_cluster(cluster, 1, gpus),), strategies=strategies,
                     processes=1, front=False)  # fmt: skip
    return replace(asked, **changes)  # type: ignore[arg-type]


def keeping_the_rules(space: Space, searched: Searched) -> Space:
    """The candidates of a space that break no rule."""
    broken = [b.who for b in broken_rules(space, searched.network)]
    return space.take(~np.logical_or.reduce([np.zeros(len(space), dtype=bool), *broken]))


__all__ = ["SMALL", "Question", "evaluate", "question", "search", "small_model"]
