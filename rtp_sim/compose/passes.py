"""A pipeline step with every pass of a micro-batch through a stage as a handful of ops: a `Schedule` as any other,
short enough to simulate whatever the number of layers and micro-batches.

What a pass takes follows from its stretch. Where b, a and h are what its end is later than its stream is free, than its
message has arrived and than the host comes to it, it ends at

    b + max(stream, message + (a - b), host + (h - b))

so that it is a kernel of b, behind a delay of a - b on the message and h - b of the host's time. Where a < b, or it
waits for another stream (of tensor parallelism) on the way, c before its end, it is two kernels, of b - c and of c;
what it leaves behind on such a stream beyond its own end is an op there. Messages, the last backward of every chunk and
the end of the step keep all their ops: there transfers of several groups meet on links, which composing (walk.py) does
not see. What ranks of a stage send each other inside the other passes has the price of the stretch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rtp_sim.compose.composition import Composition, Ranges, label_of
from rtp_sim.compose.pipeline import turns_of
from rtp_sim.compose.steady import Gone, Stand
from rtp_sim.compose.stretch import EARLIER, HOST, MARK, NEVER, RECEIVED, Stretch
from rtp_sim.compose.walk import Key, Turn
from rtp_sim.engine.costs import CostModel, OpCost, Phase
from rtp_sim.schedule.ir import Action as OpAction
from rtp_sim.schedule.ir import Compute, Dims, Op, Program, Recv, Schedule, Send
from rtp_sim.schedule.layout import stage_of_rank
from rtp_sim.schedule.pipeline_order import Action
from rtp_sim.timeline import Timeline

PASS = "pass"
"""A kernel that says itself how long it takes."""

COMPUTE, DELAY = "compute", "delay"

RESOLUTION = 200
"""A stream that a pass leaves free less than this part of it before its end is taken to be free at the end."""


class PassCost:
    """The prices of another cost model, and passes at the time that they state. Implements engine.costs.CostModel."""

    def __init__(self, cost: CostModel) -> None:
        self.own = cost
        self.overlap_slowdown_permille = cost.overlap_slowdown_permille

    def compute(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """Time of one kernel."""
        if kernel != PASS:
            return self.own.compute(kernel, dtype, dims)
        (_, takes_ns), _, (_, kernels_permille) = dims
        slower = (self.overlap_slowdown_permille - 1000) * kernels_permille
        return OpCost(takes_ns, "assumed", 1000 + round(slower / 1000))

    def host_issue_ns(self, op: Op) -> int:
        """Host time of an op, of all ops of a pass."""
        action = op.action
        if isinstance(action, Compute) and action.kernel == PASS:
            return action.dims[1][1]
        return self.own.host_issue_ns(op)

    def link_capacity(self, link: int) -> int:
        """As the other's."""
        return self.own.link_capacity(link)

    def point_to_point(self, src_rank: int, dst_rank: int, size_bytes: int, chunk_bytes: int | None) -> Phase:
        """As the other's."""
        return self.own.point_to_point(src_rank, dst_rank, size_bytes, chunk_bytes)

    def collective(self, kind: str, ranks: tuple[int, ...], size_bytes: int, dtype: str) -> tuple[Phase, ...]:
        """As the other's."""
        return self.own.collective(kind, ranks, size_bytes, dtype)

    def compute_pool(self, rank: int) -> int | None:
        """As the other's."""
        return self.own.compute_pool(rank)


def in_passes(made: Composition) -> tuple[Schedule, PassCost]:
    """The step of a composition with a program per stage, and its prices."""
    layout, short = made.setting.layout, made.short.schedule
    programs = tuple(_Writer(made, s).program() for s in range(len(made.orders)))
    of_rank = tuple(stage_of_rank(layout, r) for r in range(layout.world_size))
    return Schedule(short.name, layout.world_size, short.groups, programs, of_rank), PassCost(made.cost)


