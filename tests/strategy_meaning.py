"""What a schedule computes, in symbols: which shard lies in which buffer, and whose gradients have been added up where.

A second reading of the IR that knows no durations and no torch. All ranks run the ops of the one program in lockstep. A
weight buffer holds the number of a shard, a gradient buffer counts contributions: (rank, op) of every weight-gradient
kernel whose result is in it. A hop moves contents, a reduction adds them, an optimizer step is recorded as found.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rtp_sim.schedule.ir import Collective, Compute, Op, Schedule, Shift

Contribution = tuple[int, int]
"""(rank, index of the weight-gradient op)."""


@dataclass
class Meaning:
    """`weights[r][b]` is the shard in weight buffer b; `sums[r][b]` what buffer b adds up; `updates[r]` the
    contributions that reach rank r's optimizer step, per gradient buffer that the step reads; `wrong` lists weight
    reads of a shard other than the one the kernel names."""

    weights: list[dict[str, int]]
    sums: list[dict[str, Counter[Contribution]]]
    updates: list[dict[str, Counter[Contribution]]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    visits: dict[tuple[int, str], list[int]] = field(default_factory=dict)


def interpret(schedule: Schedule, group: str = "") -> Meaning:
    """Runs the only program of `schedule` in symbols. Ring shards start at home: rank at position p holds shard p."""
    program = schedule.programs[0]
    ring = schedule.groups.get(group)
    home = [ring.position(r) if ring else 0 for r in range(schedule.world_size)]
    rotating = {b for op in program.ops if isinstance(op.action, Shift) for b in (*op.reads, *op.writes) if b[0] == "w"}
    held = [{b: home[r] for b in rotating if program.buffers[b].live_in} for r in range(schedule.world_size)]
    m = Meaning(held, [{} for _ in home], [{} for _ in home])
    for op in program.ops:
        if isinstance(op.action, Shift):
            _shift(schedule, m, op, op.action)
        elif isinstance(op.action, Collective):
            _collective(schedule, m, op, op.action)
        else:
            assert isinstance(op.action, Compute)
            for rank in range(schedule.world_size):
                _compute(schedule, m, op, op.action, rank)
    return m


def _shift(schedule: Schedule, m: Meaning, op: Op, shift: Shift) -> None:
    (hop,), source, target = shift.hops, op.reads[0], op.writes[0]
    store: list[dict[str, object]] = m.weights if source[0] == "w" else m.sums  # type: ignore[assignment]
    sent = [store[r].get(source) for r in range(schedule.world_size)]
    for rank in range(schedule.world_size):
        if sent[rank] is not None:
            if hop.part is not None and source[0] == "w" and schedule.shard_index(rank, hop.part) != sent[rank]:
                m.wrong.append(f"rank {rank} {op.name}: sends shard {sent[rank]}, says {hop.part}")
            store[schedule.groups[shift.group].peer(rank, hop.offset)][target] = sent[rank]


def _collective(schedule: Schedule, m: Meaning, op: Op, collective: Collective) -> None:
    """Reductions add up everything the members have in the sources; the same sum stands in every target of an
    all-reduce. The targets of a reduce-scatter hold one shard together (ZeRO-1 leaves it in the gradients themselves):
    the sum is booked on the first."""
    if collective.kind not in ("all_reduce", "reduce_scatter"):
        return
    for members in schedule.groups[collective.group].instances:
        if collective.kind == "all_reduce":
            for b in op.writes:
                total = sum((m.sums[r].get(b, Counter()) for r in members), Counter())
                for r in members:
                    m.sums[r][b] = Counter(total)
            continue
        sources = [b for b in op.reads if b not in op.writes] or list(op.reads)
        total = sum((m.sums[r].get(b, Counter()) for r in members for b in sources), Counter())
        for r in members:
            m.sums[r].update({b: Counter(total) if b == op.writes[0] else Counter() for b in op.writes})


def _compute(schedule: Schedule, m: Meaning, op: Op, action: Compute, rank: int) -> None:
    sums, weights = m.sums[rank], m.weights[rank]
    shard = schedule.shard_index(rank, action.part)
    for b in op.reads:
        if b in weights and action.part is not None:
            m.visits.setdefault((rank, op.name.rsplit(".", 1)[0]), []).append(shard)
            if weights[b] != shard:
                m.wrong.append(f"rank {rank} {op.name}: holds shard {weights[b]} in {b}, works on {shard}")
    categories = schedule.programs[0].buffers
    grads = [b for b in op.writes if categories[b].category == "gradients" or b.startswith("gfull.")]
    if action.kernel == "optimizer":
        m.updates[rank] = {b: Counter(sums.get(b, Counter())) for b in op.reads if b[0] == "g"}
    elif action.kernel == "copy" and op.reads[0][0] == "w":
        weights[op.writes[0]] = weights[op.reads[0]]
    elif action.kernel == "copy":
        sources = op.reads[:1] if op.reads[0].startswith("bucket") else [b for b in op.reads if b not in op.writes]
        total = sum((sums.get(b, Counter()) for b in sources), Counter())
        sums.update({b: Counter(total) for b in op.writes})
    elif action.kernel == "add" and grads:
        sums[op.writes[0]] = sum((sums.get(b, Counter()) for b in op.reads), Counter())
    else:
        for b in grads:
            before = sums.get(b, Counter()) if b in op.reads else Counter()
            sums[b] = before + Counter({(rank, op.index): 1})


def expected_update(schedule: Schedule, rank: int, layers: set[str], axis: str = "") -> Counter[Contribution]:
    """Every weight-gradient kernel of these layers, on every rank of the world, that works on this rank's shard."""
    wanted: Counter[Contribution] = Counter()
    own = schedule.groups[axis].position(rank) if axis in schedule.groups else 0
    for op in schedule.programs[0].ops:
        if not isinstance(op.action, Compute) or op.action.kernel in ("add", "copy", "optimizer"):
            continue
        writes = [b for b in op.writes if b.startswith("g")]
        if not writes or op.name.split(".B")[0].split(".", 1)[1] not in layers:
            continue
        for other in range(schedule.world_size):
            part = op.action.part
            if part is None or part.group != axis or schedule.shard_index(other, part) == own:
                wanted[other, op.index] += 1
    return wanted


def foreign_reads(schedule: Schedule) -> list[str]:
    """Kernels on a shard that read an activation which holds nothing of that shard, on rank 0 (ranks are alike).

    An activation holds the shards of the kernels that wrote it since its last fresh write; one that a kernel without a
    shard wrote holds them all.
    """
    holds: dict[str, set[int] | None] = {}
    buffers, found = schedule.programs[0].buffers, []
    for op in schedule.programs[0].ops:
        if not isinstance(op.action, Compute) or op.action.kernel == "optimizer":
            continue
        shard = None if op.action.part is None else schedule.shard_index(0, op.action.part)
        for b in op.reads:
            held = holds.get(b)
            if buffers[b].category == "activations" and shard is not None and held is not None:
                updates = b in op.writes and shard not in held
                if shard not in held and not updates:
                    found.append(f"{op.name} works on shard {shard}, but {b} holds {sorted(held)}")
        for b in op.writes:
            before = holds.get(b, set()) if b in op.reads else set()
            holds[b] = None if shard is None or before is None else before | {shard}
    return found
