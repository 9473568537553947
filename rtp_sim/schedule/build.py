"""From a network, a training spec and a layout to the `Schedule` of a strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rtp_sim.errors import InputError
from rtp_sim.model.layers import Dropout, split_sizes
from rtp_sim.model.network import Network, unfused
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Group, Schedule
from rtp_sim.schedule.layout import ParallelLayout
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.sharding import parts, rotation_kind, tensor_kind
from rtp_sim.schedule.step import Step
from rtp_sim.schedule.strategies import STRATEGIES

BACKWARD_TO_FORWARD_FLOPS = 2


def build_schedule(
    strategy: str, network: Network, training: TrainingSpec, layout: ParallelLayout, groups: Mapping[str, Group],
    options: Options,
) -> Schedule:  # fmt: skip
    """The schedule of one training step (or of `options.eval_passes` forward passes).

    InputError, naming the strategy, if the network cannot be split that way.
    """
    if options.eval_passes and layout.axis != "rtp":
        raise InputError(f"{strategy}: evaluation passes are a matter of rotation; expected rtp or rtp-inplace")
    if layout.axis == "rtp" and not options.rtp_fuse_mlp:
        network = unfused(network)
    step = Step(strategy, network, training, groups, options)
    try:
        STRATEGIES[strategy](step)
    except InputError as error:
        raise InputError(f"{strategy} with {layout}: {error}") from None
    meta = _meta(strategy, network, training, layout, options)
    ranks = layout.world_size
    return Schedule(strategy, ranks, dict(groups), (step.b.program(),), (0,) * ranks, meta)


def replicas(layout: ParallelLayout) -> int:
    """Replicas that work on micro-batches of their own: a tensor-parallel group shares them, a ring does not."""
    return layout.dp if layout.axis == "tp" else layout.world_size


def _meta(
    strategy: str, network: Network, training: TrainingSpec, layout: ParallelLayout, options: Options
) -> dict[str, str | int | float | bool | None]:
    passes = options.eval_passes or training.num_microbatches
    sequences = training.micro_batch * passes * replicas(layout)
    flops = network.forward_flops(training.micro_batch) * passes * replicas(layout)
    notes = "; ".join(uneven_notes(network, layout))
    return {
        "strategy": strategy,
        "layout": str(layout),
        "model": network.name,
        "parameters": network.parameter_count(),
        "tokens": sequences * network.seq,
        "global_batch": sequences,
        "micro_batch": training.micro_batch,
        "num_microbatches": passes,
        "seq_len": network.seq,
        "precision": training.precision,
        "recompute": training.recompute,
        "model_flops": flops if options.eval_passes else flops * (1 + BACKWARD_TO_FORWARD_FLOPS),
        "notes": notes or None,
        **_asked_for(network, training),
    }


def _asked_for(network: Network, training: TrainingSpec) -> dict[str, str | int | float | bool | None]:
    """What not every step has: clipping, a loss scale, dropout (the largest probability)."""
    dropout = max((x.op.probability for x in network.layers() if isinstance(x.op, Dropout)), default=0.0)
    found: dict[str, str | int | float | bool | None] = {"clip_norm": training.clip_norm, "dropout": dropout or None}
    found["loss_scale"] = training.loss_scale if training.scales_loss else None
    return {key: value for key, value in found.items() if value is not None}


def uneven_notes(network: Network, layout: ParallelLayout) -> Iterator[str]:
    """One note per size that the inner axis cannot split evenly."""
    n, seen = layout.inner, set()
    tied = {layer.shares for layer in network.layers() if layer.shares}
    for layer in network.layers():
        kind = rotation_kind(layer.op, n, layer.name in tied) if layout.axis == "rtp" else tensor_kind(layer.op)
        if n == 1 or not kind or parts(layer.op, kind) in seen:
            continue
        count, what = parts(layer.op, kind)
        seen.add((count, what))
        if count % n:
            sizes = split_sizes(count, n)
            yield f"{count} {what} over {layout.axis}={n} are uneven: {sizes[0]} on some ranks, {sizes[-1]} on others"