def stands(timeline: Timeline, micros: int) -> Gone:
    """Where every simulated rank stood in a step in passes: when it was through with the first chunk of each
    micro-batch."""
    found = []
    for rank, times in timeline.ranks.items():
        places = {op.name: op.index for op in timeline.schedule.program(rank).ops}
        ends = times.end_ns[[places[pass_name("F", 0, micro)] for micro in range(micros)]]
        nothing = np.zeros((micros + 1, 0), dtype=np.int64)
        found.append(Stand(ends[:, None], nothing, int(times.end_ns.max())))
    return Gone(tuple(found))


def pass_name(kind: str, chunk: int, micro: int) -> str:
    """The op that ends a pass of a micro-batch through a chunk."""
    return f"m{micro}.{kind}{chunk}"


Place = dict[str, int]
"""Where the work of a pass ended, by stream: op indices."""


@dataclass(slots=True)
class _Left:
    """What is still to be written of a pass: its time, the host's before it, what it waits for; and which part of it
    is kernels."""

    takes_ns: int
    asked_ns: int
    after: list[int]
    kernels_permille: int


class _Writer:
    """One stage's program. `before` is where every action ended, `latest` the last of a kind and chunk, `whole` where
    ops of the short program went, `tails` what passes left behind on other streams, `ahead_ns` how much earlier than
    its kernels a pass may begin on them."""

    def __init__(self, made: Composition, stage: int) -> None:
        self.made, self.stage = made, stage
        kind = made.short.kinds[made.short.kind_of_stage[stage]]
        self.short = kind.program.ops
        self.ranges: Ranges = sorted(kind.ranges, key=lambda r: r[2])
        self.firsts = [first for _, _, first, _ in self.ranges]
        self.last = max(a.micro for a in made.orders[stage])
        self.times = {
            label: times_of(made.tables[stage][label], self.short[first:stop], made.prices.duration_ns[stage])
            for label, _, first, stop in self.ranges
            if COMPUTE in made.tables[stage][label].ends
        }
        self.ahead_ns: dict[str, int] = {}
        for times in self.times.values():
            for stream, left_ns in times.waits:
                self.ahead_ns[stream] = max(self.ahead_ns.get(stream, 0), left_ns - times.takes_ns)
        self.ops: list[Op] = []
        self.ends: Place = {}
        self.before: dict[object, Place] = {}
        self.latest: dict[object, Place] = {}
        self.whole: dict[int, int] = {}
        self.tails: Place = {}
        self.sent: tuple[int, ...] = ()
        self.owed_ns = 0

    def program(self) -> Program:
        """All actions, then the end of the step."""
        for action, turn in zip(self.made.orders[self.stage], turns_of(self.made, self.stage), strict=True):
            label = label_of(action, self.last)
            self.ends = {}
            if action.micro == self.last and action.kind in "BW":
                _, _, first, stop = next(r for r in self.ranges if r[0] == label)
                self.copy(first, stop, turn)
            else:
                self.short_pass(action, turn, self.times[label])
            self.before[action] = self.latest[action.kind, action.chunk] = self.ends
        for label, _, first, stop in self.ranges:
            if isinstance(label, tuple) and label[0] == "end":
                self.copy(first, stop, None)
        return Program(f"stage{self.stage}", {}, tuple(self.ops))

    def add(self, name: str, stream: str, action: OpAction, after: Sequence[int] = (), blocks: bool = False) -> int:
        index = len(self.ops)
        if stream == COMPUTE:
            after, self.sent = (*after, *self.sent), ()
        self.ops.append(Op(index, name, stream, action, (), (), tuple(after), blocks))
        self.ends[stream] = index
        return index

    # ---- a pass in a few ops

    def short_pass(self, action: Action, turn: Turn, times: PassTimes) -> None:
        """Receives, computes, sends."""
        one, name = turn.stretch, pass_name(*action)
        left = _Left(times.takes_ns, self.host_ns(name, one, times), [], times.kernels_permille)
        for left_ns, waited in self.waits(turn, times).items():
            if left_ns > times.takes_ns:
                waited = [self.add(f"{name}.{DELAY}", DELAY, timed(left_ns - times.takes_ns), waited)]
            elif left_ns < left.takes_ns:
                self.compute_until(left_ns, left, f"{name}.until.{left_ns}")
            left.after += waited
        self.free_early(name, times, left)
        longer = [tail for tail in times.tails if tail[2] > 0]
        kernel = timed(left.takes_ns + one.slowed_ns, left.asked_ns, left.kernels_permille)
        made = [self.add(name, COMPUTE, kernel, left.after, one.host_waits and not longer)]
        for stream, _, more_ns in times.tails:
            if -times.takes_ns // RESOLUTION <= more_ns <= 0 and stream in self.ahead_ns:
                self.tails[stream] = made[0]
        for stream, what, more_ns in longer:
            self.tails[stream] = self.add(f"{name}.{stream}", stream, what or timed(more_ns), made[:1], one.host_waits)
            made.append(self.tails[stream])
        if one.send is not None and turn.sends is not None:
            self.send(one.send, turn.sends, made)

    def compute_until(self, left_ns: int, left: _Left, name: str) -> int:
        """What of a pass comes before its last `left_ns`."""
        kernel = timed(left.takes_ns - left_ns, left.asked_ns, left.kernels_permille)
        index = self.add(name, COMPUTE, kernel, left.after)
        left.takes_ns, left.asked_ns, left.after = left_ns, 0, []
        return index

    def free_early(self, name: str, times: PassTimes, left: _Left) -> None:
        """Notes when streams are free before the pass ends, where a later one could use that."""
        for stream, _, more_ns in times.tails:
            if -min(self.ahead_ns.get(stream, 0), left.takes_ns) < more_ns < -times.takes_ns // RESOLUTION:
                first = self.compute_until(-more_ns, left, f"{name}.{stream}.free")
                self.tails[stream] = self.add(f"{name}.{stream}", stream, timed(0), (first,))

    def host_ns(self, name: str, one: Stretch, times: PassTimes) -> int:
        """The host's time before the pass can begin. What is left is owed when it comes to the next."""
        owed_ns, behind_ns = self.owed_ns, max(0, times.host_ns - times.takes_ns - one.receive_issue_ns)
        if one.receive is not None and one.receive.blocks_host:
            # The host comes to the message it waits for when it has done with the pass before.
            self.add(f"{name}.host", HOST, timed(0, owed_ns))
            owed_ns = behind_ns = 0
        self.owed_ns = 0 if one.host_waits else max(0, times.issue_ns - behind_ns)
        return owed_ns + behind_ns

    def waits(self, turn: Turn, times: PassTimes) -> dict[int, list[int]]:
        """The ops that the pass waits for, by how long it goes on from their ends, longest first."""
        found: dict[int, list[int]] = {}
        if turn.stretch.receive is not None and turn.receives is not None:
            found[times.message_ns] = [self.receive(turn.stretch.receive, turn.receives)]
        for stream, left_ns in times.waits:
            if stream in self.tails:
                found.setdefault(left_ns, []).append(self.tails.pop(stream))
        ended = self.before[turn.continues] if turn.continues is not None else {}
        for stream, left_ns in times.earlier:
            if stream in ended:
                found.setdefault(left_ns, []).append(ended[stream])
        return dict(sorted(found.items(), reverse=True))

    def receive(self, op: Op, key: Key) -> int:
        action, tag = op.action, tag_of(key)
        assert isinstance(action, Recv)
        same = Recv(action.group, action.offset, action.size_bytes, tag)
        return self.add(f"{tag}.recv", op.stream, same, (), op.blocks_host)

    def send(self, op: Op, key: Key, after: Sequence[int]) -> int:
        action, tag = op.action, tag_of(key)
        assert isinstance(action, Send)
        same = Send(action.group, action.offset, action.size_bytes, tag)
        index = self.add(f"{tag}.send", op.stream, same, after)
        if self.made.paced:
            self.sent = (*self.sent, index)
        return index

    # ---- all ops of a stretch

    def copy(self, first: int, stop: int, turn: Turn | None) -> None:
        """The ops of the short program from `first` to `stop`."""
        for op in self.short[first:stop]:
            after = [self.place(d, first) for d in op.after]
            known = sorted({d for d in after if d >= 0})
            if isinstance(op.action, Recv):
                assert turn is not None
                assert turn.receives is not None
                index = self.receive(op, turn.receives)
            elif isinstance(op.action, Send):
                assert turn is not None
                assert turn.sends is not None
                index = self.send(op, turn.sends, known)
            else:
                index = self.add(op.name, op.stream, op.action, known, op.blocks_host)
            self.whole[op.index] = index

    def place(self, op: int, first: int) -> int:
        """Where an op of the short program went that another one depends on; -1 where that goes without saying."""
        if op in self.whole:
            return self.whole[op]
        # Pacing by sends is between stretches, whichever they are (`add`).
        if isinstance(self.short[op].action, Send) and op < first:
            return -1
        label, micro, _, _ = self.ranges[bisect_right(self.firsts, op) - 1]
        assert isinstance(label, tuple)
        kind, chunk = label[0], label[1]
        last = micro == self.ranges[-1][1]
        ended = self.before.get((kind, chunk, self.last)) if last else self.latest.get((kind, chunk))
        return -1 if ended is None else ended.get(self.short[op].stream, ended[COMPUTE])


