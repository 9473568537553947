"""`Space`: every candidate of one machine as columns of numbers, so that rules and bounds work on all of them at once.

A layout is a strategy with its degrees and options; each is combined with every micro-batch that divides a replica's
share of the global batch and with every way to recompute. What would be the same step twice is not listed: an axis of
one rank, an order of axes of which only one is longer than one, `selective` where attention keeps no scores. An
interleaved pipeline has chunks of equal length where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from rtp_sim.model.layers import Attention
from rtp_sim.model.network import Network
from rtp_sim.model.training import RECOMPUTE
from rtp_sim.planner.plan import Candidate
from rtp_sim.schedule.layout import INNER_AXIS, ORDERS
from rtp_sim.schedule.pipeline_order import PIPELINES

Ints = npt.NDArray[np.int64]

DEFAULT_STRATEGIES = (
    "single", "ddp", "zero1", "zero2", "fsdp", "hsdp", "rtp", "rtp-inplace", "tp", "tp-sp", "1f1b", "interleaved",
)  # fmt: skip
EVERY_STRATEGY = (*DEFAULT_STRATEGIES, "gpipe", "zb-h1", "zb-h2", "zb-v")
SYNCS = ("ddp", "zero1", "zero2")
RINGS = ("auto", "flat")
RECOMPUTE_NAMES = RECOMPUTE
OWN_SYNC = ("rtp", "rtp-inplace", "tp", "tp-sp", *PIPELINES)
"""Strategies whose data parallelism is an option of its own (`Options.dp_sync`)."""

Layout = tuple[int, int, int, int, int, int, int, int, int]
"""strategy, inner, dp, pp, vpp, order, sync, sequence parallel, ring: names as their places in the lists above."""


@dataclass(frozen=True)
class Space:
    """Columns of equal length; names as their places in EVERY_STRATEGY, ORDERS, SYNCS, RINGS and RECOMPUTE.

    `micro_batches` is 0 where the global batch cannot be split over the replicas.
    """

    cluster: str
    nodes: int
    gpus: int
    strategy: Ints
    inner: Ints
    dp: Ints
    pp: Ints
    vpp: Ints
    order: Ints
    sync: Ints
    sequence: Ints
    ring: Ints
    micro_batch: Ints
    micro_batches: Ints
    recompute: Ints

    def __len__(self) -> int:
        return len(self.strategy)

    def take(self, which: npt.NDArray[np.bool_] | Ints) -> Space:
        """The candidates that a mask or a list of places picks."""
        columns = (getattr(self, f.name)[which] for f in fields(self)[3:])
        return Space(self.cluster, self.nodes, self.gpus, *columns)

    def candidate(self, i: int) -> Candidate:
        """One candidate by its place."""
        return Candidate(
            self.cluster, self.nodes, self.gpus, EVERY_STRATEGY[self.strategy[i]], int(self.inner[i]), int(self.dp[i]),
            int(self.pp[i]), int(self.vpp[i]), ORDERS[self.order[i]], SYNCS[self.sync[i]], bool(self.sequence[i]),
            RINGS[self.ring[i]], RECOMPUTE[self.recompute[i]], int(self.micro_batch[i]), int(self.micro_batches[i]),
        )  # fmt: skip

    def axis(self, name: str) -> Ints:
        """A degree as users name it: that of rtp, tp or fsdp is 1 where the strategy has no such axis; `fsdp` without
        hybrid sharding shards over all ranks."""
        if name in ("rtp", "tp", "fsdp"):
            has = np.array([INNER_AXIS.get(s, "") == name for s in EVERY_STRATEGY])
            own = np.where(has[self.strategy], self.inner, 1)
            return np.where(self.strategy == EVERY_STRATEGY.index("fsdp"), self.dp, own) if name == "fsdp" else own
        if name == "gpus":
            return np.full(len(self), self.gpus)
        found: Ints = getattr(self, name.replace("-", "_"))
        return found


def make_space(
    network: Network, cluster: str, nodes: int, gpus: int, gpus_per_node: int, global_batch: int,
    strategies: Sequence[str] = DEFAULT_STRATEGIES,
) -> Space:  # fmt: skip
    """All candidates of `gpus` ranks in nodes of `gpus_per_node`. Layouts that strategies refuse are among them where
    only the model decides that (rules.py)."""
    blocks = sum(block.recomputable for block in network.blocks) or len(network.blocks)
    layouts = np.array(list(_layouts(gpus, gpus_per_node, blocks, strategies)), dtype=np.int64).reshape(-1, 9)
    shares_micro = np.isin(layouts[:, 0], [EVERY_STRATEGY.index(s) for s in EVERY_STRATEGY if _shared_micro(s)])
    replicas = np.where(shares_micro, layouts[:, 2], gpus)
    batches = {int(r): _splits(global_batch, int(r)) for r in np.unique(replicas)}
    ways = [RECOMPUTE.index(r) for r in _ways_to_recompute(network)]
    rows = [(k, mb, m, w) for k, r in enumerate(replicas.tolist()) for mb, m in batches[r] for w in ways]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    columns = [*layouts[table[:, 0]].T, *table[:, 1:].T]
    return Space(cluster, nodes, gpus, *columns)


def divisors(n: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _shared_micro(strategy: str) -> bool:
    """Whether the ranks of the inner axis work on the same micro-batch (schedule/build.py, `replicas`)."""
    return INNER_AXIS.get(strategy) == "tp"


def _splits(global_batch: int, replicas: int) -> list[tuple[int, int]]:
    """(micro-batch, micro-batches) of one replica; one that stands for the layout where there is none."""
    if global_batch % replicas:
        return [(1, 0)]
    share = global_batch // replicas
    return [(d, share // d) for d in divisors(share)]


def _ways_to_recompute(network: Network) -> tuple[str, ...]:
    """`selective` only where attention writes its scores out."""
    scores = any(isinstance(x.op, Attention) and x.op.implementation != "flash" for x in network.layers())
    return RECOMPUTE if scores else tuple(r for r in RECOMPUTE if r != "selective")


def _layouts(gpus: int, per_node: int, blocks: int, strategies: Sequence[str]) -> Iterator[Layout]:
    for name in strategies:
        number = EVERY_STRATEGY.index(name)
        if name == "single":
            if gpus == 1:
                yield number, 1, 1, 1, 1, 0, 0, 0, 0
        elif name in PIPELINES:
            yield from _pipelines(name, number, gpus, blocks)
        elif not INNER_AXIS.get(name):
            if gpus > 1:
                yield number, 1, gpus, 1, 1, 0, 0, 0, 0
        else:
            yield from _with_inner_axis(name, number, gpus, per_node)


def _with_inner_axis(name: str, number: int, gpus: int, per_node: int) -> Iterator[Layout]:
    for inner in divisors(gpus)[1:]:
        dp = gpus // inner
        if name == "hsdp" and dp == 1:
            continue
        syncs = range(len(SYNCS)) if name in OWN_SYNC and dp > 1 else (0,)
        two_level = INNER_AXIS[name] == "rtp" and inner > per_node > 1 and inner % per_node == 0
        for sync in syncs:
            for ring in range(2 if two_level else 1):
                yield number, inner, dp, 1, 1, 0, sync, int(name == "tp-sp"), ring


def _chunks(blocks: int, pp: int) -> list[int]:
    """Chunks per stage that give all pieces the same number of blocks, embedding and head counted as one each or not
    (schedule/stages.py); where there is no such number, all of them."""
    every = list(range(2, blocks // pp + 1))
    return [v for v in every if not blocks % (pp * v) or not (blocks + 2) % (pp * v)] or every


def _pipelines(name: str, number: int, gpus: int, blocks: int) -> Iterator[Layout]:
    own = PIPELINES[name].chunks
    for tp in divisors(gpus):
        for pp in divisors(gpus // tp)[1:]:
            dp = gpus // tp // pp
            chunks = [own] if own is not None else _chunks(blocks, pp)
            for vpp in chunks:
                for order in range(2 if dp > 1 else 1):
                    for sync in range(2 if dp > 1 else 1):
                        for sequence in range(2 if tp > 1 else 1):
                            yield number, tp, dp, pp, 1 if own is not None else vpp, order, sync, sequence, 0
