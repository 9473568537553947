"""`Stretch`: consecutive ops of one rank as a max-plus map from what was there before to what is there after.

An op ends at the latest of: the host has issued it, its stream is free, its dependencies are done; plus its duration.
So every time inside a stretch is a maximum of (input + constant), and the constants say all about it (F. Baccelli et
al., Synchronization and Linearity, 1992). Inputs are the host's clock, the end of each stream before the stretch, the
end of its receive, and the end of the earlier stretch that it continues (the forward, for a backward). The stretch of a
whole forward pass is then evaluated once and applied to every micro-batch, in any order, with the same result as op by
op: to the nanosecond where ranks of a group move in lockstep and nothing contends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtp_sim.schedule.ir import Collective, Compute, Op, Recv, Send

HOST, RECEIVED, EARLIER, MARK = "host", "received", "earlier.", "op"
NEVER = -(1 << 62)

Vector = dict[str, int]
"""Input -> the constant that is added to it; inputs that do not matter are absent."""


@dataclass(frozen=True)
class Stretch:
    """`ends[stream]` is the end of each stream, and of each op that a later stretch asks for; `source` when what is
    sent is ready to go (None: nothing is). `meets` is when the rank comes to the collective that ends the stretch, in
    which another stage takes part. `issued` is when the host has issued all ops: it waits for a receive that blocks it,
    and with `host_waits` for kernels. `receive_issue_ns` is its time until the receive is issued.

    `compute_ns` is the kernels' time and `exposed_ns` that of communication beside which none runs, where the stretch
    starts with everything ready; `slowed_ns` how much longer it takes if kernels beside communication are slower.
    """

    ends: Mapping[str, Vector]
    source: Vector | None
    meets: Vector | None
    receive: Op | None
    send: Op | None
    send_ns: int
    issued: Vector
    host_waits: bool
    receive_issue_ns: int
    compute_ns: int
    exposed_ns: int
    slowed_ns: int

    def after(self, vector: Vector, state: Mapping[str, int]) -> int:
        """The time that a vector gives for these inputs."""
        latest = NEVER
        for name, constant in vector.items():
            if name in state and state[name] + constant > latest:
                latest = state[name] + constant
        return latest


def stretch(
    ops: Sequence[Op], first: int, stop: int, duration_ns: Sequence[int], issue_ns: Sequence[int],
    earlier: frozenset[int] = frozenset(), wanted: frozenset[int] = frozenset(), meeting: tuple[str, ...] = (),
    slowdown_permille: int = 1000,
) -> Stretch:  # fmt: skip
    """Ops [first, stop) of a program. `earlier` are the ops of the stretches that this one continues, `wanted` ops
    whose own ends matter to others; a dependency on any other op before `first` is taken as one on the end of its
    stream. With a last op that is a collective of a group of `meeting`, its end is not this rank's to say."""
    ends: dict[str, Vector] = {}
    known: dict[int, Vector] = {}
    source = meets = None
    receive = send = None
    receive_issue_ns = send_ns = 0
    host: Vector = {HOST: 0}
    waits = False
    for op in ops[first:stop]:
        host = {name: constant + issue_ns[op.index] for name, constant in host.items()}
        if isinstance(op.action, Recv):
            receive, receive_issue_ns = op, host[HOST]
            known[op.index] = {RECEIVED: 0}
            # A message arrives only after the host has asked for it.
            host = {HOST: host[HOST], RECEIVED: 0} if op.blocks_host else host
            continue
        start: Vector = dict(host)
        _later(start, ends.get(op.stream) or {op.stream: 0})
        for d in op.after:
            if d in known:
                _later(start, known[d])
            elif d in wanted:
                _later(start, {mark_of(d): 0})
            elif d in earlier and not isinstance(ops[d].action, Send):
                _later(start, {EARLIER + ops[d].stream: 0})
            # What waits for a send is pacing between stretches, whichever they are: the walk's business.
            elif ops[d].stream != op.stream and not isinstance(ops[d].action, Send):
                _later(start, {ops[d].stream: 0})
        if isinstance(op.action, Send):
            # The end of the send is the exchange's to say; its stream is not free earlier.
            source, send, send_ns = start, op, duration_ns[op.index]
            continue
        if isinstance(op.action, Collective) and op.action.group in meeting and op.index == stop - 1:
            meets = start
            continue
        end = {name: constant + duration_ns[op.index] for name, constant in start.items()}
        ends[op.stream] = known[op.index] = end
        if op.index in wanted:
            ends[mark_of(op.index)] = end
        if op.blocks_host:
            host, waits = end, True
    compute_ns, exposed_ns, slowed_ns = _at_rest(ops[first:stop], duration_ns, slowdown_permille)
    return Stretch(ends, source, meets, receive, send, send_ns, host, waits, receive_issue_ns, compute_ns, exposed_ns,
                   slowed_ns)  # fmt: skip


