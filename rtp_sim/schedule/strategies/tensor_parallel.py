"""Megatron tensor parallelism: `tp`, and `tp-sp` with sequence parallelism (arXiv 1909.08053, 2205.05198).

All ranks of a tp group work on the same micro-batch. Attention is split by heads, an MLP by its features, embedding
and head by vocabulary. `tp` all-reduces the output of each split layer, and in the backward pass its input gradient,
which overlaps with the weight gradients unless `tp_overlap` is off. `tp-sp` keeps the activations between split layers
in shards of tokens: all-gather before, reduce-scatter after; the backward gathers the saved input again for the weight
gradient.
"""

from __future__ import annotations

from rtp_sim.errors import InputError
from rtp_sim.model.layers import Conv2d, CrossEntropy, Embedding, Layer, Linear, MaxPool2d
from rtp_sim.schedule.data_parallel import DataParallel
from rtp_sim.schedule.ir import Part, Size
from rtp_sim.schedule.sharding import Sharding, even, lower, parts, shard_numel, tensor_kind
from rtp_sim.schedule.step import Step, Work

GROUP = "tp"
HERE = Part(GROUP, (0,))


def tp(step: Step) -> None:
    """Activations between split layers are whole on every rank."""
    _run(step, Tensor(step, sequence=False))


def tp_sp(step: Step) -> None:
    """Activations between split layers are split by tokens."""
    _run(step, Tensor(step, sequence=True))


def _run(step: Step, tensor: Tensor) -> None:
    sync = DataParallel(step, step.options.dp_sync)
    for last in step.microbatches():
        for layer in step.network.layers():
            tensor.forward(layer)
        for block in reversed(step.network.blocks):
            if step.recomputes(block):
                for layer in block.layers:
                    tensor.forward(layer, "R")
            for layer in reversed(block.layers):
                tensor.backward(layer)
                if (last or sync.every_microbatch) and not tensor.partial_gradient(layer):
                    sync.ready(layer, *tensor.shard(layer), tensor.split(layer))
        if last or sync.every_microbatch:
            tensor.reduce_partial_gradients(sync)
        if not last and sync.every_microbatch:
            sync.end_microbatch()
    sync.finish()


