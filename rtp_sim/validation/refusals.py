"""What a framework refuses to start: layouts that its own checks turn down before any memory is used.

A run that never begins fails however little it needs. The rules are those of nanotron's code, each where it is checked:

* its 1F1B engine asserts at least p - 1 micro-batches for p stages (pipeline_parallel/engine.py);
* every stage must have parameters: its DDP wrapper raises otherwise (`check_model_has_grad`, models/base.py), and so
  does torch's optimizer over an empty list. ZeRO-1 hands the optimizer a group of parameters that may be empty, so that
  such a stage does no harm there. The exception is a model whose embedding is its head: observed, not explained.
"""

from __future__ import annotations

from rtp_sim.errors import InputError
from rtp_sim.model.network import Network
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.stages import Stages
from rtp_sim.schedule.strategies.pipeline import stages_of


def refusal(network: Network, strategy: str, pp: int, micros: int, options: Options, *, zero1: bool) -> str:
    """Why nanotron would not start the pipeline `strategy` of `pp` stages; empty if it would. With `zero1` replicas
    share the optimizer."""
    if pp == 1:
        return ""
    if micros < pp - 1:
        return f"{micros} micro-batches are fewer than the {pp - 1} that 1F1B wants on {pp} stages"
    try:
        stages = stages_of(network, options, pp, strategy)
    except InputError as error:
        return f"stages without blocks: {error}"
    empty = [s for s in range(pp) if not _parameters(stages, s)]
    if empty and not zero1:
        return f"stage {empty[0]} of {pp} has no parameters to optimise"
    if empty and any(layer.shares for layer in network.layers()):
        return f"stage {empty[0]} of {pp} has no parameters, and embedding and head are one"
    return ""


def _parameters(stages: Stages, stage: int) -> int:
    return sum(layer.op.numel() for block in stages.blocks(stage) for layer in block.layers)
