"""Strategies that keep whole weights on every rank: `single`, `ddp`, `zero1`, `zero2`."""

from __future__ import annotations

from rtp_sim.schedule.data_parallel import DataParallel, keep_gradients
from rtp_sim.schedule.step import Step


def single(step: Step) -> None:
    """One rank, nothing communicated."""
    _data_parallel(step, DataParallel(step, "ddp", "none"))


def ddp(step: Step) -> None:
    """Every rank computes its own micro-batches; gradients are all-reduced in buckets while the last backward runs."""
    if step.options.gradient_buffer:
        keep_gradients(step)
    _data_parallel(step, DataParallel(step, "ddp", copy=step.options.dp_copy))


def zero1(step: Step) -> None:
    """As ddp, but gradients are reduce-scattered and each rank keeps the optimizer state of 1/n of the weights."""
    keep_gradients(step)
    _data_parallel(step, DataParallel(step, "zero1", copy=step.options.dp_copy))


def zero2(step: Step) -> None:
    """As zero1, and each micro-batch's gradients are reduced and freed at once: only the shard is kept."""
    _data_parallel(step, DataParallel(step, "zero2", copy=step.options.dp_copy))


def _data_parallel(step: Step, sync: DataParallel) -> None:
    for last in step.microbatches():
        step.forward()
        for layer in step.backward():
            if last or sync.every_microbatch:
                sync.ready(layer)
        if not last and sync.every_microbatch:
            sync.end_microbatch()
    sync.finish()
