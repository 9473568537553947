"""How a training step ends: what is to be known of all gradients together, the optimizer, the next loss scale.

Clipping by the global norm and loss scaling both look at every gradient before anything is updated. One kernel reads
the gradients that the rank updates with, and leaves their sum of squares and, for loss scaling, whether one of them is
not finite: one or two numbers in `grad_norm`. These are summed over every group whose ranks hold different gradients;
copies of a gradient need no communication. Each parameter counts once: where it lies on every rank of a group that is
summed over, it counts there by its share. The optimizer then multiplies what it reads by min(1, clip / norm) / scale,
so neither clipping nor unscaling is a pass of its own over the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.builder import Builder
from rtp_sim.schedule.ir import Collective, Compute, Dims, Group, Holding, Part, Size

GRAD_NORM, LOSS_SCALE = "grad_norm", "loss_scale"
SPLIT_GROUPS = ("rtp", "tp")
"""Groups along which layers are split (`Holding.split`)."""

STAGES = "pp"
"""The group of the stages of a pipeline."""


@dataclass(frozen=True, slots=True)
class OptimizerShare:
    """Parameters that a rank updates: their state is kept in `opt.<name>`; `numel` by shard where uneven.

    `holds` says whose they are; with `slice_of` the rank updates only its slice of them (ir.Buffer).
    """

    name: str
    numel: Size
    grads: tuple[str, ...]
    weights: tuple[str, ...]
    holds: tuple[Holding, ...]
    slice_of: str = ""
    part: Part | None = None


def take_step(
    b: Builder, training: TrainingSpec, groups: Mapping[str, Group], streams: Mapping[str, str],
    shares: Sequence[OptimizerShare], scratch: int = 0,
) -> None:  # fmt: skip
    """One fused optimizer step over all shares, after what it must know of the gradients. `streams` says on which
    stream a group communicates; by default on one of its name. `scratch` is how many numbers per parameter the step
    allocates for itself, as torch's foreach form does for the roots of the moments."""
    known = _look_at_gradients(b, training, groups, streams, shares) if training.measures_gradients else ()
    states = [_state(b, training, share) for share in shares]
    dims, variants = _dims([s.numel for s in shares], (("state_bytes", optimizer_traffic(training)),))
    action = Compute("optimizer", training.policy.weight_dtype, dims, _part(shares), variants)
    grads, weights = _grads(shares), tuple(dict.fromkeys(w for s in shares for w in s.weights))
    writes = [*weights, *states]
    if scratch:
        numel = sum(scratch * (s.numel if isinstance(s.numel, int) else max(s.numel)) for s in shares)
        writes.append(b.buffer("opt.scratch", "workspace", training.policy.state_dtype, numel))
    b.op("optimizer", "compute", action, (*grads, *weights, *states, *known), tuple(writes))
    if training.scales_loss:
        scale = loss_scale_buffer(b)
        b.op("loss_scale", "compute", Compute("loss_scale", "fp32", (("numel", 1),)), (GRAD_NORM, scale), (scale,))


def loss_scale_buffer(b: Builder) -> str:
    """Declares the loss scale, with the steps since it last changed, which are kept from step to step."""
    return b.buffer(LOSS_SCALE, "optimizer", "fp32", 2, persistent=True)


def _look_at_gradients(
    b: Builder, training: TrainingSpec, groups: Mapping[str, Group], streams: Mapping[str, str],
    shares: Sequence[OptimizerShare],
) -> tuple[str, ...]:  # fmt: skip
    """The norm and its reductions; returns what the optimizer reads of them. Whether a scaled step is left out is for
    the host to decide, so it waits for the last of these ops, as torch's GradScaler does."""
    dims, variants = _dims([s.numel for s in shares])
    values = 2 if training.scales_loss else 1
    norm = b.buffer(GRAD_NORM, "workspace", "fp32", values)
    over = list(_different_along(shares, groups))
    action = Compute("grad_norm", training.policy.gradient_dtype, dims, _part(shares), variants)
    blocks = training.scales_loss
    b.op("grad_norm", "compute", action, _grads(shares), (norm,), blocks_host=blocks and not over)
    for group in over:
        reduce = Collective("all_reduce", group, values * b.itemsize("fp32"), "fp32")
        name, stream = f"grad_norm.reduce.{group}", streams.get(group, group)
        b.op(name, stream, reduce, (norm,), (norm,), blocks_host=blocks and group == over[-1])
    return (norm, loss_scale_buffer(b)) if training.scales_loss else (norm,)


def _different_along(shares: Sequence[OptimizerShare], groups: Mapping[str, Group]) -> Iterator[str]:
    """Groups whose ranks update with different gradients: shards of layers, slices of a sequence, pipeline stages."""
    split = any(h.split for s in shares for h in s.holds)
    sliced = {s.slice_of for s in shares}
    for name, group in groups.items():
        if group.size > 1 and (name == STAGES or name in sliced or (split and name in SPLIT_GROUPS)):
            yield name


def _grads(shares: Sequence[OptimizerShare]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(g for s in shares for g in s.grads))


def _part(shares: Sequence[OptimizerShare]) -> Part | None:
    """By what uneven sizes are indexed."""
    return next((s.part for s in shares if isinstance(s.numel, tuple)), None)


def _state(b: Builder, training: TrainingSpec, share: OptimizerShare) -> str:
    """The buffer of a share's optimizer state, master weights included."""
    numel, each = share.numel, training.optimizer_bytes_per_parameter()
    size = tuple(n * each for n in numel) if isinstance(numel, tuple) else numel * each
    return b.buffer(
        f"opt.{share.name}", "optimizer", "uint8", size, part=share.part, persistent=True, holds=share.holds,
        slice_of=share.slice_of,
    )  # fmt: skip


def optimizer_traffic(training: TrainingSpec) -> int:
    """Bytes moved per parameter: gradient read, states and master weights read and written, weights written (and
    read where they have no master copy)."""
    p, states = training.policy, training.optimizer_bytes_per_parameter()
    return p.gradient_bytes + 2 * states + p.weight_bytes * (1 if p.master_bytes else 2)


def _dims(sizes: Sequence[Size], more: Dims = ()) -> tuple[Dims, tuple[Dims, ...] | None]:
    """The kernel's sizes for the parameters of all shares, and by shard where these are uneven."""
    shards = max((len(n) for n in sizes if isinstance(n, tuple)), default=1)
    totals = [sum(n[i] if isinstance(n, tuple) else n for n in sizes) for i in range(shards)]
    variants: tuple[Dims, ...] = tuple((("numel", t), *more) for t in totals)
    return variants[0], variants if shards > 1 else None
