"""Bounds of the step time for all candidates at once.

No step is shorter than the longer of what its kernels, its messages and its host take on rank 0 (or on a stage of the
pipeline), each without contention, with what the dependencies of the strategy put one after another. The upper figure
adds up all that could overlap. Tables are looked up per block and size (layer_times.py); what remains per candidate is
numpy. `docs/planning.md` has the formulas. `tests/test_planner_bounds.py` holds them against the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rtp_sim.compose.composition import Composition, Kinds
from rtp_sim.compose.pipeline import Walked
from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.fold import Folds
from rtp_sim.hardware.spec import Cluster
from rtp_sim.model.network import Network, unfused
from rtp_sim.model.training import TrainingSpec
from rtp_sim.planner.activations import Activations
from rtp_sim.planner.layer_times import LayerTimes
from rtp_sim.planner.plan import Candidate
from rtp_sim.planner.prices import Prices, Ranks
from rtp_sim.planner.sizes import BlockSizes, Sizes, buckets
from rtp_sim.planner.space import EVERY_STRATEGY, RECOMPUTE_NAMES, RINGS, SYNCS, Ints, Space
from rtp_sim.schedule.layout import INNER_AXIS
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.pipeline_order import PIPELINES
from rtp_sim.schedule.update import optimizer_traffic

Floats = npt.NDArray[np.float64]
NS = 1e9
FLOAT_ERROR_NS = 1e-3


@dataclass(frozen=True, slots=True)
class EndOfStep:
    """What follows the backward pass, in ns: the reduction of gradients (which may begin during it), the optimizer,
    the gathering of new weights, copies into buckets, and adding reduced shards to those of earlier micro-batches."""

    reduce_ns: float
    update_ns: float
    gather_ns: float
    copies_ns: float
    adds_ns: float


Composed = tuple[Composition, Walked]
"""A pipeline's stretches, and its stages once they are walked through."""


