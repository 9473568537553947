"""The reference interpreter: all ranks' machines in one process, op by op in lockstep. Slow, exact, deterministic.

What it computes is what a schedule means; distributed runs are compared with it, and it with plain dense training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rtp_sim.errors import ScheduleError
from rtp_sim.executor.exchange import Parcel, Transfer
from rtp_sim.executor.machine import Batch, Machine, replica_of, replicas
from rtp_sim.executor.optimizer import DEFAULTS, Hyper
from rtp_sim.executor.parameters import Parameters, assembled
from rtp_sim.model.network import Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.ir import Collective, Compute, Op, Recv, Schedule, Send, Shift

Traffic = dict[str, tuple[int, int]]
"""Kind of op (shift, send, or the collective's kind) -> bytes and messages sent."""


@dataclass(frozen=True)
class ReferenceResult:
    """`losses[s]` is the mean loss of step s over micro-batches and replicas; `losses_by_rank[s][r]` lists rank r's
    micro-batches, `grad_norms[s]` is the norm of all gradients where the schedule measures it. `gradients` are those
    the last optimizer step saw, `parameters` those after it (full tensors). `traffic[r]` is what rank r sent in one
    step, `peak_bytes[r]` the most its buffers held in the last step."""

    losses: list[float]
    losses_by_rank: list[list[list[float]]]
    gradients: Parameters
    parameters: Parameters
    traffic: list[Traffic]
    peak_bytes: list[int]
    machines: list[Machine] = field(repr=False)
    grad_norms: list[float | None] = field(default_factory=list)


def run_reference(
    schedule: Schedule, network: Network, training: TrainingSpec, parameters: Parameters,
    batches: Sequence[Sequence[Batch]], *, float64: bool = True, hyper: Hyper = DEFAULTS, seed: int = 0,
) -> ReferenceResult:  # fmt: skip
    """One training step per entry of `batches`; `batches[step][replica][micro-batch]` are the network's inputs.

    ScheduleError if ranks run different programs (they are not in lockstep then) or an op cannot be carried out.
    """
    dtype = torch.float64 if float64 else None
    machines = [
        Machine(
            schedule, r, network, training, parameters, float_dtype=dtype, hyper=hyper, seed=seed, keep_gradients=True,
        )
        for r in range(schedule.world_size)
    ]  # fmt: skip
    losses, by_rank, norms, traffic = [], [], [], [Traffic() for _ in machines]
    for step in batches:
        traffic = run_step(schedule, machines, step)
        by_rank.append([m.losses() for m in machines])
        losses.append(mean_loss(schedule, by_rank[-1]))
        norms.append(machines[0].watch.norm)
    net = machines[0].network
    gradients = assembled(schedule, net, [m.gradients for m in machines]) if machines[0].gradients else {}
    updated = bool(gradients)
    return ReferenceResult(
        losses, by_rank, gradients, assembled(schedule, net, [m.weights() for m in machines]) if updated else {},
        traffic, [m.storage.peak_bytes for m in machines], machines, norms,
    )  # fmt: skip


def mean_loss(schedule: Schedule, by_rank: Sequence[Sequence[float]]) -> float:
    """Mean over replicas and micro-batches; where ranks of a tensor-parallel group have their tokens' parts of a loss,
    these are added up."""
    split_by_rows = any(
        isinstance(op.action, Compute)
        and op.action.kernel == "cross_entropy"
        and op.action.site is not None
        and op.action.site.split == "rows"
        for op in schedule.programs[0].ops
    )
    shared = schedule.world_size // replicas(schedule)
    total = sum(sum(micros) / len(micros) for micros in by_rank if micros)
    return total / replicas(schedule) / (1 if split_by_rows else shared)


def run_step(schedule: Schedule, machines: Sequence[Machine], step: Sequence[Batch]) -> list[Traffic]:
    """One step of all machines; returns what each sent."""
    if len(schedule.programs) != 1:
        raise ScheduleError(
            "the reference interpreter runs all ranks in lockstep; expected one program for all of them"
        )
    for m in machines:
        m.start_step(step[replica_of(schedule, m.rank)])
    traffic: list[Traffic] = [{} for _ in machines]
    mail: dict[tuple[int, int, str], torch.Tensor] = {}
    for op in schedule.programs[0].ops:
        match op.action:
            case Compute():
                for m in machines:
                    m.run(op)
            case Collective():
                _collective(schedule, machines, op, op.action, traffic)
            case Shift():
                _shift(machines, op, traffic)
            case Send() | Recv():
                _post(machines, op, op.action, mail, traffic)
    return traffic


def _count(traffic: list[Traffic], rank: int, kind: str, size_bytes: int, messages: int) -> None:
    before = traffic[rank].get(kind, (0, 0))
    traffic[rank][kind] = (before[0] + size_bytes, before[1] + messages)


def _shift(machines: Sequence[Machine], op: Op, traffic: list[Traffic]) -> None:
    """All ranks' hops at once, round by round, each round's data on their way before any is put in its place."""
    everyone = [m.transfers(op) for m in machines]
    for j in range(len(everyone[0])):
        hops = [transfers[j] for transfers in everyone]
        _rounds(hops)
        for rank, t in enumerate(hops):
            if t.to != rank and t.sent_bytes:
                _count(traffic, rank, "shift", t.sent_bytes, t.messages)
    for m in machines:
        m.finish(op)


def _rounds(hops: Sequence[Transfer]) -> None:
    rounds = [list(t.rounds()) for t in hops]
    for number in range(max(len(r) for r in rounds)):
        for rank, mine in enumerate(rounds):
            if number < len(mine) and mine[number].receive.numel():
                mine[number].receive.copy_(rounds[hops[rank].source][number].send)
        for mine in rounds:
            if number < len(mine) and mine[number].into is not None:
                into = mine[number].into
                assert into is not None
                into.copy_(mine[number].receive)


def _post(
    machines: Sequence[Machine], op: Op, action: Send | Recv, mail: dict[tuple[int, int, str], torch.Tensor],
    traffic: list[Traffic],
) -> None:  # fmt: skip
    for m in machines:
        for t in m.transfers(op):
            if isinstance(action, Send):
                mail[m.rank, t.to, action.tag] = t.send.clone()
                _count(traffic, m.rank, "send", t.sent_bytes, 1)
            elif (t.source, m.rank, action.tag) not in mail:
                raise ScheduleError(f"{op.name}: nothing was sent with tag {action.tag!r} before it is received")
            else:
                t.receive.copy_(mail.pop((t.source, m.rank, action.tag)))
        m.finish(op)


# ---- collectives on lists


def _collective(
    schedule: Schedule, machines: Sequence[Machine], op: Op, action: Collective, traffic: list[Traffic]
) -> None:
    for members in schedule.groups[action.group].instances:
        parcels = [machines[r].parcel(op) for r in members]
        combine(parcels)
        for r, p in zip(members, parcels, strict=True):
            size_bytes, messages = p.traffic()
            _count(traffic, r, action.kind, size_bytes, messages)
            machines[r].finish(op, p)


def combine(parcels: Sequence[Parcel]) -> None:
    """Carries out one collective on the parcels of all its members, in order of position."""
    first, n = parcels[0], len(parcels)
    match first.kind:
        case "all_reduce" | "reduce":
            total = _reduced(first.reduction, [p.send for p in parcels])
            for position, p in enumerate(parcels):
                if first.kind == "all_reduce" or position == first.root:
                    p.receive.copy_(total)
        case "broadcast":
            for p in parcels:
                p.receive.copy_(parcels[first.root].send)
        case "all_gather":
            whole = torch.cat([p.send for p in parcels])
            for p in parcels:
                p.receive.copy_(whole)
        case "reduce_scatter":
            total = _reduced(first.reduction, [p.send for p in parcels])
            for part, p in zip(total.view(n, -1), parcels, strict=True):
                p.receive.copy_(part)
        case "all_to_all":
            sent = torch.stack([p.send for p in parcels]).view(n, n, -1)
            for position, p in enumerate(parcels):
                p.receive.copy_(sent[:, position].reshape(-1))


def _reduced(reduction: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """In order of position, so that every run adds in the same order."""
    total = tensors[0].clone()
    for t in tensors[1:]:
        total = torch.maximum(total, t) if reduction == "max" else total.add_(t)
    return total
