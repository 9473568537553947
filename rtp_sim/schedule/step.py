"""`Step`: what strategies write programs with. It emits the kernels of layers, forward and backward, into a builder.

Buffer names: `w.L` weights of layer L, `g.L` gradient, `opt.L` optimizer state, `m0/T` tensor T of micro-batch 0,
`m0/d.T` its gradient. Activations need no bookkeeping: a tensor lives until the last op that reads it, which is a
backward op where autograd would have saved it, and full recompute is emitting a block's forward a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from rtp_sim.model.kernels import BACKWARD, PASS_THROUGH, Rule
from rtp_sim.model.layers import Attention, Call, Extent, Layer
from rtp_sim.model.network import Block, Network
from rtp_sim.model.training import TrainingSpec
from rtp_sim.schedule.builder import Builder
from rtp_sim.schedule.ir import Collective, Compute, Group, Holding, Part, Site, Size
from rtp_sim.schedule.options import Options
from rtp_sim.schedule.pipeline_order import Action
from rtp_sim.schedule.sharding import ShardedLayer, Sharding, lower
from rtp_sim.schedule.update import OptimizerShare, loss_scale_buffer, take_step

OnInputGrad = Callable[[str], None]

PutOff = tuple[Layer, Callable[[], None]]
"""A weight gradient that is emitted later: whose it is, and what emits it."""


@dataclass(frozen=True, slots=True)
class Work:
    """How one layer is worked on: all of it, or one shard (`sharding`), as sub-step `sub` of several.

    `weight` and `grad` name the buffers that hold the weights and collect their gradient; `inputs` replaces input
    tensors by buffers (gathered copies, say) and `output` the output; `tag` goes into op names.
    """

    sharding: Sharding | None = None
    sub: int = 0
    weight: str | None = None
    grad: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None
    after: tuple[int, ...] = ()
    tag: str = ""


ALL = Work()


class Step:
    """The program of one rank class under construction, with what strategies need to know about the run."""

    def __init__(
        self, name: str, network: Network, training: TrainingSpec, groups: Mapping[str, Group], options: Options,
        stage: int = 0,
    ) -> None:  # fmt: skip
        self.b = Builder(name)
        self.whole = network
        self.take_part(network.blocks)
        self.stage = stage
        self.training = training
        self.groups = groups
        self.options = options
        self.extent = Extent(training.micro_batch, network.seq)
        self.policy = training.policy
        self.micro = 0
        # Where the program of a pipeline's stage goes from one action to the next: (action, index of its first op).
        self.actions: list[tuple[Action, int]] = []
        self._inputs = {i.name for i in network.inputs}
        self._loss = network.blocks[-1].layers[-1].output
        self._pending: dict[str, str] = {}
        # The stream on which collectives of a group were issued last.
        self._streams: dict[str, str] = {}
        # Weight gradients put off; None where they are emitted at once.
        self._put_off: list[PutOff] | None = None

    def take_part(self, blocks: tuple[Block, ...]) -> None:
        """From now on `network` is only what this rank works on, in a pipeline; `whole` stays all of it."""
        self.network = self.whole if blocks == self.whole.blocks else replace(self.whole, blocks=blocks)
        self._keeper = {x.weight_name: x.name for x in reversed(list(self.network.layers()))}
        self._read = {tensor for layer in self.network.layers() for tensor in layer.inputs}

    def keeps(self, layer: Layer) -> bool:
        """Whether the rank keeps the layer's weights under this layer: the first of those here that share them."""
        return bool(layer.op.numel()) and self._keeper.get(layer.weight_name) == layer.name

    # ---- what strategies loop over

    def microbatches(self) -> Iterator[bool]:
        """Each micro-batch of the step; yields whether it is the last. Declares its input tensors."""
        for micro in range(self.training.num_microbatches):
            self.start_pass(micro)
            yield micro == self.training.num_microbatches - 1

    def start_pass(self, micro: int) -> None:
        """Goes on with micro-batch `micro`, whose input tensors are there from the start of the step."""
        self.micro = micro
        for i in (i for i in self.network.inputs if i.name in self._read):
            numel = i.numel_per_sample * self.training.micro_batch
            self.b.buffer(self.tensor(i.name), "activations", i.dtype, numel, live_in=True)

    def forward(self) -> None:
        """The whole forward pass with whole layers."""
        for block in self.network.blocks:
            self.forward_block(block)

    def forward_block(self, block: Block, tag: str = "F") -> None:
        """One block with whole layers."""
        for layer in block.layers:
            self.forward_layer(layer, Work(tag=tag))

    def backward(self) -> Iterator[Layer]:
        """The whole backward pass with whole layers; yields each layer once its gradients are there."""
        for block in reversed(self.network.blocks):
            yield from self.backward_block(block)

    def backward_block(self, block: Block, work: Callable[[Layer], Work] = lambda _: ALL) -> Iterator[Layer]:
        """One block, recomputed first under full recompute; yields each layer once its gradients are there."""
        if self.recomputes(block):
            for layer in block.layers:
                self.forward_layer(layer, _tagged(work(layer), "R"))
        for layer in reversed(block.layers):
            self.backward_layer(layer, work(layer))
            self.merge_input_grads(layer)
            yield layer

    def recomputing(self, layer: Layer) -> bool:
        """Whether the layer is in a block that is recomputed."""
        return any(self.recomputes(b) and layer in b.layers for b in self.network.blocks)

    def recomputes(self, block: Block) -> bool:
        """Whether the backward of this block starts with its forward."""
        return self.training.recompute == "full" and block.recomputable

    # ---- names and buffers

    def tensor(self, name: str) -> str:
        """Buffer name of a network tensor in the current micro-batch."""
        return f"m{self.micro}/{name}"

    def group_size(self, group: str) -> int:
        """Members of a group; 1 if it does not exist."""
        return self.groups[group].size if group in self.groups else 1

    def weight(self, layer: Layer, numel: Size | None = None, part: Part | None = None, split: str = "") -> str:
        """The persistent weight buffer `w.L`; `numel` defaults to the whole layer's parameters, else `split` says
        which shard of them it is. A layer that shares weights must come after their owner."""
        numel = layer.op.numel() if numel is None else numel
        name, holds = layer.weight_name, [Holding(layer.weight_name, split)]
        dtype = self.policy.weight_dtype
        return self.b.buffer(f"w.{name}", "weights", dtype, numel, part=part, persistent=True, holds=holds)

    def gradient(self, layer: Layer, numel: Size | None = None, part: Part | None = None, split: str = "") -> str:
        """The gradient buffer `g.L`: filled in the backward pass, gone after the optimizer step."""
        numel = layer.op.numel() if numel is None else numel
        name, holds, kept = layer.weight_name, [Holding(layer.weight_name, split)], self.options.gradient_buffer
        dtype = self.policy.gradient_dtype
        return self.b.buffer(f"g.{name}", "gradients", dtype, numel, part=part, persistent=kept, holds=holds)

    def _local(self, layer: Layer, name: str, lowered: ShardedLayer, work: Work, grad: bool = False) -> str:
        """Declares (once) and names the buffer of a local tensor of `layer`, or of its gradient."""
        sharding = work.sharding
        numel, part = lowered.numel[name], None if sharding is None else sharding.part
        dtype = lowered.dtype[name]
        dtype = {"": self.policy.weight_dtype, "loss": self.loss_dtype}.get(dtype, dtype)
        if name == "y":
            if sharding is not None and sharding.assemble and not sharding.sums:
                numel, part = lower(layer.op, self.extent).numel["y"], None
            base = layer.output
        else:
            base = f"{layer.name}.{name}{_piece(sharding)}"
        buffer = f"m{self.micro}/{'d.' if grad else ''}{base}"
        kept = base == self._loss and not grad
        part = None if isinstance(numel, int) else part
        return self.b.buffer(buffer, "activations", dtype, numel, part=part, live_out=kept)

    @property
    def loss_dtype(self) -> str:
        """Log-probabilities are fp32 under mixed precision, else of the weights' dtype."""
        return "fp32" if self.policy.master_dtype else self.policy.weight_dtype

    # ---- forward

    def lowered(self, layer: Layer, work: Work) -> ShardedLayer:
        """The layer's kernel calls, per shard index."""
        sharding = work.sharding
        return lower(layer.op, self.extent, sharding.kind if sharding else "", sharding.n if sharding else 1)

    def forward_layer(self, layer: Layer, work: Work = ALL) -> None:
        """Emits the forward kernels of a layer (or of the shard that `work` names) on the compute stream."""
        lowered = self.lowered(layer, work)
        for i in range(len(lowered.calls)):
            self._forward_call(layer, lowered, i, work)

    def _forward_call(self, layer: Layer, lowered: ShardedLayer, i: int, work: Work) -> None:
        call = lowered.calls[i]
        reads = [self._operand(layer, name, lowered, work) for name in call.inputs]
        writes = [self._operand(layer, name, lowered, work) for name in call.outputs]
        if call.weight:
            reads.append(work.weight or self.weight(layer))
        if "y" in call.outputs and work.sub > 0:
            reads.append(writes[0])
        phase = f"{work.tag or 'F'}{_sub(work)}"
        self._compute(layer, phase, lowered, i, call.kernel, work, tuple(reads), tuple(writes))

    def _operand(self, layer: Layer, name: str, lowered: ShardedLayer, work: Work) -> str:
        """The buffer of a call's operand: an input of the layer, its output, or a local tensor."""
        if name.startswith("x") and name[1:].isdigit():
            tensor = layer.inputs[int(name[1:])]
            return work.inputs.get(tensor) or self.tensor(tensor)
        if name == "y" and work.output is not None:
            return work.output
        return self._local(layer, name, lowered, work)

    def _compute(
        self, layer: Layer, name: str, lowered: ShardedLayer, call: int, kernel: str, work: Work,
        reads: tuple[str, ...], writes: tuple[str, ...],
    ) -> int:  # fmt: skip
        dims, variants = lowered.dims[call]
        part = work.sharding.part if work.sharding is not None else None
        site = Site(layer.name, call, work.sharding.kind if work.sharding is not None else "")
        action = Compute(kernel, self.policy.kernel_dtype(kernel), dims, part, variants, site)
        name = f"m{self.micro}.{layer.name}.{name}.{call}.{kernel}"
        return self.b.op(name, "compute", action, reads, writes, after=work.after)

    # ---- backward

    def output_grad(self, layer: Layer) -> str:
        """The buffer with the gradient of the layer's output."""
        return self._pending.get(layer.output, "")

    def set_output_grad(self, layer: Layer, buffer: str) -> None:
        """Puts `buffer` (a gathered copy, say) in the place of the layer's output gradient."""
        self._pending[layer.output] = buffer

    def set_tensor_grad(self, tensor: str, buffer: str) -> None:
        """Puts the gradient of a tensor, which comes from elsewhere, where its maker's backward finds it."""
        self._pending[tensor] = buffer

    def take_tensor_grad(self, tensor: str) -> str:
        """The buffer with the gradient of a tensor made elsewhere; KeyError if the backward has not come there."""
        return self._pending.pop(tensor)

    def backward_layer(self, layer: Layer, work: Work = ALL, on_input_grad: OnInputGrad | None = None) -> None:
        """Emits the backward kernels of a layer or shard. Input gradients go to buffers that `merge_input_grads` takes
        up; `on_input_grad` is called with each as soon as it is complete (to start communicating it)."""
        lowered = self.lowered(layer, work)
        if self.options.gradient_local and layer.op.numel():
            self._backward_local(layer, work, on_input_grad)
            return
        self._backward(layer, lowered, work, on_input_grad)

    def _backward_local(self, layer: Layer, work: Work, on_input_grad: OnInputGrad | None) -> None:
        """The backward with the weights' gradient in their own dtype, then added to the one that is kept. Where there
        is data parallelism the first is a view of a bucket, which stays allocated."""
        kept = work.grad or self.gradient(layer)
        like = self.b.declared(kept)
        local = f"{kept}.local"
        shared = any(group.size > 1 for name, group in self.groups.items() if name == "dp")
        self.b.buffer(local, "gradients", self.policy.weight_dtype, like.numel, part=like.part, persistent=shared)
        if not shared:
            self.b.drop(local)
        lowered = self.lowered(layer, work)
        self._backward(layer, lowered, replace(work, grad=local), on_input_grad)
        numel = like.numel if isinstance(like.numel, int) else max(like.numel)
        moved = self.policy.weight_bytes + 2 * self.policy.gradient_bytes
        action = Compute("accumulate", self.policy.gradient_dtype, (("numel", numel), ("state_bytes", moved)))
        reads = (local,) if self.b.fresh(kept) else (local, kept)
        self.b.op(f"m{self.micro}.{layer.name}.B.accumulate", "compute", action, reads, (kept,))

    def _backward(self, layer: Layer, lowered: ShardedLayer, work: Work, on_input_grad: OnInputGrad | None) -> None:
        if self.training.recompute == "selective" and isinstance(layer.op, Attention):
            self._recompute_scores(layer, lowered, work)
        grads = {"y": self.output_grad(layer)}
        for i in reversed(range(len(lowered.calls))):
            call = lowered.calls[i]
            if call.kernel in PASS_THROUGH:
                for name in call.inputs:
                    self._pass_through(layer, name, grads)
            for rule in BACKWARD.get(call.kernel, ()):
                self._backward_call(layer, lowered, i, rule, grads, work, on_input_grad)

    def _pass_through(self, layer: Layer, name: str, grads: dict[str, str]) -> None:
        """The gradient of an addend is the gradient of the sum: the same buffer, no kernel."""
        grads[name] = grads["y"]

    def _backward_call(
        self, layer: Layer, lowered: ShardedLayer, i: int, rule: Rule, grads: dict[str, str], work: Work,
        on_input_grad: OnInputGrad | None,
    ) -> None:  # fmt: skip
        call = lowered.calls[i]
        if self._put_off is not None and rule.makes == ("dw",):
            micro = self.micro
            self._put_off.append((layer, lambda: self._later(micro, layer, lowered, i, rule, grads, work)))
            return
        asked = call.inputs if "dx" in rule.makes else call.inputs[:1] if "dx0" in rule.makes else ()
        wanted = [n for n in asked if self._differentiable(layer, n)]
        if not wanted and "dw" not in rule.makes:
            return
        reads = self._rule_reads(layer, lowered, call, rule, grads, work)
        writes = []
        for name in wanted:
            buffer, update = self._input_grad(layer, name, lowered, grads, work)
            writes.append(buffer)
            if update:
                reads.append(buffer)
        if "dw" in rule.makes:
            grad = work.grad or self.gradient(layer)
            writes.append(grad)
            if not self.b.fresh(grad):
                reads.append(grad)
        if self.training.scales_loss and layer.output == self._loss and call.outputs[0] == "y":
            # Where the backward pass starts, from the scale instead of from 1.
            reads.append(loss_scale_buffer(self.b))
        unique = tuple(dict.fromkeys(reads))
        self._compute(layer, f"B{_sub(work)}", lowered, i, rule.kernel, work, unique, tuple(writes))
        if on_input_grad is not None:
            for name, buffer in zip(wanted, writes, strict=False):
                if name.startswith("x"):
                    on_input_grad(buffer)

    @contextmanager
    def putting_off(self) -> Iterator[list[PutOff]]:
        """Backwards emitted inside leave their weight gradients out and list what emits them, where a kernel of its
        own makes these."""
        found: list[PutOff] = []
        self._put_off = found
        try:
            yield found
        finally:
            self._put_off = None

    def _later(
        self, micro: int, layer: Layer, lowered: ShardedLayer, i: int, rule: Rule, grads: dict[str, str], work: Work
    ) -> None:
        self.micro = micro
        self._backward_call(layer, lowered, i, rule, grads, work, None)

    def _rule_reads(
        self, layer: Layer, lowered: ShardedLayer, call: Call, rule: Rule, grads: dict[str, str], work: Work
    ) -> list[str]:
        reads = []
        for token in rule.reads:
            match token:
                case "dy":
                    # A loss has no output gradient: its backward starts from 1.
                    reads += [grads[call.outputs[0]]] if grads.get(call.outputs[0]) else []
                case "w":
                    reads.append(work.weight or self.weight(layer))
                case _:
                    # "x" or "y" is all of them, a digit picks one.
                    names = call.inputs if token[0] == "x" else call.outputs
                    picked = names[int(token[1]) : int(token[1]) + 1] if token[1:] else names
                    reads += [self._operand(layer, n, lowered, work) for n in picked]
        return reads

    def _differentiable(self, layer: Layer, name: str) -> bool:
        return not name.startswith("x") or layer.inputs[int(name[1:])] not in self._inputs

    def _input_grad(
        self, layer: Layer, name: str, lowered: ShardedLayer, grads: dict[str, str], work: Work
    ) -> tuple[str, bool]:
        """The buffer for the gradient of call input `name`, and whether it already holds a part of it."""
        if name in grads:
            return grads[name], True
        if name.startswith("x") and name[1:].isdigit():
            tensor = layer.inputs[int(name[1:])]
            grads[name] = self.input_grad_buffer(layer, tensor, work)
            return grads[name], work.sub > 0
        grads[name] = self._local(layer, name, lowered, work, grad=True)
        return grads[name], False

    def input_grad_buffer(self, layer: Layer, tensor: str, work: Work = ALL) -> str:
        """Declares the buffer in which `layer` leaves the gradient of its input `tensor`."""
        source = work.inputs.get(tensor) or self.tensor(tensor)
        like = self.b.declared(source)
        name = f"m{self.micro}/d.{tensor}@{layer.name}"
        return self.b.buffer(name, "activations", like.dtype, like.numel, part=like.part)

    def merge_input_grads(self, layer: Layer, grads: Mapping[str, str] | None = None) -> None:
        """Makes the layer's input gradients those of its input tensors, adding to what other readers of the tensor
        left there. `grads` replaces buffers (reduced copies, say) per tensor."""
        done = self._pending.pop(layer.output, "")
        kernels = {c.kernel for c in lower(layer.op, self.extent).calls}
        for tensor in layer.inputs:
            if tensor in self._inputs:
                continue
            own = done if kernels & PASS_THROUGH else f"m{self.micro}/d.{tensor}@{layer.name}"
            own = (grads or {}).get(tensor, own)
            other = self._pending.get(tensor)
            if other is not None:
                own = self._accumulate(tensor, own, other)
            self._pending[tensor] = own

    def _accumulate(self, tensor: str, own: str, other: str) -> str:
        """own += other, as autograd adds the gradients of a tensor with two readers."""
        like = self.b.declared(own)
        numel = like.numel if isinstance(like.numel, int) else max(like.numel)
        action = Compute("add", self.policy.kernel_dtype("add"), (("numel", numel),))
        self.b.op(f"m{self.micro}.{tensor}.B.add", "compute", action, (own, other), (own,))
        return own

    def _recompute_scores(self, layer: Layer, lowered: ShardedLayer, work: Work) -> None:
        """Selective recompute: the scores and probabilities of materialised attention, again."""
        for i, call in enumerate(lowered.calls):
            if call.kernel in ("attn.scores", "softmax", "dropout"):
                self._forward_call(layer, lowered, i, _tagged(work, "R"))

    # ---- end of the step

    def collective(
        self, kind: str, group: str, stream: str, name: str, numel: int, reads: tuple[str, ...],
        writes: tuple[str, ...], dtype: str | None = None, after: tuple[int, ...] = (),
    ) -> int | None:  # fmt: skip
        """A collective of `numel` elements (total array, nccl-tests' convention); none in a group of one."""
        self._streams[group] = stream
        if self.group_size(group) == 1 or numel == 0:
            return None
        dtype = dtype or self.policy.weight_dtype
        size_bytes = numel * self.b.itemsize(dtype)
        return self.b.op(name, stream, Collective(kind, group, size_bytes, dtype), reads, writes, after=after)

    def optimizer(self, shares: Sequence[OptimizerShare]) -> None:
        """The update of everything this rank updates (update.py)."""
        scratch = self.options.optimizer_scratch
        take_step(self.b, self.training, self.groups, self._streams, shares, scratch)


def _tagged(work: Work, tag: str) -> Work:
    return Work(work.sharding, work.sub, work.weight, work.grad, work.inputs, work.output, work.after, tag)


def _piece(sharding: Sharding | None) -> str:
    """What tells the shards' local tensors apart where a rank works through several: the shard, relative to its own,
    because forward and backward visit the shards in opposite orders."""
    if sharding is None or not sharding.assemble:
        return ""
    return ".s" + ".".join(f"{o:+d}" for o in sharding.part.offset)


def _sub(work: Work) -> str:
    return str(work.sub) if work.sharding is not None and work.sharding.assemble else ""
