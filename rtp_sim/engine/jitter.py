"""A simulated step played again many times with noise: every kernel, message and collective takes a random factor
longer or shorter, on every rank by itself.

What is played again is the timeline: each op keeps the time it took in it (contention and overlap included), and starts
when its stream, its host, what it depends on and its partners allow. Without noise that gives the timeline back to the
nanosecond. What noise does to contention itself is left out: transfers that meet on a link in the timeline slow each
other by what they did there; a hop whose two messages differ in size keeps the time of the longer.

Factors are log-normal with mean 1, exp(sigma z - sigma^2 / 2): of each kernel, of each message or collective, and one
per rank and step for all kernels of a rank. With a small probability a rank is a straggler in a step, and its kernels
take a stated factor longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rtp_sim.engine.costs import CostModel
from rtp_sim.engine.lowering import Gathering, Kernel, LoweredOp, Plan, Rotation, Sending, lower
from rtp_sim.engine.order import Cell, Node, Order, Ranks, Step, order
from rtp_sim.timeline import Timeline

Times = npt.NDArray[np.float64]
"""By rank and sample, in ns."""

Transfer = tuple[Times, Ranks]
"""When transfers could begin, by rank, and which message each is."""

ALIVE = 2**24
"""Numbers that are kept at once: as many samples are evaluated together as that allows."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviations of the logarithm: of `compute` kernels, of `link` messages and collectives, of a `rank` in a
    step. `straggler` is the probability that a rank is one in a step, `straggler_factor` what its kernels then take."""

    compute: float = 0.0
    link: float = 0.0
    rank: float = 0.0
    straggler: float = 0.0
    straggler_factor: float = 1.0


class Replay:
    """A timeline made ready to be played again."""

    def __init__(self, timeline: Timeline, cost: CostModel) -> None:
        self.timeline = timeline
        self.plan: Plan = lower(timeline.schedule, cost, folded=True)
        self.order: Order = order(self.plan)
        self.instances: dict[tuple[str, tuple[int, ...]], Ranks] = {}
        learning = _Learning(self)
        learning.play()
        self.durations: dict[Node, Times] = learning.durations

    @property
    def size(self) -> int:
        """Ops of all ranks: what a sample costs."""
        return sum(len(cell.ranks) * len(cell.lowered.ops) for cell in self.order.cells)

    def step_times_ns(self, noise: Noise, samples: int, seed: int) -> npt.NDArray[np.int64]:
        """The step time of each sample. The same arguments give the same numbers."""
        random = np.random.Generator(np.random.PCG64(seed))
        together = max(1, min(samples, ALIVE // self.order.most_alive))
        found = []
        for first in range(0, samples, together):
            played = _Playing(self, noise, min(together, samples - first), random)
            found.append(played.play())
        return np.rint(np.concatenate(found)).astype(np.int64)


class _Pass:
    """One walk through the order. `end` holds ends by node and, for communication ops that are ready and no more, when
    they got ready; both have a row per rank of the cell."""

    def __init__(self, replay: Replay, samples: int) -> None:
        self.order, self.plan, self.samples = replay.order, replay.plan, samples
        self.world = replay.plan.schedule.world_size
        self.end: dict[Node, Times] = {}
        self.instances = replay.instances

    def play(self) -> Times:
        """The step time of every sample."""
        for step in self.order.steps:
            if step.meeting:
                self.meet(step)
            else:
                self.take(step.node)
            for node in step.free:
                del self.end[node]
        cells = enumerate(self.order.cells)
        lasts = [self.end[c, i].max(axis=0) for c, cell in cells for i in cell.last]
        return np.asarray(np.maximum.reduce(lasts)) if lasts else np.zeros(self.samples)

    def take(self, node: Node) -> None:
        """An op is ready; a kernel runs."""
        cell = self.order.cells[node[0]]
        op = cell.lowered.ops[node[1]]
        ready = np.zeros((len(cell.ranks), self.samples))
        if op.gate < 0:
            ready += op.offset_ns
        else:
            np.add(self.end[node[0], op.gate], op.offset_ns, out=ready)
        for i in cell.read_by(op):
            np.maximum(ready, self.end[node[0], i], out=ready)
        self.end[node] = self.kernel(node, cell, ready) if isinstance(op, Kernel) else ready

    def meet(self, step: Step) -> None:
        """All partners of a communication are ready."""
        op = self.op(step.node)
        if isinstance(op, Rotation):
            self.rotate(step.meeting, op)
        elif isinstance(op, Gathering):
            self.gather(step.meeting, op.group)
        elif not isinstance(op, Kernel):
            self.send(step.meeting, op.wire)

    def op(self, node: Node) -> LoweredOp:
        """The op of a node."""
        return self.order.cells[node[0]].lowered.ops[node[1]]

    def everyone(self, nodes: tuple[Node, ...]) -> Times:
        """When the ranks of these ops were ready, by rank of the world; 0 for others."""
        ready = np.zeros((self.world, self.samples))
        for node in nodes:
            ready[self.order.cells[node[0]].ranks] = self.end[node]
        return ready

    def settle(self, nodes: tuple[Node, ...], end: Times) -> None:
        """The ends of these ops, out of those of the world."""
        for node in nodes:
            self.end[node] = end[self.order.cells[node[0]].ranks]

    def ranks_of(self, nodes: tuple[Node, ...]) -> Ranks:
        """All ranks of these ops."""
        return np.concatenate([self.order.cells[c].ranks for c, _ in nodes])

    # ---- what an op takes: learned in one pass, drawn in the others

    def kernel(self, node: Node, cell: Cell, ready: Times) -> Times:
        """The end of a kernel on the ranks of a cell."""
        raise NotImplementedError

    def flow(self, nodes: tuple[Node, ...], ranks: Ranks, transfers: list[Transfer], messages: int) -> Times:
        """The ends, on `ranks`, of ops that are made of transfers; `messages` are different ones."""
        raise NotImplementedError

    # ---- the transfers of each kind of communication

    def rotate(self, nodes: tuple[Node, ...], op: Rotation) -> None:
        """Every hop is a message from each rank to the next; a rank is done when it has sent and received."""
        ready, ranks = self.everyone(nodes), self.ranks_of(nodes)
        transfers: list[Transfer] = []
        for wire in self.plan.shapes[op.shape]:
            to, source = self.order.receiver[wire][ranks], self.order.sender[wire][ranks]
            if (to == ranks).all():
                continue
            # A message is numbered by its receiver.
            transfers.append((np.maximum(ready[ranks], ready[source]), ranks))
            transfers.append((np.maximum(ready[ranks], ready[to]), to))
        if transfers:
            ready[ranks] = self.flow(nodes, ranks, transfers, self.world)
        self.settle(nodes, ready)

    def gather(self, nodes: tuple[Node, ...], group: str) -> None:
        """The last member to come starts it for all."""
        ready, members = self.everyone(nodes), self.members(nodes, group)
        if members.shape[1] > 1:
            last = ready[members].max(axis=1)
            each = np.arange(len(members))
            ready[members] = self.flow(nodes, members[:, 0], [(last, each)], len(members))[:, None, :]
        self.settle(nodes, ready)

    def members(self, nodes: tuple[Node, ...], group: str) -> Ranks:
        """The instances of a group that these ops are of: ranks by instance and position."""
        key = group, tuple(c for c, _ in nodes)
        if key not in self.instances:
            here = set(self.ranks_of(nodes).tolist())
            instances = [members for members in self.plan.schedule.groups[group].instances if members[0] in here]
            self.instances[key] = np.array(instances, dtype=np.int64)
        return self.instances[key]

    def send(self, nodes: tuple[Node, ...], wire: int) -> None:
        """A message from each sender to its receiver."""
        sends = tuple(node for node in nodes if isinstance(self.op(node), Sending))
        receives = tuple(node for node in nodes if node not in sends)
        sources = self.ranks_of(sends)
        targets = self.order.receiver[wire][sources]
        both = np.maximum(self.everyone(sends)[sources], self.everyone(receives)[targets])
        end = self.flow(sends, sources, [(both, np.arange(len(sources)))], len(sources))
        for ops, ranks in ((sends, sources), (receives, targets)):
            ends = np.zeros((self.world, self.samples))
            ends[ranks] = end
            self.settle(ops, ends)


class _Learning(_Pass):
    """The pass that finds out how long each op took in the timeline, once it was ready."""

    def __init__(self, replay: Replay) -> None:
        super().__init__(replay, 1)
        self.durations: dict[Node, Times] = {}
        by, times = replay.timeline.representative_of, replay.timeline.ranks
        self.ends: list[Times] = []
        self.row: list[Ranks] = []
        for cell in self.order.cells:
            represented, row = np.unique([by[rank] for rank in cell.ranks.tolist()], return_inverse=True)
            self.ends.append(np.stack([times[rank].end_ns for rank in represented.tolist()]).astype(np.float64))
            self.row.append(row)

    def ended(self, node: Node) -> Times:
        """When an op ended in the timeline, on each rank of its cell."""
        return np.asarray(self.ends[node[0]][self.row[node[0]], node[1]][:, None])

    def kernel(self, node: Node, cell: Cell, ready: Times) -> Times:
        """As in the timeline."""
        end = self.ended(node)
        self.durations[node] = end - ready
        return end

    def flow(self, nodes: tuple[Node, ...], ranks: Ranks, transfers: list[Transfer], messages: int) -> Times:
        """As in the timeline."""
        ends = np.zeros((self.world, 1))
        for node in nodes:
            ends[self.order.cells[node[0]].ranks] = self.ended(node)
        self.durations[nodes[0]] = ends[ranks] - np.maximum.reduce([ready for ready, _ in transfers])
        return np.asarray(ends[ranks])


class _Playing(_Pass):
    """A pass with noise, for several samples at once."""

    def __init__(self, replay: Replay, noise: Noise, samples: int, random: np.random.Generator) -> None:
        super().__init__(replay, samples)
        self.durations, self.noise, self.random = replay.durations, noise, random
        self.of_rank = self.factors(noise.rank, self.world)
        if noise.straggler > 0:
            is_one = random.random((self.world, samples)) < noise.straggler
            self.of_rank = self.of_rank * np.where(is_one, noise.straggler_factor, 1.0)

    def factors(self, sigma: float, count: int) -> Times:
        """Log-normal factors of mean 1."""
        if sigma == 0:
            return np.ones((count, self.samples))
        drawn = self.random.standard_normal((count, self.samples))
        drawn *= sigma
        drawn -= sigma * sigma / 2
        return np.asarray(np.exp(drawn, out=drawn))

    def kernel(self, node: Node, cell: Cell, ready: Times) -> Times:
        """Each rank with factors of its own."""
        taken = self.factors(self.noise.compute, len(cell.ranks))
        taken *= self.of_rank[cell.ranks]
        taken *= self.durations[node]
        ready += taken
        return ready

    def flow(self, nodes: tuple[Node, ...], ranks: Ranks, transfers: list[Transfer], messages: int) -> Times:
        """Each message with a factor of its own, the same at both ends."""
        drawn = self.factors(self.noise.link, messages)
        ends = [ready + self.durations[nodes[0]] * drawn[message] for ready, message in transfers]
        return np.asarray(np.maximum.reduce(ends))