@dataclass(frozen=True, slots=True)
class PassTimes:
    """How much later a pass ends than its stream is free (`takes_ns`), than its message arrives and than the host comes
    to it, in ns; the host's time for all of it, from the message on where it waits for that.

    `kernels_permille` is which part of it is kernels; `waits` are the streams that it waits for on the way, with how
    long it goes on from there; `tails` the streams that it leaves busy, with what (None: more than one op) and for how
    much longer than the pass takes; `earlier` is like `waits`, of the pass that it continues."""

    takes_ns: int
    message_ns: int
    host_ns: int
    issue_ns: int
    kernels_permille: int
    waits: tuple[tuple[str, int], ...]
    tails: tuple[tuple[str, OpAction | None, int], ...]
    earlier: tuple[tuple[str, int], ...]


def times_of(one: Stretch, ops: Sequence[Op], duration_ns: Sequence[int]) -> PassTimes:
    """The times of a stretch of these ops as a pass."""
    end = one.ends[COMPUTE]
    takes_ns = end.get(COMPUTE, 0)
    others = [x for x in one.ends if x != COMPUTE and not x.startswith(MARK)]
    last = {op.stream: op for op in ops}
    tails = []
    for stream in others:
        more_ns = one.ends[stream].get(COMPUTE, NEVER) - takes_ns
        # A transfer that is all of the tail is itself: it shares links, and slows kernels.
        whole = not isinstance(last[stream].action, Compute) and duration_ns[last[stream].index] == more_ns
        tails.append((stream, last[stream].action if whole else None, more_ns))
    issue_ns = one.issued.get(RECEIVED, 0) if RECEIVED in one.issued else one.issued[HOST] - one.receive_issue_ns
    earlier = tuple((x.removeprefix(EARLIER), ns) for x, ns in end.items() if x.startswith(EARLIER))
    kernels_permille = min(1000, one.compute_ns * 1000 // takes_ns) if takes_ns else 0
    return PassTimes(
        takes_ns, end.get(RECEIVED, 0), end.get(HOST, 0), max(0, issue_ns), kernels_permille,
        tuple((x, end[x]) for x in others if x in end), tuple(tails), tuple(x for x in earlier if x[0] != COMPUTE),
    )  # fmt: skip


@lru_cache(1 << 16)
def timed(takes_ns: int, issue_ns: int = 0, kernels_permille: int = 0) -> Compute:
    """A kernel that says itself what it takes, and which part of it is kernels: what communication beside it slows."""
    return Compute(PASS, "fp32", (("ns", takes_ns), ("issue_ns", issue_ns), ("kernels_permille", kernels_permille)))


def tag_of(key: Key) -> str:
    """The tag of a message."""
    kind, piece, micro = key
    return f"{kind}{piece}.m{micro}"
