"""Small schedules with timelines laid out by hand or in lockstep, for the tests of metrics and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rtp_sim.engine.memory import MemoryProfile, memory_profile
from rtp_sim.metrics import StepMetrics, step_metrics
from rtp_sim.schedule.ir import (
    Action,
    Buffer,
    Collective,
    Compute,
    Group,
    Hop,
    Op,
    Program,
    Schedule,
    Shift,
)
from rtp_sim.timeline import RankTimes, Timeline

MIB = 2**20
DEVICE_MEMORY_BYTES = 600 * MIB


def compute(kernel: str = "linear", m: int = 8) -> Compute:
    return Compute(kernel, "bf16", (("m", m), ("k", 16)))


def ops_of(*entries: tuple[str, str, Action]) -> tuple[Op, ...]:
    """Ops from (name, stream, action), without operands or dependencies."""
    return tuple(Op(i, name, stream, action) for i, (name, stream, action) in enumerate(entries))


def schedule_of(
    ops: Iterable[Op], world_size: int = 2, groups: dict[str, Group] | None = None, **meta: str | int | float
) -> Schedule:
    """One program for all ranks, over a ring of all ranks named "ring"."""
    ring = {"ring": Group("ring", (world_size,), (tuple(range(world_size)),))}
    program = Program("all", {}, tuple(ops))
    return Schedule("toy", world_size, groups or ring, (program,), (0,) * world_size, meta)


def timeline_of(schedule: Schedule, spans: dict[int, Sequence[tuple[int, int]]]) -> Timeline:
    """A timeline from (start, end) per op of each represented rank; the first stands for the others."""
    times = {
        rank: RankTimes(
            np.array([s for s, _ in of_rank], dtype=np.int64),
            np.array([e for _, e in of_rank], dtype=np.int64),
        )
        for rank, of_rank in spans.items()
    }
    first = min(times)
    representative = tuple(r if r in times else first for r in range(schedule.world_size))
    return Timeline(schedule, "predicted", times, representative)


def profile_of(total_bytes: int, category: str = "weights") -> MemoryProfile:
    """A profile that holds `total_bytes` of one category from 0 to 100 ns."""
    held = np.array([total_bytes, 0], dtype=np.int64)
    return MemoryProfile(
        np.array([0, 100], dtype=np.int64),
        {category: held},
        total_bytes,
        0,
        {category: total_bytes},
        (("w", total_bytes),),
    )


def lockstep(schedule: Schedule, duration_ns: Callable[[Op], int], skew_ns: int = 0) -> Timeline:
    """Every op starts when its stream is free and its `after` is done; rank r is r * skew_ns late."""
    ops = schedule.program(0).ops
    start, end, free = [0] * len(ops), [0] * len(ops), dict.fromkeys((op.stream for op in ops), 0)
    for op in ops:
        start[op.index] = max([free[op.stream], *(end[i] for i in op.after)])
        end[op.index] = free[op.stream] = start[op.index] + duration_ns(op)
    return timeline_of(
        schedule,
        {
            r: [(s + r * skew_ns, e + r * skew_ns) for s, e in zip(start, end, strict=True)]
            for r in range(schedule.world_size)
        },
    )


def rotation(world_size: int = 4, layers: int = 6, shard_bytes: int = 16 * MIB) -> Schedule:
    """A forward rotation: per layer and turn one linear, while the weights of the next turn travel."""
    ops: list[Op] = []
    buffers = {
        "w0": Buffer("w0", "weights", "uint8", shard_bytes, live_in=True, live_out=True),
        "w1": Buffer("w1", "communication", "uint8", shard_bytes),
        "m": Buffer("m", "optimizer", "uint8", 4 * shard_bytes, live_in=True, live_out=True),
        "x": Buffer("x", "activations", "uint8", shard_bytes, live_in=True),
    }
    last_linear: tuple[int, ...] = ()
    last_shift: tuple[int, ...] = ()
    for layer in range(layers):
        buffers[f"y{layer}"] = Buffer(f"y{layer}", "activations", "uint8", shard_bytes // 2)
        for turn in range(world_size):
            here, there = ("w0", "w1") if (layer * world_size + turn) % 2 == 0 else ("w1", "w0")
            shift = Shift("ring", (Hop((1,), shard_bytes),))
            ops.append(
                Op(
                    len(ops),
                    f"rotate.{layer}.{turn}",
                    "ring",
                    shift,
                    (here,),
                    (there,),
                    last_linear[:1] + last_shift,
                )
            )
            reads = (here, "x" if layer == 0 else f"y{layer - 1}")
            linear = Op(
                len(ops),
                f"linear.{layer}.{turn}",
                "compute",
                compute(m=4096),
                reads,
                (f"y{layer}",),
                last_shift,
            )
            last_shift, last_linear = (ops[-1].index,), (linear.index,)
            ops.append(linear)
    ring = {"ring": Group("ring", (world_size,), (tuple(range(world_size)),))}
    meta = {"strategy": "rtp", "layout": f"rtp={world_size}", "tokens": 8192, "model_flops": 4e10}
    return Schedule(
        "rtp toy", world_size, ring, (Program("rtp", buffers, tuple(ops)),), (0,) * world_size, meta
    )


def sharded(world_size: int = 4, layers: int = 6, shard_bytes: int = 16 * MIB) -> Schedule:
    """A forward of fully sharded layers: gather the weights of a layer, then its linear."""
    total = world_size * shard_bytes
    buffers = {
        "w": Buffer("w", "weights", "uint8", shard_bytes, live_in=True, live_out=True),
        "m": Buffer("m", "optimizer", "uint8", 4 * shard_bytes, live_in=True, live_out=True),
        "x": Buffer("x", "activations", "uint8", shard_bytes, live_in=True),
    }
    ops: list[Op] = []
    for layer in range(layers):
        buffers[f"full{layer}"] = Buffer(f"full{layer}", "communication", "uint8", total)
        buffers[f"y{layer}"] = Buffer(f"y{layer}", "activations", "uint8", shard_bytes // 2)
        gather = Collective("all_gather", "ring", total, "bf16")
        ops.append(Op(len(ops), f"gather.{layer}", "gather", gather, ("w",), (f"full{layer}",)))
        reads = (f"full{layer}", "x" if layer == 0 else f"y{layer - 1}")
        after = (ops[-1].index,)
        ops.append(Op(len(ops), f"linear.{layer}", "compute", compute(m=4096), reads, (f"y{layer}",), after))
    ring = {"ring": Group("ring", (world_size,), (tuple(range(world_size)),))}
    meta = {"strategy": "fsdp", "layout": f"fsdp={world_size}", "tokens": 8192, "model_flops": 4e10}
    return Schedule(
        "fsdp toy", world_size, ring, (Program("fsdp", buffers, tuple(ops)),), (0,) * world_size, meta
    )


def example(
    schedule: Schedule, compute_ns: int, communication_ns: int
) -> tuple[Timeline, dict[int, MemoryProfile], StepMetrics]:
    """Timeline, memory of every rank, and metrics of a schedule with two durations."""
    timeline = lockstep(
        schedule, lambda op: compute_ns if isinstance(op.action, Compute) else communication_ns, 300
    )
    memory = {rank: memory_profile(schedule, rank, timeline.times(rank)) for rank in timeline.ranks}
    shares = {"measured": 0.7, "assumed": 0.3}
    return timeline, memory, step_metrics(timeline, memory, DEVICE_MEMORY_BYTES, 5e13, shares)