class Tensor:
    """One rank's view of the split: which work each layer is, and the communication at its edges."""

    def __init__(self, step: Step, sequence: bool) -> None:
        self.step, self.n = step, step.group_size(GROUP)
        self.sequence = sequence and self.n > 1
        self._producer = {x.output: x for x in step.whole.layers()}
        self._kinds: dict[str, str] = {}
        self._works: dict[tuple[str, str], Work] = {}
        self._require_splits(sequence)

    def _require_splits(self, sequence: bool) -> None:
        """InputError where there is nothing to split, or a rank would get no part and idle while others compute."""
        layers = list(self.step.whole.layers())
        if self.n > 1 and not any(self.kind(x) for x in layers):
            raise InputError(
                "nothing to split: expected attention, MLPs, experts, an embedding or a language-model head"
            )
        for layer in layers:
            kind = self.kind(layer)
            if kind and parts(layer.op, kind)[0] < self.n:
                count, what = parts(layer.op, kind)
                raise InputError(f"cannot split {count} {what} over {self.n} ranks: each rank needs at least one")
            if sequence and self.n > 1 and isinstance(layer.op, Conv2d | MaxPool2d):
                raise InputError(f"{layer.name}: sequence parallelism splits tokens, and images have none")

    def kind(self, layer: Layer) -> str:
        """How the layer is split; "" if it is not. A loss is split where its logits are."""
        if layer.name not in self._kinds:
            self._kinds[layer.name] = self._kind(layer)
        return self._kinds[layer.name]

    def _kind(self, layer: Layer) -> str:
        if isinstance(layer.op, CrossEntropy):
            logits = self._producer.get(layer.inputs[0])
            return self.kind(logits) if logits is not None else ""
        return tensor_kind(layer.op)

    def shard(self, layer: Layer) -> tuple[Size, Part | None]:
        """Parameters of the layer's shard, by shard index where uneven."""
        numel = (
            even(shard_numel(layer.op, self.kind(layer), self.n))
            if self.kind(layer) and self.n > 1
            else layer.op.numel()
        )
        return numel, HERE if isinstance(numel, tuple) else None

    def work(self, layer: Layer, tag: str = "") -> Work:
        """The layer as this rank's shard: of its weights, or of the tokens, or whole, in any micro-batch."""
        if (layer.name, tag) not in self._works:
            self._works[layer.name, tag] = self._work(layer, tag)
        return self._works[layer.name, tag]

    def _work(self, layer: Layer, tag: str) -> Work:
        kind = self.kind(layer) or ("rows" if self._by_rows(layer) else "")
        sharding = Sharding(kind, self.n, HERE) if kind and self.n > 1 else None
        if layer.op.numel() == 0:
            return Work(sharding, tag=tag)
        return Work(sharding, 0, self._weight(layer), self._grad(layer), tag=tag)

    def _weight(self, layer: Layer) -> str:
        return self.step.weight(layer, *self.shard(layer), self.split(layer))

    def _grad(self, layer: Layer) -> str:
        return self.step.gradient(layer, *self.shard(layer), self.split(layer))

    def split(self, layer: Layer) -> str:
        """Along what this rank's weights are a shard; "" if it has them all."""
        return self.kind(layer) if self.n > 1 else ""

    def _by_rows(self, layer: Layer) -> bool:
        """Whether sequence parallelism leaves this layer its share of the tokens."""
        return self.sequence and not self.kind(layer)

    def partial_gradient(self, layer: Layer) -> bool:
        """Whether each rank has seen only its tokens, so that gradients of whole weights must be added up."""
        return self._by_rows(layer) and self.step.keeps(layer)

    # ---- forward

    def forward(self, layer: Layer, tag: str = "F") -> None:
        """The layer with the communication around it."""
        kind, step = self.kind(layer), self.step
        work = self.work(layer, tag)
        if self.sequence and self._reads_whole(layer):
            work = self._with_inputs(layer, work, tag)
        if self.sequence and self._writes_partial(layer):
            partial = self._full(layer.output, "partial")
            step.forward_layer(layer, Work(work.sharding, 0, work.weight, work.grad, work.inputs, partial, tag=tag))
            self._scatter(layer, partial, layer.output, f"{layer.name}.{tag}.reduce_scatter")
            return
        step.forward_layer(layer, work)
        output = step.tensor(layer.output)
        if self._writes_partial(layer):
            numel = self._tokens_numel(output)
            self._collective("all_reduce", f"{layer.name}.{tag}.all_reduce", numel, output, output)
        if kind and self.n > 1 and isinstance(layer.op, CrossEntropy):
            self._loss_statistics(layer, tag)

    def _reads_whole(self, layer: Layer) -> bool:
        return self.kind(layer) in ("heads", "ffn") or (self.kind(layer) == "vocab" and isinstance(layer.op, Linear))

    def _writes_partial(self, layer: Layer) -> bool:
        return self.n > 1 and (self.kind(layer) in ("heads", "ffn") or isinstance(layer.op, Embedding))

    def _loss_statistics(self, layer: Layer, tag: str) -> None:
        """Maximum, sum of exponentials and target logit per token, each reduced over the vocabulary shards."""
        statistics = self.step.tensor(f"{layer.name}.statistics")
        for what in ("max", "sum", "target"):
            self.step.collective("all_reduce", GROUP, GROUP, f"m{self.step.micro}.{layer.name}.{tag}.{what}",
                                 self.step.extent.tokens, (statistics,), (statistics,), "fp32")  # fmt: skip

    # ---- backward

    def backward(self, layer: Layer) -> None:
        """The layer's gradients with the communication around them."""
        step, work = self.step, self.work(layer)
        if self.n == 1 or not self.kind(layer) or isinstance(layer.op, CrossEntropy):
            step.backward_layer(layer, work)
            step.merge_input_grads(layer)
            return
        if self.sequence and self._writes_partial(layer):
            self._gather_output_grad(layer)
        if self.sequence and self._reads_whole(layer):
            work = self._with_inputs(layer, work, "B")
        reduced: dict[str, str] = {}
        made: list[str] = []

        def reduce(buffer: str) -> None:
            self._reduce_input_grad(layer, buffer, reduced)

        step.backward_layer(layer, work, reduce if step.options.tp_overlap else made.append)
        for buffer in made:
            reduce(buffer)
        step.merge_input_grads(layer, reduced)

    def _reduce_input_grad(self, layer: Layer, buffer: str, reduced: dict[str, str]) -> None:
        """Each rank has the part of the input gradient that went through its shard: add them up."""
        tensor = buffer.split("/d.", 1)[1].rsplit("@", 1)[0]
        name = f"{layer.name}.B.reduce.{tensor}"
        if not self.sequence:
            self._collective("all_reduce", name, self._tokens_numel(buffer), buffer, buffer)
            return
        target = self._rows_grad(tensor, layer)
        self._collective("reduce_scatter", name, self._tokens_numel(buffer), buffer, target)
        reduced[tensor] = target

    def _gather_output_grad(self, layer: Layer) -> None:
        sharded = self.step.output_grad(layer)
        full = self._full(layer.output, "grad")
        name = f"{layer.name}.B.all_gather"
        self._collective("all_gather", name, self._tokens_numel(full), sharded, full)
        self.step.set_output_grad(layer, full)

    def reduce_partial_gradients(self, sync: DataParallel) -> None:
        """One all-reduce over the tp group for weights whose ranks each saw their own tokens (norms, positions)."""
        layers = [x for x in self.step.network.layers() if self.partial_gradient(x)]
        grads = tuple(f"g.{x.name}" for x in layers)
        numel, dtype = sum(x.owned_numel for x in layers), self.step.policy.gradient_dtype
        name = f"m{self.step.micro}.reduce_partial_gradients"
        self.step.collective("all_reduce", GROUP, GROUP, name, numel, grads, grads, dtype)
        for layer in layers:
            sync.ready(layer)

    # ---- buffers and collectives

    def _with_inputs(self, layer: Layer, work: Work, tag: str) -> Work:
        """All-gathers the layer's token-sharded inputs and makes the work read the copies."""
        inputs = {}
        for tensor in layer.inputs:
            full = self._full(tensor, "full")
            name = f"{layer.name}.{tag}.all_gather.{tensor}"
            inputs[tensor] = full
            if tag == "B" and self.step.options.tp_keep_gathered and not self.step.recomputing(layer):
                continue
            self._collective("all_gather", name, self._tokens_numel(full), self.step.tensor(tensor), full)
        return Work(work.sharding, 0, work.weight, work.grad, inputs, work.output, tag=tag)

    def _full(self, tensor: str, what: str) -> str:
        """A buffer for all tokens of a tensor."""
        step, layer = self.step, self._producer[tensor]
        dtype = lower(layer.op, step.extent).dtype["y"] or step.policy.weight_dtype
        numel = step.extent.tokens * self._width(tensor)
        return step.b.buffer(f"{step.tensor(tensor)}.{what}", "communication", dtype, numel)

    def _rows_numel(self, tensor: str) -> Size:
        tokens, width = self.step.extent.tokens, self._width(tensor)
        base, extra = divmod(tokens, self.n)
        return even(tuple((base + (i < extra)) * width for i in range(self.n)))

    def _rows_grad(self, tensor: str, layer: Layer) -> str:
        step, numel = self.step, self._rows_numel(tensor)
        name = f"{step.tensor('d.' + tensor)}@{layer.name}.rows"
        part = HERE if isinstance(numel, tuple) else None
        dtype = step.b.declared(step.tensor(tensor)).dtype
        return step.b.buffer(name, "activations", dtype, numel, part=part)

    def _width(self, tensor: str) -> int:
        """Features per token of a tensor between layers."""
        numel = lower(self._producer[tensor].op, self.step.extent).numel["y"]
        assert isinstance(numel, int)
        return numel // self.step.extent.tokens

    def _scatter(self, layer: Layer, partial: str, tensor: str, name: str) -> None:
        step, numel = self.step, self._rows_numel(tensor)
        part = HERE if isinstance(numel, tuple) else None
        target = step.b.buffer(step.tensor(tensor), "activations", step.policy.weight_dtype, numel, part=part)
        self._collective("reduce_scatter", name, self._tokens_numel(partial), partial, target)

    def _tokens_numel(self, buffer: str) -> int:
        numel = self.step.b.declared(buffer).numel
        return numel if isinstance(numel, int) else max(numel)

    def _collective(self, kind: str, name: str, numel: int, source: str, target: str) -> None:
        dtype = self.step.b.declared(source).dtype
        self.step.collective(kind, GROUP, GROUP, f"m{self.step.micro}.{name}", numel, (source,), (target,), dtype)