class Model:
    """What bounds are made of, on one machine: times, prices and sizes of one network. `folds`, `kinds`
    and `composed` are what evaluations leave for those after them (evaluate.py)."""

    def __init__(self, network: Network, cluster: Cluster, training: TrainingSpec, cost: ClusterCost | None = None
                 ) -> None:  # fmt: skip
        self.network, self.cluster, self.training = network, cluster, training
        self.cost = cost or ClusterCost(cluster)
        self.prices = Prices(cluster, self.cost)
        expanded = unfused(network)
        self.times = LayerTimes(network, expanded, self.cost, self.prices, training.precision,
                                Options().rtp_chunk_bytes)  # fmt: skip
        self.sizes = Sizes(network, expanded)
        self.activations = Activations(network, expanded, training.precision)
        self.slowdown = self.times.slowdown
        self.folds = Folds()
        self.kinds: Kinds = {}
        self.composed: dict[Candidate, Composed] = {}
        self._ends: dict[object, EndOfStep] = {}

    def end_of_step(self, way: str, inner: int, of: tuple[int, ...] | None, dp: int, stride: int, sync: str,
                    copies: bool = False) -> EndOfStep:  # fmt: skip
        """The end of the step for the blocks with these numbers (None: all), reduced over dp ranks `stride` apart."""
        key = (way, inner, of, dp, stride, sync, copies)
        if key not in self._ends:
            blocks = self.sizes.blocks(way, inner)
            chosen = blocks if of is None else [blocks[k] for k in of]
            self._ends[key] = self._end(chosen, self.prices.strided(dp, stride), sync, copies)
        return self._ends[key]

    def _end(self, blocks: Sequence[BlockSizes], group: Ranks, sync: str, copies: bool) -> EndOfStep:
        policy, n = self.training.policy, len(group)
        filled = buckets(blocks, policy.gradient_bytes, Options())
        total = sum(size * count for size, count in filled.items())
        if n == 1:
            return EndOfStep(0.0, self.update(total), 0.0, 0.0, 0.0)
        price, reduce, gather, adds, share = self.prices.collective, 0.0, 0.0, 0.0, 0
        for size, count in filled.items():
            padded = -(-size // n) * n
            if sync == "ddp":
                reduce += count * price("all_reduce", group, size * policy.gradient_bytes)
            else:
                reduce += count * price("reduce_scatter", group, padded * policy.gradient_bytes)
                gather += count * price("all_gather", group, padded * policy.weight_bytes)
                adds += count * self.kernel("add", policy.gradient_dtype, numel=padded // n)
                share += count * (padded // n)
        copied = self.kernel("copy", policy.gradient_dtype, numel=total) if copies else 0.0
        return EndOfStep(reduce, self.update(total if sync == "ddp" else share), gather,
                         copied * (2 if sync == "ddp" else 1), adds)  # fmt: skip

    def update(self, numel: int) -> float:
        """Time of the optimizer over `numel` parameters."""
        return self.kernel("optimizer", self.training.policy.weight_dtype, numel=numel,
                           state_bytes=optimizer_traffic(self.training))  # fmt: skip

    def kernel(self, name: str, dtype: str, **sizes: int) -> float:
        """Time of one kernel in ns."""
        return float(self.cost.compute(name, dtype, tuple(sizes.items())).duration_ns)


def time_bounds(space: Space, model: Model) -> tuple[Floats, Floats]:
    """(lower, upper) in seconds for every candidate of a space whose rules all hold."""
    lower, upper = np.zeros(len(space)), np.zeros(len(space))
    for number in np.unique(space.strategy):
        name, mine = EVERY_STRATEGY[number], np.flatnonzero(space.strategy == number)
        part = space.take(mine)
        if name in PIPELINES:
            from rtp_sim.planner.pipeline_bounds import pipeline_bounds

            lower[mine], upper[mine] = pipeline_bounds(part, model, name)
        elif name in ("fsdp", "hsdp"):
            lower[mine], upper[mine] = _gathering(part, model)
        else:
            lower[mine], upper[mine] = _plain(part, model, name)
    # Steps take whole nanoseconds; sums of floats may be a little above theirs.
    return np.floor(lower + FLOAT_ERROR_NS) / NS, upper / NS


def way_of(name: str, sequence: bool, ring: str) -> str:
    """How layers are split (layer_times.py)."""
    axis = INNER_AXIS.get(name, "")
    if axis == "rtp":
        return name if ring == "auto" else f"{name}+flat"
    if axis == "tp":
        return "sp" if sequence else "tp"
    return "whole"


def lookup(columns: Sequence[Ints], make: Callable[..., Sequence[float]]) -> Floats:
    """`make(*key)` for every distinct row of the columns, spread over all rows: shape (values, rows)."""
    first, where = distinct(columns)
    keys = zip(*(column[first].tolist() for column in columns), strict=True)
    table = np.array([make(*key) for key in keys], dtype=np.float64)
    return np.take(table.T, where, axis=1)


def distinct(columns: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Places of the first of each distinct row, and for each row the number of its kind."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        code = code * (int(column.max(initial=0)) + 1) + column
        # Renumbered after every column, so that no product of their ranges can overflow.
        _, code = np.unique(code, return_inverse=True)
    _, first, where = np.unique(code, return_index=True, return_inverse=True)
    return first, where.reshape(-1)


def _plain(space: Space, model: Model, name: str) -> tuple[Floats, Floats]:
    """Replicated weights, rotation and tensor parallelism."""

    def passes(inner: int, sequence: int, ring: int, mb: int, recompute: int) -> list[float]:
        way = way_of(name, bool(sequence), RINGS[ring])
        total: list[float] = model.times.table(way, inner, mb, RECOMPUTE_NAMES[recompute], True).sum(axis=0).tolist()
        return total

    def ends(inner: int, dp: int, sequence: int, ring: int, sync: int) -> tuple[float, ...]:
        way = way_of(name, bool(sequence), RINGS[ring])
        mode = name if name in SYNCS else SYNCS[sync]
        found = model.end_of_step(way, inner, None, dp, inner, mode, name in SYNCS)
        return found.reduce_ns, found.update_ns, found.gather_ns, found.copies_ns, found.adds_ns

    f, b, _, kernels_f, kernels_b, issue_f, issue_b, messages = lookup(
        (space.inner, space.sequence, space.ring, space.micro_batch, space.recompute), passes
    )
    reduce, update, gather, copies, adds = lookup((space.inner, space.dp, space.sequence, space.ring, space.sync), ends)
    m = space.micro_batches
    every = space.sync == SYNCS.index("zero2") if name not in SYNCS else np.full(len(space), name == "zero2")
    rounds = np.where(every, m, 1)
    # A reduction begins once the forward before it is through.
    behind = np.where(every, f + m * reduce, m * f + (m - 1) * b + reduce)
    # From the second micro-batch on kernels wait for every reduction, to add its shard to the earlier ones; they may be
    # waiting for other messages at the same time.
    exposed = m * np.maximum(f + b - kernels_f - kernels_b, 0.0)
    waiting = np.where(every, np.maximum((m - 1) * (reduce + adds) - exposed, 0.0), 0.0)
    kernels = m * (f + b) + rounds * copies + waiting
    lower = np.maximum(np.maximum(kernels, behind), m * (issue_f + issue_b)) + update + gather
    upper = m * ((kernels_f + kernels_b) * model.slowdown + messages) + rounds * (reduce + copies) + update + gather
    return lower, np.maximum(lower, upper)


# ---- weights gathered unit by unit


def _gathering(space: Space, model: Model) -> tuple[Floats, Floats]:
    """FSDP and hybrid sharding: the next unit is gathered beside the kernels of this one."""

    def of(inner: int, dp: int, mb: int, recompute: int) -> tuple[float, ...]:
        n, across = (inner, dp) if inner > 1 else (dp, 1)
        return _fsdp_micro(model, n, across, inner, mb, RECOMPUTE_NAMES[recompute])

    f, b, again, kernels, messages, across, update, issue = lookup(
        (space.inner, space.dp, space.micro_batch, space.recompute), of
    )
    m = space.micro_batches
    # The first micro-batch leaves its gradient shards in place; later ones wait for theirs, to add them.
    before = m * f + np.where(m > 1, b + (m - 2) * again, 0.0)
    lower = np.maximum(np.maximum(m * f + b + (m - 1) * again, before + across), m * issue) + update
    upper = m * (kernels * model.slowdown + messages) + across + update
    return lower, np.maximum(lower, upper)


def _fsdp_micro(model: Model, n: int, replicas: int, stride: int, mb: int, recompute: str) -> tuple[float, ...]:
    """Forward, backward, backward of a later micro-batch, kernels, messages of a micro-batch; then the reduction across
    replicas, the optimizer, and the host's time per micro-batch. See schedule/strategies/fsdp.py for the order of
    gathers and reductions."""
    policy, price = model.training.policy, model.prices.collective
    together = model.prices.worst
    blocks, sizes = model.times.blocks("whole", 1, mb, recompute), model.sizes.blocks("whole", 1)
    tied = any(s.shared for s in sizes)
    owner = [k if not _root(model.network, k) or not tied else -1 for k in range(len(sizes))]
    numel: dict[int, int] = {}
    for k, s in zip(owner, sizes, strict=True):
        numel[k] = numel.get(k, 0) + s.owned
    shard = {k: -(-v // n) for k, v in numel.items()}
    gather_of = {k: together("all_gather", n, s * n * policy.weight_bytes) for k, s in shard.items()}
    reduce_of = {k: together("reduce_scatter", n, s * n * policy.gradient_bytes) for k, s in shard.items()}

    def first(order: Sequence[int], costs: dict[int, float]) -> list[float]:
        seen: set[int] = set()
        return [0.0 if k in seen or seen.add(k) else costs[k] for k in order]  # type: ignore[func-returns-value]

    ahead, back = first(owner, gather_of), first(owner[::-1], gather_of)
    scatter = first(owner, reduce_of)[::-1]
    f = [x.forward_ns for x in blocks]
    b = [x.backward_ns for x in blocks][::-1]
    last = len(f) - 1
    beside = model.times.beside
    forward = ahead[0] + sum(beside(f[i], ahead[i + 1]) for i in range(last)) + f[last]
    # The first gather of the backward runs beside the loss, which needs no weights.
    exposed = max(0.0, back[0] - model.times.weightless_ns(mb))
    backward = exposed + sum(
        beside(b[i], back[i + 1] + (scatter[i - 1] if i else 0.0)) for i in range(last)
    ) + b[last] + scatter[last]  # fmt: skip
    adds = {k: model.kernel("add", policy.gradient_dtype, numel=s) if n > 1 and s else 0.0 for k, s in shard.items()}
    added = sum(first(owner, adds))
    beside_adds = model.times.adds_ns(mb)[::-1]
    waited = sum(max(0.0, x - y) for x, y in zip(scatter, beside_adds, strict=True))
    later = exposed + sum(beside(b[i], back[i + 1]) for i in range(last)) + b[last] + waited + added
    across_group = model.prices.strided(replicas, stride)
    across = sum(price("all_reduce", across_group, s * policy.gradient_bytes) for s in shard.values())
    issue = sum(x.forward_issue_ns + x.backward_issue_ns for x in blocks)
    messages = sum(ahead) + sum(back) + sum(scatter)
    return forward, backward, later, sum(f) + sum(b), messages, across, model.update(sum(shard.values())), issue


def _root(network: Network, k: int) -> bool:
    """Whether a block shares weights with another, so that both are gathered as one."""
    shared = {x.shares for x in network.layers() if x.shares}
    return any(x.name in shared or x.shares for x in network.blocks[k].layers)


