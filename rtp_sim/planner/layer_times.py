"""What the layers of a network take on one rank: the least time of their kernels and of the messages they wait for.

A block's times are sums over its layers. Three ways to split a layer are known: not at all ("whole": replicated and
fully sharded data parallelism), by Megatron's tensor parallelism ("tp", "sp") and by rotation ("rtp", "rtp-inplace").
Kernels and messages have the prices of the cost model, so the sums are exact where nothing contends and nothing else
is waited for; what can hide behind a kernel is left out. Every time here is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from rtp_sim.cost.model import ClusterCost
from rtp_sim.model.kernels import BACKWARD
from rtp_sim.model.layers import Attention, Call, CrossEntropy, Embedding, Extent, Layer, LayerOp, Linear, Split
from rtp_sim.model.network import Block, Network
from rtp_sim.model.training import PRECISIONS
from rtp_sim.planner.prices import Prices
from rtp_sim.schedule.sharding import parts, rotation_kind, tensor_kind

RECOMPUTED_SCORES = ("attn.scores", "softmax", "dropout")
"""Kernels of an attention layer that selective recompute runs again (schedule/step.py)."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward and backward of a layer or block in ns: device time on the critical path, what of the backward's is
    recomputation (which needs no gradient), kernels alone, the host's time to issue them, messages alone."""

    forward_ns: float = 0.0
    backward_ns: float = 0.0
    recompute_ns: float = 0.0
    forward_kernels_ns: float = 0.0
    backward_kernels_ns: float = 0.0
    forward_issue_ns: float = 0.0
    backward_issue_ns: float = 0.0
    communication_ns: float = 0.0

    def plus(self, other: Pass) -> Pass:
        """Both, one after the other."""
        return Pass(*(getattr(self, n) + getattr(other, n) for n in Pass.__slots__))


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Kernel times of a layer (or shard): forward, backward, the weight gradient of its first call, which input
    gradients can be communicated behind, and what selective recompute adds; how many there are."""

    forward_ns: float
    backward_ns: float
    tail_ns: float
    again_ns: float
    forward_count: int
    backward_count: int


class LayerTimes:
    """Times of a network's blocks on one cluster; everything is worked out once per kind of layer and size."""

    def __init__(self, network: Network, unfused: Network, cost: ClusterCost, prices: Prices, precision: str,
                 chunk_bytes: int) -> None:  # fmt: skip
        self.cost, self.prices = cost, prices
        self.policy = PRECISIONS[precision]
        self.chunk_bytes = chunk_bytes
        self.networks: Mapping[bool, Network] = {False: network, True: unfused}
        self._producer = {f: {x.output: x for x in n.layers()} for f, n in self.networks.items()}
        self._inputs = {i.name for i in network.inputs}
        self._tied = {f: {x.shares for x in n.layers() if x.shares} for f, n in self.networks.items()}
        self._issue_ns = float(cost.cluster.device.host_issue_ns.value)
        # Ranks that share a pool of cores are slowed by what transfers take of it instead.
        self.slowdown = cost.overlap_slowdown_permille / 1000 if cost.compute_pool(0) is None else 1.0
        self._adds = {f: self._merges(f) for f in self.networks}
        self._alike: dict[object, int] = {}
        self._blocks: dict[object, Pass] = {}
        self._tables: dict[object, npt.NDArray[np.float64]] = {}
        self._keys = {f: [self._block_key(b, f) for b in n.blocks] for f, n in self.networks.items()}
        self.kernels = cache(self._kernels)
        self._price: Callable[[str, int, int], float] = self._first

    def _first(self, kind: str, n: int, size_bytes: int) -> float:
        return self.prices.collective(kind, self.prices.neighbours(n), size_bytes)

    def table(self, way: str, n: int, micro_batch: int, recompute: str, worst: bool = False
              ) -> npt.NDArray[np.float64]:  # fmt: skip
        """`blocks` as an array (blocks, fields of Pass)."""
        key = (way, n, micro_batch, recompute, worst and not self.prices.aligned(n))
        if key not in self._tables:
            rows = [[getattr(x, name) for name in Pass.__slots__] for x in self.blocks(*key)]
            self._tables[key] = np.array(rows, dtype=np.float64)
        return self._tables[key]

    def blocks(self, way: str, n: int, micro_batch: int, recompute: str, worst: bool = False) -> list[Pass]:
        """The times of every block, in order, split by `way` over n ranks: the first n, or with `worst` those whose
        collectives take longest."""
        self._price = self.prices.worst if worst else self._first
        unfused = way.startswith("rtp")
        adds = self._adds[unfused]
        found = []
        for block, alike in zip(self.networks[unfused].blocks, self._keys[unfused], strict=True):
            again = recompute == "full" and block.recomputable
            key = (way, n, micro_batch, again, recompute == "selective", alike, unfused, worst)
            if key not in self._blocks:
                self._blocks[key] = self._block(block.layers, adds[block.name], way, n, micro_batch, again, recompute)
            found.append(self._blocks[key])
        return found

    def weightless_ns(self, micro_batch: int) -> float:
        """What the backward does, with whole layers, before it first needs weights: that of the loss."""
        network, total = self.networks[False], 0.0
        for layer in reversed(network.blocks[-1].layers):
            if layer.op.numel():
                break
            total += self.kernels(layer.op, Extent(micro_batch, network.seq), Split(), self._asked(layer)).backward_ns
        return total

    def adds_ns(self, micro_batch: int) -> list[float]:
        """Of every whole block, the additions of gradients of one tensor: some follow its last weight gradient."""
        network = self.networks[False]
        extent = Extent(micro_batch, network.seq)
        return [self._merged_ns(self._adds[False][block.name], extent, "whole", 1) for block in network.blocks]

    def _block_key(self, block: Block, unfused: bool) -> int:
        """The first block that takes as long as this one, by its number."""
        layers = tuple(
            (x.op, x.name in self._tied[unfused], bool(x.shares), self._asked(x), self._tensor_kind(x, unfused))
            for x in block.layers
        )
        return self._alike.setdefault((unfused, layers, self._adds[unfused][block.name]), len(self._alike))

    # ---- blocks

    def _block(self, layers: Sequence[Layer], adds: tuple[int, ...], way: str, n: int, micro_batch: int, again: bool,
               recompute: str) -> Pass:  # fmt: skip
        extent = Extent(micro_batch, self.networks[False].seq)
        total = Pass()
        for layer in layers:
            total = total.plus(self._layer(layer, extent, way, n, again, recompute == "selective"))
        if again and way == "sp":
            # The output gradient is gathered beside what is recomputed last.
            last = max((k for k, x in enumerate(layers) if self._tensor_kind(x, False)), default=len(layers))
            beside = sum(self._layer(x, extent, way, n, False, False).forward_ns for x in layers[last + 1 :])
            total = total.plus(Pass(backward_ns=-beside, recompute_ns=-beside))
        merged = self._merged_ns(adds, extent, way, n)
        issue = self._issue_ns * len(adds)
        return total.plus(Pass(backward_ns=merged, backward_kernels_ns=merged, backward_issue_ns=issue))

    def _layer(self, layer: Layer, extent: Extent, way: str, n: int, again: bool, selective: bool) -> Pass:
        if way.startswith("rtp"):
            kind = rotation_kind(layer.op, n, layer.name in self._tied[True]) if n > 1 else ""
            if kind:
                return self._rotating(layer, "vocab" if layer.shares else kind, extent, way, n, again, selective)
            return self._plain(self.kernels(layer.op, extent, Split(), self._asked(layer)), again, selective)
        if way == "whole" or n == 1:
            return self._plain(self.kernels(layer.op, extent, Split(), self._asked(layer)), again, selective)
        kind = self._tensor_kind(layer, False)
        split = Split(kind, n, 0) if kind else Split("rows", n, n - 1) if way == "sp" else Split()
        base = self._plain(self.kernels(layer.op, extent, split, self._asked(layer)), again, selective)
        if not kind or isinstance(layer.op, CrossEntropy):
            return base
        forward, backward, all_ns = self._around(layer, kind, extent, way, n, base.backward_ns, split)
        more = forward if again else 0.0
        return base.plus(Pass(forward, backward + more, more, communication_ns=all_ns + more))

    def _plain(self, k: _Kernels, again: bool, selective: bool) -> Pass:
        """Kernels one after another."""
        backward = k.backward_ns + (k.forward_ns if again else 0.0) + (k.again_ns if selective else 0.0)
        issued = k.backward_count + (k.forward_count if again else 0)
        return Pass(k.forward_ns, backward, k.forward_ns if again else 0.0, k.forward_ns, backward,
                    k.forward_count * self._issue_ns, issued * self._issue_ns)  # fmt: skip

    # ---- tensor parallelism

    def _around(self, layer: Layer, kind: str, extent: Extent, way: str, n: int, kernels_ns: float, split: Split
                ) -> tuple[float, float, float]:  # fmt: skip
        """What collectives around a split layer add to its forward and its backward, and their sum. The reduction of
        an input gradient runs beside the weight gradient that follows, the gathering of the saved input beside the
        kernels before that, which both slow."""
        tail_ns = self.kernels(layer.op, extent, split, self._asked(layer)).tail_ns
        reads_whole = kind in ("heads", "ffn") or isinstance(layer.op, Linear)
        writes_partial = kind in ("heads", "ffn") or isinstance(layer.op, Embedding)
        inputs = [t for t in layer.inputs if t not in self._inputs]
        forward = backward = all_ns = 0.0

        def price(what: str, tensor: str) -> float:
            return self._price(what, n, self._bytes(tensor, extent))

        if way == "sp":
            before = sum(price("all_gather", t) for t in inputs) if reads_whole else 0.0
            after = price("reduce_scatter", layer.output) if writes_partial else 0.0
            forward = before + after
            back = price("all_gather", layer.output) if writes_partial else 0.0
            scatter = price("reduce_scatter", inputs[0]) if len(inputs) == 1 and reads_whole else 0.0
            again = min(before, kernels_ns - tail_ns) * (1 - 1 / self.slowdown)
            backward = back + self.beside(tail_ns, scatter) - tail_ns + max(0.0, again)
            all_ns = forward + back + scatter + before
        else:
            forward = price("all_reduce", layer.output) if writes_partial else 0.0
            reduce = price("all_reduce", inputs[0]) if len(inputs) == 1 else 0.0
            backward = self.beside(tail_ns, reduce) - tail_ns
            all_ns = forward + reduce
        return forward, backward, all_ns

    def _tensor_kind(self, layer: Layer, unfused: bool) -> str:
        """As schedule/strategies/tensor_parallel.py: a loss is split where its logits are."""
        if isinstance(layer.op, CrossEntropy):
            logits = self._producer[unfused].get(layer.inputs[0])
            return self._tensor_kind(logits, unfused) if logits is not None else ""
        return tensor_kind(layer.op)

    def _bytes(self, tensor: str, extent: Extent) -> int:
        """Bytes of a tensor between layers, whole."""
        return _whole_numel(self._producer[False][tensor], extent) * self.policy.weight_bytes

    # ---- rotation

    def _rotating(self, layer: Layer, kind: str, extent: Extent, way: str, n: int, again: bool, selective: bool
                  ) -> Pass:  # fmt: skip
        """A pass over all shards: each sub-step takes the longer of its kernels and the hop beside it; gradients hop
        after the kernels. In place nothing runs beside a hop."""
        large = parts(layer.op, kind)[0] % n or n
        asked = self._asked(layer)
        first = self.kernels(layer.op, extent, Split(kind, n, 0), asked)
        last = self.kernels(layer.op, extent, Split(kind, n, n - 1), asked)
        sizes = _two_sizes(layer, kind, n)
        forward = large * first.forward_ns + (n - large) * last.forward_ns
        backward = large * first.backward_ns + (n - large) * last.backward_ns
        if selective:
            backward += large * first.again_ns + (n - large) * last.again_ns
        least_forward, least_backward = min(first.forward_ns, last.forward_ns), min(first.backward_ns, last.backward_ns)
        weights, gradients = min(sizes) * self.policy.weight_bytes, min(sizes) * self.policy.gradient_bytes
        chunk = self.chunk_bytes if way.startswith("rtp-inplace") else None
        there, back = self.prices.hops(n, way, weights, chunk), self.prices.hops(n, way, weights, chunk, reverse=True)
        home = self.prices.hops(n, way, gradients, chunk, reverse=True)
        if chunk is not None:
            f, b = forward + sum(there), backward + sum(back) + sum(home)
            r = forward + sum(back) + min(back)
        else:
            f = max(forward, least_forward + sum(self.beside(least_forward, hop) for hop in there))
            b = max(backward, least_backward + sum(self.beside(least_backward, hop) for hop in back)) + sum(home)
            # The last hop, back to where the pass began, may run beside the layers that follow.
            r = max(forward, least_forward + sum(self.beside(least_forward, hop) for hop in back))
        count_f, count_b = n * min(first.forward_count, last.forward_count), n * min(
            first.backward_count, last.backward_count
        )  # fmt: skip
        kernels_b = backward
        if again:
            b, kernels_b, count_b = b + r, kernels_b + forward, count_b + count_f
        hops_ns = sum(there) + sum(back) + sum(home) + (sum(back) if again else 0.0)
        return Pass(f, b, r if again else 0.0, forward, kernels_b, count_f * self._issue_ns, count_b * self._issue_ns,
                    hops_ns)  # fmt: skip

    def beside(self, kernels_ns: float, message_ns: float) -> float:
        """Kernels and a message that start together: kernels are slower while the message is under way."""
        return max(message_ns, kernels_ns + message_ns * (1 - 1 / self.slowdown))

    # ---- kernels

    def _kernels(self, op: LayerOp, extent: Extent, split: Split, asked: tuple[bool, ...]) -> _Kernels:
        """The kernels of one layer. `asked` says of each input whether a gradient is wanted."""
        calls = op.lower(extent, split).calls
        forward = [self._ns(c.kernel, c) for c in calls]
        again = [t for t, c in zip(forward, calls, strict=True) if c.kernel in RECOMPUTED_SCORES]
        backward, tail, count = 0.0, 0.0, 0
        for i in reversed(range(len(calls))):
            for rule in BACKWARD.get(calls[i].kernel, ()):
                if "dw" not in rule.makes and not _wanted(calls[i], rule.makes, asked):
                    continue
                ns = self._ns(rule.kernel, calls[i])
                backward, count = backward + ns, count + (ns > 0)
                if i == 0 and rule.makes == ("dw",):
                    tail += ns
        again_ns = sum(again) if isinstance(op, Attention) else 0.0
        return _Kernels(sum(forward), backward, tail, again_ns, sum(t > 0 for t in forward), count)

    def _ns(self, kernel: str, call: Call) -> float:
        return float(self.cost.compute(kernel, self.policy.kernel_dtype(kernel), call.dims).duration_ns)

    def _asked(self, layer: Layer) -> tuple[bool, ...]:
        return tuple(t not in self._inputs for t in layer.inputs)

    # ---- gradients of tensors with several readers

    def _merges(self, unfused: bool) -> dict[str, tuple[int, ...]]:
        """Per block, the features per token of every addition of two gradients of one tensor."""
        network, seen = self.networks[unfused], set[str]()
        found: dict[str, list[int]] = {block.name: [] for block in network.blocks}
        for block in network.blocks:
            for layer in block.layers:
                for tensor in layer.inputs:
                    if tensor in seen and tensor not in self._inputs:
                        one = Extent(1, network.seq)
                        found[block.name].append(_whole_numel(self._producer[unfused][tensor], one))
                    seen.add(tensor)
        return {name: tuple(sizes) for name, sizes in found.items()}

    def _merged_ns(self, adds: tuple[int, ...], extent: Extent, way: str, n: int) -> float:
        """Time of these additions; with sequence parallelism on a rank's share of the tokens."""
        share = n if way == "sp" else 1
        total = 0.0
        for per_sample in adds:
            numel = per_sample * extent.batch // share
            total += self.cost.compute("add", self.policy.kernel_dtype("add"), (("numel", numel),)).duration_ns
        return total


def _wanted(call: Call, makes: tuple[str, ...], asked: tuple[bool, ...]) -> bool:
    """Whether one of the input gradients that a rule makes is wanted."""
    names = call.inputs if "dx" in makes else call.inputs[:1]
    return any(not (name[0] == "x" and name[1:].isdigit()) or asked[int(name[1:])] for name in names)


def _whole_numel(layer: Layer, extent: Extent) -> int:
    return layer.op.lower(extent).tensors["y"].numel


def _two_sizes(layer: Layer, kind: str, n: int) -> tuple[int, int]:
    """Parameters of the first and of the last shard."""
    return layer.op.numel(Split(kind, n, 0)), layer.op.numel(Split(kind, n, n - 1))

