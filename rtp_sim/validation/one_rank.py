"""One rank that ran alone (`rtp-sim run --only-rank`) against what is predicted of it.

Two predictions are asked. The rank's own program, simulated as it ran, alone, with its communication replaced as in the
run, gives every op a time to compare with: a kernel costs what it costs in the whole schedule, a "fake" transfer
nothing, a "copy" a copy of its bytes on its stream. The whole schedule on all its ranks gives the peak memory, and the
step time that the measured kernels make believable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.memory import memory_profile
from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import NS_PER_S, communication_totals, time_split
from rtp_sim.schedule.ir import DTYPE_BYTES, Collective, Compute, Op, Program, Recv, Schedule, Shift
from rtp_sim.timeline import Timeline, of_one_rank
from rtp_sim.validation.diff import diff, with_numbers
from rtp_sim.validation.predict import Conditions, predict
from rtp_sim.validation.runs import Check, MeasuredRun, Validation, equal, near, notes, spread_of


@dataclass(frozen=True)
class Clusters:
    """`alone` is the machine that the rank ran on, with one rank; `whole` has all ranks. `note` says what of `whole` is
    assumed, "" if nothing is."""

    alone: Cluster
    whole: Cluster
    note: str


def clusters_for(run: MeasuredRun, profile: str, nodes: int | None) -> Clusters:
    """The profile with one rank, and with all ranks of the schedule.

    Where a profile of a small machine cannot have as many, its device is put into nodes of 8 with a NIC each: kernels
    cost the same there. InputError if there is no such profile.
    """
    ranks, alone = run.schedule.world_size, load_cluster(profile, 1, 1)
    try:
        return Clusters(alone, load_cluster(profile, nodes or 1, ranks), "")
    except InputError:
        if nodes is not None:
            raise
    per_node = next(n for n in range(min(8, ranks), 0, -1) if ranks % n == 0)
    wires = load_cluster(f"generic:a100-sxm-80gb,gpus={per_node},nics={per_node},nic=200Gb/s", ranks // per_node, ranks)
    note = (
        f"{alone.name} cannot have {ranks} ranks: the whole schedule is predicted for {ranks} of its devices, "
        f"{per_node} to a node, with NVLink and a NIC of 200 Gb/s each (assumed)"
    )
    return Clusters(alone, replace(wires, name=f"{ranks} x {alone.device.name}", device=alone.device), note)


def validate_one_rank(run: MeasuredRun, clusters: Clusters, tolerance: float, engine: str = "simpy") -> Validation:
    """Kernels one by one, their sum and the peak memory within the tolerance, traffic equal. How long communication
    took is no part of the verdict: nothing was sent. InputError if the run was of all ranks."""
    rank, schedule = run.only_rank, run.schedule
    if rank is None:
        raise InputError(f"{run.path} is a run of all ranks; expected one of rtp-sim run --only-rank")
    cost = ClusterCost(clusters.alone)
    whole = predict(schedule, clusters.whole, run.conditions, engine)
    peak_bytes = memory_profile(schedule, rank, whole.times(rank)).peak_bytes
    alone = predict_alone(schedule, rank, run.communication, clusters.alone, run.conditions, engine)
    measured = run.timeline
    for key in ("bytes_sent", "messages", "peak_memory_bytes"):
        if values := getattr(run, key):
            measured = with_numbers(measured, key, {rank: values[0]})
    joined = diff(with_numbers(alone, "peak_memory_bytes", {rank: peak_bytes}), measured, (rank,))
    kernels = [op for op in joined.ranks[0].ops if isinstance(op.op.action, Compute)]
    checks: list[Check] = [
        near("kernels", "ns", sum(o.predicted_ns for o in kernels), sum(o.measured_ns for o in kernels), tolerance)
    ]
    if run.peak_memory_bytes:
        checks.append(near("peak memory", "bytes", peak_bytes, run.peak_memory_bytes[0], tolerance))
    sent, messages, _ = communication_totals(schedule, rank)
    if run.bytes_sent:
        checks.append(equal("bytes sent", "bytes", [sent], run.bytes_sent))
    if run.messages:
        checks.append(equal("messages", "messages", [messages], run.messages))
    said = (*notes(run, cost), *_notes(run, whole, rank, alone.step_time_ns), *filter(None, [clusters.note]))
    return Validation(run, clusters.alone, tolerance, spread_of(run.step_times_ns), joined, tuple(checks), said)


def _notes(run: MeasuredRun, whole: Timeline, rank: int, alone_ns: int) -> tuple[str, str]:
    split = time_split(whole, rank)
    ms = [f"{ns / NS_PER_S * 1e3:.4g} ms" for ns in (split.step_ns, split.compute_ns, split.exposed_ns, alone_ns)]
    how = "left out" if run.communication == "fake" else "replaced by copies of the same size"
    return (
        f"rank {rank} of {run.schedule.world_size} ran alone, communication {how}: a step so is predicted to take "
        f"{ms[3]}; losses have no meaning",
        f"on all {run.schedule.world_size} ranks a step is predicted to take {ms[0]}, of which this rank computes "
        f"{ms[1]} and only communicates {ms[2]}",
    )


def predict_alone(
    schedule: Schedule, rank: int, communication: str, cluster: Cluster, conditions: Conditions, engine: str = "simpy"
) -> Timeline:
    """The rank's program simulated alone, its communication replaced ("fake" or "copy")."""
    times = predict(without_partners(schedule, rank, communication), cluster, conditions, engine).times(0)
    meta: dict[str, str | int] = {"engine": engine, "cluster": cluster.name, "communication": communication}
    return of_one_rank(schedule, "predicted", rank, times, {**meta, "only_rank": rank})


def without_partners(schedule: Schedule, rank: int, communication: str) -> Schedule:
    """The rank's program as a schedule of its own, in which it copies what it would send or receive (nothing, if
    "fake"): the same ops, sized for this rank."""

    def own(op: Op) -> Op:
        action = op.action
        if not isinstance(action, Compute):
            return replace(op, action=_copy(schedule, rank, op, communication == "copy"))
        dims = action.dims_at(schedule.shard_index(rank, action.part))
        return replace(op, action=replace(action, dims=dims, part=None, variants=None))

    program = schedule.program(rank)
    return Schedule(schedule.name, 1, {}, (Program(program.name, {}, tuple(map(own, program.ops))),), (0,))


def _copy(schedule: Schedule, rank: int, op: Op, copies: bool) -> Compute:
    """A copy of as many bytes as the stand-in of the run passes over (executor/alone.py)."""
    action = op.action
    assert not isinstance(action, Compute)
    dtype = action.dtype if isinstance(action, Collective) else "uint8"
    size_bytes = 0
    if copies and isinstance(action, Collective):
        size_bytes = action.size_bytes
    elif copies and isinstance(action, Shift):
        # In place each chunk goes to the bounce buffer and back.
        passes = 1 if action.chunk_bytes is None else 2
        size_bytes = passes * sum(h.bytes_at(schedule.shard_index(rank, h.part)) for h in action.hops)
    elif copies and isinstance(action, Recv):
        size_bytes = action.size_bytes
    return Compute("copy", dtype, (("numel", size_bytes // DTYPE_BYTES[dtype]),))
