"""Dropout by its seed: every strategy against dense training whose masks are worked out here, from the rule alone.

The rule: an element is kept where torch.rand from a generator is at least p; the generator's seed is the CRC-32 of the
text "(seed, step, replica, 'm<micro-batch>', Site(layer='...', call=..., split='...'), shard)".
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from executor_reference import EXACT, HYPER, batches_of, furthest
from strategy_helpers import EVERY_STRATEGY, build, stack

from rtp_sim.errors import InputError
from rtp_sim.executor.dense import train_dense
from rtp_sim.executor.parameters import executed_network, initial_parameters
from rtp_sim.executor.reference import run_reference
from rtp_sim.executor.request import RunRequest, from_json, to_json
from rtp_sim.experiment import find_network
from rtp_sim.model.layers import Attention, Dropout, Layer, Linear
from rtp_sim.model.network import Network, transformer_network, with_dropout
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Compute

P, SEED, HEADS, SEQ, BATCH = 0.2, 11, 4, 4, 2


def dropping(attention: str) -> Network:
    """Two blocks of width 24 with 4 heads; dropout behind the embedding, attention, the MLPs, and inside attention
    where it is materialised."""
    return transformer_network(find_model("gpt2-tiny", hidden_size=24, vocab_size=36, dropout=P), SEQ, attention)


def drawn(text: str, numel: int) -> torch.Tensor:
    return torch.rand(numel, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))) >= P


def shares(total: int, n: int) -> list[int]:
    return [total // n + (i < total % n) for i in range(n)]


def masks(strategy: str, n: int) -> Callable[[Layer, int, int, int, torch.Size], torch.Tensor]:
    """Rotation and tensor parallelism split attention by heads, sequence parallelism everything else by tokens."""

    def keep(layer: Layer, step: int, replica: int, micro: int, shape: torch.Size) -> torch.Tensor:
        inside = isinstance(layer.op, Attention)
        split = "heads" if inside and strategy.startswith(("rtp", "tp")) and n > 1 else ""
        split = "rows" if strategy == "tp-sp" and n > 1 and not inside else split
        # Of materialised attention the calls are: projection, scores, softmax, dropout.
        site = f"Site(layer='{layer.name}', call={3 if inside else 0}, split='{split}')"
        sizes = {"": [shape.numel()], "rows": [24 * t for t in shares(BATCH * SEQ, n)],
                 "heads": [BATCH * h * SEQ * SEQ for h in shares(HEADS, n)]}[split]  # fmt: skip
        parts = [drawn(f"({SEED}, {step}, {replica}, 'm{micro}', {site}, {i})", size) for i, size in enumerate(sizes)]
        if split == "heads":
            return torch.cat([p.view(BATCH, -1, SEQ, SEQ) for p in parts], 1)
        return torch.cat(parts).view(shape)

    return keep


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
@pytest.mark.parametrize(
    ("n", "attention", "recompute"),
    [(2, "flash", "none"), (3, "materialised", "full"), (4, "materialised", "selective")],
)
def test_every_strategy_drops_what_the_rule_says(strategy: str, n: int, attention: str, recompute: str) -> None:
    """Two micro-batches, two steps, clipped."""
    network, n = dropping(attention), 1 if strategy == "single" else n
    spec = TrainingSpec(
        BATCH, SEQ, 2, precision="fp32", attention=attention, recompute=recompute, optimizer="sgd", clip_norm=0.5
    )
    schedule = build(strategy, network, n, spec)
    executed = executed_network(schedule, network)
    parameters, batches = initial_parameters(executed, dtype=torch.float64), batches_of(schedule, executed, spec, 2)
    ours = run_reference(schedule, network, spec, parameters, batches, hyper=HYPER, seed=SEED)
    dense = train_dense(executed, parameters, batches, BATCH, "sgd", HYPER.lr, clip_norm=0.5, keep=masks(strategy, n))
    assert ours.losses == pytest.approx(dense.losses, abs=EXACT)
    assert ours.grad_norms == pytest.approx(dense.grad_norms, abs=EXACT)
    assert furthest(ours.gradients, dense.gradients)[0] < EXACT
    assert furthest(ours.parameters, dense.parameters)[0] < EXACT


def test_presets_have_no_dropout_and_zero_leaves_no_op() -> None:
    for dropout in (None, 0.0):
        for attention in ("flash", "materialised"):
            network = find_network("gpt2-tiny", 8, attention, dropout)
            assert network == transformer_network(find_model("gpt2-tiny"), 8, attention)
            assert dropouts(network) == []


def test_an_asked_for_probability_is_in_the_network_and_in_the_request(tmp_path: Path) -> None:
    network = find_network("gpt2-tiny", 8, "materialised", 0.1)
    assert network == transformer_network(find_model("gpt2-tiny", dropout=0.1), 8, "materialised")
    # Behind the embedding, and twice in each of two blocks; inside attention once in each.
    probabilities = [x.op.probability for x in network.layers() if isinstance(x.op, Dropout)]
    assert probabilities == [0.1] * 5
    assert dropouts(network) == ["embed.drop", "h0.attn", "h0.drop1", "h0.drop2", "h1.attn", "h1.drop1", "h1.drop2"]
    request = RunRequest(network, TrainingSpec(1, 8, attention="materialised"))
    assert from_json(to_json(request)) == request


def dropouts(network: Network) -> list[str]:
    """The layers that launch a dropout kernel, in order."""
    spec = TrainingSpec(1, network.seq, precision="fp32", optimizer="sgd")
    ops = build("single", network, 1, spec).programs[0].ops
    kernels = [op.action for op in ops if isinstance(op.action, Compute) and op.action.kernel == "dropout"]
    return [a.site.layer for a in kernels if a.site is not None]


def test_layer_lists_take_another_probability_or_none() -> None:
    network = stack([Linear(8, 6), Dropout(6, 0.3), Dropout(6), Linear(6, 4)])
    assert [x.op for x in with_dropout(network, 0.1).layers()][1:3] == [Dropout(6, 0.1), Dropout(6, 0.1)]
    bare = with_dropout(network, 0.0)
    assert [x.name for x in bare.layers()] == ["l0", "l3"]
    assert [x.inputs for x in bare.layers()] == [("x",), ("l0.y",)]
    assert with_dropout(bare, 0.0) == bare
    with pytest.raises(InputError, match="stack has no dropout layer"):
        with_dropout(bare, 0.1)