def mark_of(op: int) -> str:
    """What the end of a single op is called among inputs and ends."""
    return f"{MARK}{op}"


def _later(vector: Vector, other: Vector) -> None:
    for name, constant in other.items():
        if vector.get(name, NEVER) < constant:
            vector[name] = constant


def _at_rest(ops: Sequence[Op], duration_ns: Sequence[int], slowdown_permille: int) -> tuple[int, int, int]:
    """Kernel time, exposed communication, and what the slowdown adds, if everything before is long done.

    Walks the ops in program order: a kernel is slowed by the communication that was issued before it.
    """
    plain, beside_ns, compute_ns, exposed_ns = _walk(ops, duration_ns, 1000)
    slow = plain
    if slowdown_permille > 1000 and beside_ns:
        slow, *_ = _walk(ops, duration_ns, slowdown_permille)
    return compute_ns, exposed_ns, slow - plain


def _walk(ops: Sequence[Op], duration_ns: Sequence[int], permille: int) -> tuple[int, int, int, int]:
    """End of the kernels, communication beside some, kernel time, exposed communication."""
    free: dict[str, int] = {}
    end_of: dict[int, int] = {}
    moving: list[tuple[int, int]] = []
    computing: list[tuple[int, int]] = []
    for op in ops:
        if isinstance(op.action, Send | Recv):
            continue
        start = max([free.get(op.stream, 0), *(end_of.get(d, 0) for d in op.after)])
        length = duration_ns[op.index]
        if not isinstance(op.action, Compute):
            end = start + length
            if length:
                moving.append((start, end))
        else:
            end = start + length if permille == 1000 else _slowed(start, length, moving, permille)
            if length:
                computing.append((start, end))
        free[op.stream] = end_of[op.index] = end
    total, exposed_ns = sum(end - start for start, end in computing), _outside(moving, computing)
    return free.get("compute", 0), _outside(moving, []) - exposed_ns, total, exposed_ns


def _slowed(start: int, length: int, moving: list[tuple[int, int]], permille: int) -> int:
    """When a kernel of `length` that begins at `start` ends, if it advances at 1000 / permille beside communication."""
    at, left = start, length * permille
    for begin, end in sorted(m for m in moving if m[1] > start):
        if begin > at:
            gap = min((begin - at) * permille, left)
            left -= gap
            at += gap // permille
        if left <= 0 or begin > at:
            break
        beside = min((end - at) * 1000, left) if end > at else 0
        left -= beside
        at += beside // 1000
    return at + -(-left // permille)


def _outside(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
    """Total length of the union of `some` less that of `others`."""
    events = sorted([(t, 0, d) for a, b in some for t, d in ((a, 1), (b, -1))]
                    + [(t, 1, d) for a, b in others for t, d in ((a, 1), (b, -1))])  # fmt: skip
    depth, total, before = [0, 0], 0, 0
    for t, which, change in events:
        if depth[0] and not depth[1]:
            total += t - before
        depth[which] += change
        before = t
    return total
